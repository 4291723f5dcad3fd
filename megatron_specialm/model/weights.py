"""The canonical weights of a model, and the part of each that a process holds under tensor parallelism.

Canonical weights are those of one process without Transformer Engine: unsharded matrices, layers numbered globally, no
vocabulary padding, tied embeddings once. Checkpoints, exports and comparisons use only these, and so fit any layout.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import padded_vocabulary
from megatron_specialm.config.precision import Linear

EXPERT_CODES = "expert_codes"
PROJECTION = "mlp.projection"
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
# Transformer Engine fuses a norm into the linear that follows it. Its names for that norm's parameters:
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


Index = tuple[slice, ...]


class Sliceable(Protocol):
    """A canonical tensor that can be sliced: in memory, or in files of which only the slices are read."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape of the full tensor."""

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """The box at a tuple of slices."""


@dataclass(frozen=True)
class WeightSpec:
    """A canonical weight: its shape, and how tensor parallelism shards it.

    `cut` is the sharded dimension, None if the weight is replicated. `blocks` is the number of equal parts along it that are
    sharded separately: SwiGLU concatenates the gate and up projections. `padded` is the size of the first dimension in memory
    if it is larger than the weight's own. `is_expert`: the first dimension is over a layer's experts, which expert parallelism
    shards. `expert`: the parameter is that of this expert alone, without the first dimension; pieces lie in the full weight.
    """

    shape: tuple[int, ...]
    cut: int | None = None
    blocks: int = 1
    padded: int = 0
    is_expert: bool = False
    expert: int | None = None

    def pieces(
        self, flat: torch.Tensor, *, rank: int, size: int, first: int = 0
    ) -> Iterator[tuple[Index, torch.Tensor]]:
        """The boxes of the canonical tensor that a process holds, without padding.

        Args:
            flat: (n,) elements `first` to `first + n` of the part of process `rank` of `size`, flattened row by row.

        Yields:
            A box's index in the canonical tensor, and a view of the box's elements in `flat`.
        """
        if self.expert is not None:
            one = WeightSpec(self.shape[1:], None if self.cut is None else self.cut - 1, self.blocks)
            for box, piece in one.pieces(flat, rank=rank, size=size, first=first):
                yield (slice(self.expert, self.expert + 1), *box), piece.unsqueeze(0)
            return
        if self.cut is None or size == 1:  # one block on one process
            cut, blocks, rank, size = 0, 1, 0, 1
        else:
            cut, blocks = self.cut, self.blocks
        local = [self.padded or self.shape[0], *self.shape[1:]]
        local[cut] //= size
        width = local[cut] // blocks  # of this process's part of a block
        for offsets, shape in _boxes(local, first, first + flat.numel()):
            view, flat = flat[: math.prod(shape)].view(shape), flat[math.prod(shape) :]
            start, stop = offsets[cut], offsets[cut] + shape[cut]
            for block in range(start // width, -(-stop // width)):
                own = max(start, block * width)
                place = own + (block * (size - 1) + rank) * width
                end = min(place + min(stop, (block + 1) * width) - own, self.shape[cut])
                if place < end:
                    index = [slice(offset, offset + count) for offset, count in zip(offsets, shape, strict=True)]
                    index[cut] = slice(place, end)
                    yield tuple(index), view.narrow(cut, own - start, end - place)


def _boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split elements `start` to `stop` of a row-major array into boxes, as (first index, shape), in order: a partial row, full
    rows, a partial row."""
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    head = min(-(-start // row) * row, stop)
    tail = max(stop // row * row, head)
    for part in ((start, head), (head, tail), (tail, stop)):
        number, begin = divmod(part[0], row)
        if part == (head, tail) and head < tail:
            yield (number, *(0 for _ in shape[1:])), ((tail - head) // row, *shape[1:])
        else:
            for offsets, box in _boxes(shape[1:], begin, begin + part[1] - part[0]):
                yield (number, *offsets), (1, *box)


def decays(name: str) -> bool:
    """Whether weight decay applies to a canonical weight. It does to the matrices of linears, embeddings and bases, and to
    LoRA's factors; not to norms and biases, nor to codes and projections, whose entries each scale complete matrices."""
    return "layernorm" not in name and not name.endswith(("bias", "bias_basis", EXPERT_CODES, PROJECTION))


def weight_specs(model: ModelConfig, *, vocabulary_size: int, tensor_parallel: int = 1) -> dict[str, WeightSpec]:
    """All canonical weights of a model by name, in the order of the forward pass."""
    hidden, qkv = model.hidden_size, model.qkv_size
    padded = padded_vocabulary(vocabulary_size, tensor_parallel=tensor_parallel)
    embedding = WeightSpec((vocabulary_size, hidden), cut=0, padded=padded)
    layer = {
        "input_layernorm.weight": WeightSpec((hidden,)),
        "self_attention.linear_qkv.weight": WeightSpec((qkv, hidden), cut=0),
        "self_attention.linear_proj.weight": WeightSpec((hidden, model.attention_size), cut=1),
        "pre_mlp_layernorm.weight": WeightSpec((hidden,)),
        **{f"mlp.{name}": spec for name, spec in _feed_forward(model, model.ffn_hidden_size).items()},
    }
    final = {"decoder.final_layernorm.weight": WeightSpec((hidden,))}
    if model.family == "neox":
        layer |= {
            "input_layernorm.bias": WeightSpec((hidden,)),
            "self_attention.linear_qkv.bias": WeightSpec((qkv,), cut=0),
            "self_attention.linear_proj.bias": WeightSpec((hidden,)),
            "pre_mlp_layernorm.bias": WeightSpec((hidden,)),
        }
        final["decoder.final_layernorm.bias"] = WeightSpec((hidden,))
    if model.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = WeightSpec((qkv,), cut=0)
    if model.qk_norm:
        layer |= {f"self_attention.{part}_layernorm.weight": WeightSpec((model.head_size,)) for part in "qk"}
    layer = _derived(model, layer)
    layers = {
        f"decoder.layers.{number}.{name}": spec
        for number in range(model.layers)
        for name, spec in _with_experts(model, layer, model.experts_of(number)).items()
    }
    output = {} if model.tie_embeddings else {OUTPUT_LAYER: embedding}
    codes = {}
    if model.projection is not None:
        codes[EXPERT_CODES] = WeightSpec((model.projection.experts, model.projection.code_size))
    return {**codes, WORD_EMBEDDINGS: embedding, **layers, **final, **output}


ROUTER = "mlp.router.weight"
EXPERT_BIAS = "mlp.router.expert_bias"  # by which experts are chosen; set after each step, not trained
EXPERTS = "mlp.experts"
SHARED_EXPERT = "mlp.shared_expert"
SHARED_EXPERT_GATE = "mlp.shared_expert_gate.weight"
RESIDUAL = "mlp.residual"
RESIDUAL_MIX = "mlp.residual_mix"  # a linear to two logits: whose softmax weights the experts' sum and the dense part


def _with_experts(model: ModelConfig, layer: dict[str, WeightSpec], experts: int) -> dict[str, WeightSpec]:
    """Replace the specs of a feed-forward part by those of an MoE layer. Of a weight of all experts the first dimension is over
    them."""
    if model.moe is None or not experts:
        return layer
    moe, hidden = model.moe, model.hidden_size
    found = {name: spec for name, spec in layer.items() if not name.startswith("mlp.")}
    size = moe.ffn_hidden_size or model.ffn_hidden_size
    if not moe.by_cluster:
        found[ROUTER] = WeightSpec((experts, hidden))
    if moe.bias_update_rate:
        found[EXPERT_BIAS] = WeightSpec((experts,))
    for name, spec in _feed_forward(model, size).items():
        # Megatron-Core splits experts with biases over no tensor-parallel ranks.
        cut = None if spec.cut is None or model.family == "neox" else spec.cut + 1
        found[f"{EXPERTS}.{name}"] = replace(spec, shape=(experts, *spec.shape), cut=cut, is_expert=True)
    if moe.residual:
        found |= {f"{RESIDUAL}.{name}": spec for name, spec in _feed_forward(model, size).items()}
        found |= {f"{RESIDUAL_MIX}.weight": WeightSpec((2, hidden)), f"{RESIDUAL_MIX}.bias": WeightSpec((2,))}
    if moe.shared_expert is not None:
        found |= {f"{SHARED_EXPERT}.{name}": spec for name, spec in _feed_forward(model, moe.shared_expert).items()}
        found[SHARED_EXPERT_GATE] = WeightSpec((1, hidden))
    return found


def _feed_forward(model: ModelConfig, size: int) -> dict[str, WeightSpec]:
    """The specs of one feed-forward network."""
    hidden, gates = model.hidden_size, 2 if model.family == "llama" else 1
    found = {
        "linear_fc1.weight": WeightSpec((gates * size, hidden), cut=0, blocks=gates),
        "linear_fc2.weight": WeightSpec((hidden, size), cut=1),
    }
    if model.family == "neox":
        found |= {"linear_fc1.bias": WeightSpec((size,), cut=0), "linear_fc2.bias": WeightSpec((hidden,))}
    return found


# The modules of a layer's linears, by the names that configs use.
LINEAR_PLACES: dict[Linear, str] = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
PROJECTED: tuple[Linear, ...] = ("fc1", "fc2")


def _derived(model: ModelConfig, layer: dict[str, WeightSpec]) -> dict[str, WeightSpec]:
    """Replace the specs of linears that are computed from other parameters (`model/derived.py`)."""
    found = dict(layer)
    if model.projection is not None:
        found[PROJECTION] = WeightSpec((model.projection.code_size, model.projection.capacity))
        for name in [name for name in layer if name.startswith(tuple(LINEAR_PLACES[one] for one in PROJECTED))]:
            spec = found.pop(name)
            cut = None if spec.cut is None else spec.cut + 1
            found[f"{name}_basis"] = replace(spec, shape=(model.projection.capacity, *spec.shape), cut=cut)
    if model.lora is not None:
        for name in model.lora.linears:
            place = LINEAR_PLACES[name]
            found.update(_lora(f"{place}.", layer[f"{place}.weight"], model.lora.rank))
    return found


def _lora(prefix: str, base: WeightSpec, rank: int) -> Iterator[tuple[str, WeightSpec]]:
    """The factors of B A, which has the base's shape. The factor on the base's sharded side is sharded, the other is not."""
    out, into = base.shape
    yield f"{prefix}lora_a", WeightSpec((rank, into), cut=1 if base.cut == 1 else None)
    yield f"{prefix}lora_b", WeightSpec((out, rank), cut=0 if base.cut == 0 else None, blocks=base.blocks)
