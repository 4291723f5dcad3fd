"""Experts that a layout does not fit are refused, with the numbers and the nearest way out."""

from dataclasses import replace

import pytest

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.model import LowRank, ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import DeepSpeedConfig, ParallelConfig
from megatron_specialm.config.precision import Fp8Config
from megatron_specialm.estimate.capabilities import refuse
from megatron_specialm.estimate.setup import Setup

MODEL = ModelConfig(layers=6, hidden_size=96, ffn_hidden_size=384, attention_heads=6)


def _layout(**parallel) -> Setup:
    return Setup(MODEL, ParallelConfig(**parallel), "fp32", 1000, 48, global_batch_size=48, micro_batch_size=4)


def _moe(layout: dict, family: str = "llama", fp8: Fp8Config | None = None, **moe) -> Setup:
    model = MODEL.model_copy(update={"family": family, "moe": MixtureOfExperts(**{"experts": 8, **moe})})
    return replace(_layout(**layout), model=model, precision="fp8" if fp8 else "fp32", fp8=fp8)


@pytest.mark.parametrize(
    ("setup", "words", "way_out"),
    [
        (_layout(data_parallel=2, expert_parallel=2), "the model has no `moe`", "set parallel.expert_parallel: 1"),
        (_moe({"data_parallel": 4, "expert_parallel": 4}, experts=[8] * 5 + [6]), "must divide moe.experts [6, 8]", "is 2"),
        (_moe({"data_parallel": 2, "expert_parallel": 4}), "must divide the 2 processes", "is 2"),
        (_moe({"tensor_parallel": 2, "expert_parallel": 2, "sequence_parallel": True}), "must divide the 1 processes", "is 1"),
        (_moe({"tensor_parallel": 2}), "without sequence_parallel", "set parallel.sequence_parallel: true"),
        (_moe({"tensor_parallel": 3, "sequence_parallel": True}, ffn_hidden_size=64, top_k=1),
         "tensor_parallel 3 must divide", "parallel.tensor_parallel that does is 2"),
        (_moe({"tensor_parallel": 3, "sequence_parallel": True}, family="neox", shared_expert=64),
         "must divide feed-forward size 64", "parallel.tensor_parallel that does is 2"),
        (_moe({"data_parallel": 3, "expert_parallel": 3}, experts=4), "must divide moe.experts [4]", "is 1"),
        (_moe({"context_parallel": 2}, capacity_factor=1.5), "takes positions out of order", "parallel.context_parallel: 1"),
        (_moe({}, fp8=Fp8Config()), "has not been measured with experts", "set precision: bf16"),
    ],
)  # fmt: skip
def test_experts_that_a_layout_does_not_fit_are_refused(setup: Setup, words: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        refuse("slm", setup)
    assert words in str(refusal.value) and str(refusal.value).endswith(way_out)


@pytest.mark.parametrize(
    ("student", "teacher", "words", "way_out"),
    [
        (_layout(tensor_parallel=3), _moe({}, ffn_hidden_size=64), "must divide feed-forward size 64", "is 2"),
        (_layout(tensor_parallel=3), _moe({}, shared_expert=64), "must divide feed-forward size 64", "is 2"),
        (replace(_layout(), precision="fp8", fp8=Fp8Config()), _moe({}), "has not been measured with experts",
         "set precision: bf16"),
    ],
)  # fmt: skip
def test_so_are_experts_of_a_teacher_beside_a_dense_student(
    student: Setup, teacher: Setup, words: str, way_out: str
) -> None:
    refuse("slm", replace(student, teacher=teacher.model, parallel=ParallelConfig(), precision="fp32", fp8=None))
    with pytest.raises(ConfigError) as refusal:
        refuse("slm", replace(student, teacher=teacher.model))
    assert words in str(refusal.value) and str(refusal.value).endswith(way_out)


def test_a_proposal_breaks_no_condition_of_another_feature() -> None:
    """4 divides the experts' size too, but not the attention heads."""
    setup = _moe({"tensor_parallel": 6, "sequence_parallel": True}, ffn_hidden_size=64)
    with pytest.raises(ConfigError, match=r"feed-forward size 64 .* parallel.tensor_parallel that does is 2$"):
        refuse("slm", setup)


def test_experts_with_biases_may_lie_on_tensor_parallel_processes() -> None:
    refuse("slm", _moe({"tensor_parallel": 2, "expert_parallel": 2, "sequence_parallel": True}, family="neox"))
    teacher = _moe({"data_parallel": 2, "expert_parallel": 2})
    refuse("slm", replace(teacher, model=MODEL, teacher=teacher.model))


def _deepspeed(zero_stage: int, **layout) -> Setup:
    return replace(_moe({}), parallel=DeepSpeedConfig(engine="deepspeed", zero_stage=zero_stage, **layout))


@pytest.mark.parametrize(
    ("setup", "words", "way_out"),
    [
        (_deepspeed(3), "DeepSpeed-MoE has no ZeRO-3", "nearest parallel.zero_stage that does is 2"),
        (_deepspeed(0, data_parallel=2, expert_parallel=2), "expert_parallel 2 with zero_stage 0",
         "nearest parallel.zero_stage that does is 1"),
        (_deepspeed(1, data_parallel=2, expert_parallel=4), "must divide the 2 processes", "is 2"),
        (_deepspeed(1, pipeline_parallel=2), "does not offer pipeline parallel", "or parallel.engine: megatron"),
        (replace(_deepspeed(1), model=_moe({}).model.model_copy(update={"lora": LowRank(rank=4)})),
         "LoRA on an MoE model trains no expert", "set parallel.engine: megatron"),
    ],
)  # fmt: skip
def test_experts_that_deepspeed_does_not_train_are_refused(setup: Setup, words: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        refuse("slm", setup)
    assert words in str(refusal.value) and str(refusal.value).endswith(way_out)


def test_experts_that_deepspeed_trains() -> None:
    refuse("slm", _deepspeed(0, data_parallel=2))
    for stage in (1, 2):
        refuse("slm", _deepspeed(stage, tensor_parallel=3, data_parallel=2, expert_parallel=2, offload_optimizer=True))
