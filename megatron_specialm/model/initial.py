"""First weights: each canonical weight is drawn from a generator seeded by (seed, name), so that no layout changes it."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.weights import EXPERT_CODES, Sliceable, WeightSpec, weight_specs

# The initial coefficient of each matrix in which experts differ, relative to 1 for the matrix that all experts share. Adam
# moves all matrices at the same rate and these updates add up. With large coefficients the expert's weights change too fast.
EXPERT_SPREAD = 0.3


def first_weight(name: str, spec: WeightSpec, config: ModelConfig, *, seed: int) -> Sliceable:
    """The first value of a canonical weight. Experts are drawn one by one, when their slices are read: a process that holds few
    of them draws few."""
    if not spec.is_expert:
        return first_value(name, spec.shape, config, seed=seed)
    return _Experts(name, spec.shape, config, seed)


@dataclass(frozen=True)
class _Experts:
    """The first values of a weight of all experts of a layer, (E, ...): each from a generator of its own."""

    name: str
    shape: tuple[int, ...]
    config: ModelConfig
    seed: int

    def __getitem__(self, index: Any) -> torch.Tensor:
        experts, *rest = index if isinstance(index, tuple) else (slice(None),)
        found = [
            first_value(self.name, self.shape[1:], self.config, seed=f"{self.seed}/expert {expert}")
            for expert in range(*experts.indices(self.shape[0]))
        ]
        return torch.stack(found)[(slice(None), *rest)]


def first_value(name: str, shape: Sequence[int], config: ModelConfig, *, seed: int | str) -> torch.Tensor:
    """N(0, init_std); N(0, init_std / sqrt(2 L)) for the linears that write to the residual stream; biases 0, norms 1.

    Every expert of a projected network starts with these variances. Its coefficients are 1 for the first matrix, which all
    experts share, and random for the others, with the mean square of EXPERT_SPREAD. LoRA's A is random and its B is 0, so that
    the initial change is zero.

    Legend: K experts, M code size, H capacity.
    """
    generator = _generator(f"{seed}/{name}")
    if "layernorm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith(("bias", "bias_basis", "lora_b")):
        return torch.zeros(shape)
    drawn = torch.randn(shape, generator=generator)
    if config.projection is not None and name == EXPERT_CODES:
        return _first_codes(drawn, config.projection.capacity)
    if name.endswith("mlp.projection"):
        return _first_projection(drawn)
    if name.endswith("lora_a"):
        return drawn / math.sqrt(shape[1])
    residual = "linear_proj.weight" in name or "linear_fc2.weight" in name
    std = config.init_std / (math.sqrt(2 * config.layers) if residual else 1)
    if name.endswith("weight_basis"):
        std /= math.sqrt(1 + (shape[0] - 1) * EXPERT_SPREAD**2)
    return drawn * std


def first_adapters(config: ModelConfig, *, vocabulary_size: int, seed: int) -> dict[str, torch.Tensor]:
    """The canonical first weights of LoRA's adapters, which a base model lacks; empty without `config.lora`."""
    specs = weight_specs(config, vocabulary_size=vocabulary_size)
    return {name: first_value(name, specs[name].shape, config, seed=seed) for name in specs if ".lora_" in name}


def _first_codes(drawn_KM: torch.Tensor, capacity: int) -> torch.Tensor:
    """1 for the matrix that all experts share, then the expert's own entries, scaled to the same length for all experts."""
    used = min(drawn_KM.shape[1], capacity) - 1
    codes_KM = EXPERT_SPREAD * drawn_KM
    codes_KM[:, 0] = 1
    own = codes_KM[:, 1 : 1 + used]
    own *= EXPERT_SPREAD * math.sqrt(capacity - 1) / own.norm(dim=1, keepdim=True)
    return codes_KM


def _first_projection(drawn_MH: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows, so that the coefficients have the code's length. If the code is longer than the number of matrices, its
    last entries have no effect at first, like LoRA's A while B is zero."""
    used = min(drawn_MH.shape) - 1
    projection_MH = torch.zeros_like(drawn_MH)
    projection_MH[0, 0] = 1
    projection_MH[1 : 1 + used, 1:] = torch.linalg.qr(drawn_MH[1 : 1 + used, 1:].t()).Q.t()
    return projection_MH


def _generator(label: str) -> torch.Generator:
    digest = hashlib.sha256(label.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) % 2**63)
