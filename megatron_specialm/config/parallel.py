"""How a training is spread over processes. It does not change what is computed, so it is no part of a digest."""

import math
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import ModelConfig


class ParallelConfig(Settings):
    """A layout: tensor x context x data x pipeline parallel processes, tensor ranks nearest to each other.

    What a layout asks of the model, the batch and the machine is in `estimate/capabilities.py`.
    """

    tensor_parallel: PositiveInt = Field(default=1, description="processes that share each matrix (TP)")
    sequence_parallel: bool = Field(default=False, description="norms too are shared, by positions (SP); with TP only")
    pipeline_parallel: PositiveInt = Field(default=1, description="stages of consecutive layers (PP), 1F1B schedule")
    virtual_pipeline: PositiveInt = Field(default=1, description="chunks per stage; above 1: interleaved 1F1B")
    context_parallel: PositiveInt = Field(default=1, description="processes that share each sequence (CP)")
    data_parallel: PositiveInt = Field(default=1, description="copies that share each global batch (DP)")
    distributed_optimizer: bool = Field(default=False, description="the copies share the optimizer's state (ZeRO-1)")
    overlap_communication: bool = Field(
        default=False, description="gradients are reduced, and parameters gathered, while others are computed"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="in the backward pass: nothing; the feed-forward parts; whole layers"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "sequence_parallel goes with tensor_parallel above 1 (it is 1): drop it, or raise tensor_parallel to 2"
            )
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                f"virtual_pipeline {self.virtual_pipeline} goes with pipeline_parallel above 1 (it is 1): "
                "set virtual_pipeline to 1, or raise pipeline_parallel to 2"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def chunks(self) -> int:
        """Runs of consecutive layers that the model is cut into."""
        return self.pipeline_parallel * self.virtual_pipeline

    def describe(self) -> str:
        """Short: `TP2 SP PP4 DP2 ZeRO-1`, or `1 process`."""
        sizes = {
            "TP": self.tensor_parallel, "PP": self.pipeline_parallel, "VP": self.virtual_pipeline,
            "CP": self.context_parallel, "DP": self.data_parallel,
        }  # fmt: skip
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        parts += ["SP"] * self.sequence_parallel + ["ZeRO-1"] * self.distributed_optimizer
        parts += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return " ".join(parts) or "1 process"


VOCABULARY_MULTIPLE = 128  # rows of the embedding in memory: whole tiles for matrix kernels


def padded_vocabulary(vocabulary_size: int, *, tensor_parallel: int) -> int:
    """Rows of the embedding in memory. The padding never reaches a loss, a checkpoint or an export."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel)
    return math.ceil(vocabulary_size / multiple) * multiple


def split_layers(model: ModelConfig, vocabulary_size: int, chunks: int) -> list[int]:
    """How many layers each chunk gets, first to last: as even as whole layers allow when the last one's output layer,
    for a small model worth several layers, is counted with it. Every chunk gets at least one.

    Raises:
        ValueError: there are fewer layers than chunks.
    """
    if model.layers < chunks:
        raise ValueError(f"{model.layers} layers cannot be cut into {chunks} chunks")
    output = vocabulary_size * model.hidden_size * model.layers / model.linear_parameters()  # in layers
    counts = [1] * chunks
    for _ in range(model.layers - chunks):
        loads = [count + (output if chunk == chunks - 1 else 0) for chunk, count in enumerate(counts)]
        counts[loads.index(min(loads))] += 1
    return counts
