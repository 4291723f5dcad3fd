"""Rows of the table of capabilities that are about experts."""

from megatron_specialm.estimate.capability import BOTH, Capability, Condition

EXPERTS = (
    Capability(
        "mixture of experts", lambda s: s.model.moe is not None,
        "engine megatron with tensor_parallel: sequence_parallel too; a capacity_factor: context_parallel 1",
        engines=BOTH,
        conditions=(
            Condition(
                lambda s: s.parallel.context_parallel == 1 or s.model.moe is None or s.model.moe.capacity_factor is None,
                "moe.capacity_factor drops a window's last tokens first, and context_parallel {p.context_parallel} takes "
                "positions out of order",
                remedy="leave out moe.capacity_factor, or set parallel.context_parallel: 1",
            ),
            Condition(
                lambda s: (
                    s.parallel.engine != "megatron" or s.parallel.tensor_parallel == 1 or s.parallel.sequence_parallel
                ),
                "moe: tensor_parallel {p.tensor_parallel} without sequence_parallel would send each token to its experts "
                "{p.tensor_parallel} times",
                remedy="set parallel.sequence_parallel: true",
            ),
        ),
    ),
    Capability(
        "experts of the model or its teacher", lambda s: bool(s.moe_models),
        "not fp8; tensor_parallel divides feed-forward sizes of MoE layers, but not of experts with biases",
        engines=BOTH,
        conditions=(
            Condition(
                lambda s: s.fp8 is None,
                "moe: precision fp8 has not been measured with experts, whose numbers of tokens FP8 kernels do not fit",
                remedy="set precision: bf16",
            ),
            Condition(
                lambda s: s.indivisible_expert_size is None,
                "tensor_parallel {p.tensor_parallel} must divide feed-forward size {s.indivisible_expert_size} of MoE layers",
                "parallel.tensor_parallel",
            ),
        ),
    ),
    Capability(
        "expert parallel", lambda s: s.parallel.expert_parallel > 1,
        "an MoE model; divides the experts of each layer, and data_parallel x context_parallel",
        engines=BOTH,
        conditions=(
            Condition(
                lambda s: bool(s.moe_models),
                "expert_parallel {p.expert_parallel} splits experts, and the model has no `moe`",
                remedy="set parallel.expert_parallel: 1",
            ),
            Condition(
                lambda s: all(count % s.parallel.expert_parallel == 0 for count in s.expert_counts),
                "expert_parallel {p.expert_parallel} must divide moe.experts {s.expert_counts}",
                "parallel.expert_parallel",
            ),
            Condition(
                lambda s: s.expert_ranks % s.parallel.expert_parallel == 0,
                "expert_parallel {p.expert_parallel} must divide the {s.expert_ranks} processes that have the same experts "
                "otherwise (data_parallel {p.data_parallel} x context_parallel {p.context_parallel}; with biases, x "
                "tensor_parallel)",
                "parallel.expert_parallel",
            ),
        ),
    ),
    Capability(
        "mixture of experts with ZeRO", lambda s: s.parallel.engine == "deepspeed" and s.model.moe is not None,
        "zero_stage 1 or 2; without expert_parallel 0 too; no LoRA",
        engines=("deepspeed",),
        conditions=(
            Condition(
                lambda s: s.parallel.zero_stage <= 2,
                "moe with zero_stage {p.zero_stage}: DeepSpeed-MoE has no ZeRO-3",
                "parallel.zero_stage",
            ),
            Condition(
                lambda s: s.parallel.expert_parallel == 1 or s.parallel.zero_stage > 0,
                "expert_parallel {p.expert_parallel} with zero_stage {p.zero_stage}: without ZeRO each process takes the norm "
                "of its own experts",
                "parallel.zero_stage",
            ),
            Condition(
                lambda s: s.model.lora is None,
                "LoRA on an MoE model trains no expert, and DeepSpeed's optimizer asks for some",
                remedy="set parallel.engine: megatron",
            ),
        ),
    ),
)  # fmt: skip
