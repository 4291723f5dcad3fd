"""Fixtures shared by all tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_specialm.config.model import ModelConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def neox() -> ModelConfig:
    """A GPT-NeoX-style shape small enough for any test."""
    return ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=64, attention_heads=4)


@pytest.fixture
def llama() -> ModelConfig:
    """A Llama-style shape with grouped queries."""
    return ModelConfig(family="llama", layers=2, hidden_size=32, ffn_hidden_size=48, attention_heads=4, query_groups=2)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the smoke pipeline has run to its end, on this machine. What it printed is in `stdout`."""
    folder = tmp_path_factory.mktemp("smoke")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    subprocess.run([sys.executable, ROOT / "tools" / "smoke_corpus.py"], cwd=folder, check=True, env=environment)
    config = str(ROOT / "configs" / "pipelines" / "smoke.yaml")
    command = [sys.executable, "-m", "megatron_specialm", "run", config]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    from megatron_specialm.base.environment import ALONE
    from megatron_specialm.engine.megatron.process_groups import process_group

    with process_group(ALONE):
        yield
