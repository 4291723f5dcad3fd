"""The time of a training step in a layout of the Megatron engine, by arithmetic.

A step is a sum of named parts. Each is a number of FLOPs or bytes of one process of the slowest pipeline stage, over a rate of
the hardware. Windows are counted as full. Shorter ones, packed, make fewer micro-batches, of which a pipeline's bubble is a
larger share.

Legend: N tokens of a micro-batch on one process, H hidden size, G * D width of keys, V vocabulary, t, c, e, d tensor, context,
expert and data parallel size, p pipeline stages, v chunks per stage, m micro-batches, n layers of a stage.

Sources: Narayanan et al. 2021 (arXiv 2104.04473) for tensor parallel bytes and the bubble; ZeRO (arXiv 1910.02054) for the
bytes of data parallelism; ring attention (arXiv 2310.01889) for context parallelism. What overlaps with computation follows
from the engine's settings (`model/gpt.py`, `engine/megatron/engine.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_specialm.config.parallel import padded_vocabulary
from megatron_specialm.estimate.flops import attention_flops, forward_flops, projection_flops
from megatron_specialm.estimate.hardware import Hardware
from megatron_specialm.estimate.memory import FP32, LOSS, StageSizes, layer_activations, optimizer_shards, stage_sizes
from megatron_specialm.estimate.setup import Setup

# What is kept for the backward pass is written and read in the forward pass, and so is its gradient in the backward pass.
ACTIVATION_PASSES = 4
LAUNCHES = 40  # kernels of a layer's forward and backward pass
BUCKET = 40_000_000  # weights whose gradients Megatron-Core reduces together when it overlaps; at least 1M per replica


class Part(NamedTuple):
    """A part of a step: its seconds, and the FLOPs or bytes that they follow from."""

    name: str
    seconds: float
    amount: float = 0.0
    unit: str = ""

    def times(self, count: int) -> "Part":
        """So many of it."""
        return self._replace(seconds=self.seconds * count, amount=self.amount * count)


@dataclass(frozen=True)
class StepTime:
    """The parts of a step that take time."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(part.seconds for part in self.parts)

    def seconds(self, name: str) -> float:
        """Of the part with this name; 0 if the layout has none."""
        return sum(part.seconds for part in self.parts if part.name == name)


def step_time(setup: Setup, hardware: Hardware, *, fused: bool, checkpoint_every: int) -> StepTime:
    """The time of an optimizer step.

    Args:
        fused: as of `memory_of`.
        checkpoint_every: steps. Only the copy to the host is counted, as if the next passes did not hide it: an upper
            bound. Files are written during the next steps.
    """
    fused = fused and setup.precision != "fp32"
    setup, parallel = _in_passes(setup), setup.parallel
    sizes = [stage_sizes(setup, stage) for stage in range(parallel.pipeline_parallel)]
    stages = [_Stage(setup, hardware, stage, size, fused=fused) for stage, size in enumerate(sizes)]
    passes = [tuple(stage.parts()) for stage in stages]
    seconds = [sum(part.seconds for part in parts) for parts in passes]
    slowest = seconds.index(max(seconds))
    # (p - 1) / v micro-batches of equal stages; of unequal ones, each of the others' once.
    bubble = Part("pipeline bubble", (sum(seconds) - max(seconds)) / parallel.virtual_pipeline)
    parts = (
        *(part.times(setup.micro_batches) for part in passes[slowest]),
        bubble,
        *stages[slowest].step_parts(checkpoint_every),
    )
    return StepTime(tuple(part for part in parts if part.seconds > 0))


def _in_passes(setup: Setup) -> Setup:
    """With micro-batches as they are computed: a packed one of a projected network has windows of one mixture of experts."""
    apart = setup.packing == "packed" and setup.model.projection is not None
    return replace(setup, micro_batch_size=min(setup.micro_batch_size, setup.windows_per_expert)) if apart else setup


class _Stage:
    """A process of a pipeline stage."""

    def __init__(self, setup: Setup, hardware: Hardware, stage: int, sizes: StageSizes, *, fused: bool) -> None:
        self._setup, self._hardware, self._sizes, self._fused = setup, hardware, sizes, fused
        self._parallel, self._model = setup.parallel, setup.model
        self._first, self._last = stage == 0, stage == setup.parallel.pipeline_parallel - 1
        self._element = FP32 if setup.precision == "fp32" else 2
        self._tokens = setup.micro_batch_size * setup.context_length / self._parallel.context_parallel
        self._vector = self._tokens * self._model.hidden_size * self._element  # bytes of activations between layers

    def parts(self) -> Iterator[Part]:
        """Of a forward and backward pass over a micro-batch."""
        products, attention, again, memory = self._products(), self._attention(), self._recomputation(), self._memory()
        computed = products.seconds + attention.seconds + again.seconds + memory.seconds
        launches = LAUNCHES * len(self._sizes.layers) * self._hardware.launch
        yield products
        yield attention
        yield again
        yield memory
        yield Part("waiting for kernel launches", max(0.0, launches - computed))
        yield self._tensor()
        yield self._context()
        yield self._experts()
        yield self._pipeline(computed)

    def step_parts(self, checkpoint_every: int) -> Iterator[Part]:
        """Of a step, once."""
        yield from self._derived()
        yield from self._replicas()
        own = self._own_weights()
        half = self._element != FP32
        # Sums to zero; of its own: norm, clipping, Adam with gradient, weight and two moments, and the half-precision weight.
        traffic = FP32 * self._sizes.trained + (1 + 2 + 7) * FP32 * own + half * 2 * own
        yield Part("optimizer", traffic / self._hardware.memory, traffic, "B")
        copied = 3 * FP32 * own / checkpoint_every  # weight and moments
        yield Part("checkpoint", copied / self._hardware.host, copied, "B")

    def _products(self) -> Part:
        """Linears and the output layer; of a teacher beside the student, which has one stage, the forward pass."""
        setup, model = self._setup, self._model
        flops = 3 * self._of_layers(2 * model.linear_parameters(active=True))
        flops += 3 * self._last * self._shared(2 * setup.vocabulary_size * model.hidden_size)
        if setup.teacher is not None:
            whole = forward_flops(setup.teacher, setup.vocabulary_size, setup.context_length)
            flops += self._shared(whole - attention_flops(setup.teacher, setup.context_length))
        return self._computed("matrix products", flops)

    def _attention(self) -> Part:
        setup = self._setup
        flops = 3 * self._of_layers(attention_flops(self._model, setup.context_length))
        if setup.teacher is not None:
            flops += self._shared(attention_flops(setup.teacher, setup.context_length))
        return self._computed("attention", attention=flops)

    def _recomputation(self) -> Part:
        model = self._model
        linears, attention = (
            2 * model.linear_parameters(active=True),
            attention_flops(model, self._setup.context_length),
        )
        sizes = model.linear_sizes()
        feed_forward = linears - 2 * model.layers * sum(math.prod(sizes[name]) for name in ("qkv", "proj"))
        again = {"none": (0, 0), "selective": (feed_forward, 0), "full": (linears, attention)}
        return self._computed("recomputation", *map(self._of_layers, again[self._parallel.recompute]))

    def _memory(self) -> Part:
        """What all operations but matrix products read and write: activations, the loss over the vocabulary; and weights, read
        twice in the backward pass, with the sums of their gradients."""
        setup, tensor = self._setup, self._parallel.tensor_parallel
        kept = sum(layer_activations(setup, layer, self._element, fused=self._fused) for layer in self._sizes.layers)
        loss = self._last * LOSS * padded_vocabulary(setup.vocabulary_size, tensor_parallel=tensor) / tensor
        recomputed = 2 if self._parallel.recompute == "full" else 0
        traffic = self._tokens * ((ACTIVATION_PASSES + recomputed) * kept + 2 * loss)
        traffic += self._weights_used() * (3 * self._element + 2 * FP32)
        return Part("memory traffic", traffic / self._hardware.memory, traffic, "B")

    def _weights_used(self) -> float:
        """Weights that a micro-batch is computed with: of a projected network those of one expert."""
        if self._model.projection is None:
            return self._sizes.weights
        one = self._sizes.derived / self._setup.local_variants
        return self._sizes.weights - (self._model.projection.capacity - 1) * one

    def _tensor(self) -> Part:
        """All-reduces of activations: two per layer in each direction, 8 N H (t - 1) / t elements in all; one of the
        embedding's output, one of the output layer's gradient. With sequence parallelism each is a reduce-scatter and an
        all-gather of the same bytes. Experts exchange each token `top_k` times. None overlaps."""
        size, layers = self._parallel.tensor_parallel, self._sizes.layers
        if size == 1:
            return Part("tensor parallel collectives", 0.0)
        again = {"none": 0, "selective": 1, "full": 2}[self._parallel.recompute]
        further = (
            self._model.moe.top_k - 1 if self._model.moe is not None and self._setup.expert_tensor_parallel > 1 else 0
        )
        count = (4 + again) * len(layers) + self._first + self._last
        count += further * 2 * sum(1 for layer in layers if self._model.experts_of(layer))
        sent = count * 2 * (size - 1) / size * self._vector
        return self._moved("tensor parallel collectives", sent, self._hardware.ring_rate(size, 1), count)

    def _context(self) -> Part:
        """Keys and values of the other parts of a sequence; in the backward pass with their gradients. Transformer Engine
        sends them while it computes attention, so only what takes longer counts."""
        size, model, tensor = self._parallel.context_parallel, self._model, self._parallel.tensor_parallel
        layers = len(self._sizes.layers)
        width = 2 * model.kv_heads * model.head_size / tensor
        sent = 3 * (size - 1) * layers * width * self._tokens * self._element
        rate = self._hardware.message_rate(size * tensor)
        part = self._moved("context parallel exchange", sent, rate, 3 * (size - 1) * layers)
        return part._replace(seconds=max(0.0, part.seconds - self._attention().seconds))

    def _experts(self) -> Part:
        """All-to-alls: tokens go to their experts and back, in each direction."""
        size, moe = self._parallel.expert_parallel, self._model.moe
        if moe is None or size == 1:
            return Part("expert all-to-all", 0.0)
        count = 4 * sum(1 for layer in self._sizes.layers if self._model.experts_of(layer))
        sent = count * moe.top_k * self._vector / self._sequence_shards * (size - 1) / size
        rate = self._hardware.message_rate(size * self._setup.expert_tensor_parallel)
        return self._moved("expert all-to-all", sent, rate, count)

    def _pipeline(self, computed: float) -> Part:
        """Activations to the next stage and gradients to the one before, for each chunk. An interleaved schedule overlaps
        them."""
        parallel = self._parallel
        stages, chunks = parallel.pipeline_parallel, parallel.virtual_pipeline
        count = 2 * chunks if stages > 1 else 0
        sent, rate = count * self._vector / self._sequence_shards, self._hardware.message_rate(parallel.world_size)
        part = self._moved("pipeline messages", sent, rate, count)
        return part if chunks == 1 else part._replace(seconds=max(0.0, part.seconds - computed))

    def _replicas(self) -> Iterator[Part]:
        """Gradients (fp32) are summed over replicas; with the distributed optimizer each gets a part, and then all gather the
        weights. Overlapped, they are hidden by the last backward pass and the next forward pass but for one bucket."""
        sizes, parallel = self._sizes, self._parallel
        tensor, expert_tensor = parallel.tensor_parallel, self._setup.expert_tensor_parallel
        groups = (
            (sizes.trained - sizes.experts, parallel.data_parallel * parallel.context_parallel, tensor),
            (
                sizes.experts,
                self._setup.expert_ranks // parallel.expert_parallel,
                expert_tensor * parallel.expert_parallel,
            ),
        )
        rates = [self._hardware.ring_rate(size, apart) for _, size, apart in groups]
        passes = 1 if parallel.zero_stage else 2  # a reduce-scatter; or an all-reduce
        backward = 2 / 3 * sum(part.seconds for part in (self._products(), self._attention(), self._memory()))
        reduced = [
            self._moved("gradient reduction", passes * FP32 * count * (size - 1) / size, rate, size > 1)
            for (count, size, _), rate in zip(groups, rates, strict=True)
        ]
        if (self._first or self._last) and parallel.pipeline_parallel > 1 and self._model.tie_embeddings:
            vocabulary = padded_vocabulary(self._setup.vocabulary_size, tensor_parallel=tensor) // tensor
            rate = self._hardware.message_rate(parallel.world_size)
            reduced.append(self._moved("gradient reduction", FP32 * vocabulary * self._model.hidden_size, rate, 1))
        yield self._exposed(reduced, backward)
        if parallel.zero_stage:
            gathered = [
                self._moved("parameter gathering", self._element * count * (size - 1) / size, rate, size > 1)
                for (count, size, _), rate in zip(groups, rates, strict=True)
            ]
            yield self._exposed(gathered, backward / 2)

    def _exposed(self, parts: list[Part], hidden_by: float) -> Part:
        """The sum of parts, without the seconds that computation hides. Derived weights are gathered before and reduced after
        all passes."""
        whole = Part(parts[0].name, sum(part.seconds for part in parts), sum(part.amount for part in parts), "B")
        if not getattr(self._parallel, "overlap_communication", False) or self._sizes.derived:
            return whole
        bucket = min(1.0, max(BUCKET, 1_000_000 * self._parallel.data_parallel) / self._sizes.trained)
        return whole._replace(seconds=max(whole.seconds * bucket, whole.seconds - hidden_by))

    def _derived(self) -> Iterator[Part]:
        """Weights that a step computes from others, and their gradients."""
        sizes, model, setup = self._sizes, self._model, self._setup
        if not sizes.derived:
            return
        # Of each matrix of a projected network: read (through fp32), and its gradient zeroed, summed and written.
        bases = (sizes.trained - self._weights_used()) * 28 if model.projection is not None else 0.0
        traffic = bases + sizes.derived * (3 * self._element + 2 * FP32)
        yield Part("derived weights, memory traffic", traffic / self._hardware.memory, traffic, "B")
        if model.projection is not None:
            flops = projection_flops(model, setup.local_variants)
            shards = self._parallel.tensor_parallel * model.layers / len(sizes.layers)
            yield self._computed("derived weights, matrix products", flops / shards)

    def _own_weights(self) -> float:
        """Weights whose optimizer state this process has."""
        copies, expert_copies = optimizer_shards(self._setup)
        return (self._sizes.trained - self._sizes.experts) / copies + self._sizes.experts / expert_copies

    @property
    def _sequence_shards(self) -> int:
        return self._parallel.tensor_parallel if self._parallel.sequence_parallel else 1

    def _of_layers(self, flops: float) -> float:
        """This process's part of what a token takes in all layers, for a micro-batch."""
        return self._shared(flops) * len(self._sizes.layers) / self._model.layers

    def _shared(self, flops: float) -> float:
        """This process's part of what a token takes, for a micro-batch."""
        return flops * self._tokens / self._parallel.tensor_parallel

    def _computed(self, name: str, products: float = 0.0, attention: float = 0.0) -> Part:
        seconds = products / self._hardware.products + attention / self._hardware.attention
        return Part(name, seconds, products + attention, "FLOP")

    def _moved(self, name: str, sent: float, rate: float, count: int) -> Part:
        """Bytes that a process sends by so many collectives or messages."""
        return Part(name, sent / rate + count * self._hardware.collective, sent, "B")
