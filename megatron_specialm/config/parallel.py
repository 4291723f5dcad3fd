"""How a training is spread over processes, and by which engine. It does not change what is computed, so it is in no digest.

Each engine has a layout class of its own, chosen by `engine`. A new engine adds its class here, to `LAYOUTS` and `Layout`.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetCoreSchemaHandler, PositiveInt, model_validator
from pydantic_core import CoreSchema, core_schema

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import ModelConfig


class _Layout(Settings):
    """What layouts of all engines have: tensor x context x data x pipeline parallel processes, tensor ranks next to each other.

    `estimate/capabilities.py` has what a layout requires of the model, the batch and the machine, and what an engine does not
    offer.
    """

    engine: str = Field(description="the package of engine/ that trains")
    tensor_parallel: PositiveInt = Field(default=1, description="processes over which each matrix is split (TP)")
    sequence_parallel: bool = Field(default=False, description="norms are split too, by positions (SP); with TP only")
    pipeline_parallel: PositiveInt = Field(default=1, description="stages of consecutive layers (PP), 1F1B schedule")
    virtual_pipeline: PositiveInt = Field(default=1, description="chunks per stage; above 1: interleaved 1F1B")
    context_parallel: PositiveInt = Field(default=1, description="processes over which each sequence is split (CP)")
    data_parallel: PositiveInt = Field(default=1, description="copies over which each global batch is split (DP)")
    expert_parallel: PositiveInt = Field(
        default=1,
        description="processes over which the experts of each MoE layer are split (EP), out of the data-parallel ones",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations recomputed in the backward pass: none, those of the feed-forward parts, those of whole layers",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_engines_settings(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        others = {
            name: engine for engine, layout in LAYOUTS.items() for name in layout.model_fields.keys() - cls.model_fields
        }
        for name in data.keys() & others:
            if data[name] is not None:  # a null takes back what `defaults` set
                engine, instead = others[name], _INSTEAD.get(name, "drop it")
                raise ValueError(f"{name} is a setting of engine {engine}: {instead}, or set engine: {engine}")
        return {name: value for name, value in data.items() if name not in others}

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

    def for_engine(self, engine: str) -> dict[str, Any]:
        """The settings of a like layout of another engine: all those that both have; null for the others, which `defaults` may
        have set.

        Raises:
            ConfigError: there is no such engine.
        """
        if engine not in LAYOUTS:
            raise ConfigError(f"engine {engine} is unknown: it is one of {', '.join(LAYOUTS)}")
        own, other = self.model_dump(mode="json"), LAYOUTS[engine].model_fields
        return {**{name: value if name in other else None for name, value in own.items()}, "engine": engine}

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def chunks(self) -> int:
        """The number of groups of consecutive layers that the model is split into."""
        return self.pipeline_parallel * self.virtual_pipeline

    def _describe(self, *, zero_stage: int) -> str:
        sizes = {
            "TP": self.tensor_parallel, "PP": self.pipeline_parallel, "VP": self.virtual_pipeline,
            "CP": self.context_parallel, "DP": self.data_parallel, "EP": self.expert_parallel,
        }  # fmt: skip
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        parts += ["SP"] * self.sequence_parallel + [f"ZeRO-{zero_stage}"] * (zero_stage > 0)
        parts += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return " ".join(parts) or "1 process"


_INSTEAD = {
    "distributed_optimizer": "set zero_stage: 1 instead",
    "zero_stage": "set distributed_optimizer: true instead of 1",
}


class ParallelConfig(_Layout):
    """A layout of the Megatron engine."""

    engine: Literal["megatron"] = Field(default="megatron", description="the package of engine/ that trains")
    distributed_optimizer: bool = Field(
        default=False, description="the optimizer's state is split over the copies (ZeRO-1)"
    )
    overlap_communication: bool = Field(
        default=False, description="reduce gradients and gather parameters during computation"
    )

    @property
    def zero_stage(self) -> int:
        """What is split over the copies, as ZeRO numbers it: 0 nothing, 1 the optimizer's state."""
        return int(self.distributed_optimizer)

    @property
    def offload_optimizer(self) -> bool:
        """Whether the optimizer's state is on the host."""
        return False

    def describe(self) -> str:
        """Short: `TP2 SP PP4 DP2 ZeRO-1`, or `1 process`."""
        return self._describe(zero_stage=self.zero_stage)

    def more_sharding(self) -> dict[str, Any]:
        """The settings with which the copies split more; none if there are none."""
        return {} if self.distributed_optimizer else {"distributed_optimizer": True}


class DeepSpeedConfig(_Layout):
    """A layout of the DeepSpeed engine: ZeRO (arXiv 1910.02054) over the data-parallel copies of a model that Megatron-Core's
    tensor parallelism splits."""

    engine: Literal["deepspeed"] = Field(description="the package of engine/ that trains")
    zero_stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="what is split over the copies: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too",
    )
    offload_optimizer: bool = Field(default=False, description="the optimizer's state and step are on the host (CPU)")

    def more_sharding(self) -> dict[str, Any]:
        """See `ParallelConfig.more_sharding`."""
        return {} if self.zero_stage == 3 else {"zero_stage": self.zero_stage + 1}

    def describe(self) -> str:
        """Short: `DeepSpeed TP2 DP2 ZeRO-1`."""
        return f"DeepSpeed {self._describe(zero_stage=self.zero_stage)}" + " offload" * self.offload_optimizer


LAYOUTS: dict[str, type[Settings]] = {"megatron": ParallelConfig, "deepspeed": DeepSpeedConfig}  # by engine


class _ByEngine:
    """A union discriminated by `engine`. A layout without it is Megatron's, as in files of earlier versions."""

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.tagged_union_schema(
            {engine: handler.generate_schema(layout) for engine, layout in LAYOUTS.items()},
            discriminator=_engine_of,
            custom_error_type="engine",
            custom_error_message=f"names an unknown engine: set `engine` to one of {', '.join(LAYOUTS)}",
        )


def _engine_of(layout: Any) -> str:
    named = layout.get("engine") if isinstance(layout, dict) else getattr(layout, "engine", None)
    return "megatron" if named is None else str(named)


Layout = Annotated[ParallelConfig | DeepSpeedConfig, _ByEngine()]


VOCABULARY_MULTIPLE = 128  # rows of the embedding in memory: whole tiles for matrix kernels


def padded_vocabulary(vocabulary_size: int, *, tensor_parallel: int) -> int:
    """Rows of the embedding in memory. The padding never reaches a loss, a checkpoint or an export."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel)
    return math.ceil(vocabulary_size / multiple) * multiple


def split_layers(model: ModelConfig, vocabulary_size: int, chunks: int) -> list[int]:
    """The number of layers of each chunk, first to last: as even as whole layers allow, where the output layer, which in a
    small model costs as much as several layers, counts for the last chunk. Every chunk gets at least one layer.

    Raises:
        ValueError: there are fewer layers than chunks.
    """
    if model.layers < chunks:
        raise ValueError(f"{model.layers} layers cannot be split into {chunks} chunks")
    output = vocabulary_size * model.hidden_size * model.layers / model.linear_parameters(active=True)  # in layers
    counts = [1] * chunks
    for _ in range(model.layers - chunks):
        loads = [count + (output if chunk == chunks - 1 else 0) for chunk, count in enumerate(counts)]
        counts[loads.index(min(loads))] += 1
    return counts
