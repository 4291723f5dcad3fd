"""The ordinary model of a checkpoint: one of the experts that it has for clusters, or a base with its adapters merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json
from megatron_specialm.base.shapes import Size
from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import STATE, declare_final, find_final
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.merge import merge_lora, project, take_expert


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
        """The ordinary model.

        Args:
            mixture_K: (K,) coefficients of a projected network's experts: one-hot for a single one. One-hot for an MoE that
                routes by cluster.

        Raises:
            CheckpointError: a model with an expert per cluster, and no mixture or one of another number of experts.
        """
        weights, shape = self.weights, self.shape
        if (experts := shape.window_experts) is not None:
            if mixture_K is None or len(mixture_K) != experts:
                asked = "none was named" if mixture_K is None else f"a mixture of {len(mixture_K)} was asked for"
                raise CheckpointError(
                    f"{self.step}: a model of {experts} experts, one per cluster, and {asked}: say which expert"
                )
            weights = (take_expert if shape.projection is None else project)(weights, shape, mixture_K)
        if shape.lora is not None:
            weights = merge_lora(weights, shape)
        # Progress and cost belong to the training, not to the model: a training that starts from it begins anew.
        state = {name: value for name, value in self.state.items() if name not in ("progress", "spent")}
        return MergedModel(shape.base_config, weights, {**state, "model": shape.base_config.model_dump(mode="json")})


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


def one_hot(expert: int, *, experts: int) -> torch.Tensor:
    """Coefficients (K,) of a mixture that is one expert.

    Raises:
        CheckpointError: there is no such expert.
    """
    if not 0 <= expert < experts:
        raise CheckpointError(f"expert {expert} does not exist: there are experts 0 to {experts - 1}")
    return torch.eye(experts)[expert]


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


def project_expert(folder: Path, output: Path, *, expert: int) -> Path:
    """Write an expert of a model that has one per cluster as an ordinary model; returns its step's folder.

    Args:
        folder: of a train task that has ended.
        output: to be made.

    Raises:
        CheckpointError: `folder` is of no finished training or of an ordinary model, there is no such expert, or `output`
            is there already.
    """
    if not (folder / "result.json").is_file():
        raise CheckpointError(f"{folder}: no result.json: name the folder of a training that has ended, RUN/STAGE/KEY")
    network = read_trained(find_final(folder))
    if (experts := network.shape.window_experts) is None:
        raise CheckpointError(
            f"{network.step}: an ordinary model, without an expert per cluster: there is none to write"
        )
    if output.exists():
        raise CheckpointError(f"{output}: is there already: name a folder to make")
    return write_merged(network.merged(one_hot(expert, experts=experts)), output)
