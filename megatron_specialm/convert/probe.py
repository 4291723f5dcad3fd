"""The logits of a model on fixed tokens, in fp32 and plain PyTorch, from canonical weights as they stream past.

This is a second description of the families, on purpose: it imports neither Megatron-Core nor Transformers, and both are
compared with it in tests. Memory is that of one layer in the weights' own type, and of one matrix in fp32.

A mixture of experts drops no token, whatever its capacity in training.

Legend: T positions, A attention heads, G key/value heads, D head size, H hidden size, P places of the vocabulary, E experts, K
experts per token.
"""

import math
from typing import Any

import torch
from torch.nn import functional

from megatron_specialm.config.architectures import rotary_scaling
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.weights import (
    EXPERT_BIAS,
    EXPERTS,
    OUTPUT_LAYER,
    RESIDUAL,
    RESIDUAL_MIX,
    ROUTER,
    SHARED_EXPERT,
    SHARED_EXPERT_GATE,
    WORD_EMBEDDINGS,
)

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
        """A weight of any type. A layer is computed when the first weight after it comes."""
        if name == WORD_EMBEDDINGS:
            self._x_TH = weight[self.tokens].float()
            self._output_PH = weight[self.places].float()
            return
        if name == OUTPUT_LAYER:
            self._output_PH = weight[self.places].float()
            return
        layer, _, part = _place(name)
        if layer != self._layer:
            self._compute()
            self._layer = layer
        self._held[part] = weight

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """(T, P) logits. All weights have been taken."""
        final = self._norm(self._x_TH, "final_layernorm")
        self.logits_TP = final @ self._output_PH.t()
        return self.logits_TP

    def _compute(self) -> None:
        if self._layer:
            self._x_TH = self._x_TH + self._attention(self._norm(self._x_TH, "input_layernorm"))
            self._x_TH = self._x_TH + self._feed_forward(self._norm(self._x_TH, "pre_mlp_layernorm"))
            self._held.clear()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, shape = self._held[f"{name}.weight"].float(), (x.shape[-1],)
        if self._config.family == "llama":
            return functional.rms_norm(x, shape, weight, self._config.norm_epsilon)
        return functional.layer_norm(x, shape, weight, self._held[f"{name}.bias"].float(), self._config.norm_epsilon)

    def _linear(self, x: torch.Tensor, name: str, expert: int | None = None) -> torch.Tensor:
        """Of a linear of all experts, one of them."""
        weight, bias = self._held[f"{name}.weight"], self._held.get(f"{name}.bias")
        if expert is not None:
            weight, bias = weight[expert], None if bias is None else bias[expert]
        return functional.linear(x, weight.float(), None if bias is None else bias.float())

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
        if ROUTER not in self._held:
            return self._network(x_TH, "mlp")
        output_TH = self._experts(x_TH)
        if SHARED_EXPERT_GATE in self._held:
            gate_T1 = self._linear(x_TH, SHARED_EXPERT_GATE.removesuffix(".weight")).sigmoid()
            output_TH = output_TH + gate_T1 * self._network(x_TH, SHARED_EXPERT)
        if f"{RESIDUAL_MIX}.weight" in self._held:
            mix_T2 = self._linear(x_TH, RESIDUAL_MIX).softmax(-1)
            output_TH = mix_T2[:, :1] * output_TH + mix_T2[:, 1:] * self._network(x_TH, RESIDUAL)
        return output_TH

    def _experts(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The sum of the outputs of each token's experts, with their weights."""
        moe = self._config.moe
        assert moe is not None
        logits_TE = self._linear(x_TH, ROUTER.removesuffix(".weight"))
        bias_E = self._held.get(EXPERT_BIAS)
        scores_TE = logits_TE.softmax(-1) if bias_E is None else logits_TE.sigmoid()
        chosen_TK = (scores_TE if bias_E is None else scores_TE + bias_E.float()).topk(moe.top_k).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        if moe.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        weights_TE = torch.zeros_like(scores_TE).scatter(1, chosen_TK, weights_TK)
        # An expert computes all tokens: sums of other numbers of rows would be in another order.
        outputs = (weights_TE[:, one, None] * self._network(x_TH, EXPERTS, one) for one in chosen_TK.unique().tolist())
        return torch.stack(list(outputs)).sum(0)

    def _network(self, x: torch.Tensor, place: str, expert: int | None = None) -> torch.Tensor:
        """A feed-forward network: the dense one of a layer, or one of its experts."""
        wide = self._linear(x, f"{place}.linear_fc1", expert)
        if self._config.family == "llama":
            gate, up = wide.chunk(2, dim=1)
            wide = functional.silu(gate) * up
        else:
            wide = functional.gelu(wide, approximate="tanh" if self._config.activation == "gelu_tanh" else "none")
        return self._linear(wide, f"{place}.linear_fc2", expert)


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
