"""Memory per process, by arithmetic: weights, gradients, optimizer's state, derived weights and activations of a layout.

Legend: L layers, H hidden size, F feed-forward size, Q = A * D and K = G * D the widths of queries and of keys, V padded
vocabulary, N tokens of a micro-batch on one process, t tensor parallel processes. The shares are those of Megatron-LM's
accounting (arXiv 2205.05198), counted anew for this project's layers and fused attention.
"""

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from megatron_specialm.config.parallel import padded_vocabulary, split_layers
from megatron_specialm.estimate.capabilities import violation
from megatron_specialm.estimate.setup import Setup

FP32 = 4
MOMENTS = 2 * FP32  # Adam's, per weight
LOSS = 3 * FP32  # logits, their log-softmax and its gradient, per token and word
# With a teacher beside the student its logits too, both distributions at the temperature, and what they are made from.
DISTILLATION = 8 * FP32


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `teacher` are the weights of one beside the student. `derived` are the weights that a step
    computes from others (`model/derived.py`), and the sums of their gradients. `activations` are kept from forward to
    backward passes; `working` is the most that one step of a backward pass needs beside them: the loss over the
    vocabulary, a layer that is recomputed, or the gradients of derived weights on their way to the parameters."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    derived: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The peak in bytes. What the GPU's driver and the communication library take is not in it."""
        held = self.weights + self.gradients + self.optimizer + self.teacher + self.derived
        return held + self.activations + self.working


def memory_of(setup: Setup, *, fused: bool) -> Memory:
    """What the process that needs most needs, of all pipeline stages.

    Args:
        fused: the machine has Transformer Engine's layers, whose activations and norms keep less for the backward pass;
            they are not used in fp32. (GELU keeps the same in every form: what it reads and what it returns.)
    """
    fused = fused and setup.precision != "fp32"
    stages = range(setup.parallel.pipeline_parallel)
    return max((_stage_memory(setup, stage, fused=fused) for stage in stages), key=lambda memory: memory.total)


def _stage_memory(setup: Setup, stage: int, *, fused: bool) -> Memory:
    parallel, last = setup.parallel, stage == setup.parallel.pipeline_parallel - 1
    layers = sum(_layers(setup, stage))
    weights = _stage_weights(setup, stage, last=last)
    trained = weights if setup.model.lora is None else layers * _adapter_weights(setup)
    derived = layers * _derived_weights(setup)
    element = FP32 if setup.precision == "fp32" else 2
    frozen, kept_fp32 = _kept_in_fp32(setup, layers)
    # Half-precision weights have an fp32 original, which is the optimizer's.
    state = trained * MOMENTS + (0 if element == FP32 else (trained - kept_fp32) * FP32)
    copies = parallel.data_parallel * parallel.context_parallel if parallel.distributed_optimizer else 1
    tokens = setup.micro_batch_size * setup.context_length // parallel.context_parallel
    passes = min(setup.micro_batches * parallel.virtual_pipeline, _passes_under_way(setup, stage))
    kept = passes * max(_layers(setup, stage)) * _kept(setup, element, fused=fused)
    kept += last * _norm(setup, element, fused=fused)  # the final one
    activations = round(tokens * kept)
    loss = last * (DISTILLATION if setup.teacher else LOSS) * _vocabulary(setup)
    teacher = _stage_weights(replace(setup, model=setup.teacher), stage, last=last) if setup.teacher else 0
    # Once all backward passes are done: the derived weights' gradients in the weights' precision, and of one basis. Before
    # all forward passes: an fp32 copy of one basis.
    rounded = 0 if element == FP32 else element
    alone = max(derived * rounded + _largest_basis(setup) * element, _largest_basis(setup) * FP32 if rounded else 0)
    return Memory(
        weights=weights * element + (frozen + kept_fp32) * (FP32 - element),
        gradients=trained * FP32,
        optimizer=state // copies,
        teacher=teacher * element,
        derived=derived * (element + FP32),
        activations=activations,
        working=max(round(tokens * max(loss, _layer_backward(setup, element, fused=fused))), alone - activations),
    )


def _layers(setup: Setup, stage: int) -> list[int]:
    """Layers of each of a stage's chunks."""
    parallel = setup.parallel
    return split_layers(setup.model, setup.vocabulary_size, parallel.chunks)[stage :: parallel.pipeline_parallel]


def _stage_weights(setup: Setup, stage: int, *, last: bool) -> int:
    model = setup.model
    tables = (stage == 0) + (last and (stage > 0 or not model.tie_embeddings))  # embedding, output layer
    final_norm = last * model.hidden_size * (1 if model.family == "llama" else 2)
    layers = sum(_layers(setup, stage)) * _layer_weights(setup)
    codes = model.projection.experts * model.projection.code_size if model.projection else 0  # on every stage
    return layers + tables * _vocabulary(setup) * model.hidden_size + final_norm + codes


def _vocabulary(setup: Setup) -> int:
    """Words of one process, padding included."""
    share = setup.parallel.tensor_parallel
    return padded_vocabulary(setup.vocabulary_size, tensor_parallel=share) // share


def _layer_weights(setup: Setup) -> int:
    """Weights of one layer on one process: linears and those of their biases that are cut with them; norms, and whole
    biases; what derived weights are computed from."""
    model, share = setup.model, setup.parallel.tensor_parallel
    linears = model.linear_parameters() // model.layers
    if model.family == "llama":
        plain = linears // share + 2 * model.hidden_size
    else:
        plain = (linears + model.qkv_size + model.ffn_hidden_size) // share + 6 * model.hidden_size
    if model.projection is not None:
        capacity = model.projection.capacity
        plain += (capacity - 1) * _projected_weights(setup) + capacity * model.projection.code_size
    return plain + _adapter_weights(setup)


def _projected_weights(setup: Setup) -> int:
    """What one expert of a projected network has of its own in a layer, on one process."""
    model, share = setup.model, setup.parallel.tensor_parallel
    sizes = model.linear_sizes()
    weights = (math.prod(sizes["fc1"]) + math.prod(sizes["fc2"])) // share
    return weights if model.family == "llama" else weights + model.ffn_hidden_size // share + model.hidden_size


def _largest_basis(setup: Setup) -> int:
    if setup.model.projection is None:
        return 0
    sizes = setup.model.linear_sizes()
    matrix = max(math.prod(sizes["fc1"]), math.prod(sizes["fc2"])) // setup.parallel.tensor_parallel
    return setup.model.projection.capacity * matrix


def _adapter_weights(setup: Setup) -> int:
    """LoRA's two factors of a layer's linears, on one process: of each linear, one factor is cut."""
    model, share = setup.model, setup.parallel.tensor_parallel
    if model.lora is None:
        return 0
    numbers = 0
    for name in model.lora.linears:
        out, into = model.linear_sizes()[name]
        numbers += out // share + into if name in ("qkv", "fc1") else out + into // share
    return model.lora.rank * numbers


def _derived_weights(setup: Setup) -> int:
    """Weights that a step computes in a layer: of all mixtures of experts that its micro-batches can be of, or of base and
    adapters."""
    model = setup.model
    if model.projection is not None:
        return min(setup.variants, setup.micro_batches) * _projected_weights(setup)
    if model.lora is not None:
        return (
            sum(math.prod(model.linear_sizes()[name]) for name in model.lora.linears) // setup.parallel.tensor_parallel
        )
    return 0


def _kept_in_fp32(setup: Setup, layers: int) -> tuple[int, int]:
    """Weights that are fp32 in a half-precision model: frozen ones, which adapters are added to, and trained ones, of
    which weights are computed."""
    model = setup.model
    if model.projection is not None:
        size = model.projection.code_size
        return 0, layers * size * model.projection.capacity + size * model.projection.experts
    if model.lora is not None:
        return layers * _derived_weights(setup), layers * _adapter_weights(setup)
    return 0, 0


def _passes_under_way(setup: Setup, stage: int) -> int:
    """Forward passes of chunks whose backward pass is still to come, at most: 1F1B, plain or interleaved."""
    stages, chunks = setup.parallel.pipeline_parallel, setup.parallel.virtual_pipeline
    if chunks == 1:
        return stages - stage
    return 2 * (stages - stage - 1) + (chunks - 1) * stages + 1


def _kept(setup: Setup, element: int, *, fused: bool) -> float:
    """Bytes per token that a layer keeps for its backward pass."""
    if setup.parallel.recompute == "full":
        return element * setup.model.hidden_size / _position_share(setup)
    whole = _layer_activations(setup, element, fused=fused)
    return whole - (_feed_forward(setup, element, fused=fused) if setup.parallel.recompute == "selective" else 0)


def _layer_backward(setup: Setup, element: int, *, fused: bool) -> float:
    """Bytes per token of a layer's backward pass, at its widest: what is computed again, and the gradients of the
    feed-forward part."""
    model, recompute = setup.model, setup.parallel.recompute
    wide, hidden = model.ffn_hidden_size / setup.parallel.tensor_parallel, model.hidden_size
    gradients = 2 * wide if model.family == "llama" else wide + 2 * hidden
    again = {"none": lambda *_, **__: 0, "selective": _feed_forward, "full": _layer_activations}[recompute]
    return again(setup, element, fused=fused) + element * gradients


def _layer_activations(setup: Setup, element: int, *, fused: bool) -> float:
    """Bytes per token: two norms; queries and keys as rotated, all three as projected, and the attention's result with
    its log-sum; the feed-forward part."""
    model, share = setup.model, setup.parallel.tensor_parallel
    queries, keys = model.head_size * model.attention_heads, model.head_size * model.kv_heads
    attention = element * (3 * queries + 3 * keys) + FP32 * model.attention_heads
    return 2 * _norm(setup, element, fused=fused) + attention / share + _feed_forward(setup, element, fused=fused)


def _feed_forward(setup: Setup, element: int, *, fused: bool) -> float:
    """Bytes per token within the feed-forward part: before and after the activation. PyTorch's gated one keeps the gate
    and its activation too."""
    parts = 2 if setup.model.family == "neox" else 3 if fused else 5
    return element * parts * setup.model.ffn_hidden_size / setup.parallel.tensor_parallel


def _norm(setup: Setup, element: int, *, fused: bool) -> float:
    """Bytes per token of a norm's input and output. PyTorch's RMSNorm computes in fp32, and keeps what it has scaled
    unless its weight is frozen."""
    scaled = FP32 if setup.model.lora is None else 0
    parts = 2 * element if setup.model.family == "neox" or fused else FP32 + scaled + element
    return parts * setup.model.hidden_size / _position_share(setup)


def _position_share(setup: Setup) -> int:
    return setup.parallel.tensor_parallel if setup.parallel.sequence_parallel else 1


@dataclass(frozen=True)
class Change:
    """Settings of a train stage to change, by their names in the config."""

    settings: Mapping[str, Any]

    def describe(self) -> str:
        """As advice: `set micro_batch_size: 8 and parallel.recompute: full`."""
        return "set " + " and ".join(f"{key}: {str(value).lower()}" for key, value in self.settings.items())


def smallest_change(setup: Setup, limit: int, *, fused: bool) -> Change | None:
    """The change of the config that makes a setup fit `limit` bytes per process and costs least: first what costs no
    speed, then what costs some, then more processes. One setting if one will do, otherwise all up to the first that does;
    None where all of them do not.
    """
    candidates = list(_changes(setup))
    for settings in (*candidates, *accumulate(candidates, operator.or_)):
        changed = setup.changed(settings)
        if violation(changed) is None and memory_of(changed, fused=fused).total <= limit:
            return Change(settings)
    return None


def _changes(setup: Setup) -> Iterator[dict[str, Any]]:
    parallel = setup.parallel
    if not parallel.distributed_optimizer and parallel.data_parallel > 1:
        yield {"parallel.distributed_optimizer": True}
    if not parallel.sequence_parallel and parallel.tensor_parallel > 1:
        yield {"parallel.sequence_parallel": True}
    size = setup.micro_batch_size
    while size % 2 == 0:
        size //= 2
        yield {"micro_batch_size": size}
    if parallel.recompute == "none":
        yield {"parallel.recompute": "selective"}
    if parallel.recompute != "full":
        yield {"parallel.recompute": "full"}
    for size in (2, 4, 8):
        yield {"parallel.tensor_parallel": parallel.tensor_parallel * size}
    for size in (2, 4, 8):
        yield {"parallel.pipeline_parallel": parallel.pipeline_parallel * size}
