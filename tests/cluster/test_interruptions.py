"""A training of two ranks on two nodes, and all that ends one before its time: it goes on, and ends with the same bits."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_specialm.slurm.nodes import exclude_node
from megatron_specialm.slurm.records import Attempt, excluded_folder
from tests.cluster.configuration import KILL_WAIT_SECONDS
from tests.cluster.machine import NamespacedNode
from tests.cluster.runs import Run, assert_same_bits, local_environment, prepared
from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.timeout(900)
STEPS = 400
OVERRIDES = [f"stages.slm.steps={STEPS}", "stages.slm.parallel.data_parallel=2", "stages.slm.checkpoint.every=20"]


@pytest.fixture(scope="module")
def straight(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same training, on this machine and without interruption."""
    folder = prepared(smoke_run, tmp_path_factory.mktemp("straight"), "tokenizer", "tokens")
    run = Run(None, folder, OVERRIDES)  # type: ignore[arg-type]
    subprocess.run(run.command("run", "--only", "slm"), cwd=folder, env=local_environment(), check=True, timeout=600)
    return run.root / "slm/generic"


@pytest.fixture
def run(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> Run:
    folder = prepared(smoke_run, tmp_path, "tokenizer", "tokens")
    return Run(cluster, folder, list(OVERRIDES), site={"jobs": {"slm": {"processes_per_node": 1}}})


def _begun(run: Run) -> int:
    """Wait until an attempt has saved a step and goes on; its number.

    It need not be the first: where the machine is so busy that a node does not answer in time, Slurm ends an attempt, which
    saves a step then, too. What is done to a node after such an end would fall between two attempts.
    """
    first_seen: dict[int, int] = {}  # saved step, by attempt

    def goes_on() -> bool:
        attempts, step = run.attempts("slm"), run.saved_step("slm")
        return bool(attempts) and step > first_seen.setdefault(len(attempts), step) and attempts[-1].end is None

    run.until(goes_on, "a step is saved", 60)
    assert run.saved_step("slm") < STEPS - 40, "the test came too late: the training has ended"
    return len(run.attempts("slm")) - 1


def _next(run: Run, number: int, timeout: float) -> tuple[Attempt, Attempt]:
    """Wait for the attempt after that of this number; both."""
    run.until(lambda: len(run.attempts("slm")) > number + 1, "the job starts again", timeout)
    return run.attempts("slm")[number], run.attempts("slm")[number + 1]


def _finished(run: Run, straight: Path, *before: str, submission: str = "0001") -> None:
    """Wait for the end, after attempts that ended so; it is that of the training without interruption.

    Attempts that Slurm has ended are not counted: where the machine is busy there may be more of them (`_begun`).
    """
    assert run.wait("slm", 120) == ["COMPLETED"], run.log("slm")
    outcomes = [outcome for outcome in run.outcomes("slm", submission=submission) if outcome != "preempted"]
    assert outcomes == [*before, "finished"], "\n".join(str(attempt.end) for attempt in run.attempts("slm")) + run.log(
        "slm"
    )
    assert_same_bits(run.root / "slm/generic", straight)


def test_the_time_limit(run: Run, straight: Path) -> None:
    """A real one, near only when the training has begun, and far again for the next attempt. Slurm looks twice a minute who is
    to be warned. So that the training does not end before, its ranks are frozen until the warning has come."""
    run.site["limits"] = {"warning_seconds": 15, "silent_seconds": 100, "hang_seconds": 100}
    run.submit("--only", "slm")
    number = _begun(run)
    ranks = [run.rank(0), run.rank(1)]
    for rank in ranks:
        rank.suspend()
    element = f"{run.job('slm')}_0"
    hours, minutes, _ = map(int, run.cluster.job(element)["RunTime"].split(":"))
    run.cluster.run("scontrol", "update", f"JobId={element}", f"TimeLimit={60 * hours + minutes + 1}")
    run.until(lambda: "SIGUSR1: the ranks are asked to save and stop" in run.log("slm"), "the time limit is near", 90)
    for rank in ranks:
        rank.resume()
    run.until(lambda: run.attempts("slm")[number].end, "the attempt has ended", 90)
    run.cluster.run("scontrol", "update", f"JobId={element}", "TimeLimit=10")
    end = _next(run, number, 60)[0].end
    assert end is not None and end.outcome == "timeout" and end.requeued
    assert end.step and end.reason == f"the time limit is near: saved at step {end.step}"
    _finished(run, straight, "timeout")


def test_a_preemption(run: Run, straight: Path) -> None:
    run.submit("--only", "slm")
    number = _begun(run)
    run.cluster.run("scontrol", "requeue", f"{run.job('slm')}_0")
    ended, following = _next(run, number, 90)
    end = ended.end
    assert end is not None and end.outcome == "preempted"
    if end.reason == "ended by Slurm":  # the first record stands, of SIGTERM, only if KillWait passed on a busy machine
        assert following.begin.time - end.time >= KILL_WAIT_SECONDS
    else:
        assert end.reason == f"ended by Slurm: saved at step {end.step}"
    _finished(run, straight)


def test_a_preemption_by_an_urgent_job(run: Run, straight: Path, tmp_path: Path) -> None:
    """When a partition's GraceTime begins, ranks alone are told to end: they save, and the job is queued again at once."""
    run.submit("--only", "slm")
    number = _begun(run)
    urgent = run.cluster.submit("sleep 1", "--partition=urgent", "--nodes=4", "--exclusive", cwd=tmp_path)
    end = _next(run, number, 90)[0].end
    assert run.cluster.job(urgent)["JobState"] in ("COMPLETED", "COMPLETING")
    assert end is not None and end.outcome == "preempted" and end.requeued
    assert end.reason == f"ended by Slurm: saved at step {end.step}"
    _finished(run, straight)


def test_cancelled_in_the_middle_of_a_save(run: Run, straight: Path) -> None:
    """It stays cancelled; nothing that is half-written is taken for whole; and a second submit goes on."""
    run.overrides = [*OVERRIDES[:-1], "stages.slm.checkpoint.every=1"]
    run.submit("--only", "slm")
    _begun(run)
    run.until(lambda: any((run.root / "slm/generic").glob(".step_*.tmp")), "a save is under way", 30)
    run.cluster.run("scancel", run.job("slm"))
    assert run.wait("slm") == ["CANCELLED"]
    assert run.status()["slm"]["done"] == 0
    assert run.saved_step("slm") > 0
    run.submit("--only", "slm")
    _finished(run, straight, submission="0002")


def test_power_loss_of_a_node(run: Run, straight: Path) -> None:
    run.submit("--only", "slm")
    number = _begun(run)
    lost = run.attempts("slm")[number].begin.nodes[1]
    run.cluster.power_off(lost)
    assert lost not in _next(run, number, 90)[1].begin.nodes
    assert run.wait("slm", 120) == ["COMPLETED"], run.log("slm")
    assert run.outcomes("slm")[number] in ("lost", "failed", "preempted", "hang")
    assert run.outcomes("slm")[-1] == "finished"
    assert re.search(rf"resuming from {run.root}/artifacts/slm/generic/\w+/step_", run.log("slm"))
    assert_same_bits(run.root / "slm/generic", straight)


def test_a_network_partition(run: Run, straight: Path) -> None:
    """The ranks of a node that nobody reaches are named, and the job goes on elsewhere."""
    run.submit("--only", "slm")
    number = _begun(run)
    lost = run.attempts("slm")[number].begin.nodes[1]
    run.cluster.partition(lost)
    first, second = _next(run, number, 90)
    assert lost not in second.begin.nodes
    assert first.end is not None and f"rank 1 on {lost}" in run.log("slm")
    _finished(
        run, straight, *({first.end.outcome} - {"preempted"})
    )  # it depends on who notices first, Slurm or the supervisor


def test_a_rank_that_hangs(run: Run, straight: Path) -> None:
    """It is named with its node, which is left out from then on."""
    run.submit("--only", "slm")
    number = _begun(run)
    os.kill(run.rank(1).pid, signal.SIGSTOP)
    first, second = _next(run, number, 90)
    node = first.begin.nodes[1]
    assert first.end is not None and first.end.outcome == "hang" and f"rank 1 on {node}" in first.end.reason
    assert node not in second.begin.nodes
    _finished(run, straight, "hang")


def test_a_bad_node_is_left_out(run: Run, straight: Path) -> None:
    """The look at one node does not come to its end: the job starts on others, and so do those that come after it. Where too
    few are left, because others were excluded before, those are tried again."""
    busy = {"slower_than": 1000, "clock_seconds": 300}  # on a busy machine neither is a node's fault
    run.site["preflight"] = {"enabled": True, "seconds": 180, "free_disk": 1, **busy}
    run.submit("--only", "slm")
    node = run.until(lambda: run.attempts("slm") and run.attempts("slm")[0].begin.nodes[1], "the job has started", 60)
    os.kill(run.process("node_check", SLURM_PROCID="1").pid, signal.SIGSTOP)
    before = sorted({*run.cluster.nodes} - {*run.attempts("slm")[0].begin.nodes})
    for other in before:
        exclude_node(excluded_folder(run.root), other, reason="slow")
    first, second = _next(run, 0, 90)
    assert first.end is not None and first.end.outcome == "bad-node" and node in first.end.reason
    assert node not in second.begin.nodes and before[1] not in second.begin.nodes
    assert f"{before[0]}: excluded, and tried again" in run.log("slm")
    assert f"#SBATCH --exclude={','.join(sorted([node, *before]))}" in run.submit("--dry-run", "--only", "slm-nopt")
    _finished(run, straight, "bad-node")


def test_a_node_that_only_slurm_reaches_is_left_out(run: Run) -> None:
    """Slurm's controller sees nothing wrong, so that the job would start on it each time, and be given up."""
    first, second = run.cluster.nodes["node1"], run.cluster.nodes["node2"]
    if not (isinstance(first, NamespacedNode) and isinstance(second, NamespacedNode)):
        pytest.skip("nodes have no network of their own here")
    run.overrides = ["stages.slm.steps=20", "stages.slm.parallel.data_parallel=2"]
    first.send_astray(second.ip)
    run.submit("--only", "slm")
    assert run.wait("slm", 180) == ["COMPLETED"], run.log("slm")
    lost, *_, last = run.attempts("slm")
    assert lost.begin.nodes == ("node1", "node2") and "node2" not in last.begin.nodes
    assert lost.end is not None and lost.end.outcome == "bad-node"
    assert "node2: no process starts on it" in lost.end.reason
    first.send_right(second.ip)
