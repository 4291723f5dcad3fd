"""Which layouts of the Megatron engine a training can have on given nodes, and how long a step takes in each."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.estimate.capabilities import is_allowed, lacking
from megatron_specialm.estimate.hardware import hardware_of
from megatron_specialm.estimate.memory import Change, memory_of
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.estimate.step_time import StepTime, step_time

CHUNKS = (1, 2, 4)  # virtual_pipeline
MOST_NODES = 64  # that are tried when a model does not fit


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        change: the settings in which it differs from the config.
        memory: bytes of the process that needs most.
    """

    change: Change
    setup: Setup
    memory: int
    time: StepTime

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its parallel sizes."""
        layout = self.setup.parallel
        return (
            layout.tensor_parallel, layout.context_parallel, layout.pipeline_parallel, layout.data_parallel,
            layout.expert_parallel,
        )  # fmt: skip


@dataclass(frozen=True)
class Layouts:
    """The layouts of some nodes.

    Attributes:
        fastest: of each combination of parallel sizes the fastest layout that fits, the fastest first.
        fitting: how many layouts fit.
        too_large: how many are allowed and do not fit.
    """

    fastest: list[Candidate]
    fitting: int
    too_large: int


def find_layouts(setup: Setup, machine: Accelerator, nodes: int, *, checkpoint_every: int) -> Layouts:
    """Every layout of all GPUs of so many nodes, each with the least recomputation with which it fits.

    Args:
        setup: of engine megatron.
        machine: a node, as `planned_machine` gives it.
        checkpoint_every: steps.
    """
    hardware, fused = hardware_of(machine.name, setup.precision), machine.has_fused_layers
    fitting, too_large = [], 0
    for change, changed, memory in _measured(setup, machine, nodes):
        if memory > machine.usable_bytes:
            too_large += 1
            continue
        time = step_time(changed, hardware, fused=fused, checkpoint_every=checkpoint_every)
        fitting.append(Candidate(change, changed, memory, time))
    fitting.sort(key=lambda one: (one.time.total, one.memory))
    fastest: dict[tuple[int, ...], Candidate] = {}
    for one in fitting:
        fastest.setdefault(one.sizes, one)
    return Layouts([*fastest.values()], len(fitting), too_large)


def nodes_needed(setup: Setup, machine: Accelerator, nodes: int) -> tuple[int, Change] | None:
    """Of 2, 4, 8... times so many nodes the fewest on which a layout fits, and that layout; None if none does."""
    while (nodes := 2 * nodes) <= MOST_NODES:
        for change, _, memory in _measured(setup, machine, nodes):
            if memory <= machine.usable_bytes:
                return nodes, change
    return None


def _measured(setup: Setup, machine: Accelerator, nodes: int) -> Iterator[tuple[Change, Setup, int]]:
    """Allowed layouts with their memory: of the recomputation policies the first that fits, or else the last."""
    for settings in _settings(setup, machine.gpus, nodes):
        for policy in ("none", "selective", "full"):
            changed = setup.changed(settings | {"parallel.recompute": policy})
            if not is_allowed(changed) or lacking(changed, machine):
                break
            memory = memory_of(changed, fused=machine.has_fused_layers).total
            if memory <= machine.usable_bytes or policy == "full":
                yield _change(setup, changed, settings | {"parallel.recompute": policy}), changed, memory
                break


def _change(setup: Setup, changed: Setup, settings: Mapping[str, Any]) -> Change:
    return Change({name: value for name, value in settings.items() if setup.value(name) != changed.value(name)})


def _settings(setup: Setup, gpus: int, nodes: int) -> Iterator[dict[str, Any]]:
    """Settings whose product is the number of GPUs. Tensor and context parallel processes, which exchange most, are of one
    node."""
    for tensor, context in ((t, c) for t in _divisors(gpus) for c in _divisors(gpus // t)):
        rest = gpus * nodes // (tensor * context)
        for stages in (size for size in _divisors(rest) if size <= setup.model.layers):
            replicas = rest // stages
            shared = replicas * context > 1
            layout = {
                "tensor_parallel": tensor,
                "sequence_parallel": tensor > 1 and setup.context_length % tensor == 0,
                "context_parallel": context,
                "pipeline_parallel": stages,
                "data_parallel": replicas,
                "distributed_optimizer": shared,
                "overlap_communication": shared,
            }
            for chunks in CHUNKS if stages > 1 else (1,):
                for experts in _divisors(math.gcd(replicas * context, *setup.expert_counts)):
                    for size in _micro_batch_sizes(setup, replicas):
                        yield {
                            "micro_batch_size": size,
                            **({"packing": "none"} if context > 1 else {}),
                            **{f"parallel.{name}": value for name, value in layout.items()},
                            "parallel.virtual_pipeline": chunks,
                            "parallel.expert_parallel": experts,
                        }


def _micro_batch_sizes(setup: Setup, replicas: int) -> list[int]:
    """Those that divide a replica's part of the batch; of an MoE whose loss depends on it, the present one."""
    if setup.model.moe is not None and setup.model.moe.depends_on_micro_batch:
        return [setup.micro_batch_size]
    return _divisors(setup.global_batch_size // replicas) if setup.global_batch_size % replicas == 0 else []


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
