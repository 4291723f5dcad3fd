"""Peak memory of training steps against the estimate of `estimate/memory.py`."""

from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np
import torch
from bench_moe import dense_of, large, small

from gpu_check.figures import Figure, attempt, between
from gpu_check.training import drawn_on_device, engine_of, free, preset, random_batch, uneven_batch
from megatron_specialm.base.accelerator import find_accelerator
from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config
from megatron_specialm.data.packing import MicroBatches
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.capabilities import lacking
from megatron_specialm.estimate.memory import memory_of
from megatron_specialm.estimate.setup import Setup

MIB = 2**20


def against_estimate(*, tiny: bool) -> Iterator[Figure]:
    """The ratio of the peak to the estimate, over precisions, recomputation, families, projected networks, LoRA, packed
    windows, and a mixture of experts with its dense model."""
    machine, refused = find_accelerator(), ""
    with single_process():
        for name, setup in _setups(tiny=tiny):
            if reason := lacking(setup, machine):
                yield Figure(name, "not possible here")
                refused = reason
            else:
                yield from attempt(name, _ratio(name, setup, fused=machine.has_fused_layers))
    if refused or not torch.cuda.is_available():
        raise MachineError(refused or "the peak is CUDA's count, and there is no GPU")


def _ratio(name: str, setup: Setup, *, fused: bool) -> Generator[Figure, None, None]:
    free()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    batch = random_batch(setup) if setup.packing == "none" else uneven_batch(setup)
    engine = engine_of(setup, first_weights=drawn_on_device)
    for _ in range(3):
        engine.train_step(batch, learning_rate=1e-4)
    if MIXTURE in batch.extra_inputs:  # drawn experts: several micro-batches may have the same one
        setup = replace(setup, variants=len(np.unique(batch.extra_inputs[MIXTURE], axis=0)))
    estimate = estimate_of(setup, batch, fused=fused)
    yield Figure(f"{name}: estimate", estimate / MIB, "MiB")
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() - before
        yield Figure(f"{name}: peak", peak / MIB, "MiB")
        yield between(f"{name}: peak / estimate", peak / estimate, 0.9, 1.1)


def estimate_of(setup: Setup, batch: Batch, *, fused: bool) -> int:
    """The estimate in bytes for a step on a batch: for the largest of its micro-batches."""
    parts = MicroBatches(setup.packing, setup.micro_batch_size).of([batch])
    largest = max(part.tokens.size for part in parts)
    return memory_of(replace(setup, context_length=largest // setup.micro_batch_size), fused=fused).total


def _setups(*, tiny: bool) -> Iterator[tuple[str, Setup]]:
    neox, llama = (preset(name) for name in (("nano", "llama-tiny") if tiny else ("slm-126m", "llama-130m")))
    yield "neox fp32", _setup(neox, "fp32", tiny=tiny)
    for recompute in ("none", "selective", "full"):
        yield f"neox bf16, recompute {recompute}", _setup(neox, "bf16", tiny=tiny, recompute=recompute)
    yield "llama bf16", _setup(llama, "bf16", tiny=tiny)
    projection = {"projection": Projection(experts=8, capacity=6, code_size=8)}
    packed = _setup(neox, "bf16", tiny=tiny)
    yield "neox bf16, packed", replace(packed, packing="packed", global_batch_size=4 * packed.micro_batch_size)
    moe = small(2) if tiny else replace(large(), micro_batch_size=8, global_batch_size=8)
    yield "MoE bf16", replace(moe, precision="bf16")
    yield "dense beside the MoE, bf16", replace(dense_of(moe), precision="bf16")
    yield "neox bf16, projected", _setup(neox.model_copy(update=projection), "bf16", tiny=tiny)
    yield "neox bf16, LoRA", _setup(neox.model_copy(update={"lora": LowRank(rank=64)}), "bf16", tiny=tiny)
    yield "neox FP8 tensorwise", _setup(neox, "fp8", tiny=tiny)


def _setup(model: ModelConfig, precision: str, *, tiny: bool, recompute: str = "none") -> Setup:
    vocabulary, context, micro_batch = (304, 32, 2) if tiny else (32_000, 1024, 8)
    projected = model.projection is not None
    return Setup(
        model, ParallelConfig(recompute=recompute), precision, vocabulary, context,  # type: ignore[arg-type]
        global_batch_size=4 * micro_batch if projected else micro_batch, micro_batch_size=micro_batch,
        fp8=Fp8Config() if precision == "fp8" else None,
    )  # fmt: skip
