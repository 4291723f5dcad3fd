"""The ordinary model of a checkpoint: one of the experts that it has for clusters, or a base with its adapters merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.files import read_json
from megatron_specialm.base.shapes import Size
from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import STATE, declare_final
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.merge import ordinary


@dataclass(frozen=True)
class _Description:
    """What is read here of a step's state; `stages/train.py` writes it."""

    model: ModelConfig
    vocabulary_size: Size
    context_length: Size
    tokenizer: str


@dataclass(frozen=True)
class MergedModel:
    """An ordinary model: its shape, its canonical weights, and the state of its checkpoint."""

    shape: ModelConfig
    weights: Mapping[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def vocabulary_size(self) -> int:
        """Tokens of its tokenizer."""
        return self.state["vocabulary_size"]

    @property
    def context_length(self) -> int:
        """Tokens of the windows that it was trained on."""
        return self.state["context_length"]

    def build(self) -> Gpt:
        """The whole model with its weights on this process, in fp32."""
        model = Gpt(self.shape, vocabulary_size=self.vocabulary_size, context_length=self.context_length)
        model.load(self.weights)
        return model


@dataclass(frozen=True)
class TrainedModel:
    """The model of a checkpoint as it was trained: ordinary, with adapters, or with an expert per cluster."""

    step: Path
    shape: ModelConfig
    weights: Mapping[str, torch.Tensor]
    state: dict[str, Any]

    def merged(self, mixture_K: torch.Tensor | None = None) -> MergedModel:
        """The ordinary model; see `ordinary`."""
        weights, shape = ordinary(self.weights, self.shape, mixture_K, where=self.step), self.shape.base_config
        # Progress and cost belong to the training, not to the model: a training that starts from it begins anew.
        state = {name: value for name, value in self.state.items() if name not in ("progress", "spent")}
        return MergedModel(shape, weights, {**state, "model": shape.model_dump(mode="json")})


def read_trained(step: Path) -> TrainedModel:
    """The model of a `step_N` folder. Its files are verified now; its tensors are read when they are asked for.

    Raises:
        ArtifactError: a file is missing, cut short or changed.
    """
    checkpoint, described = read_checkpoint(step), read_json(step / STATE, _Description)
    return TrainedModel(step, described.model, checkpoint.weights, checkpoint.state)


def read_merged(step: Path) -> MergedModel:
    """The ordinary model of a `step_N` folder.

    Raises:
        ArtifactError: a file is missing, cut short or changed.
        CheckpointError: it has an expert per cluster, and so is many models.
    """
    return read_trained(step).merged()


def write_merged(model: MergedModel, folder: Path) -> Path:
    """Write an ordinary model as the outcome of a training that ended at step 0; returns the step's folder."""
    step = save_checkpoint(
        folder,
        step=0,
        weights={name: tensor.contiguous() for name, tensor in model.weights.items()},
        optimizer_state={},
        state=model.state,
    )
    declare_final(folder, step=0)
    return step
