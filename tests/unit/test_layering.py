"""The architecture as a test: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "megatron_specialm"
# From the bottom up. A package imports those above it in this list and none below.
ORDER = (
    "base", "config", "estimate", "graph", "data", "clustering", "model", "checkpoint", "convert", "engine", "train", "stages",
    "run", "parity", "report", "slurm", "cli",
)  # fmt: skip
LAYERS = {package: set(ORDER[: place + 1]) for place, package in enumerate(ORDER)} | {"doctor": {"doctor", "base"}}
LAYERS["slurm"] |= {"doctor"}  # the look at a node computes as the doctor does
LAYERS["cli"] |= {"doctor"}
LIGHT = {"megatron_specialm.data.documents"}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    for path in (PACKAGE / layer).rglob("*.py"):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "megatron_specialm" and len(parts) > 1 and name not in LIGHT:
                assert {parts[1], ".".join(parts[1:])} & LAYERS[layer], f"{path.name} imports {name}"


def _importers(*modules: str) -> set[str]:
    """The files that import any of these modules, or what is in them."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name == module or name.startswith(f"{module}.") for name in _imports(path) for module in modules)
    }


def test_megatron_core_is_known_to_the_model_and_its_engines_alone() -> None:
    for place in _importers("megatron.core") - {"data/store.py"}:  # the format of its data sets
        assert place.startswith(("model/", "engine/")), place


def test_engines_are_opened_by_one_function() -> None:
    for place in _importers("megatron_specialm.engine.megatron"):
        assert place.startswith("engine/"), place


def test_the_command_line_the_launcher_and_the_doctor_import_no_torch() -> None:
    folders = ("estimate", "graph", "run", "report", "slurm")
    modules = [f"megatron_specialm.{name}.{path.stem}" for name in folders for path in (PACKAGE / name).glob("*.py")]
    modules.append("megatron_specialm.doctor.report")  # its `compute` runs in processes of its own
    program = f"import sys, megatron_specialm.cli, {', '.join(modules)}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_help_imports_no_schema() -> None:
    program = "import sys, megatron_specialm.cli; print(sorted({'pydantic', 'numpy', 'yaml'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, Megatron-Core's kernels are compiled")
def test_without_a_gpu_a_training_does_not_import_torchs_compiler() -> None:
    program = "import sys, torch, megatron_specialm.stages.train; "
    program += "print('torch._inductor.compile_fx' in sys.modules, torch.compile.__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "torch"]
