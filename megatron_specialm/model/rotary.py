"""Rotary positions where Transformer Engine's kernel does not compute them.

Megatron-Core computes cosines and sines anew for the queries and the keys of each layer, and joins the result with an empty
tensor. Here all layers of a chunk share them. The values are equal, and take about half of the time (docs/benchmarks.md).

Legend: T positions, B sequences, A attention heads, D head size.
"""

import functools
import importlib
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.weak import WeakTensorKeyDictionary

_tables: Any = WeakTensorKeyDictionary()  # cosines and sines by angles, and by the bounds of packed windows


@functools.cache
def install() -> None:
    """Have Megatron-Core's attention call `rotate`. Idempotent."""
    importlib.import_module("megatron.core.transformer.attention").apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


def rotate(
    states_TBAD: torch.Tensor,
    angles_T11D: torch.Tensor,
    config: TransformerConfig,
    cu_seqlens: torch.Tensor | None = None,
    mscale: float = 1.0,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """As Megatron-Core's `apply_rotary_pos_emb`: (T, B, A, D), or (T, A, D) with packed windows, -> the same shape.

    Each packed window begins at the first of the angles.
    """
    if config.apply_rope_fusion:
        return apply_rotary_pos_emb(states_TBAD, angles_T11D, config, cu_seqlens, mscale, cp_group)
    assert mscale == 1.0 and not config.rotary_interleaved and not config.multi_latent_attention
    assert angles_T11D.shape[-1] == states_TBAD.shape[-1], "all of a head is rotated"
    cosines, sines = _cosines_and_sines(angles_T11D, cu_seqlens)
    if cu_seqlens is not None:
        assert cp_group is None or cp_group.size() == 1, "each process has whole windows"
        cosines, sines = cosines[:, 0], sines[:, 0]
    return _Rotation.apply(states_TBAD, cosines.to(states_TBAD.dtype), sines.to(states_TBAD.dtype))


def _cosines_and_sines(angles_T11D: torch.Tensor, bounds: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (T, 1, 1, D); the sines of a head's first half are negative (`_Rotation`)."""
    tables = _tables.setdefault(angles_T11D, WeakTensorKeyDictionary())
    key = angles_T11D if bounds is None else bounds
    if key not in tables:
        if bounds is not None:
            angles_T11D = torch.cat([angles_T11D[:length] for length in bounds.diff().tolist()])
        first, second = torch.sin(angles_T11D).chunk(2, dim=-1)
        tables[key] = torch.cos(angles_T11D), torch.cat((-first, second), dim=-1)
    return tables[key]


class _Rotation(torch.autograd.Function):
    """states * cosines + (states with the halves of each head exchanged) * sines, where the sines of the first half are
    negative. The backward pass rotates the other way."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(cosines, sines)
        return _exchanged(states).mul_(sines).add_(states * cosines)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        return gradient * cosines - _exchanged(gradient).mul_(sines), None, None


def _exchanged(states: torch.Tensor) -> torch.Tensor:
    return states.roll(states.shape[-1] // 2, dims=-1)
