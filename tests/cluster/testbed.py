"""A real Slurm cluster on this machine, for tests: munge, slurmctld and several slurmd, started as root without systemd.

Everything lies in one folder, a *slot* that belongs to who holds the lock in it. Nothing is left behind: daemons are
killed by the kernel when this process ends, and what a killed run left else (a bridge, a mount) goes when its slot is
taken again.
"""

import fcntl
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import psutil

from tests.cluster.configuration import Address, gres_conf, slurm_conf
from tests.cluster.machine import (
    NamespacedNode,
    Node,
    PlainNode,
    kill,
    mac,
    marked,
    namespaces_allowed,
    network,
    start_daemon,
    user_environment,
)

T = TypeVar("T")

SLOTS = range(1, 51)
BUSY = 4  # so much longer may things take where other work fills the machine
SMALL_DISK = 64 * 2**20
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")


class Cluster:
    """A running cluster. Job ids are Slurm's, as text: `12`, or `12_3` for an element of an array."""

    def __init__(self, slot: Path, nodes: dict[str, Node], *, namespaces: bool) -> None:
        self.slot = slot
        self.nodes = nodes
        self.namespaces = namespaces  # whether nodes have a network of their own
        self.cut_off: set[str] = set()
        self.controller: subprocess.Popen[bytes] | None = None

    @property
    def small_disk(self) -> Path:
        """A folder on a file system of `SMALL_DISK` bytes that all nodes share, to be filled and left empty."""
        return self.slot / "small"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user of this cluster."""
        return user_environment(self.slot)

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 120) -> str:
        """What a command prints on the login node; fails with what it said if it fails."""
        for _ in range(5):
            done = subprocess.run(
                command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=timeout
            )
            if done.returncode == 0 or command[0] != "squeue":  # which may find the controller busy, or crash
                break
            time.sleep(1)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, body: str, *options: str, cwd: Path) -> str:
        """Submit a bash script; the job's id."""
        script = cwd / f"script-{time.monotonic_ns()}.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        return self.run("sbatch", "--parsable", *options, str(script), cwd=cwd).strip()

    def jobs(self, job_id: str) -> list[dict[str, str]]:
        """The fields of a job, or of each started element of an array, as `scontrol show job` has them."""
        text = self.run("scontrol", "show", "job", job_id)
        return [dict(_FIELD.findall(record)) for record in text.strip().split("\n\n")]

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of one job."""
        (only,) = self.jobs(job_id)
        return only

    def wait(self, job_id: str, timeout: float = 60) -> list[dict[str, str]]:
        """Wait for the end of a job, or of all elements of an array; its fields."""

        def ended() -> list[dict[str, str]] | None:
            jobs = self.jobs(job_id)
            return jobs if all(job["JobState"] in ENDED for job in jobs) else None

        return self.until(ended, f"job {job_id} has ended", timeout)

    def wait_for(self, job_id: str, state: str, timeout: float = 60) -> dict[str, str]:
        """Wait until a job is in a state, such as RUNNING; its fields."""

        def reached() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] == state else None

        return self.until(reached, f"job {job_id} is {state}", timeout)

    def wait_for_node(self, name: str, state: str, timeout: float = 60) -> None:
        """Wait until a node is in a state, in the words of `node_state`."""
        self.until(lambda: self.node_state(name) == state, f"{name} is {state}", timeout)

    def until(self, question: Callable[[], T], what: str, timeout: float) -> T:
        """Ask until the answer is true; fails after `timeout` seconds of a quiet machine with the state of the cluster."""
        deadline = time.monotonic() + BUSY * timeout
        while not (answer := question()):
            if time.monotonic() > deadline:
                queue = self.run("squeue", "--all"), self.run("sinfo", "--Node", "--long")
                raise AssertionError(f"not in {BUSY * timeout:.0f} s: {what}\n{''.join(queue)}")
            time.sleep(0.2)
        return answer

    def node_state(self, name: str) -> str:
        """What Slurm says of a node: `idle`, `mixed`, `idle+completing`, ..., and `down` for all that is down.

        From scontrol: after a restart of the controller, sinfo goes on to call a node `mixed` that scontrol calls idle.
        """
        shown = re.search(r"State=(\S+)", self.run("scontrol", "show", "node", name))
        assert shown is not None
        state = shown[1].lower()
        return "down" if state.startswith("down") else state

    def power_off(self, name: str) -> None:
        """Kill everything on a node, as a power loss does."""
        self.nodes[name].power_off()
        self.cut_off.discard(name)

    def power_on(self, name: str) -> None:
        """Start a node again."""
        self.nodes[name].power_on()

    def partition(self, name: str) -> None:
        """Cut a node off from all others; what runs on it goes on."""
        self.nodes[name].cut_off()
        self.cut_off.add(name)

    def heal(self, name: str) -> None:
        """Undo `partition`."""
        self.nodes[name].reconnect()
        self.cut_off.discard(name)

    def stop_controller(self) -> None:
        """Stop slurmctld. Jobs run on."""
        assert self.controller is not None
        self.controller.terminate()
        self.controller.wait()

    def start_controller(self) -> None:
        """Start it again, from the state that it saved."""
        self._start_controller()
        self.until(self._answers, "slurmctld answers", 20)
        for name in self.nodes:  # a job that ends before its node has reported again leaves the node busy for minutes
            self.until(lambda name=name: self.node_state(name) != "unknown", f"{name} has reported", 30)

    def reset(self) -> None:
        """No jobs, and all nodes there: what one test did is nothing to the next."""
        for name in list(self.cut_off):
            self.heal(name)
        self.run("scancel", "--user=root")
        self.until(lambda: not self.run("squeue", "--noheader"), "the queue is empty", 60)
        for name in self.nodes:
            if self.node_state(name) != "idle":
                self.power_off(name)
                self.power_on(name)
        for name in self.nodes:
            self.wait_for_node(name, "idle", timeout=20)

    def start(self) -> None:
        """Start all daemons, and wait until all nodes are idle."""
        start_daemon(
            ["munged", "--foreground", "--force", f"--key-file={self.slot}/munge.key",
             f"--socket={self.slot}/munge.socket", f"--pid-file={self.slot}/munge.pid",
             f"--log-file={self.slot}/munge.log", f"--seed-file={self.slot}/munge.seed"],
            slot=self.slot, log=self.slot / "munge.log",
        )  # fmt: skip
        self._start_controller()
        for node in self.nodes.values():
            node.power_on()
        self.until(self._answers, "slurmctld answers", 20)
        for name in self.nodes:
            self.wait_for_node(name, "idle")

    def _start_controller(self) -> None:
        self.controller = start_daemon(["slurmctld", "-D"], slot=self.slot, log=self.slot / "slurmctld.out")

    def _answers(self) -> bool:
        return subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True).returncode == 0


_FIELD = re.compile(r"([A-Za-z:/]+)=(.*?)(?=\s+[A-Za-z:/]+=|\s*$)", re.MULTILINE)


@contextmanager
def running_cluster(*, nodes: int = 4, cpus: int = 4, namespaces: bool | None = None) -> Iterator[Cluster]:
    """A cluster of nodes `node1`, `node2`, ... of `cpus` cores and two (fake) GPUs each, until the block ends."""
    namespaces = namespaces_allowed() if namespaces is None else namespaces
    with _slot() as (number, slot):
        try:
            cluster = _prepare(number, slot, nodes=nodes, cpus=cpus, namespaces=namespaces)
            cluster.start()
            yield cluster
        finally:
            _clear(number, slot)


@contextmanager
def _slot() -> Iterator[tuple[int, Path]]:
    """The first folder that no living process holds, emptied."""
    base = Path(tempfile.gettempdir()) / "specialm-testbed"
    base.mkdir(exist_ok=True)
    for number in SLOTS:
        with (base / f"{number}.lock").open("w") as lock:
            if _locked(lock):
                _clear(number, base / str(number))
                (base / str(number)).mkdir()
                yield number, base / str(number)
                return
    raise AssertionError(f"{len(SLOTS)} clusters run already: {base}")


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bridge(number: int) -> str:
    return f"specialm{number}-"


def _clear(number: int, slot: Path) -> None:
    """Processes, network, mounts and files of a slot, of this run or of one that was killed."""
    kill(marked(slot))
    network(f"link del {_bridge(number)}", check=False)
    below = [p.mountpoint for p in psutil.disk_partitions(all=True) if p.mountpoint.startswith(f"{slot}/")]
    for mount in below:
        subprocess.run(["umount", "--lazy", mount], check=True)
    shutil.rmtree(slot, ignore_errors=True)


def _prepare(number: int, slot: Path, *, nodes: int, cpus: int, namespaces: bool) -> Cluster:
    """Write the files of a cluster and make its bridge."""
    names = [f"node{i + 1}" for i in range(nodes)]
    host = socket.gethostname().split(".")[0]
    if namespaces:
        subnet = f"10.213.{number}"
        controller = Address(host, f"{subnet}.1", 21000 + number)
        addresses = {name: Address(name, f"{subnet}.{11 + i}", 22000) for i, name in enumerate(names)}
        network(f"link add {_bridge(number)} address {mac(controller.ip)} type bridge")
        network(f"addr add {subnet}.1/24 dev {_bridge(number)}")
        network(f"link set {_bridge(number)} up")
        own: dict[str, Node] = {
            name: NamespacedNode(name, address.ip, _bridge(number), slot) for name, address in addresses.items()
        }
    else:
        controller = Address("localhost", "127.0.0.1", 21000 + number)
        addresses = {
            name: Address("localhost", "127.0.0.1", 22000 + 100 * number + i) for i, name in enumerate(names, start=1)
        }
        own = {name: PlainNode(name, slot) for name in names}
    (slot / "state").mkdir()
    (slot / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(slot / "small")], check=True)
    (slot / "munge.key").write_bytes(os.urandom(128))
    (slot / "munge.key").chmod(0o400)
    (slot / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{a.ip} {n}\n" for n, a in addresses.items()) + f"{controller.ip} {host}\n"
    )
    for name in names:
        (slot / f"tmp.{name}").mkdir()
    devices = {name: [slot / f"{name}.gpu{i}" for i in range(2)] for name in names}
    for device in (file for files in devices.values() for file in files):
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (slot / "gres.conf").write_text(gres_conf(devices))
    (slot / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (slot / "slurm.conf").write_text(slurm_conf(slot, controller=controller, nodes=addresses, cpus=cpus))
    return Cluster(slot, own, namespaces=namespaces)
