"""A layout's parity case: a small model and a few batches that take every path that the large one takes."""

import math

from pydantic import PositiveFloat, PositiveInt

from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import LAYOUTS, Layout, ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision
from megatron_specialm.estimate.setup import Setup

HEAD_SIZE = 8


class ParityCase(Settings):
    """What is trained twice: in a layout, and on one process."""

    model: ModelConfig
    parallel: Layout
    precision: Precision
    fp8: Fp8Config | None = None
    packing: Packing = "none"
    vocabulary_size: PositiveInt = 131  # prime: no number of processes divides it, and its padding is more than one row
    context_length: PositiveInt
    micro_batch_size: PositiveInt = 2
    windows_per_expert: PositiveInt = 2  # of a projected network; packed, a micro-batch may be larger
    micro_batches: PositiveInt  # per copy in the layout
    steps: PositiveInt = 4
    learning_rate: PositiveFloat = 1e-2
    clip_grad: PositiveFloat = 0.1  # below the norm of every step: clipping is part of what is compared
    # Adam divides by it plus the gradient's size. Larger than usual, so that where a gradient is all rounding its sign
    # does not decide the step.
    epsilon: PositiveFloat = 1e-3

    @property
    def global_batch_size(self) -> int:
        """Windows per step."""
        return self.micro_batch_size * self.micro_batches * self.parallel.data_parallel

    @property
    def setup(self) -> Setup:
        """What the case asks of an engine."""
        return Setup(
            self.model, self.parallel, self.precision, self.vocabulary_size, self.context_length, self.global_batch_size,
            self.micro_batch_size, self.fp8, self.windows_per_expert, packing=self.packing,
        )  # fmt: skip

    def by_engine(self, engine: str) -> "ParityCase":
        """The same training in a like layout of another engine. (Megatron's optimizer state is not split then: that is compared
        with one process.) Of an MoE, Megatron-Core's tensor parallelism includes sequence parallelism."""
        layout = LAYOUTS[engine].model_validate(
            {
                **self.parallel.for_engine(engine),
                "sequence_parallel": engine == "megatron"
                and (
                    self.parallel.sequence_parallel
                    or (self.model.moe is not None and self.parallel.tensor_parallel > 1)
                ),
            }
        )
        return self.model_copy(update={"parallel": layout})

    def on_one_process(self) -> "ParityCase":
        """The same training without a layout, by the Megatron engine, with padded windows."""
        size = min(self.micro_batch_size, self.windows_per_expert)
        return self.model_copy(
            update={
                "parallel": ParallelConfig(),
                "packing": "none",
                "micro_batch_size": size,
                "micro_batches": self.global_batch_size // size,
            }
        )


def parity_case(setup: Setup) -> ParityCase:
    """A setup shrunk to what two cores train in a second. What a layout can get wrong stays: family, tied embeddings,
    grouped queries, and a number of layers that the chunks do not divide, where the model has more of them."""
    model, parallel = setup.model, setup.parallel
    groups = parallel.tensor_parallel * (2 if model.kv_heads == model.attention_heads else 1)
    heads = groups * (model.attention_heads // model.kv_heads)
    hidden = heads * HEAD_SIZE
    feed_forward = max(1, round(model.ffn_hidden_size / model.hidden_size * hidden / parallel.tensor_parallel))
    projection, lora = model.projection, model.lora
    if projection is not None:  # odd sizes: none is taken for another
        projection = Projection(experts=min(projection.experts, 3), capacity=min(projection.capacity, 4), code_size=5)
    if lora is not None:
        rank = min(lora.rank, 3)
        lora = lora.model_copy(update={"rank": rank, "alpha": lora.factor * rank})
    layers = min(model.layers, parallel.chunks + 1)
    moe = None if model.moe is None else _shrunk_experts(model.moe, parallel, scale=hidden / model.hidden_size)
    if moe is not None:  # one MoE layer on each chunk, and all numbers of a list
        layers = min(model.layers, max(layers, moe.every * max(parallel.chunks, len(set(moe.counts)))))
        if isinstance(moe.experts, list):
            moe = moe.model_copy(update={"experts": moe.experts[-(layers // moe.every) :]})
    shrunk = model.model_copy(
        update={
            "name": f"{model.name}, shrunk",
            "layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": feed_forward * parallel.tensor_parallel,
            "attention_heads": heads,
            "kv_channels": None if model.kv_channels is None else 2 * HEAD_SIZE,
            "query_groups": None if model.query_groups is None else groups,
            "projection": projection,
            "lora": lora,
            "moe": moe,
        }
    )
    mixed = setup.packing == "packed" and projection is not None and setup.windows_per_expert < setup.micro_batch_size
    return ParityCase(
        model=shrunk,
        parallel=parallel,
        precision=setup.precision,
        fp8=setup.fp8,
        packing=setup.packing,
        windows_per_expert=1 if mixed else 2,
        context_length=math.lcm(16, parallel.tensor_parallel, 2 * parallel.context_parallel),
        micro_batches=2 * parallel.pipeline_parallel,
    )


def _shrunk_experts(moe: MixtureOfExperts, parallel: Layout, *, scale: float) -> MixtureOfExperts:
    """At least two experts per process, and two numbers of them where the layers have several."""
    tensor, fewest = (
        parallel.tensor_parallel,
        parallel.expert_parallel * max(2, -(-moe.top_k // parallel.expert_parallel)),
    )
    counts = [min(count, fewest if count == min(moe.counts) else 2 * fewest) for count in moe.counts]
    return moe.model_copy(
        update={
            "experts": counts if isinstance(moe.experts, list) else counts[0],
            **{
                name: tensor * max(1, round(size * scale / tensor))
                for name in ("ffn_hidden_size", "shared_expert")
                if (size := getattr(moe, name)) is not None
            },
        }
    )
