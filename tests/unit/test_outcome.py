"""What a rank leaves of its end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import SpecialmError, Stopped, TrainingError
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.reporting import recorded_outcome

FIRST, SECOND = World(0, 2, 0, "", "srun"), World(1, 2, 1, "", "srun")


def _left(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        (TrainingError("loss nan"), "loss nan", 4),
        (KeyError("x"), "KeyError: 'x'", 1),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", 1),
    ],
)
def test_errors_of_any_rank_are_left_and_pass_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, says: str, code: int
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    process_status = ProcessStatus()
    process_status.beat(step=40)
    with (
        pytest.raises(type(error)) as raised,
        recorded_outcome(SECOND, process_status, environ={"SPECIALM_ATTEMPT": str(tmp_path)}),
    ):
        raise error
    assert raised.value is error
    (left,) = _left(tmp_path).values()
    assert {key: left[key] for key in ("error", "exit_code", "step", "node")} == {
        "error": says, "exit_code": code, "step": 40, "node": "gpu7",
    }  # fmt: skip
    assert (tmp_path / "error-1.json").exists() and left["time"] > 0


@pytest.mark.parametrize(("world", "leaves"), [(FIRST, {"stopped.json": {"step": 3}}), (SECOND, {})])
def test_the_first_rank_says_at_which_step_all_stopped(tmp_path: Path, world: World, leaves: dict) -> None:
    process_status = ProcessStatus()
    process_status.beat(step=3)
    with pytest.raises(Stopped), recorded_outcome(world, process_status, environ={"SPECIALM_ATTEMPT": str(tmp_path)}):
        raise Stopped("at step 3")
    assert _left(tmp_path) == leaves


def test_success_is_said_by_the_first_rank_alone(tmp_path: Path) -> None:
    for world, expected in ((SECOND, []), (FIRST, ["finished.json"])):
        with recorded_outcome(world, ProcessStatus(), environ={"SPECIALM_ATTEMPT": str(tmp_path)}):
            pass
        assert list(_left(tmp_path)) == expected


def test_a_folder_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environ = {"SPECIALM_ATTEMPT": str(tmp_path / "file" / "attempt-0")}
    with pytest.raises(SpecialmError, match="the cause"), recorded_outcome(FIRST, ProcessStatus(), environ=environ):
        raise SpecialmError("the cause")
    with recorded_outcome(FIRST, ProcessStatus(), environ=environ):
        pass


def test_a_full_disk_hides_no_error() -> None:
    """Where the kernel itself refuses to write."""
    program = """
import resource, signal, sys, tempfile
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import SpecialmError
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.reporting import recorded_outcome
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with tempfile.TemporaryDirectory() as folder:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        with recorded_outcome(World(0, 1, 0, "", "srun"), ProcessStatus(), environ={"SPECIALM_ATTEMPT": folder}):
            raise SpecialmError("the cause")
    except SpecialmError as error:
        sys.exit(str(error) != "the cause")
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
