"""Checkpoints of our own: `step_N` folders, of any engine and layout, and folders of trainings that have ended."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.artifacts import LABEL, artifact_folder, read_label
from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import publish_folder, read_json, write_json
from megatron_specialm.base.shapes import Size
from megatron_specialm.checkpoint.opening import Checkpoint, read_checkpoint
from megatron_specialm.checkpoint.steps import RESULT, STATE, declare_final, find_final, step_folder
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.architectures import Model, refuse_given
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.lazy import Computed, LazyTensor
from megatron_specialm.convert.safetensors_writer import SafetensorsWriter
from megatron_specialm.convert.source import Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import TOKENIZER, copy_tokenizer, is_ours
from megatron_specialm.model.merge import adapted, ordinary
from megatron_specialm.model.weights import weight_specs

FORMAT = "canonical"


@dataclass(frozen=True)
class _State:
    """What is read here of a step's state."""

    model: ModelConfig
    vocabulary_size: Size
    context_length: Size
    tokenizer: str = ""
    special_ids: dict[str, Any] = field(default_factory=dict)


def recognize(path: Path) -> bool:
    """Whether a folder is a step, or a training that has ended."""
    return (path / STATE).is_file() or (path / RESULT).is_file()


def open_folder(path: Path, given: Model | None = None) -> Source:
    """Open a step, or the outcome of a training. Files are compared with the manifest; adapters are merged.

    Raises:
        ArtifactError: a file is missing, damaged or changed.
        CheckpointError: it is of a projected network, or tensors do not fit the model.
    """
    refuse_given(path, given)
    checkpoint, state = _read(path)
    step, shape = checkpoint.folder, state.model
    if shape.projection is not None:
        raise CheckpointError(
            f"{step}: a projected network of {shape.projection.experts} experts: make one of them an ordinary model with "
            "`specialm project`, and convert that"
        )
    stored: Mapping[str, LazyTensor] = checkpoint.weights.stored
    for name, spec in weight_specs(shape, vocabulary_size=state.vocabulary_size).items():
        if tuple(stored[name].shape) != spec.shape:
            raise CheckpointError(f"{step}: {name} has shape {tuple(stored[name].shape)}, and the model {spec.shape}")
    merged = shape.base_config
    names = weight_specs(merged, vocabulary_size=state.vocabulary_size)
    weights = {name: _merged(name, stored, shape) for name in names}
    adapters = {name for name in stored if ".lora_" in name}
    if left := sorted(stored.keys() - weights.keys() - adapters):
        raise CheckpointError(f"{step}: {left[0]} has no place in the model ({len(left)} left over)")
    return _source(checkpoint, state, weights, layout="adapters merged" if adapters else "whole tensors")


def open_experts(path: Path, mixture: Callable[[int], torch.Tensor]) -> Source:
    """Open an expert, or a mixture of experts, of a model that has one per cluster: an ordinary model.

    Args:
        mixture: from the number K of experts to their coefficients (K,): one-hot for a single one.

    Raises:
        CheckpointError: it is an ordinary model, or has no such mixture.
    """
    experts = expert_count(path)
    mixture_K = mixture(experts)
    checkpoint, state = _read(path)
    is_one = bool(mixture_K.count_nonzero() == 1)
    if state.model.projection is None and not is_one:
        raise CheckpointError(f"{checkpoint.folder}: its experts have no average: name one (--expert)")
    # In memory: it is as small as what it was trained to be.
    found = ordinary(checkpoint.weights, state.model, mixture_K, where=checkpoint.folder)
    names = weight_specs(state.model.base_config, vocabulary_size=state.vocabulary_size)
    layout = f"expert {int(mixture_K.argmax())} of {experts}" if is_one else f"average of {experts} experts"
    return _source(checkpoint, state, {name: found[name].contiguous() for name in names}, layout=layout)


def expert_count(path: Path) -> int:
    """The number of experts of a model that has one per cluster.

    Raises:
        CheckpointError: it is an ordinary model, or of no training.
    """
    if not recognize(path):
        raise CheckpointError(
            f"{path}: no result.json: name the folder of a training that has ended, RUN/STAGE/KEY, or a mixture's, RUN/STAGE"
        )
    step = _step_of(path)
    if (experts := read_json(step / STATE, _State).model.window_experts) is None:
        raise CheckpointError(f"{step}: an ordinary model, without an expert per cluster: there is none to write")
    return experts


def _read(path: Path) -> tuple[Checkpoint, _State]:
    step = _step_of(path)
    return read_checkpoint(step), read_json(step / STATE, _State)


def _step_of(path: Path) -> Path:
    return path if (path / STATE).is_file() else find_final(path)


def _source(checkpoint: Checkpoint, state: _State, weights: Mapping[str, LazyTensor], *, layout: str) -> Source:
    """A source of the weights of the ordinary model."""
    step = checkpoint.folder
    return Source(
        path=step,
        format=FORMAT,
        model=Model(state.model.base_config, state.vocabulary_size, state.context_length, state.special_ids),
        weights=weights,
        stored=checkpoint.weights.stored,
        layout=layout,
        step=int(step.name.removeprefix("step_")) if step.name.startswith("step_") else 0,
        tokenizer=_tokenizer_of(step.parent),
        tokenizer_fingerprint=state.tokenizer,
        fingerprint=read_fingerprint(step),
    )


def _tokenizer_of(training: Path) -> Path | None:
    """The folder beside a converted step; or of the `tokenizer` task that a training of a run has used."""
    if (training / TOKENIZER).is_dir():
        return training / TOKENIZER
    artifact = training.resolve()  # RUN/artifacts/STAGE/KEY/DIGEST
    if not (artifact / LABEL).is_file():
        return None
    inputs = read_label(artifact)["made_from"].get("inputs", {})
    root, tasks = artifact.parents[3], (name.partition("/") for name in inputs)
    folders = [artifact_folder(root, stage, key, inputs[f"{stage}/{key}"]) for stage, _, key in tasks]
    return next((folder for folder in folders if is_ours(folder)), None)


def _merged(name: str, stored: Mapping[str, LazyTensor], shape: ModelConfig) -> LazyTensor:
    """A weight, with its adapters if it has any."""
    place = name.removesuffix("weight")
    base = stored[name]
    if shape.lora is None or f"{place}lora_a" not in stored:
        return base
    factor = shape.lora.factor

    def compute() -> torch.Tensor:
        a, b = (stored[f"{place}{part}"][()].float() for part in ("lora_a", "lora_b"))
        return adapted(base[()].float(), a, b, factor=factor)

    return Computed(tuple(base.shape), torch.float32, compute)


def write_folder(target: TargetSpec) -> None:
    """Write the folder of a training that ended at step 0: its only step, with one file of tensors.

    `tokenizer/` beside the step has the tokenizer's files.
    """
    source, step = target.source, target.folder / ".step"
    step.mkdir()
    places = {name: (target.dtype, tensor.shape) for name, tensor in source.weights.items()}
    file = SafetensorsWriter(step / "model-00000.safetensors", places)
    target.for_each_weight(lambda name, tensor: file.write(name, tensor[()]))
    file.close()
    target.fingerprint.save(step)
    state = {
        "model": source.model.shape.model_dump(mode="json"),
        "vocabulary_size": source.model.vocabulary_size,
        "context_length": source.model.context_length,
        "tokenizer": source.tokenizer_fingerprint,
        "special_ids": dict(source.model.special_ids),
        "converted_from": {"format": source.format, "path": str(source.path), "step": source.step},
    }
    write_json(step / STATE, state)
    publish_folder(step, step_folder(target.folder, 0))
    declare_final(target.folder, step=0)
    if source.tokenizer is not None:
        copy_tokenizer(source.tokenizer, target.folder / TOKENIZER, context_length=source.model.context_length)
