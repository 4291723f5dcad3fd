"""The configuration files of a Slurm cluster made for tests: every wait that an administrator makes long is short."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Address:
    """Where a daemon is met: `host` is the name that it knows itself by, `ip` and `port` how others reach it."""

    host: str
    ip: str
    port: int


KILL_WAIT_SECONDS = 30  # from SIGTERM to SIGKILL; Slurm's default


def slurm_conf(folder: Path, *, controller: Address, nodes: dict[str, Address], cpus: int) -> str:
    """The text of slurm.conf.

    Two partitions: `debug` is where jobs go, and those of `urgent` preempt them. A lost node is noticed in about 15 seconds,
    and one that is only busy has answered by then. A requeued job starts again when munge's credentials
    of its first start have expired, after 5 (less is ignored).
    """
    lines = [
        "ClusterName=specialm",
        f"SlurmctldHost={controller.host}({controller.ip})",
        f"SlurmctldPort={controller.port}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        "CredType=cred/munge",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"TmpFS={folder}/tmp.%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd.%n.log",
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "SlurmdParameters=config_overrides",  # nodes claim more cores than the machine has
        "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",
        "SlurmdTimeout=10",
        f"KillWait={KILL_WAIT_SECONDS}",
        "MinJobAge=3600",  # `scontrol show job` is the only record of a job that has ended
        "JobRequeue=1",
        "PropagateResourceLimits=NONE",
        "DefMemPerCPU=500",
        "GresTypes=gpu",
    ]
    lines += [
        f"NodeName={name} NodeHostname={address.host} NodeAddr={address.ip} Port={address.port}"
        f" CPUs={cpus} RealMemory={cpus * 1000} Gres=gpu:2 State=UNKNOWN"
        for name, address in nodes.items()
    ]
    names = ",".join(nodes)
    lines += [
        f"PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20",
        f"PartitionName=urgent Nodes={names} MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(devices: dict[str, list[Path]]) -> str:
    """The text of gres.conf: which device files are which node's GPUs."""
    return "".join(f"NodeName={node} Name=gpu File={','.join(map(str, files))}\n" for node, files in devices.items())
