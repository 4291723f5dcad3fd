"""Model shapes. (Their parameters and FLOPs: `estimate/`.)

Legend: A attention heads, G query groups, D the head size: hidden size / A unless `kv_channels` is set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from megatron_specialm.config.base import Settings
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.precision import LINEARS, Linear


class Projection(Settings):
    """SLM-pn (Grangier et al., arXiv 2402.01093, section 2): the feed-forward linears of expert i in layer l are
    `W(l,i) = sum_r (E[i] M(l))[r] T(l)[r]`, with codes E (experts, code_size), M(l) (code_size, capacity) and T(l)
    (capacity, out, in). All other weights are common to the experts."""

    experts: PositiveInt = Field(description="k: the number of experts, one per cluster")
    capacity: PositiveInt = Field(description="h: matrices per linear that experts are combined from")
    code_size: PositiveInt = Field(description="m: the length of an expert's code")


class LowRank(Settings):
    """LoRA (arXiv 2106.09685): a linear's weight is `W + alpha / rank * B A`, and only A (rank, in) and B (out, rank)
    are trained. B starts at zero, so training starts from the base model exactly."""

    rank: PositiveInt = Field(default=64, description="the paper's")
    alpha: PositiveFloat | None = Field(default=None, description="default: rank, a factor of one")
    linears: list[Linear] = Field(default=list(LINEARS), min_length=1, description="of each layer")

    @property
    def factor(self) -> float:
        """The factor of B A."""
        return (self.alpha or self.rank) / self.rank


Activation = Literal["gelu", "gelu_tanh"]


@dataclass(frozen=True)
class FeedForwardPart:
    """Equal feed-forward networks of a layer: their size, how many there are, and how many of them compute a token."""

    ffn_hidden_size: int
    count: int = 1
    active: int = 1


class ModelConfig(Settings):
    """A decoder-only transformer. The families differ in norm, activation and biases only.

    `neox`: LayerNorm, GELU, biases, exported as GPT-NeoX (the paper's models). `llama`: RMSNorm, SwiGLU, no biases,
    grouped queries allowed, exported as Llama. Both use rotary positions and pre-norm blocks.
    """

    name: str = Field(default="custom", description="shown in tables and model cards")
    family: Literal["neox", "llama"] = "neox"
    layers: PositiveInt = Field(le=10_000)
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    attention_heads: PositiveInt
    query_groups: PositiveInt | None = Field(default=None, description="key/value heads; default: one per head")
    tie_embeddings: bool = True
    kv_channels: PositiveInt | None = Field(
        default=None, description="the size of a head; default: hidden_size / attention_heads"
    )
    qkv_bias: bool = Field(default=False, description="of family llama: queries, keys and values have a bias (Qwen2)")
    qk_norm: bool = Field(default=False, description="of family llama: RMSNorm of each query and key head (Qwen3)")
    rotary_base: PositiveInt = 10_000
    rotary_scaling: PositiveFloat | None = Field(
        default=None, description="Llama 3's: slow rotations are slower by this factor, for contexts over 8,192 tokens"
    )
    norm_epsilon: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    activation: Activation = Field(
        default="gelu",
        description="of family neox: exact, or by its tanh approximation, which a GPU computes in one kernel",
    )
    moe: MixtureOfExperts | None = Field(default=None, description="mixture-of-experts layers")
    projection: Projection | None = Field(default=None, description="SLM-pn: many experts in one model")
    lora: LowRank | None = Field(default=None, description="set by a train stage's `lora`, not in a preset")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if (self.kv_channels is None and self.hidden_size % self.attention_heads) or self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over attention_heads {self.attention_heads} (or kv_channels) must give an "
                "even whole head size (rotary positions turn pairs)"
            )
        if self.attention_heads % self.kv_heads:
            raise ValueError(
                f"attention_heads {self.attention_heads} must be a multiple of query_groups {self.kv_heads}"
            )
        if self.family == "neox" and self.kv_heads != self.attention_heads:
            raise ValueError("family neox has no grouped queries (GPT-NeoX cannot hold them): use family llama")
        if self.family == "neox" and (self.qkv_bias or self.qk_norm):
            raise ValueError("qkv_bias and qk_norm are for family llama (neox has biases everywhere): leave them out")
        if self.family == "llama" and self.activation != "gelu":
            raise ValueError(f"activation {self.activation} is for family neox; llama's is SwiGLU: leave it out")
        return self

    @model_validator(mode="after")
    def _check_moe(self) -> Self:
        if self.moe is None:
            return self
        layers = self.layers // self.moe.every
        if not layers:
            raise ValueError(
                f"moe.every {self.moe.every} is more than layers {self.layers}: no layer would have experts"
            )
        if isinstance(self.moe.experts, list) and len(self.moe.experts) != layers:
            raise ValueError(
                f"moe.experts has {len(self.moe.experts)} numbers, and layers {self.layers} with moe.every {self.moe.every} "
                f"make {layers} MoE layers: give {layers} numbers, or one for all"
            )
        if self.projection is not None:
            raise ValueError("moe and projection both replace the feed-forward parts: set one of them")
        if self.lora is not None and (places := {"fc1", "fc2"} & set(self.lora.linears)):
            raise ValueError(
                f"lora.linears {', '.join(sorted(places))}: the feed-forward parts of this model are experts, which have no "
                "adapters: set lora.linears to [qkv, proj]"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_activation_of_llama(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A llama has no setting `activation`."""
        values: dict[str, Any] = whole(self)
        if self.family == "llama":
            values.pop("activation", None)
        return values

    @property
    def base_config(self) -> "ModelConfig":
        """The shape of one ordinary model: one expert, adapters merged."""
        by_cluster = self.moe is not None and self.moe.by_cluster
        return self.model_copy(update={"projection": None, "lora": None, "moe": None if by_cluster else self.moe})

    @property
    def window_experts(self) -> int | None:
        """K, of a model with an expert per cluster: one expert, or a mixture of them, computes a whole window. None for
        others."""
        if self.projection is not None:
            return self.projection.experts
        return self.moe.counts[0] if self.moe is not None and self.moe.by_cluster else None

    @property
    def export_refusal(self) -> str | None:
        """Why no architecture of Hugging Face computes this model, and what would; None if one does."""
        moe = self.moe
        if moe is None:
            return None
        if self.family == "neox":
            return "no Hugging Face architecture has experts with LayerNorm, GELU and biases: set family: llama"
        if moe.residual:
            return "no Hugging Face architecture has a dense part mixed with the experts by a softmax: use moe.shared_expert"
        if len(set(moe.counts)) > 1:
            return f"Qwen2-MoE has equally many experts in each MoE layer, and moe.experts is {moe.experts}: give one number"
        if moe.bias_update_rate:
            return (
                f"Qwen2-MoE has softmax scores, and with moe.bias_update_rate {moe.bias_update_rate} they are sigmoids: "
                "use moe.aux_loss"
            )
        return None

    @property
    def activation_name(self) -> str:
        """The activation of the feed-forward part, in words."""
        if self.family == "llama":
            return "SwiGLU"
        return "exact GELU" if self.activation == "gelu" else "GELU by its tanh approximation"

    @property
    def kv_heads(self) -> int:
        """G: the number of key/value heads."""
        return self.query_groups or self.attention_heads

    @property
    def head_size(self) -> int:
        """D: the size of a head."""
        return self.kv_channels or self.hidden_size // self.attention_heads

    @property
    def attention_size(self) -> int:
        """A * D: what attention returns for a token."""
        return self.attention_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Rows of the matrix that computes queries, keys and values."""
        return self.head_size * (self.attention_heads + 2 * self.kv_heads)

    def experts_of(self, layer: int) -> int:
        """The number of experts of a layer, counted from 0; 0 if the layer is dense."""
        return self.moe.experts_of(layer) if self.moe is not None else 0

    def feed_forward_parts(self, layer: int) -> Iterator[FeedForwardPart]:
        """The feed-forward networks of a layer, counted from 0."""
        experts = self.experts_of(layer)
        if self.moe is None or not experts:
            yield FeedForwardPart(self.ffn_hidden_size)
            return
        size = self.moe.ffn_hidden_size or self.ffn_hidden_size
        yield FeedForwardPart(size, experts, self.moe.top_k)
        if self.moe.residual:
            yield FeedForwardPart(size)
        if self.moe.shared_expert is not None:
            yield FeedForwardPart(self.moe.shared_expert)

    def router_parameters(self, layer: int) -> int:
        """Weights by which a layer chooses and mixes its feed-forward networks."""
        if self.moe is None or self.moe.by_cluster or not self.experts_of(layer):
            return 0
        gates = (2 if self.moe.residual else 0) + (1 if self.moe.shared_expert else 0)
        return self.hidden_size * (self.experts_of(layer) + gates)

    def linear_parameters(self, *, active: bool = False) -> int:
        """Weights of the linears of all layers, without biases and norms.

        Args:
            active: only those that compute a token: 2 FLOPs each per token and forward pass.
        """
        attention = self.hidden_size * self.head_size * (2 * self.attention_heads + 2 * self.kv_heads)
        matrices = self.hidden_size * (3 if self.family == "llama" else 2)
        return sum(
            attention
            + self.router_parameters(layer)
            + sum(
                matrices * part.ffn_hidden_size * (part.active if active else part.count)
                for part in self.feed_forward_parts(layer)
            )
            for layer in range(self.layers)
        )

    def linear_sizes(self) -> dict[Linear, tuple[int, int]]:
        """(out, in) of each linear of a layer. The llama family's first feed-forward linear is gate and up in one."""
        gates = 2 if self.family == "llama" else 1
        return {
            "qkv": (self.qkv_size, self.hidden_size),
            "proj": (self.hidden_size, self.attention_size),
            "fc1": (gates * self.ffn_hidden_size, self.hidden_size),
            "fc2": (self.hidden_size, self.ffn_hidden_size),
        }
