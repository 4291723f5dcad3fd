"""A training step of a mixture of experts against the dense model with as many active parameters (tools/bench_moe.py)."""

import statistics
from collections.abc import Iterator
from dataclasses import replace

from bench_moe import Comparison, compare, dense_of, large, small

from gpu_check.figures import Figure, at_most
from gpu_check.training import with_smaller_batches
from megatron_specialm.base.accelerator import name_of_device
from megatron_specialm.base.gpus import utilisation
from megatron_specialm.engine.open import single_process

RATIO = 1 / 0.6  # 0.6 of the dense model's tokens per second


def beside_dense(*, tiny: bool) -> Iterator[Figure]:
    """Tokens per second and MFU of both, and the ratio of times."""
    setup, rounds, steps = (small(4), 1, 1) if tiny else (large(), 5, 3)

    def measured(size: int) -> Comparison:
        return compare(replace(setup, micro_batch_size=size, global_batch_size=size), rounds=rounds, steps=steps)

    with single_process():
        found, size = with_smaller_batches(measured, setup.micro_batch_size)
    for name, one, milliseconds in (("dense", dense_of(setup), found.dense), ("MoE", setup, found.moe)):
        tokens = size * setup.context_length
        flops = one.changed({"global_batch_size": size, "micro_batch_size": size}).step_flops
        mfu = utilisation(flops=flops, seconds=milliseconds / 1e3, devices=1, device_name=name_of_device())
        yield Figure(f"{name}: step of {size} windows", milliseconds, "ms")
        yield Figure(f"{name}: speed", tokens / milliseconds * 1e3, "tokens/s")
        yield Figure(f"{name}: MFU", "unknown peak" if mfu is None else 100 * mfu, "" if mfu is None else "%")
    ratio = statistics.median(found.ratios)
    yield Figure("ratio", ratio) if tiny else at_most("ratio", ratio, RATIO)
