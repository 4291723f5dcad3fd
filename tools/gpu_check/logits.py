"""Logits of one model on the GPU, on the CPU and by Transformers, in fp32 and bf16, for both families.

`python -m gpu_check.logits FILE [tiny]` computes those on the CPU, in a process that sees no GPU. First weights are drawn by
name and so are equal everywhere.

Legend: B windows, T positions, V vocabulary.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gpu_check.figures import Figure, at_most, attempt
from gpu_check.training import preset
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.huggingface import huggingface_config, to_huggingface
from megatron_specialm.engine.open import single_process
from megatron_specialm.model.gpt import Gpt

SEED = 0
# Largest difference. fp32: an export's tolerance; bf16: relative to the largest logit, which has 8 bits.
FP32_DIFFERENCE, BF16_DIFFERENCE = 1e-3, 0.05


def compare(*, tiny: bool) -> Iterator[Figure]:
    """Largest differences."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cpu.safetensors")
        command = [sys.executable, "-m", "gpu_check.logits", str(path), *["tiny"] * tiny]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        on_cpu = load_file(path)
    for family in ("neox", "llama"):
        yield from attempt(family, _family(family, on_cpu, tiny=tiny))


def _family(family: str, on_cpu: dict[str, torch.Tensor], *, tiny: bool) -> Generator[Figure, None, None]:
    exact = on_cpu[f"{family} fp32"]
    yield Figure(f"{family}: largest logit", float(exact.abs().max()))
    for precision in ("fp32", "bf16"):
        here = _logits(family, precision, tiny=tiny)
        yield from _differences(
            f"{family} {precision}: this device, CPU", here, on_cpu[f"{family} {precision}"], precision
        )
        yield from _differences(f"{family} {precision}: this device, CPU in fp32", here, exact, precision)
    theirs = _transformers(family, tiny=tiny)
    yield from _differences(f"{family}: Transformers on the CPU, our CPU", theirs, exact, "fp32")


def _differences(name: str, ours: torch.Tensor, others: torch.Tensor, precision: str) -> Iterator[Figure]:
    largest = float((ours - others).abs().max())
    if precision == "fp32":
        yield at_most(name, largest, FP32_DIFFERENCE)
    else:
        yield at_most(f"{name}, of the largest", largest / float(others.abs().max()), BF16_DIFFERENCE)


def _shape(family: str, *, tiny: bool) -> tuple[ModelConfig, int, torch.Tensor]:
    """A model, its vocabulary, and (B, T) tokens."""
    name = {"neox": "slm-126m", "llama": "llama-130m"}[family]
    shape, vocabulary, context = preset(name), 32_000, 1024
    if tiny:
        shape, vocabulary, context = preset({"neox": "nano", "llama": "llama-tiny"}[family]), 300, 16
    tokens = np.random.default_rng(SEED).integers(0, vocabulary, (1, context))
    # Small first weights hide an activation's curvature: wider ones, as training makes them.
    return shape.model_copy(update={"init_std": 3 * shape.init_std}), vocabulary, torch.from_numpy(tokens)


@torch.no_grad()
def _logits(family: str, precision: str, *, tiny: bool) -> torch.Tensor:
    """Of our model on this process's device: (B, T, V) in fp32, on the CPU."""
    shape, vocabulary, tokens = _shape(family, tiny=tiny)
    with single_process(threads=len(os.sched_getaffinity(0))):
        model = Gpt(shape, vocabulary_size=vocabulary, context_length=tokens.shape[1], precision=precision)  # type: ignore[arg-type]
        model.initialize(seed=SEED)
        if precision == "bf16":  # norms are built in fp32, and a training's wrapper rounds them
            for chunk in model.chunks:
                chunk.bfloat16()
        return model.train(False).logits(tokens.to(model.device)).float().cpu().contiguous()


@torch.no_grad()
def _transformers(family: str, *, tiny: bool) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    shape, vocabulary, tokens = _shape(family, tiny=tiny)
    config = huggingface_config(shape, vocabulary_size=vocabulary, context_length=tokens.shape[1], eod=0)
    with single_process(threads=len(os.sched_getaffinity(0))):
        ours = Gpt(shape, vocabulary_size=vocabulary, context_length=tokens.shape[1])
        ours.initialize(seed=SEED)
        weights = {own.name: own.parameter.detach().cpu()[: own.spec.shape[0]] for own in ours.weights()}
        model = AutoModelForCausalLM.from_config(config).eval()
        missing, unexpected = model.load_state_dict(to_huggingface(weights, shape), strict=False)
        tied = {"lm_head.weight", "embed_out.weight"} if shape.tie_embeddings else set()
        assert not unexpected and set(missing) <= tied, (missing, unexpected)
        return model(tokens).logits.float()


if __name__ == "__main__":
    small = sys.argv[2:] == ["tiny"]
    save_file(
        {f"{family} {precision}": _logits(family, precision, tiny=small)
         for family in ("neox", "llama") for precision in ("fp32", "bf16")},
        sys.argv[1],
    )  # fmt: skip
