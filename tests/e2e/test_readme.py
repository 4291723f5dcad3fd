"""Every command of the README, in its short form: scripts are asked for help, pipelines stop after their first stage."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_bad_input import ROOT, WORDS

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
ON_A_CLUSTER = ("specialm submit", "specialm status", "specialm logs", "specialm cancel")  # tests/cluster runs these
SHORT = ["--until", "tokenizer", "stages.tokenizer.vocabulary_size=300"]


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    return make_own_text(tmp_path)


def make_own_text(folder: Path) -> Path:
    """The files that `your-domain.yaml` speaks of."""
    text = " ".join(WORDS[number * number % len(WORDS)] for number in range(3000))
    for name, field in (
        ("generic/a", "text"),
        ("generic-test", "text"),
        ("tickets/train", "body"),
        ("tickets/test", "body"),
    ):
        path = folder / "my-text" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({field: text}) + "\n")
    return folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith(ON_A_CLUSTER)])
def test_readme_command(command: str, own_text: Path) -> None:
    program, *arguments = shlex.split(command)
    if program.startswith("tools/"):
        full = [str(ROOT / program), "--help"]
    else:
        assert program == "specialm", f"the README has a command that this test does not know: {command}"
        arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments]
        override = "text.generic.train=my-text/generic/*.jsonl"  # the page says .zst
        full = [
            sys.executable,
            "-m",
            "megatron_specialm",
            *arguments,
            override,
            *(SHORT if arguments[0] == "run" else []),
        ]
    outcome = subprocess.run(
        full, cwd=own_text, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_there_are_commands() -> None:
    assert {"tools/quickstart.sh", "tools/test.sh"} <= set(COMMANDS)
