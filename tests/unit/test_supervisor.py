"""The supervisor's decisions, with an srun that runs its command here and an scontrol that tells what it was asked. (The real
ones are in tests/cluster.)"""

import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.site import Site
from megatron_specialm.slurm.allocation import Allocation
from megatron_specialm.slurm.nodes import exclude_node, excluded_nodes
from megatron_specialm.slurm.records import AttemptEnd, read_attempts
from megatron_specialm.slurm.sbatch import Shape
from megatron_specialm.slurm.supervisor import Work, supervise

LEAVE = (
    "import os, pathlib, sys; (pathlib.Path(os.environ['SPECIALM_ATTEMPT']) / {name!r}).write_text({text!r}); "
    "sys.exit({code})"
)
FINISH = LEAVE.format(name="finished.json", text="{}", code=0)
FAIL = LEAVE.format(
    name="error-0.json", text='{"error": "no luck", "exit_code": 4, "step": 7, "node": "node1", "time": 1}', code=4
)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of srun and scontrol."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    _program(folder / "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    _program(folder / "scontrol", f'echo "$@" >> {tmp_path}/asked')
    return folder


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def _work(tmp_path: Path, program: str, *, preflight: bool = False, attempt: int = 0) -> Work:
    allocation = Allocation("7_0", 0, attempt, ("node1", "node2"), "127.0.0.1", cpus_per_task=1, gpus_per_node=0)
    site = Site.model_validate({"preflight": {"enabled": preflight, "free_disk": 1}, "limits": {"failures": 1}})
    command = [sys.executable, "-c", program]
    return Work(site, allocation, "srun", Shape(1, 1), command, tmp_path / "job.0", tmp_path / "excluded")


def _end(work: Work) -> AttemptEnd:
    end = read_attempts(work.state)[-1].end
    assert end is not None
    return end


def _asked(tmp_path: Path) -> list[str]:
    path = tmp_path / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_all_is_done(programs: Path, tmp_path: Path) -> None:
    work = _work(tmp_path, FINISH)
    assert supervise(work) == 0
    assert (_end(work).outcome, _end(work).requeued, _asked(tmp_path)) == ("finished", False, [])


def test_exit_code_0_alone_is_no_success(programs: Path, tmp_path: Path) -> None:
    work = _work(tmp_path, "")
    assert supervise(work) == 0, "it is queued again"
    assert (_end(work).outcome, _end(work).requeued, _asked(tmp_path)) == ("failed", True, ["requeue 7_0"])


def test_ranks_that_slurm_alone_has_told_to_stop_are_queued_again_at_no_cost(programs: Path, tmp_path: Path) -> None:
    """As it does when a partition's GraceTime begins: this process hears of it when that is over."""
    stop = LEAVE.format(name="stopped.json", text='{"step": 7}', code=75)
    for attempt in range(3):
        work = _work(tmp_path, stop, attempt=attempt)
        assert supervise(work) == 0
        assert (_end(work).outcome, _end(work).step, _end(work).requeued) == ("preempted", 7, True)
    assert _asked(tmp_path) == ["requeue 7_0"] * 3


def test_failures_end_when_their_budget_is_used_up(programs: Path, tmp_path: Path) -> None:
    assert supervise(_work(tmp_path, FAIL)) == 0
    second = _work(tmp_path, FAIL, attempt=1)
    assert supervise(second) == 4
    assert (_end(second).step, _end(second).requeued, _asked(tmp_path)) == (7, False, ["requeue 7_0"])
    assert _end(second).reason.startswith("node1: no luck; not queued again: 2 attempts have failed")


def test_where_slurm_refuses_to_queue_again_the_record_says_so(programs: Path, tmp_path: Path) -> None:
    _program(programs / "scontrol", 'echo "Requested operation is presently disabled" >&2; exit 1')
    work = _work(tmp_path, FAIL)
    with pytest.raises(MachineError, match="presently disabled"):
        supervise(work)
    assert not _end(work).requeued
    assert _end(work).reason.startswith("node1: no luck; cannot be queued again: ")


@pytest.mark.parametrize("updated", [True, False])
def test_a_job_is_never_left_held(programs: Path, tmp_path: Path, updated: bool) -> None:
    _program(programs / "scontrol", f'echo "$@" >> {tmp_path}/asked; [ "$1" != update ] || {str(updated).lower()}')
    exclude_node(tmp_path / "excluded", "node9", reason="slow")
    assert supervise(_work(tmp_path, FAIL)) == 0
    assert _asked(tmp_path) == ["requeuehold 7_0", "update JobId=7_0 ExcNodeList=node9", "release 7_0"]


def test_what_slurm_ends_during_the_preflight_is_neither_revived_nor_held_against_nodes(
    programs: Path, tmp_path: Path
) -> None:
    answer = tmp_path / "job.0" / "attempt-0" / "nodes" / "node1.json"
    _program(programs / "srun", f"""kill -TERM {os.getpid()}; echo '{{"began": 1}}' > {answer}; exit 1""")
    work = _work(tmp_path, FINISH, preflight=True)
    assert supervise(work) != 0, "jobs that wait for this one must not start"
    assert (_end(work).requeued, _asked(tmp_path), excluded_nodes(work.excluded)) == (False, [], [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
