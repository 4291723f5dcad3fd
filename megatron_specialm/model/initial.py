"""First weights: each canonical weight is drawn whole from a generator of (seed, its name), so no layout changes it."""

import hashlib
import math
from collections.abc import Sequence

import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.weights import EXPERT_CODES

# How far experts start from each other: the coefficient of each matrix that tells them apart, beside 1 for the one that
# they share. Adam moves every matrix at the same rate, so these add up: large ones make the whole expert jump.
EXPERT_SPREAD = 0.3


def first_value(name: str, shape: Sequence[int], config: ModelConfig, *, seed: int) -> torch.Tensor:
    """N(0, init_std), projections back into the residual stream N(0, init_std / sqrt(2 L)); biases 0, norms 1.

    Of a projected network every expert starts with these variances: its coefficients are 1 for the first matrix, which
    all experts share, and N(0, EXPERT_SPREAD) for each of the others. LoRA starts at zero change: A is drawn, B is 0.
    """
    generator = _generator(f"{seed}/{name}")
    if "layernorm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith(("bias", "bias_basis", "lora_b")):
        return torch.zeros(shape)
    if name == EXPERT_CODES:
        return _shared_first(torch.ones(shape[0]), EXPERT_SPREAD * torch.randn(shape, generator=generator))
    drawn = torch.randn(shape, generator=generator)
    if name.endswith("mlp.projection"):
        code_size, _ = shape
        drawn[:, 0] = 0
        drawn[0] = 0
        drawn /= math.sqrt(max(code_size - 1, 1))
        drawn[0, 0] = 1
        return drawn
    if name.endswith("lora_a"):
        return drawn / math.sqrt(shape[1])
    residual = "linear_proj.weight" in name or "linear_fc2.weight" in name
    std = config.init_std / (math.sqrt(2 * config.layers) if residual else 1)
    if name.endswith("weight_basis"):
        std /= math.sqrt(1 + (shape[0] - 1) * EXPERT_SPREAD**2)
    return drawn * std


def _shared_first(first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([first[:, None], codes[:, 1:]], 1)


def _generator(label: str) -> torch.Generator:
    digest = hashlib.sha256(label.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) % 2**63)
