"""A layout's parity case: a small model and a few batches that take every path that the large one takes."""

import math

from pydantic import PositiveFloat, PositiveInt

from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import ModelConfig, Projection
from megatron_specialm.config.parallel import Layout, ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision
from megatron_specialm.estimate.setup import Setup

HEAD_SIZE = 8


class ParityCase(Settings):
    """What is trained twice: in a layout, and on one process."""

    model: ModelConfig
    parallel: Layout
    precision: Precision
    fp8: Fp8Config | None = None
    vocabulary_size: PositiveInt = 131  # prime: no number of processes divides it, and its padding is more than one row
    context_length: PositiveInt
    micro_batch_size: PositiveInt = 2
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
            self.micro_batch_size, self.fp8,
        )  # fmt: skip

    def on_one_process(self) -> "ParityCase":
        """The same training without a layout."""
        return self.model_copy(
            update={
                "parallel": ParallelConfig(),
                "micro_batches": self.micro_batches * self.parallel.data_parallel,
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
    shrunk = model.model_copy(
        update={
            "name": f"{model.name}, shrunk",
            "layers": min(model.layers, parallel.chunks + 1),
            "hidden_size": hidden,
            "ffn_hidden_size": feed_forward * parallel.tensor_parallel,
            "attention_heads": heads,
            "kv_channels": None if model.kv_channels is None else 2 * HEAD_SIZE,
            "query_groups": None if model.query_groups is None else groups,
            "projection": projection,
            "lora": lora,
        }
    )
    return ParityCase(
        model=shrunk,
        parallel=parallel,
        precision=setup.precision,
        fp8=setup.fp8,
        context_length=math.lcm(16, parallel.tensor_parallel, 2 * parallel.context_parallel),
        micro_batches=2 * parallel.pipeline_parallel,
    )
