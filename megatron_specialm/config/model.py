"""Model shapes, and what they cost: parameters and floating-point operations by arithmetic, without torch.

Legend: L layers, H hidden size, F feed-forward size, A attention heads, G query groups, D = H / A head size,
V vocabulary, T context length.
"""

import math
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from megatron_specialm.config.base import Settings
from megatron_specialm.config.precision import LINEARS, Linear


class Projection(Settings):
    """SLM-pn (Grangier et al., arXiv 2402.01093, section 2): the feed-forward linears of expert i in layer l are
    `W(l,i) = sum_r (E[i] M(l))[r] T(l)[r]`, with codes E (experts, code_size), M(l) (code_size, capacity) and T(l)
    (capacity, out, in). All else is shared by the experts."""

    experts: PositiveInt = Field(description="k: the number of clusters")
    capacity: PositiveInt = Field(description="h: matrices per linear that experts are combined from")
    code_size: PositiveInt = Field(description="m: numbers that tell an expert from the others")


class LowRank(Settings):
    """LoRA (arXiv 2106.09685): a linear's weight is `W + alpha / rank * B A`, and only A (rank, in) and B (out, rank)
    are trained. B starts at zero, so training starts from the base model exactly."""

    rank: PositiveInt = Field(default=64, description="the paper's")
    alpha: PositiveFloat | None = Field(default=None, description="default: rank, a factor of one")
    linears: list[Linear] = Field(default=list(LINEARS), min_length=1, description="of each layer")

    @property
    def factor(self) -> float:
        """What B A counts."""
        return (self.alpha or self.rank) / self.rank


Activation = Literal["gelu", "gelu_tanh"]


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
    rotary_base: PositiveInt = 10_000
    norm_epsilon: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    activation: Activation = Field(
        default="gelu",
        description="of family neox: exact, or by its tanh approximation, which a GPU computes in one kernel",
    )
    projection: Projection | None = Field(default=None, description="SLM-pn: many experts in one model")
    lora: LowRank | None = Field(default=None, description="set by a train stage's `lora`, not in a preset")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.attention_heads or (self.hidden_size // self.attention_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over attention_heads {self.attention_heads} must give an even whole "
                "head size (rotary positions turn pairs)"
            )
        if self.attention_heads % self.kv_heads:
            raise ValueError(
                f"attention_heads {self.attention_heads} must be a multiple of query_groups {self.kv_heads}"
            )
        if self.family == "neox" and self.kv_heads != self.attention_heads:
            raise ValueError("family neox has no grouped queries (GPT-NeoX cannot hold them): use family llama")
        if self.family == "llama" and self.activation != "gelu":
            raise ValueError(f"activation {self.activation} is for family neox; llama's is SwiGLU: leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_its_own(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A description names the activation of a neox model; a llama has no such setting."""
        values: dict[str, Any] = whole(self)
        if self.family == "llama":
            values.pop("activation", None)
        return values

    @property
    def plain(self) -> "ModelConfig":
        """The shape of what is served: one expert, adapters merged."""
        return self.model_copy(update={"projection": None, "lora": None})

    @property
    def activation_name(self) -> str:
        """The feed-forward part's activation, for a reader."""
        if self.family == "llama":
            return "SwiGLU"
        return "exact GELU" if self.activation == "gelu" else "GELU by its tanh approximation"

    @property
    def kv_heads(self) -> int:
        """G: the number of key/value heads."""
        return self.query_groups or self.attention_heads

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden_size // self.attention_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the matrix that makes queries, keys and values."""
        return self.head_size * (self.attention_heads + 2 * self.kv_heads)

    def linear_parameters(self) -> int:
        """Weights of the linears of all layers, biases and norms left out: 2 FLOPs each per token and forward pass."""
        attention = self.hidden_size * self.head_size * (2 * self.attention_heads + 2 * self.kv_heads)
        feed_forward = self.hidden_size * self.ffn_hidden_size * (3 if self.family == "llama" else 2)
        return self.layers * (attention + feed_forward)

    def linear_sizes(self) -> dict[Linear, tuple[int, int]]:
        """(out, in) of each linear of a layer. The llama family's first feed-forward linear is gate and up in one."""
        gates = 2 if self.family == "llama" else 1
        return {
            "qkv": (self.qkv_size, self.hidden_size),
            "proj": (self.hidden_size, self.hidden_size),
            "fc1": (gates * self.ffn_hidden_size, self.hidden_size),
            "fc2": (self.hidden_size, self.ffn_hidden_size),
        }

    def trained_parameters(self, vocabulary_size: int) -> int:
        """The parameters that an optimizer step changes: of a projected model all its matrices, of LoRA the adapters."""
        sizes = self.linear_sizes()
        if self.lora is not None:
            return self.layers * sum(self.lora.rank * sum(sizes[name]) for name in self.lora.linears)
        if self.projection is None:
            return self.parameters(vocabulary_size)
        one = self.layers * self._feed_forward_parameters()
        shared = self.parameters(vocabulary_size) - one
        codes = self.projection.code_size * (self.projection.experts + self.layers * self.projection.capacity)
        return shared + self.projection.capacity * one + codes

    def projection_flops(self, variants: int) -> int:
        """FLOPs of a step of a projected network beside the model's own: so many experts are combined from `capacity`
        matrices each, and their gradients return to the matrices and to the coefficients."""
        assert self.projection is not None
        return 6 * variants * self.projection.capacity * self.layers * self._feed_forward_parameters()

    def _feed_forward_parameters(self) -> int:
        """Of one layer: what a projected model has `capacity` of."""
        sizes = self.linear_sizes()
        biases = sizes["fc1"][0] + sizes["fc2"][0] if self.family == "neox" else 0
        return math.prod(sizes["fc1"]) + math.prod(sizes["fc2"]) + biases

    def parameters(self, vocabulary_size: int) -> int:
        """All parameters, as exported: one expert, no vocabulary padding, tied embeddings counted once."""
        embeddings = vocabulary_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        if self.family == "llama":
            small = (2 * self.layers + 1) * self.hidden_size
        else:
            per_layer = (
                self.qkv_size + self.hidden_size + self.ffn_hidden_size + self.hidden_size + 4 * self.hidden_size
            )
            small = self.layers * per_layer + 2 * self.hidden_size
        return self.linear_parameters() + embeddings + small

    def forward_flops(self, vocabulary_size: int, context_length: int) -> int:
        """FLOPs of one token's forward pass, a multiply-add being 2.

        Linears and the output layer 2 per weight; attention 2 * L * H * T: scores and weighted sum over the T / 2 keys
        that a causal mask leaves on average. Norms, activations and softmax are not counted, nor is recomputation, so
        utilisation computed from it is of the model's own work (and below what counts the masked half would give).
        """
        linears = 2 * (self.linear_parameters() + vocabulary_size * self.hidden_size)
        return linears + 2 * self.layers * self.hidden_size * context_length

    def training_flops(self, vocabulary_size: int, context_length: int) -> int:
        """FLOPs of one token's forward and backward pass: three forward passes."""
        return 3 * self.forward_flops(vocabulary_size, context_length)
