"""The README's commands on a cluster, in their order and short form: the config stops after its first stage."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster
from tests.e2e.test_readme import COMMANDS, ON_A_CLUSTER, ROOT, SHORT, make_own_text


@pytest.mark.timeout(400)
def test_the_readmes_commands(cluster: Cluster, tmp_path: Path) -> None:
    make_own_text(tmp_path)
    profile = tmp_path / "slurm"
    profile.mkdir()
    (profile / "site.yaml").write_text("jobs: {default: {time: '00:10:00', memory: 1G}}\npreflight: {free_disk: 1}\n")
    environment = {**cluster.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = [command for command in COMMANDS if command.startswith(ON_A_CLUSTER)]
    assert {command.split()[1] for command in commands} == {"submit", "status", "logs", "cancel"}
    said = {}
    for command in commands:
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(command)]
        if words[1] == "logs":
            words = [words[0], words[1], words[2], "tokenizer"]
        words.append("text.generic.train=my-text/generic/*.jsonl")
        short = SHORT if words[1] == "submit" else SHORT[2:]
        outcome = subprocess.run(
            [*words, *short], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**environment, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert outcome.returncode == 0, f"{command}: {outcome.stdout}{outcome.stderr}"
        said[words[1]] = outcome.stdout
    assert "1 tasks submitted" in said["submit"] and "finished: all tasks are done" in said["logs"]
    assert "no job is queued or running" in said["cancel"]
