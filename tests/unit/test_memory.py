"""The memory estimate, against what training takes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from megatron_specialm.base.environment import ALONE
from megatron_specialm.config.load import configs_folder
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import DeepSpeedConfig, ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.objective import cross_entropy
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.estimate.memory import Change, memory_of, smallest_change
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.weights import weight_specs
from megatron_specialm.train.distillation import Distillation
from tests.memory import PeakMemory

NEOX = ModelConfig(layers=4, hidden_size=128, ffn_hidden_size=512, attention_heads=4)
LLAMA = ModelConfig(family="llama", layers=4, hidden_size=128, ffn_hidden_size=384, attention_heads=4, query_groups=2)
EXPERTS = 5
PROJECTION = {"projection": Projection(experts=EXPERTS, capacity=6, code_size=7)}
LORA = {"lora": LowRank(rank=8)}
LARGE = Setup(
    ModelConfig(layers=24, hidden_size=1024, ffn_hidden_size=4096, attention_heads=16), ParallelConfig(), "bf16",
    vocabulary_size=32_000, context_length=1024, global_batch_size=512, micro_batch_size=16,
)  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
@pytest.mark.parametrize("vocabulary", [300, 3000])
def test_within_ten_percent_of_what_a_step_takes(
    model: ModelConfig, precision: str, recompute: str, vocabulary: int
) -> None:
    _check(model, precision, recompute, vocabulary)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
@pytest.mark.parametrize("derived", [PROJECTION, LORA], ids=["projection", "lora"])
def test_so_it_is_with_derived_weights(model: ModelConfig, precision: str, recompute: str, derived: dict) -> None:
    _check(model.model_copy(update=derived), precision, recompute, 300)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [300, 3000])
def test_so_it_is_with_a_teacher_beside_it(precision: str, vocabulary: int) -> None:
    _check(NEOX, precision, "none", vocabulary, teacher=NEOX.model_copy(update={"hidden_size": 256}))


@pytest.mark.parametrize(
    ("precision", "recompute"), [("fp32", "none"), ("fp32", "selective"), ("fp32", "full"), ("bf16", "none")]
)
@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
def test_so_it_is_with_experts(model: ModelConfig, precision: str, recompute: str) -> None:
    _check(model.model_copy(update={"moe": MixtureOfExperts(experts=4)}), precision, recompute, 300)


def _check(
    model: ModelConfig, precision: str, recompute: str, vocabulary: int, teacher: ModelConfig | None = None
) -> None:
    parallel = ParallelConfig(recompute=recompute)
    setup = Setup(
        model, parallel, precision, vocabulary,
        context_length=128, global_batch_size=12, micro_batch_size=4, teacher=teacher,
        variants=3 if model.projection else 0,
    )  # fmt: skip
    memory = memory_of(setup, fused=False)
    with process_group(ALONE, parallel=parallel):
        gpt, beside = (
            Gpt(one, vocabulary_size=vocabulary, context_length=128, precision=precision, parallel=parallel)
            for one in (model, teacher or model)
        )
        gpt.initialize(seed=0)
        beside.initialize(seed=1)
        engine = MegatronEngine(
            gpt,
            parallel=parallel,
            optimizer=Optimizer(),
            micro_batch_size=4,
            objective=Distillation(alpha=0.5, temperature=1.0, teacher="online") if teacher else cross_entropy,
            teacher=beside if teacher else None,
        )
        held = sum(parameter.nbytes for _, parameter, _ in gpt.weights())
        rounded = [one for _, one, _ in gpt.weights() if one.requires_grad and one.dtype == torch.bfloat16]
        gradients = sum(gradient.nbytes for gradient in engine.gradients().values())
        windows = np.random.default_rng(0).integers(0, vocabulary, (12, 129))
        notes = {MIXTURE: np.eye(EXPERTS, dtype=np.float32)[[0, 2, 3]].repeat(4, 0)} if model.projection else {}
        batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((12, 128), np.float32), notes)
        engine.train_step(batch, learning_rate=1e-3)
        with PeakMemory() as taken:
            engine.accumulate_gradients(batch)
        state = sum(tensor.nbytes for name, tensor in engine.optimizer_state().items() if name != "step")
    originals = sum(2 * parameter.nbytes for parameter in rounded)
    assert memory.derived + memory.activations + memory.working == pytest.approx(taken.peak, rel=0.1)
    # Checkpoints have no padding of the vocabulary; a process has.
    assert memory.weights == held
    assert memory.teacher == (sum(parameter.nbytes for _, parameter, _ in beside.weights()) if teacher else 0)
    assert memory.gradients == pytest.approx(gradients, rel=0.15)
    assert memory.optimizer == pytest.approx(state + originals, rel=0.15)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
@pytest.mark.parametrize("derived", [{}, PROJECTION, LORA], ids=["plain", "projection", "lora"])
def test_weights_are_counted_as_they_are_cut(model: ModelConfig, derived: dict, share: int) -> None:
    config = model.model_copy(
        update={"attention_heads": 8, "query_groups": 4 if model.query_groups else None, **derived}
    )
    setup = Setup(config, ParallelConfig(tensor_parallel=share), "fp32", 300, 128, 8, 4)
    held = 0
    for spec in weight_specs(config, vocabulary_size=300, tensor_parallel=share).values():
        rows = spec.padded or spec.shape[0]
        held += rows * math.prod(spec.shape[1:]) // (1 if spec.cut is None else share)
    memory = memory_of(setup, fused=False)
    assert memory.weights == 4 * held
    if not config.lora:
        assert memory.gradients == memory.weights


def test_every_share_is_smaller() -> None:
    whole = memory_of(LARGE, fused=True)
    halved = memory_of(replace(LARGE, parallel=ParallelConfig(tensor_parallel=2)), fused=True)
    assert halved.weights == pytest.approx(whole.weights / 2, rel=0.01)
    staged = memory_of(replace(LARGE, parallel=ParallelConfig(pipeline_parallel=4)), fused=True)
    assert staged.weights < whole.weights / 2 and staged.activations > 0.8 * whole.activations, "1F1B keeps four"
    shared = memory_of(replace(LARGE, parallel=ParallelConfig(data_parallel=4, distributed_optimizer=True)), fused=True)
    assert shared.optimizer == whole.optimizer // 4


def test_experts_are_split_over_the_processes_that_have_them() -> None:
    model = LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=8)})
    split = {"data_parallel": 4, "expert_parallel": 4}
    whole, one = (
        memory_of(replace(LARGE, model=model, parallel=parallel), fused=True)
        for parallel in (ParallelConfig(), DeepSpeedConfig(engine="deepspeed", zero_stage=2, **split))
    )
    experts = 8 * LLAMA.layers * 3 * LLAMA.hidden_size * LLAMA.ffn_hidden_size
    assert one.weights == pytest.approx(whole.weights - 0.75 * experts * 2, rel=1e-6)
    assert one.gradients == pytest.approx(whole.gradients / 4, rel=1e-6), "a quarter of the experts, whole"
    assert one.optimizer == pytest.approx(whole.optimizer / 4, rel=1e-6)
    adapted = memory_of(replace(LARGE, model=model.model_copy(update=LORA)), fused=True)
    assert adapted.optimizer == memory_of(replace(LARGE, model=LLAMA.model_copy(update=LORA)), fused=True).optimizer


def test_expert_parallelism_is_advised() -> None:
    moe = ModelConfig(**yaml.safe_load((configs_folder() / "models" / "moe-30b-64e.yaml").read_text()))
    setup = replace(
        LARGE, model=moe, micro_batch_size=1, parallel=ParallelConfig(data_parallel=8, distributed_optimizer=True)
    )
    split = memory_of(setup.changed({"parallel.expert_parallel": 8}), fused=True).total
    assert split < memory_of(setup, fused=True).total / 3
    assert smallest_change(setup, split, fused=True) == Change({"parallel.expert_parallel": 8})
    with_tensors = Change({"parallel.tensor_parallel": 2, "parallel.sequence_parallel": True})
    alone = replace(setup, parallel=ParallelConfig())
    limit = memory_of(alone.changed(with_tensors.settings), fused=True).total
    assert smallest_change(alone, limit, fused=True) == with_tensors
    deepspeed = replace(setup, parallel=DeepSpeedConfig(engine="deepspeed", data_parallel=8, zero_stage=2))
    change = smallest_change(deepspeed, split // 3, fused=True)
    assert change is not None and "parallel.zero_stage" not in change.settings, "ZeRO-3 is refused with experts"


def test_fp32_is_never_computed_by_transformer_engine() -> None:
    full = replace(LARGE, model=LLAMA, precision="fp32")
    assert memory_of(full, fused=True) == memory_of(full, fused=False)


def test_the_smallest_change_fits() -> None:
    needed = memory_of(LARGE, fused=True).total
    assert smallest_change(LARGE, needed - 1, fused=True) == Change({"micro_batch_size": 8})
    copies = replace(LARGE, parallel=ParallelConfig(data_parallel=2))
    assert smallest_change(copies, needed - 1, fused=True) == Change({"parallel.distributed_optimizer": True})
    alone = replace(LARGE, micro_batch_size=1)
    tight = memory_of(replace(alone, parallel=ParallelConfig(recompute="full")), fused=True).total
    assert smallest_change(alone, tight, fused=True) == Change({"parallel.recompute": "full"})
    assert smallest_change(LARGE, 2**20, fused=True) is None
    assert Change({"micro_batch_size": 8, "parallel.recompute": "full"}).describe() == (
        "set micro_batch_size: 8 and parallel.recompute: full"
    )
