"""The architecture as a test: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_specialm"
LAYERS = {
    "base": {"base"},
    "config": {"config", "base"},
    "data": {"data", "config", "base"},
    "model": {"model", "config", "base"},
    "clustering": {"clustering", "data", "config", "base"},
    "train": {"train", "model", "data", "config", "base"},
    "convert": {"convert", "model", "data", "config", "base"},
    "stages": {"stages", "train", "convert", "clustering", "model", "data", "config", "base"},
    # torch-free: of the layers below it takes the reader of files and the context of a task, which are so too
    "launch": {"launch", "config", "base"},
    # torch-free, as submitting and supervising jobs must be; the look at a node computes as the doctor does
    "slurm": {"slurm", "launch", "config", "base", "doctor"},
    # reports on the machine; only the command line asks for it
    "doctor": {"doctor", "base"},
}
LIGHT = {"megatron_specialm.data.documents", "megatron_specialm.stages.context"}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    for path in (PACKAGE / layer).glob("*.py"):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "megatron_specialm" and len(parts) > 1 and name not in LIGHT:
                assert {parts[1], ".".join(parts[1:])} & LAYERS[layer], f"{path.name} imports {name}"


def test_megatron_core_is_imported_in_few_places() -> None:
    for path in PACKAGE.rglob("*.py"):
        if any(name.startswith("megatron.core") for name in _imports(path)):
            place = path.relative_to(PACKAGE).as_posix()
            assert place.startswith(("model/", "train/")) or place == "data/store.py", place


def test_the_command_line_the_launcher_and_the_doctor_import_no_torch() -> None:
    folders = ("launch", "slurm")
    modules = [f"megatron_specialm.{name}.{path.stem}" for name in folders for path in (PACKAGE / name).glob("*.py")]
    modules.append("megatron_specialm.doctor.report")  # its `compute` runs in processes of its own
    program = f"import sys, megatron_specialm.cli, {', '.join(modules)}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_help_imports_no_schema() -> None:
    program = "import sys, megatron_specialm.cli; print(sorted({'pydantic', 'numpy', 'yaml'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
