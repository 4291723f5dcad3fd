"""The test cluster does what tests of larger things ask of it. (That it loses nodes and power, those show themselves.)"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster, running_cluster

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).parents[2]


def test_two_nodes(cluster: Cluster) -> None:
    printed = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")
    assert sorted(printed.split()) == ["node1", "node1", "node2", "node2"]


def test_controller_restarts_while_a_job_runs(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("while [ ! -e go ]; do sleep 0.1; done; echo went", "--output=log", cwd=tmp_path)
    cluster.wait_for(job, "RUNNING")
    cluster.stop_controller()
    time.sleep(1)
    cluster.start_controller()
    assert cluster.job(job)["JobState"] == "RUNNING"
    (tmp_path / "go").touch()
    (done,) = cluster.wait(job)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "0")
    assert (tmp_path / "log").read_text() == "went\n"


def test_what_depends_on_a_failure_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    first = cluster.submit("exit 3", cwd=tmp_path)
    second = cluster.submit("true", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes", cwd=tmp_path)
    (failed,), (cancelled,) = cluster.wait(first), cluster.wait(second)
    assert (failed["JobState"], failed["ExitCode"]) == ("FAILED", "3:0")
    assert cancelled["JobState"] == "CANCELLED"


def test_elements_of_an_array(cluster: Cluster, tmp_path: Path) -> None:
    array = cluster.submit("exit $SLURM_ARRAY_TASK_ID", "--array=0-2%2", cwd=tmp_path)
    states = {job["ArrayTaskId"]: job["ExitCode"] for job in cluster.wait(array)}
    assert states == {"0": "0:0", "1": "1:0", "2": "2:0"}


def test_a_node_that_was_off_is_reached_by_the_others_at_once(cluster: Cluster) -> None:
    """They may know its hardware address from before."""
    both = ("srun", "--nodes=2", "--nodelist=node1,node2", "true")
    cluster.run(*both)
    cluster.power_off("node2")
    cluster.wait_for_node("node2", "down")
    cluster.power_on("node2")
    cluster.wait_for_node("node2", "idle")
    cluster.run(*both)


def test_without_namespaces(tmp_path: Path) -> None:
    """A second cluster, of nodes that share this machine's network."""
    with running_cluster(nodes=2, namespaces=False) as cluster:
        job = cluster.submit("srun --nodes=2 sleep 300", "--nodes=2", "--no-requeue", cwd=tmp_path)
        cluster.wait_for(job, "RUNNING")
        cluster.power_off("node2")
        cluster.partition("node1")
        cluster.wait_for_node("node2", "down")
        cluster.wait_for_node("node1", "down")
        cluster.heal("node1")
        cluster.wait_for_node("node1", "idle")
    assert not cluster.slot.exists()


KILLED = """
import os, signal
from tests.cluster.testbed import running_cluster
with running_cluster(nodes=1) as cluster:
    cluster.submit("sleep 1234", cwd=cluster.slot)
    print(cluster.slot, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    """Its daemons end with it; the next cluster takes its folder and removes its bridge and mount."""
    command = [sys.executable, "-c", KILLED]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    slot = Path(killed.stdout.strip())
    assert slot.exists()
    with running_cluster(nodes=1) as cluster:
        assert cluster.slot == slot
        cluster.run("srun", "true")
    assert not slot.exists() and str(slot) not in Path("/proc/self/mounts").read_text()
    assert not os.path.exists(f"/sys/class/net/specialm{slot.name}-")
