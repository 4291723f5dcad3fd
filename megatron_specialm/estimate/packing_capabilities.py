"""Rows of the table of capabilities that are about packing, and the packing that a training has by default."""

from dataclasses import replace

from megatron_specialm.config.packing import Packing
from megatron_specialm.estimate.capability import BOTH, Capability, Condition
from megatron_specialm.estimate.setup import Setup

_SAME_MICRO_BATCHES = Condition(
    lambda s: s.model.moe is None or not s.model.moe.depends_on_micro_batch,
    "packing {s.packing} puts other windows into a micro-batch together, and moe.aux_loss {s.model.moe.aux_loss} and "
    "moe.capacity_factor {s.model.moe.capacity_factor} balance or drop the tokens of one",
    remedy="set packing: none",
)
_WHOLE_SEQUENCES = Condition(
    lambda s: s.parallel.context_parallel == 1,
    "packing {s.packing} with context_parallel {p.context_parallel}: it has not been tested",
    remedy="set packing: none (and of a projected network windows_per_expert to a multiple of micro_batch_size)",
)
PACKING = (
    Capability(
        "sorted windows", lambda s: s.packing == "sorted",
        "pipeline, context and expert parallelism 1; not an MoE with aux_loss or capacity_factor",
        engines=BOTH,
        conditions=(
            _SAME_MICRO_BATCHES,
            _WHOLE_SEQUENCES,
            Condition(
                lambda s: s.parallel.pipeline_parallel == s.parallel.expert_parallel == 1,
                "packing sorted makes micro-batches of different lengths, and with pipeline_parallel {p.pipeline_parallel} and "
                "expert_parallel {p.expert_parallel} processes exchange tensors of one size",
                remedy="set packing: packed",
            ),
        ),
    ),
    Capability(
        "packed windows", lambda s: s.packing == "packed",
        "context_parallel 1; not an MoE with aux_loss or capacity_factor",
        engines=BOTH,
        conditions=(_SAME_MICRO_BATCHES, _WHOLE_SEQUENCES),
    ),
)  # fmt: skip


def best_packing(setup: Setup) -> Packing:
    """The packing with the least padding that a setup's model and layout allow. What can be sorted can be packed."""
    packed = replace(setup, packing="packed")
    allowed = all(condition.holds(packed) for row in PACKING if row.asked(packed) for condition in row.conditions)
    return "packed" if allowed else "none"
