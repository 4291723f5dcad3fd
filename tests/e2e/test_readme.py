"""Every command of the README and the other pages of documentation: run, or with the reason why not at least parsed.

A command is a line of a `bash` block, or an inline `specialm ...`, `tools/...`, `python tools/...` and the like. Those that
need a cluster, a GPU, a package index or a quarter of an hour are listed in `NOT_RUN`; all others run, shortened. A command
of a kind that is not known here fails until it is given a place.
"""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer.main

from megatron_specialm.cli import app
from tests.commands import succeed
from tests.conftest import ROOT
from tests.texts import WORDS, write_documents

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]
PROGRAMS = r"(?:specialm|python tools/\S+|tools/\S+|torchrun|srun|mpirun|sbatch|pip|time specialm)(?: .+)?"
ON_A_CLUSTER = ("specialm submit", "specialm status", "specialm logs", "specialm cancel")  # tests/cluster runs these
SHORT = ["--until", "tokenizer", "stages.tokenizer.vocabulary_size=300"]
# What a command's beginning, as a pattern, says of why it is not run here.
NOT_RUN = {
    r"specialm (submit|status|logs|cancel)\b(?!.*--dry-run)": "a cluster; tests/cluster/test_readme_jobs.py runs them",
    r"specialm run configs/pipelines/adapt.yaml": "a model of the hub; tests/e2e/test_adapt.py runs it on a small one",
    r"specialm tune-precision\b": "a GPU",
    r"specialm doctor$": "tests/unit/test_doctor.py runs it; here it runs with --quick",
    r"specialm run configs/pipelines/(quickstart|evidence)": "a quarter of an hour or more",
    r"specialm( run| check| parity| figures| clean| convert| inspect| diff| merge| project)?$": "a mention, by name",
    r"specialm .*\b[A-Z]{3,}\b": "a form with names to fill in, as CONFIG or STAGE",
    r"tools/(quickstart|evidence|test)\.sh": "a package index, and a quarter of an hour or more",
    r"(python )?tools/bench_\w+\.py": "minutes of measuring, some on a GPU",
    r"python tools/chaos\.py": "half an hour; tests/e2e/test_chaos.py does it in small",
    r"python tools/results_tables\.py": "finished seeds; tests/unit/test_results_tables.py runs it",
    r"(torchrun|srun|mpirun|sbatch)\b": "several processes, or a cluster; tests/distributed/test_launchers.py, tests/cluster",
    r"tools/(convert_\w+|merge_lora|inspect_checkpoint)\.py$": "a mention; tests/unit/test_tools.py runs them",
    r"pip install": "a package index",
    r"tools/gpu_check\.sh": "a GPU; tests/e2e/test_gpu_check.py runs it in small",
}  # fmt: skip


def _blocks(text: str) -> list[str]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [" ".join(line.split(" #")[0].split()) for line in lines if line.strip()]


def _inline(text: str) -> list[str]:
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    words = [" ".join(span.split()) for span in spans]
    return [span.removeprefix("time ") for span in words if re.fullmatch(PROGRAMS, span)]


COMMANDS = list(dict.fromkeys(_blocks(PAGES[0].read_text())))
DOCUMENTED = list(
    dict.fromkeys(command for page in PAGES for find in (_blocks, _inline) for command in find(page.read_text()))
)
RUN = [command for command in DOCUMENTED if not any(re.match(pattern, command) for pattern in NOT_RUN)]


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    return make_own_text(tmp_path)


def make_own_text(folder: Path) -> Path:
    """The files that `your-domain.yaml` speaks of."""
    words = [WORDS[number * number % len(WORDS)] for number in range(3000)]
    texts = [" ".join(words[first : first + 100]) for first in range(0, 3000, 100)]
    for name, field in (
        ("generic/a", "text"),
        ("generic-test", "text"),
        ("tickets/train", "body"),
        ("tickets/test", "body"),
    ):
        write_documents(folder / "my-text" / f"{name}.jsonl", texts, field=field)
    return folder


@pytest.mark.parametrize("command", [command for command in RUN if not re.search("smoke|quickstart", command)])
def test_a_command_on_own_text(command: str, own_text: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "specialm", f"a command of a kind that this test does not know: {command}"
    words = [str(ROOT / word) if re.match("(configs|slurm)/", word) else word for word in arguments]
    if any(word.startswith("configs/") for word in arguments):
        words.append("text.generic.train=my-text/generic/*.jsonl")  # the page says .zst
    if other := [word for word in words if word.startswith("reuse=")]:  # the run before, from which it takes over
        succeed(own_text, *(word for word in words if not re.match("(root|reuse)=", word)), *SHORT)
        assert (own_text / other[0].removeprefix("reuse=") / "pipeline.yaml").exists()
    succeed(own_text, *words, *(SHORT if arguments[0] == "run" else []))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", [command for command in RUN if re.search("smoke|quickstart", command)])
def test_a_command_on_a_finished_run(command: str, smoke_copy: Path, tmp_path: Path) -> None:
    """In a folder with the smoke page's text and run, which stands for the quickstart's: same stages, other domains."""
    program, *arguments = shlex.split(command)
    assert program == "specialm", f"a command of a kind that this test does not know: {command}"
    for name in ("data", "runs") if arguments[0] != "parity" else ():  # a certificate would go into later trainings
        (tmp_path / name).symlink_to(smoke_copy / name)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments]
    words = [word.replace("runs/quickstart", "runs/smoke").replace("/legal", "/scipy") for word in words]
    said = succeed(tmp_path, *words)
    if arguments[0] == "parity":  # the fine-tunings have one micro-batch for two stages or copies
        reference = r"DP2 \(engine megatron\)" if "--against" in arguments else "one process"
        assert len(re.findall(f"equals {reference}", said)) == 3 and said.count("not run: stages.") == 4
    if arguments[0] == "generate":
        assert said.startswith(arguments[-1])


def test_each_way_not_to_run_a_command_is_needed() -> None:
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in DOCUMENTED), f"{pattern}: no documented command is like it"
    assert {"tools/quickstart.sh", "tools/test.sh"} <= set(COMMANDS) and len(RUN) > 10


@pytest.mark.parametrize(
    "command", [command for command in DOCUMENTED if "specialm" in command and "pip " not in command]
)
def test_specialm_takes_what_is_documented(command: str) -> None:
    """The command exists, and it has the options."""
    words = shlex.split(command[re.search(r"\b(megatron_)?specialm\b", command).end() :])  # type: ignore[union-attr]
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    own = group.commands.get(words[0]) if words and not words[0].startswith("-") else group  # type: ignore[union-attr]
    assert own is not None, f"specialm has no command {words[0]!r}"
    known = {option for parameter in own.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize(
    "tool", sorted({match for c in DOCUMENTED for match in re.findall(r"tools/\w+\.(?:py|sh)", c)})
)
def test_a_tool_takes_what_is_documented(
    tool: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if tool.endswith(".py"):
        monkeypatch.syspath_prepend(ROOT / "tools")
        monkeypatch.setattr(sys, "argv", [tool, "--help"])
        with pytest.raises(SystemExit) as end:  # in this process, which has imported torch
            runpy.run_path(str(ROOT / tool), run_name="__main__")
        assert not end.value.code
    else:
        subprocess.run(["bash", str(ROOT / tool), "--help"], check=True, timeout=200)
    said = capfd.readouterr().out
    for documented in (command for command in DOCUMENTED if tool in command):
        assert all(word in said for word in shlex.split(documented) if word.startswith("--"))


def test_what_else_is_documented_is_there() -> None:
    """Extras to install, and scripts for sbatch."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in DOCUMENTED:
        if found := re.match(r"pip install '?megatron_specialm\[(\w+)\]", command):
            assert found.group(1) in extras
        if command.startswith("sbatch "):
            script = next((word for word in command.split()[1:] if not word.startswith("-")), None)
            if script is not None:  # `sbatch --test-only` names an option only
                subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
