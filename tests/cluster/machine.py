"""The machines of a test cluster: with a network of their own where this one allows it, otherwise plain processes."""

import os
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

# In the environment of every daemon, and so of what it starts: what is to be stopped is found by it.
MARK = "SPECIALM_TESTBED"


def user_environment(slot: Path) -> dict[str, str]:
    """The environment of a user of a slot's cluster: nothing of a Slurm job that this process may be in."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return {**inherited, "SLURM_CONF": str(slot / "slurm.conf")}


def start_daemon(command: list[str], *, slot: Path, log: Path, **options: object) -> subprocess.Popen[bytes]:
    """A process that the kernel kills when this one ends, however it ends.

    To be called from the main thread: the kernel takes the end of the thread for the end of the process.
    """
    environment = {**user_environment(slot), MARK: str(slot)}
    with log.open("ab") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], env=environment, stdout=out, stderr=out,
            start_new_session=True, **{"stdin": subprocess.DEVNULL, **options},  # type: ignore[call-overload]
        )  # fmt: skip


def marked(slot: Path) -> list[psutil.Process]:
    """The daemons of a cluster and all their descendants, without this process and its ancestors."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(slot):
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    spared = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in spared]


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes and see them gone."""
    processes = list(processes)
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


class Node(Protocol):
    """One machine of the cluster."""

    def power_on(self) -> None:
        """Start its slurmd."""

    def power_off(self) -> None:
        """Kill everything that runs on it, at once."""

    def cut_off(self) -> None:
        """Nobody hears of it, while it goes on."""

    def reconnect(self) -> None:
        """Undo `cut_off`."""


@dataclass
class NamespacedNode:
    """A node in its own process, host name, mount and network namespace, on the cluster's bridge."""

    name: str
    ip: str
    bridge: str
    slot: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def _link(self) -> str:
        return f"{self.bridge}{self.name.removeprefix('node')}"

    @property
    def _namespace(self) -> Path:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/ns/net")

    def power_on(self) -> None:
        # The card has the same address each time: others would send to the earlier one until their entry for it expires.
        # bash is the namespace's first process: it collects what daemons of jobs leave behind, which slurmd does not.
        # It waits for its network card before it starts slurmd. All ends with the first process.
        inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; read -r _ || exit; slurmd -D -N "$1" & wait'
        self.process = start_daemon(
            ["unshare", "--pid", "--uts", "--ipc", "--mount", "--net", "--fork", "--kill-child", "--mount-proc",
             "bash", "-c", inside, "bash", self.name, str(self.slot / "hosts")],
            slot=self.slot, log=self.slot / f"{self.name}.log", stdin=subprocess.PIPE,
        )  # fmt: skip
        own, here = self._namespace, os.readlink("/proc/self/ns/net")
        while os.readlink(own) == here:
            assert self.process.poll() is None, (self.slot / f"{self.name}.log").read_text()
        # The kernel removes the network of a killed run's node some time after its process.
        network(f"link del {self._link}", check=False)
        network(f"link add {self._link} type veth peer name eth0 address {mac(self.ip)} netns {self.process.pid}")
        network(f"link set {self._link} master {self.bridge} up")
        for command in (f"addr add {self.ip}/24 dev eth0", "link set eth0 up", "link set lo up"):
            network(command, inside=own)
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.close()

    def power_off(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        network(f"link del {self._link}", check=False)  # a namespace's end takes its card with it, in its own time

    def cut_off(self) -> None:
        network(f"link set {self._link} down")

    def reconnect(self) -> None:
        network(f"link set {self._link} up")

    def send_astray(self, ip: str) -> None:
        """What this node sends to an address is lost."""
        network(f"neigh replace {ip} lladdr {mac('0.0.0.0')} dev eth0 nud permanent", inside=self._namespace)

    def send_right(self, ip: str) -> None:
        """Undo `send_astray`."""
        network(f"neigh del {ip} dev eth0", inside=self._namespace)


@dataclass
class PlainNode:
    """A node that is a slurmd on a port: without a network of its own, it is cut off by stopping its processes."""

    name: str
    slot: Path
    process: subprocess.Popen[bytes] | None = None
    stopped: list[psutil.Process] = field(default_factory=list)

    def power_on(self) -> None:
        self.process = start_daemon(
            ["slurmd", "-D", "-N", self.name], slot=self.slot, log=self.slot / f"{self.name}.log"
        )

    def power_off(self) -> None:
        kill(self._processes())
        if self.process is not None:
            self.process.wait()

    def cut_off(self) -> None:
        self.stopped = self._processes()
        for process in self.stopped:
            process.suspend()

    def reconnect(self) -> None:
        for process in self.stopped:
            if process.is_running():
                process.send_signal(signal.SIGCONT)

    def _processes(self) -> list[psutil.Process]:
        """slurmd, and what jobs run here: Slurm tells them their node's name, but not the daemon above them."""
        own: dict[int, psutil.Process] = {}
        for process in marked(self.slot):
            try:
                daemon = self.process is not None and process.pid == self.process.pid
                if daemon or process.environ().get("SLURMD_NODENAME") == self.name:
                    own[process.pid] = process
                    above = process.parent()
                    if above is not None and above.name() == "slurmstepd":
                        own[above.pid] = above
            except psutil.Error:
                continue
        return list(own.values())


def mac(ip: str) -> str:
    """A hardware address for an IP address."""
    return ":".join(["02", "00", *(f"{int(part):02x}" for part in ip.split("."))])


def network(command: str, *, inside: Path | None = None, check: bool = True) -> None:
    """`ip COMMAND`, here or in the network namespace of a file under /proc."""
    enter = ["nsenter", f"--net={inside}"] if inside else []
    subprocess.run([*enter, "ip", *command.split()], check=check, capture_output=True, text=True)


def namespaces_allowed() -> bool:
    """Whether this machine lets us make namespaces and a bridge."""
    script = "ip link add specialm-try type bridge && ip link add specialm-try0 type veth peer name specialm-try1"
    command = ["unshare", "--pid", "--uts", "--ipc", "--mount", "--net", "--fork", "--mount-proc", "sh", "-c", script]
    return subprocess.run(command, capture_output=True).returncode == 0
