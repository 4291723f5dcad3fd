"""A run that is killed, stopped, hung up on and started twice at random moments ends as one that nobody disturbs: the same
bits, nothing left over, and no process that outlives its command. `tools/chaos.py` does it for longer."""

from pathlib import Path

import pytest

from tools.disturbed.local import disturbed_run, straight_run

SIZES = {"steps": 60, "every": 5, "until": "export"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the config has run undisturbed."""
    folder = tmp_path_factory.mktemp("straight")
    straight_run(folder, **SIZES)
    return folder


def test_disturbed_at_random_it_ends_with_the_same_bits(straight: Path, tmp_path: Path) -> None:
    run = disturbed_run(tmp_path, straight, seed=0, at_most=6, longest=8, **SIZES)
    assert not run.faults, "\n".join([*run.faults, f"happened: {dict(run.happened)}"])
    assert run.happened  # fewer than six where it ended before
