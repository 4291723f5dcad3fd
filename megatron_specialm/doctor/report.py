"""All findings about a machine, in order, as a table and as JSON."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Group
from rich.table import Column, Table

from megatron_specialm.base.terminal import plain
from megatron_specialm.doctor import accelerator, machine
from megatron_specialm.doctor.finding import Finding, can_train, guarded
from megatron_specialm.doctor.packages import PACKAGES, blame, package_finding
from megatron_specialm.doctor.process import Outcome, start_command, start_module

COMMANDS = {
    "nvidia-smi": ("nvidia-smi",),
    "mpirun": ("mpirun", "--version"),
    "sinfo": ("sinfo", "--version"),
    "srun": ("srun", "--version"),
    "partitions": ("sinfo", "--noheader", "--format=%R %D"),
}
STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red"}


def examine(*, quick: bool, environment: Mapping[str, str] = os.environ, folder: Path = Path()) -> list[Finding]:
    """Collect all findings. `folder`: the disk for runs; `quick`: without computations."""
    imported, outputs = _outcomes(environment)
    packages = {
        name: guarded(
            name, partial(package_finding, package, imported[name]), remedy=package.remedy, needed=package.needed
        )
        for name, package in PACKAGES.items()
    }
    facts = {name: imported[name].answer() if finding.state == "ok" else {} for name, finding in packages.items()}
    driver = guarded("CUDA driver", lambda: machine.driver_finding(outputs["nvidia-smi"]), remedy=machine.DRIVER_REMEDY)
    names, gpus = accelerator.find_gpus(facts["torch"], driver, environment)
    return [
        guarded("python", machine.python_finding, needed=True),
        packages["torch"],
        driver,
        *gpus,
        guarded("NCCL", lambda: accelerator.nccl_finding(facts["torch"]), remedy=accelerator.NCCL_REMEDY),
        blame(packages["megatron-core"], (packages["transformer-engine"], packages["apex"])),
        guarded("fused layers", lambda: accelerator.fused_finding(facts["megatron-core"], len(names))),
        *(packages[name] for name in ("transformer-engine", "apex", "flash-attn", "deepspeed", "mpi4py")),
        guarded("mpirun", lambda: machine.mpirun_finding(outputs["mpirun"]), remedy=machine.MPI_REMEDY),
        guarded(
            "slurm",
            lambda: machine.slurm_finding(outputs["sinfo"], outputs["srun"], outputs["partitions"]),
            remedy=machine.SLURM_REMEDY,
        ),
        guarded("cores", machine.cores_finding),
        guarded("memory", machine.memory_finding),
        guarded("disk", lambda: machine.disk_finding(folder)),
        *(() if quick or packages["torch"].state != "ok" else accelerator.compute_findings(names, environment)),
    ]


def _outcomes(environment: Mapping[str, str]) -> tuple[dict[str, Outcome], dict[str, Outcome | None]]:
    """The outcomes of all imports and commands, which run at the same time."""
    with contextlib.ExitStack() as stack:
        imports = {
            name: stack.enter_context(start_module("packages", name, environment=environment)) for name in PACKAGES
        }
        commands = {
            key: stack.enter_context(
                start_command(name, *arguments, environment=environment) or contextlib.nullcontext()
            )
            for key, (name, *arguments) in COMMANDS.items()
        }
        return (
            {name: process.wait() for name, process in imports.items()},
            {key: None if process is None else process.wait() for key, process in commands.items()},
        )


def as_json(findings: list[Finding]) -> str:
    """The findings, and whether this machine can train, as JSON."""
    value = {"can_train": can_train(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(value, indent=2)


def _table(*header: str) -> Table:
    """A table that folds long words."""
    return Table(*(Column(name, overflow="fold") for name in header), box=None, pad_edge=False)


def render(findings: list[Finding]) -> Group:
    """The findings as a table of 80 columns or less, then the remedies, then the verdict."""
    table = _table("part", "state", "version", "")
    parts_of: dict[str, list[str]] = {}
    for finding in findings:
        state = plain(finding.state, STYLES[finding.state])
        table.add_row(plain(finding.name), state, plain(finding.version), plain(finding.detail))
        if finding.state != "ok" and finding.remedy:
            parts_of.setdefault(finding.remedy, []).append(finding.name)
    remedies = _table("to get", "")
    for remedy, parts in parts_of.items():
        remedies.add_row(plain("\n".join(parts)), plain(remedy, overflow="fold"))
    if can_train(findings):
        verdict = plain("This machine can train.", "green")
    else:
        lacking = [finding.name for finding in findings if finding.needed and finding.state != "ok"]
        verdict = plain(f"Training needs what is not ok here: {', '.join(lacking)}.", "bold red")
    return Group(table, "", *((remedies, "") if parts_of else ()), verdict)
