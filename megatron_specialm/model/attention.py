"""Core attention where Transformer Engine's cannot be used: PyTorch's fused kernel.

A packed sequence is computed window by window. On a CPU that took less time than attention over padded windows or, with a block
mask, over the whole sequence (docs/benchmarks.md).

Legend: T positions, B sequences, A attention heads, G key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional


@dataclass
class PackedWindows(PackedSeqParams):
    """Megatron-Core's parameters, whose bounds are on the device, and the windows' lengths on the host: attention window by
    window then does not wait for a GPU in each layer."""

    lengths: Sequence[int] = ()


class FusedCoreAttention(torch.nn.Module):
    """Causal attention by `scaled_dot_product_attention`, instead of Megatron-Core's unfused attention.

    Sequences are padded at their end only. So causality is enough to keep padding out of all real positions.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **_: Any
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self", "causal self-attention only"
        assert config.attention_dropout == 0.0 and config.context_parallel_size == 1
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        query_TBAD: torch.Tensor,
        key_TBGD: torch.Tensor,
        value_TBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedWindows | None = None,
    ) -> torch.Tensor:
        """(T, B, A, D), (T, B, G, D), (T, B, G, D) -> (T, B, A * D). A packed sequence has no dimension B."""
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is None:
            return causal_attention(query_TBAD, key_TBGD, value_TBGD)
        lengths = packed_seq_params.lengths
        windows = zip(*(part[:, None].split(lengths) for part in (query_TBAD, key_TBGD, value_TBGD)), strict=True)
        return torch.cat([causal_attention(*window) for window in windows])


def causal_attention(query_TBAD: torch.Tensor, key_TBGD: torch.Tensor, value_TBGD: torch.Tensor) -> torch.Tensor:
    """(T, B, A, D), (T, B, G, D), (T, B, G, D) -> (T, B, A * D)."""
    context_BATD = functional.scaled_dot_product_attention(
        query_TBAD.permute(1, 2, 0, 3),
        key_TBGD.permute(1, 2, 0, 3),
        value_TBGD.permute(1, 2, 0, 3),
        is_causal=True,
        enable_gqa=query_TBAD.shape[2] != key_TBGD.shape[2],
    )
    return context_BATD.permute(2, 0, 1, 3).flatten(2)
