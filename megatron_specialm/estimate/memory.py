"""Memory per process, by arithmetic: weights, gradients, optimizer state, derived weights and activations of a layout.

Legend: L layers, H hidden size, F feed-forward size, Q = A * D and K = G * D the widths of queries and of keys, V padded
vocabulary, N tokens of a micro-batch on one process, t tensor parallel processes. The method is Megatron-LM's (arXiv
2205.05198), with counts for this project's layers and fused attention.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import padded_vocabulary, split_layers
from megatron_specialm.estimate.capabilities import violation
from megatron_specialm.estimate.setup import Setup

FP32 = 4
MOMENTS = 2 * FP32  # Adam's, per weight
LOSS = 3 * FP32  # logits, their log-softmax and its gradient, per token and word
# With a teacher beside the student: also its logits, both distributions at the temperature, and their inputs.
DISTILLATION = 8 * FP32


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        optimizer: its state, unless that is on the host (`offload_optimizer`).
        teacher: weights of a teacher beside the student.
        derived: weights that a step computes from others (`model/derived.py`), and the sums of their gradients.
        activations: kept from forward to backward passes.
        working: the most that a part of a backward pass needs in addition: for the loss over the vocabulary, a layer that is
            recomputed, or the gradients of derived weights.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    derived: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The peak in bytes, without the memory of the GPU's driver and of the communication library."""
        held = self.weights + self.gradients + self.optimizer + self.teacher + self.derived
        return held + self.activations + self.working


def memory_of(setup: Setup, *, fused: bool) -> Memory:
    """The memory of the process that needs most, over all pipeline stages.

    Args:
        fused: the machine has Transformer Engine's layers, whose activations and norms keep less for the backward pass;
            they are not used in fp32. (Every form of GELU keeps its input and its output.)
    """
    fused = fused and setup.precision != "fp32"
    stages = range(setup.parallel.pipeline_parallel)
    return max((_stage_memory(setup, stage, fused=fused) for stage in stages), key=lambda memory: memory.total)


class StageSizes(NamedTuple):
    """Numbers of weights of one process of a pipeline stage.

    Attributes:
        layers: those of the stage, counted from 0 over the whole model.
        trained: weights that the optimizer changes.
        experts: trained weights of experts, whose gradients are summed over fewer processes.
    """

    layers: list[int]
    weights: int
    trained: int
    experts: int
    derived: int


def stage_sizes(setup: Setup, stage: int) -> StageSizes:
    """The weights of a process of a stage, counted from 0."""
    layers = [layer for chunk in _chunks(setup, stage) for layer in chunk]
    weights = _stage_weights(setup, stage, last=stage == setup.parallel.pipeline_parallel - 1)
    trained, experts = weights, sum(_expert_weights(setup, layer) for layer in layers)
    if setup.model.lora is not None:
        trained, experts = len(layers) * _adapter_weights(setup), 0
    return StageSizes(layers, weights, trained, experts, len(layers) * _derived_weights(setup))


def _stage_memory(setup: Setup, stage: int, *, fused: bool) -> Memory:
    parallel, last = setup.parallel, stage == setup.parallel.pipeline_parallel - 1
    numbers, weights, trained, experts, derived = stage_sizes(setup, stage)
    element = FP32 if setup.precision == "fp32" else 2
    frozen, kept_fp32 = _kept_in_fp32(setup, numbers)
    # The optimizer has an fp32 copy of half-precision weights.
    state = MOMENTS if element == FP32 else MOMENTS + FP32
    copies, expert_copies = optimizer_shards(setup)
    optimizer = (
        (trained - experts) * state - kept_fp32 * (state - MOMENTS)
    ) // copies + experts * state // expert_copies
    tokens = setup.micro_batch_size * setup.context_length // parallel.context_parallel
    passes = min(setup.micro_batches * parallel.virtual_pipeline, _passes_under_way(setup, stage))
    kept = passes * max(
        sum(_kept(setup, layer, element, fused=fused) for layer in chunk) for chunk in _chunks(setup, stage)
    )
    kept += last * _norm(setup, element, fused=fused)  # the final one
    activations = round(tokens * kept)
    loss = last * (DISTILLATION if setup.teacher else LOSS) * _vocabulary(setup)
    teacher = _stage_weights(replace(setup, model=setup.teacher), stage, last=last) if setup.teacher else 0
    # After all backward passes: the derived weights' gradients in the weights' precision, and those of one basis. Before all
    # forward passes: an fp32 copy of one basis.
    rounded = 0 if element == FP32 else element
    alone = max(derived * rounded + _largest_basis(setup) * element, _largest_basis(setup) * FP32 if rounded else 0)
    return Memory(
        weights=(weights * element + (frozen + kept_fp32) * (FP32 - element))
        // (copies if parallel.zero_stage >= 3 else 1),
        gradients=FP32
        * ((trained - experts) // copies + experts // expert_copies if parallel.zero_stage >= 2 else trained),
        optimizer=0 if parallel.offload_optimizer else optimizer,
        teacher=teacher * element,
        derived=derived * (element + FP32),
        activations=activations,
        working=max(
            round(tokens * max(loss, *(_layer_backward(setup, layer, element, fused=fused) for layer in numbers))),
            alone - activations,
        ),
    )


def optimizer_shards(setup: Setup) -> tuple[int, int]:
    """The number of processes that the optimizer's state of a weight is split over, and that of an expert's."""
    parallel = setup.parallel
    if not parallel.zero_stage:
        return 1, 1
    return parallel.data_parallel * parallel.context_parallel, setup.expert_ranks // parallel.expert_parallel


def _chunks(setup: Setup, stage: int) -> list[range]:
    """The layers of each of a stage's chunks, counted from 0 over the whole model."""
    parallel = setup.parallel
    counts = split_layers(setup.model, setup.vocabulary_size, parallel.chunks)
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)][
        stage :: parallel.pipeline_parallel
    ]


def _stage_weights(setup: Setup, stage: int, *, last: bool) -> int:
    model = setup.model
    tables = (stage == 0) + (last and (stage > 0 or not model.tie_embeddings))  # embedding, output layer
    final_norm = last * model.hidden_size * (1 if model.family == "llama" else 2)
    layers = sum(
        _layer_weights(setup, layer) + _expert_weights(setup, layer)
        for chunk in _chunks(setup, stage)
        for layer in chunk
    )
    codes = model.projection.experts * model.projection.code_size if model.projection else 0  # on every stage
    return layers + tables * _vocabulary(setup) * model.hidden_size + final_norm + codes


def _vocabulary(setup: Setup) -> int:
    """Vocabulary entries of one process, padding included."""
    tensor = setup.parallel.tensor_parallel
    return padded_vocabulary(setup.vocabulary_size, tensor_parallel=tensor) // tensor


def _layer_weights(setup: Setup, layer: int) -> int:
    """Weights of a layer on one process, without its experts: linears with the biases that are split like them; norms and
    biases that are not split; the router; the weights that derived weights are computed from."""
    model, tensor = setup.model, setup.parallel.tensor_parallel
    parts = [part.ffn_hidden_size for part in model.feed_forward_parts(layer)]
    parts = parts[1:] if model.experts_of(layer) else parts
    attention = math.prod(model.linear_sizes()["qkv"]) + math.prod(model.linear_sizes()["proj"])
    plain = (attention + _matrices(model) * sum(parts)) // tensor + 2 * model.hidden_size
    if model.family == "neox":
        plain += (model.qkv_size + sum(parts)) // tensor + (3 + len(parts)) * model.hidden_size
    plain += model.qkv_bias * model.qkv_size // tensor + model.qk_norm * 2 * model.head_size
    plain += model.router_parameters(layer)
    if model.projection is not None:
        capacity = model.projection.capacity
        plain += (capacity - 1) * _projected_weights(setup) + capacity * model.projection.code_size
    return plain + _adapter_weights(setup)


def _expert_weights(setup: Setup, layer: int) -> int:
    """Weights of a layer's experts on one process."""
    model = setup.model
    if not model.experts_of(layer):
        return 0
    experts = next(model.feed_forward_parts(layer))
    one = _matrices(model) * experts.ffn_hidden_size // setup.expert_tensor_parallel
    if model.family == "neox":
        one += experts.ffn_hidden_size + model.hidden_size
    return experts.count // setup.parallel.expert_parallel * one


def _matrices(model: ModelConfig) -> int:
    """Weights of a feed-forward network, per unit of its size."""
    return model.hidden_size * (3 if model.family == "llama" else 2)


def _projected_weights(setup: Setup) -> int:
    """Weights of one expert of a projected network in a layer, on one process."""
    model, tensor = setup.model, setup.parallel.tensor_parallel
    sizes = model.linear_sizes()
    weights = (math.prod(sizes["fc1"]) + math.prod(sizes["fc2"])) // tensor
    return weights if model.family == "llama" else weights + model.ffn_hidden_size // tensor + model.hidden_size


def _largest_basis(setup: Setup) -> int:
    if setup.model.projection is None:
        return 0
    sizes = setup.model.linear_sizes()
    matrix = max(math.prod(sizes["fc1"]), math.prod(sizes["fc2"])) // setup.parallel.tensor_parallel
    return setup.model.projection.capacity * matrix


def _adapter_weights(setup: Setup) -> int:
    """LoRA's two factors of a layer's linears, on one process: one factor of each linear is split."""
    model, tensor = setup.model, setup.parallel.tensor_parallel
    if model.lora is None:
        return 0
    numbers = 0
    for name in model.lora.linears:
        out, into = model.linear_sizes()[name]
        numbers += out // tensor + into if name in ("qkv", "fc1") else out + into // tensor
    return model.lora.rank * numbers


def _derived_weights(setup: Setup) -> int:
    """Weights that a step computes in a layer: for as many mixtures of experts as a process can have, or from base and
    adapters."""
    model = setup.model
    if model.projection is not None:
        return setup.local_variants * _projected_weights(setup)
    if model.lora is not None:
        return (
            sum(math.prod(model.linear_sizes()[name]) for name in model.lora.linears) // setup.parallel.tensor_parallel
        )
    return 0


def _kept_in_fp32(setup: Setup, numbers: list[int]) -> tuple[int, int]:
    """Weights of layers that are fp32 in a half-precision model, frozen and trained ones: those to which adapters are added or
    from which weights are computed, and routers."""
    model, layers = setup.model, len(numbers)
    routed = model.moe is not None and not model.moe.by_cluster
    routers = model.hidden_size * sum(map(model.experts_of, numbers)) if routed else 0
    if model.projection is not None:
        size = model.projection.code_size
        return 0, layers * size * model.projection.capacity + size * model.projection.experts
    if model.lora is not None:
        return layers * _derived_weights(setup) + routers, layers * _adapter_weights(setup)
    return 0, routers


def _passes_under_way(setup: Setup, stage: int) -> int:
    """An upper bound of the forward passes of chunks that wait for their backward pass: 1F1B, plain or interleaved."""
    stages, chunks = setup.parallel.pipeline_parallel, setup.parallel.virtual_pipeline
    if chunks == 1:
        return stages - stage
    return 2 * (stages - stage - 1) + (chunks - 1) * stages + 1


def _kept(setup: Setup, layer: int, element: int, *, fused: bool) -> float:
    """Bytes per token that a layer keeps for its backward pass."""
    if setup.parallel.recompute == "full":
        return element * setup.model.hidden_size / _sequence_shards(setup)
    whole = layer_activations(setup, layer, element, fused=fused)
    return whole - (_feed_forward(setup, layer, element, fused=fused) if setup.parallel.recompute == "selective" else 0)


def _layer_backward(setup: Setup, layer: int, element: int, *, fused: bool) -> float:
    """Peak bytes per token of a layer's backward pass: recomputed activations, and the gradients of the feed-forward part."""
    model, recompute = setup.model, setup.parallel.recompute
    wide, hidden = _active_size(setup, layer), model.hidden_size
    gradients = 2 * wide if model.family == "llama" else wide + 2 * hidden
    again = {"none": lambda *_, **__: 0, "selective": _feed_forward, "full": layer_activations}[recompute]
    return again(setup, layer, element, fused=fused) + element * gradients


def layer_activations(setup: Setup, layer: int, element: int, *, fused: bool) -> float:
    """Bytes per token: two norms; rotated queries and keys, and with `qk_norm` normalized ones; projected queries, keys and
    values; the attention's result with its log-sum; the feed-forward part."""
    model, tensor = setup.model, setup.parallel.tensor_parallel
    queries, keys = model.head_size * model.attention_heads, model.head_size * model.kv_heads
    attention = element * (3 + model.qk_norm) * (queries + keys) + FP32 * model.attention_heads
    return (
        2 * _norm(setup, element, fused=fused) + attention / tensor + _feed_forward(setup, layer, element, fused=fused)
    )


def _feed_forward(setup: Setup, layer: int, element: int, *, fused: bool) -> float:
    """Bytes per token in the feed-forward part: before and after the activation. PyTorch's gated activation also keeps the gate
    and its activation. An MoE layer also keeps the input and output of each expert that a token is routed to, and the router's
    logits and scores; experts are taken to be loaded equally."""
    model = setup.model
    parts = 2 if model.family == "neox" else 3 if fused else 5
    dispatch = 0
    if model.moe is not None and (experts := model.experts_of(layer)):
        dispatch = 2 * model.moe.top_k * element * model.hidden_size + 3 * FP32 * experts
        if model.family == "neox":  # the activations times the token's weight, which no fused kernel computes for GELU
            dispatch += model.moe.top_k * element * next(model.feed_forward_parts(layer)).ffn_hidden_size
    return element * parts * _active_size(setup, layer) + dispatch / _sequence_shards(setup)


def _active_size(setup: Setup, layer: int) -> float:
    """The feed-forward size that computes a token, on one process."""
    parts = setup.model.feed_forward_parts(layer)
    return sum(part.ffn_hidden_size * part.active for part in parts) / setup.parallel.tensor_parallel


def _norm(setup: Setup, element: int, *, fused: bool) -> float:
    """Bytes per token of a norm's input and output. PyTorch's RMSNorm computes in fp32, and keeps the normalized input unless
    its weight is frozen."""
    scaled = FP32 if setup.model.lora is None else 0
    parts = 2 * element if setup.model.family == "neox" or fused else FP32 + scaled + element
    return parts * setup.model.hidden_size / _sequence_shards(setup)


def _sequence_shards(setup: Setup) -> int:
    return setup.parallel.tensor_parallel if setup.parallel.sequence_parallel else 1


@dataclass(frozen=True)
class Change:
    """Settings of a train stage to change, by their names in the config."""

    settings: Mapping[str, Any]

    def describe(self) -> str:
        """As advice: `set micro_batch_size: 8 and parallel.recompute: full`."""
        return "set " + " and ".join(f"{key}: {str(value).lower()}" for key, value in self.settings.items())


def smallest_change(setup: Setup, limit: int, *, fused: bool) -> Change | None:
    """The cheapest change of the config that makes a setup fit `limit` bytes per process.

    Candidates in order: settings that cost no speed, that cost some, more processes. One setting if one is enough, otherwise
    all up to the first that is, without those that are refused together with the earlier ones; None if all of them are not.
    """
    candidates = list(_changes(setup))
    for settings in (*candidates, *_accumulated(setup, candidates)):
        changed = setup.changed(settings)
        if violation(changed) is None and memory_of(changed, fused=fused).total <= limit:
            return Change(settings)
    return None


def _accumulated(setup: Setup, candidates: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    settings: dict[str, Any] = {}
    for candidate in candidates:
        if violation(setup.changed(settings | candidate)) is None:
            settings = settings | candidate
            yield settings


def _changes(setup: Setup) -> Iterator[dict[str, Any]]:
    parallel = setup.parallel
    if parallel.data_parallel > 1 and (sharding := parallel.more_sharding()):
        yield {f"parallel.{name}": value for name, value in sharding.items()}
    if not parallel.sequence_parallel and parallel.tensor_parallel > 1:
        yield {"parallel.sequence_parallel": True}
    if setup.moe_models:
        most = math.gcd(setup.expert_ranks, *setup.expert_counts)
        for size in range(parallel.expert_parallel + 1, most + 1):
            if most % size == 0:
                yield {"parallel.expert_parallel": size}
    size = setup.micro_batch_size
    while size % 2 == 0:
        size //= 2
        yield {"micro_batch_size": size}
    if parallel.recompute == "none":
        yield {"parallel.recompute": "selective"}
    if parallel.recompute != "full":
        yield {"parallel.recompute": "full"}
    together = {"parallel.sequence_parallel": True} if setup.model.moe and parallel.engine == "megatron" else {}
    for size in (2, 4, 8):
        yield {"parallel.tensor_parallel": parallel.tensor_parallel * size, **together}
    for size in (2, 4, 8):
        yield {"parallel.pipeline_parallel": parallel.pipeline_parallel * size}
