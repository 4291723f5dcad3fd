"""The logits of a model on fixed tokens, in fp32 and plain PyTorch, from canonical weights as they stream past.

This is a second description of the families, on purpose: it imports neither Megatron-Core nor Transformers, and both are
compared with it in tests. Memory is that of one layer.

Legend: T positions, A attention heads, G key/value heads, D head size, H hidden size, P places of the vocabulary.
"""

import math
from typing import Any

import torch
from torch.nn import functional

from megatron_specialm.config.architectures import rotary_scaling
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.weights import OUTPUT_LAYER, WORD_EMBEDDINGS

TOKENS, PLACES = 16, 8


def probe_ids(count: int, vocabulary_size: int) -> list[int]:
    """Token ids that are spread over a vocabulary."""
    return [(7 * number * number + 101 * number + 1) % vocabulary_size for number in range(count)]


class Probe:
    """Takes canonical weights in the order of the forward pass. Afterwards `logits_TP` has the result.

    `tokens` are its input, one sequence; `places` the ids whose logits are computed.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        self.tokens, self.places = probe_ids(TOKENS, vocabulary_size), probe_ids(PLACES, vocabulary_size)
        self.logits_TP: torch.Tensor | None = None
        self._config, self._layer, self._held = config, "", {}  # type: ignore[var-annotated]
        self._rotation = _rotation(config, TOKENS)

    @torch.no_grad()
    def take(self, name: str, weight: torch.Tensor) -> None:
        """A weight in fp32. A layer is computed when the first weight after it comes. Mixtures of experts are not."""
        if self._config.moe is not None:
            return
        if name == WORD_EMBEDDINGS:
            self._x_TH = weight[self.tokens].clone()
            self._output_PH = weight[self.places].clone()
            return
        if name == OUTPUT_LAYER:
            self._output_PH = weight[self.places].clone()
            return
        layer, _, part = _place(name)
        if layer != self._layer:
            self._compute()
            self._layer = layer
        self._held[part] = weight

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """(T, P) logits, none of a mixture of experts. All weights have been taken."""
        if self._config.moe is not None:
            return torch.empty(0, PLACES)
        final = self._norm(self._x_TH, "final_layernorm")
        self.logits_TP = final @ self._output_PH.t()
        return self.logits_TP

    def _compute(self) -> None:
        if self._layer:
            self._x_TH = self._x_TH + self._attention(self._norm(self._x_TH, "input_layernorm"))
            self._x_TH = self._x_TH + self._feed_forward(self._norm(self._x_TH, "pre_mlp_layernorm"))
            self._held.clear()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, shape = self._held[f"{name}.weight"], (x.shape[-1],)
        if self._config.family == "llama":
            return functional.rms_norm(x, shape, weight, self._config.norm_epsilon)
        return functional.layer_norm(x, shape, weight, self._held[f"{name}.bias"], self._config.norm_epsilon)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self._held[f"{name}.weight"], self._held.get(f"{name}.bias"))

    def _attention(self, x_TH: torch.Tensor) -> torch.Tensor:
        config = self._config
        heads = config.attention_heads // config.kv_heads
        packed = self._linear(x_TH, "self_attention.linear_qkv").unflatten(
            1, (config.kv_heads, heads + 2, config.head_size)
        )
        query, key, value = packed.split([heads, 1, 1], dim=2)
        query_TAD, key_TGD, value_TGD = query.flatten(1, 2), key.squeeze(2), value.squeeze(2)
        if config.qk_norm:
            query_TAD = self._norm(query_TAD, "self_attention.q_layernorm")
            key_TGD = self._norm(key_TGD, "self_attention.k_layernorm")
        query_TAD, key_TGD = (_rotate(x, self._rotation) for x in (query_TAD, key_TGD))
        key_TAD, value_TAD = (x.repeat_interleave(heads, dim=1) for x in (key_TGD, value_TGD))
        scores_ATT = torch.einsum("tad,sad->ats", query_TAD, key_TAD) / math.sqrt(config.head_size)
        hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        shares_ATT = scores_ATT.masked_fill(hidden, -math.inf).softmax(-1)
        return self._linear(
            torch.einsum("ats,sad->tad", shares_ATT, value_TAD).flatten(1), "self_attention.linear_proj"
        )

    def _feed_forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        wide = self._linear(x_TH, "mlp.linear_fc1")
        if self._config.family == "llama":
            gate, up = wide.chunk(2, dim=1)
            wide = functional.silu(gate) * up
        else:
            wide = functional.gelu(wide, approximate="tanh" if self._config.activation == "gelu_tanh" else "none")
        return self._linear(wide, "mlp.linear_fc2")


def _place(name: str) -> tuple[str, str, str]:
    """`decoder.layers.3.mlp.linear_fc1.weight` -> (`3`, ".", `mlp.linear_fc1.weight`); of the final norm (``, ...)."""
    rest = name.removeprefix("decoder.")
    return rest.removeprefix("layers.").partition(".") if rest.startswith("layers.") else ("", "", rest)


def _rotation(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (T, 1, D) of rotary positions."""
    size = config.head_size
    frequencies = 1.0 / config.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaling: dict[str, Any] = rotary_scaling(config)
    if scaling["rope_type"] == "llama3":
        slow, fast, original = (
            scaling[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        turns = original * frequencies / (2 * math.pi)  # in the original context
        share = ((turns - slow) / (fast - slow)).clamp(0, 1)  # of the frequency that stays
        frequencies = share * frequencies + (1 - share) * frequencies / scaling["factor"]
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(T, heads, D), whose first half of D are the pairs' first numbers and whose second half their second."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = rotation
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
