"""The supervisor with real ranks, started by an srun that runs its command here, an scontrol that records its arguments, and an
sbatch for which a job could always start.
(The real ones are in tests/cluster.)"""

import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_specialm.base.errors import ArtifactError, MachineError
from megatron_specialm.config.site import Site
from megatron_specialm.slurm.allocation import Allocation
from megatron_specialm.slurm.nodes import exclude_node, excluded_nodes
from megatron_specialm.slurm.records import AttemptEnd, read_attempts
from megatron_specialm.slurm.sbatch import JobSize
from megatron_specialm.slurm.supervisor import JobAttempt, supervise
from tests.conftest import ROOT

RANK = """
import os, signal, time
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import Stopped, TrainingError
from megatron_specialm.run.inline import rank_lifecycle
with rank_lifecycle(World(0, 1, 0, "", "srun")) as status, status.at_step_boundaries():
    status.begin("training")
    status.beat(step=7)
    {work}
"""
FINISH = RANK.format(work="pass")
FAIL = RANK.format(work='raise TrainingError("no luck")')


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of srun, scontrol and sbatch."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    _program(folder / "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    _program(folder / "scontrol", f'case "$1" in show|write) ;; *) echo "$@" >> {tmp_path}/scontrol;; esac')
    _program(folder / "sbatch", "true")
    return folder


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def _attempt(tmp_path: Path, program: str, *, preflight: bool = False, attempt: int = 0) -> JobAttempt:
    allocation = Allocation("7_0", 0, attempt, ("node1", "node2"), "127.0.0.1", cpus_per_task=1, gpus_per_node=0)
    limits = {"failures": 1, "heartbeat_seconds": 1}
    site = Site.model_validate({"preflight": {"enabled": preflight, "free_disk": 1}, "limits": limits})
    command = [sys.executable, "-c", program]
    return JobAttempt(site, allocation, "srun", JobSize(1, 1), command, tmp_path / "job.0", tmp_path / "excluded")


def _end(attempt: JobAttempt) -> AttemptEnd:
    end = read_attempts(attempt.state)[-1].end
    assert end is not None
    return end


def _scontrol(tmp_path: Path) -> list[str]:
    path = tmp_path / "scontrol"
    return path.read_text().splitlines() if path.exists() else []


def test_a_job_that_finishes(programs: Path, tmp_path: Path) -> None:
    attempt = _attempt(tmp_path, FINISH)
    assert supervise(attempt) == 0
    assert (_end(attempt).outcome, _end(attempt).requeued, _scontrol(tmp_path)) == ("finished", False, [])


def test_exit_code_0_alone_is_no_success(programs: Path, tmp_path: Path) -> None:
    attempt = _attempt(tmp_path, "")
    assert supervise(attempt) == 0, "it is queued again"
    assert (_end(attempt).outcome, _end(attempt).requeued, _scontrol(tmp_path)) == ("failed", True, ["requeue 7_0"])


def test_a_warning_before_the_time_limit_reaches_the_rank_in_the_answer_to_its_heartbeat(
    programs: Path, tmp_path: Path
) -> None:
    """The rank, which warns the supervisor itself, stops at its step, and its outcome is read."""
    wait = "os.kill(os.getppid(), signal.SIGUSR1)\n    while not status.stop_asked_by: time.sleep(0.01)\n    "
    attempt = _attempt(tmp_path, RANK.format(work=f'{wait}raise Stopped("at its step")'))
    assert supervise(attempt) == 0
    assert (_end(attempt).outcome, _end(attempt).step, _end(attempt).requeued) == ("timeout", 7, True)
    assert _end(attempt).reason == "the time limit is near: saved at step 7"


def test_ranks_that_got_sigterm_alone_are_queued_again_at_no_cost(programs: Path, tmp_path: Path) -> None:
    """Slurm sends it to ranks only when a partition's GraceTime begins, and to this process when that is over."""
    stop = RANK.format(work='raise Stopped("at its step")')
    for attempt in range(3):
        attempt = _attempt(tmp_path, stop, attempt=attempt)
        assert supervise(attempt) == 0
        assert (_end(attempt).outcome, _end(attempt).step, _end(attempt).requeued) == ("preempted", 7, True)
    assert _scontrol(tmp_path) == ["requeue 7_0"] * 3


def test_ranks_that_slurm_preempts_before_they_handle_signals_are_queued_again_at_no_cost(
    programs: Path, tmp_path: Path
) -> None:
    """They leave no outcome, or the error of a peer that has lost them. Without preemption that is a failure."""
    _program(
        programs / "scontrol",
        f'[ "$1" = show ] && echo JobState=RUNNING PreemptTime=2026-11-27T04:06:27 || echo "$@" >> {tmp_path}/scontrol',
    )
    for number, program in enumerate(["import os; os.kill(os.getpid(), 15)"] * 2 + [FAIL]):
        attempt = _attempt(tmp_path, program, attempt=number)
        assert supervise(attempt) == 0
        assert (_end(attempt).outcome, _end(attempt).requeued) == ("preempted", True)
        assert _end(attempt).reason == "ended by Slurm: no checkpoint was saved, so it resumes from the previous one"
    assert _scontrol(tmp_path) == ["requeue 7_0"] * 3


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "CANCELLED"])
def test_a_job_that_slurm_has_ended_is_left_to_slurm(programs: Path, tmp_path: Path, state: str) -> None:
    """After GraceTime Slurm kills ranks that have not ended and queues the job again, before this process gets SIGTERM."""
    _program(programs / "scontrol", f'echo "$@" >> {tmp_path}/scontrol; echo JobState={state} PreemptTime=None')
    attempt = _attempt(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert supervise(attempt) != 0, "dependent jobs must not start"
    assert (_end(attempt).outcome, _end(attempt).requeued) == ("preempted", False)
    assert _scontrol(tmp_path) == ["show job 7_0"]


def test_failures_end_when_their_budget_is_used_up(programs: Path, tmp_path: Path) -> None:
    assert supervise(_attempt(tmp_path, FAIL)) == 0
    second = _attempt(tmp_path, FAIL, attempt=1)
    assert supervise(second) == 4, "the exit code of TrainingError"
    assert (_end(second).step, _end(second).requeued, _scontrol(tmp_path)) == (7, False, ["requeue 7_0"])
    assert _end(second).reason.startswith("node1: no luck; not queued again: 2 attempts failed")


@pytest.mark.parametrize("preflight", [False, True])
def test_a_node_on_which_srun_starts_nothing_is_excluded(programs: Path, tmp_path: Path, preflight: bool) -> None:
    """srun then starts no rank on the others either, and fails on each later attempt, too."""
    body = 'case "$*" in *--nodelist=node1*) exit 0;; *) echo "Task launch failed on node node2" >&2; exit 1;; esac'
    _program(programs / "srun", body)
    attempt = _attempt(tmp_path, FINISH, preflight=preflight)
    assert supervise(attempt) == 0
    assert (_end(attempt).outcome, _end(attempt).requeued) == ("bad-node", True)
    assert "node2: no process starts on it: Task launch failed on node node2" in _end(attempt).reason
    assert excluded_nodes(attempt.excluded) == ["node2"]
    assert _scontrol(tmp_path) == ["requeuehold 7_0", "update JobId=7_0 ExcNodeList=node2", "release 7_0"]


def test_where_slurm_refuses_to_queue_again_the_record_says_so(programs: Path, tmp_path: Path) -> None:
    _program(programs / "scontrol", 'echo "Requested operation is presently disabled" >&2; exit 1')
    attempt = _attempt(tmp_path, FAIL)
    with pytest.raises(MachineError, match="presently disabled"):
        supervise(attempt)
    assert not _end(attempt).requeued
    assert _end(attempt).reason.startswith("node1: no luck; cannot be queued again: ")


@pytest.mark.parametrize("updated", [True, False])
def test_a_job_is_never_left_held(programs: Path, tmp_path: Path, updated: bool) -> None:
    record = f'echo "$@" >> {tmp_path}/scontrol'
    _program(
        programs / "scontrol",
        f'case "$1" in show|write) ;; update) {record}; {str(updated).lower()};; *) {record};; esac',
    )
    exclude_node(tmp_path / "excluded", "node9", reason="slow")
    assert supervise(_attempt(tmp_path, FAIL)) == 0
    assert _scontrol(tmp_path) == ["requeuehold 7_0", "update JobId=7_0 ExcNodeList=node9", "release 7_0"]


NO_NODES = "allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    ("sbatch", "excluded", "tried_again"),
    [
        ("true", "node1,node2,node9", None),
        (f'[[ $2 != *node2* ]] || {{ echo "{NO_NODES}" >&2; exit 1; }}', "node1,node9", "node2"),
        (f'[ $2 = --exclude= ] || {{ echo "{NO_NODES}" >&2; exit 1; }}', "", "node1, node2, node9"),
        (f'echo "{NO_NODES}" >&2; exit 1', "", "node1, node2, node9"),  # it could not start without them either
        ("echo 'sbatch: error: not on this node' >&2; exit 1", "node1,node2,node9", None),
    ],
)
def test_no_more_nodes_are_excluded_than_the_job_can_do_without(
    programs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sbatch: str,
    excluded: str,
    tried_again: str | None,
) -> None:
    """With fewer nodes than it needs, Slurm would let it wait for ever."""
    _program(programs / "sbatch", f'[ "$1" = --test-only ] || exit 9; [ -z "$SLURM_JOB_ID" ] || exit 9; {sbatch}')
    for node in ("node2", "node9", "node1"):  # the first was excluded longest ago
        exclude_node(tmp_path / "excluded", node, reason="slow")
    assert supervise(_attempt(tmp_path, FAIL)) == 0
    assert _scontrol(tmp_path) == ["requeuehold 7_0", f"update JobId=7_0 ExcNodeList={excluded}", "release 7_0"]
    warnings = [line for line in caplog.messages if "tried again" in line]
    assert [line.partition(": ")[0] for line in warnings] == ([tried_again] if tried_again else [])


def test_a_damaged_list_of_excluded_nodes_is_on_record(programs: Path, tmp_path: Path) -> None:
    attempt = _attempt(tmp_path, FAIL)
    attempt.excluded.mkdir()
    (attempt.excluded / "nodes.json").write_text("{")
    with pytest.raises(ArtifactError):
        supervise(attempt)
    assert not _end(attempt).requeued and "repair or remove it" in _end(attempt).reason
    assert _scontrol(tmp_path) == []


def test_a_job_that_slurm_ends_during_the_preflight_is_not_queued_again_and_excludes_no_node(
    programs: Path, tmp_path: Path
) -> None:
    result = tmp_path / "job.0" / "attempt-0" / "nodes" / "node1.json"
    _program(programs / "srun", f"""kill -TERM {os.getpid()}; echo '{{"began": 1}}' > {result}; exit 1""")
    attempt = _attempt(tmp_path, FINISH, preflight=True)
    assert supervise(attempt) != 0, "dependent jobs must not start"
    assert (_end(attempt).requeued, _scontrol(tmp_path), excluded_nodes(attempt.excluded)) == (False, [], [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
