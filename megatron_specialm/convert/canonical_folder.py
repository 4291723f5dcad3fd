"""Checkpoints of our own: `step_N` folders, of any engine and layout, and folders of trainings that have ended."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.artifacts import LABEL, artifact_folder, read_label
from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import publish_folder, read_json, write_json
from megatron_specialm.base.shapes import Size
from megatron_specialm.checkpoint.opening import Checkpoint, read_checkpoint
from megatron_specialm.checkpoint.steps import RESULT, STATE, declare_final, find_final, step_folder
from megatron_specialm.config.architectures import Model, refuse_given
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.adam import MOMENTS, AdamState, read_adam
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.lazy import Computed, LazyTensor
from megatron_specialm.convert.safe_pickle import COPY_AGAIN
from megatron_specialm.convert.safetensors_writer import SafetensorsWriter
from megatron_specialm.convert.source import Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import TOKENIZER, copy_tokenizer, is_ours
from megatron_specialm.model.merge import adapted, ordinary
from megatron_specialm.model.weights import weight_specs

FORMAT = "canonical"


@dataclass(frozen=True)
class _State:
    """What is read here of a step's state. Checkpoints of version 0.1 do not say their model."""

    model: ModelConfig | None = None
    vocabulary_size: Size | None = None
    context_length: Size | None = None
    tokenizer: str = ""
    learning_rate: float | None = None
    special_ids: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def recognize(path: Path) -> bool:
    """Whether a folder is a step, or a training that has ended."""
    return (path / STATE).is_file() or (path / RESULT).is_file()


def open_folder(path: Path, given: Model | None = None) -> Source:
    """Open a step, or the outcome of a training. Files are compared with the manifest; adapters are merged.

    Args:
        given: the model, of a checkpoint that does not say it.

    Raises:
        ArtifactError: a file is missing, damaged or changed.
        CheckpointError: it is of a projected network, or tensors do not fit the model.
    """
    checkpoint, state = _read(path)
    step, model = checkpoint.folder, _model(checkpoint.folder, state, given)
    shape = model.shape
    if shape.window_experts is not None:
        raise CheckpointError(
            f"{step}: a model of {shape.window_experts} experts, one per cluster: make one of them an ordinary model with "
            "`specialm project`, and convert that"
        )
    stored: Mapping[str, LazyTensor] = checkpoint.weights.stored
    for name, spec in weight_specs(shape, vocabulary_size=model.vocabulary_size).items():
        if tuple(stored[name].shape) != spec.shape:
            raise CheckpointError(f"{step}: {name} has shape {tuple(stored[name].shape)}, and the model {spec.shape}")
    merged = shape.base_config
    names = weight_specs(merged, vocabulary_size=model.vocabulary_size)
    weights = {name: _merged(name, stored, shape) for name in names}
    adapters = {name for name in stored if ".lora_" in name}
    if left := sorted(stored.keys() - weights.keys() - adapters):
        raise CheckpointError(f"{step}: {left[0]} has no place in the model ({len(left)} left over)")
    optimizer = None if adapters else _adam(checkpoint.optimizer_state.stored, names, state)
    reason = "of adapters, which are merged" if adapters else "of some weights only: the others are frozen"
    layout = "adapters merged" if adapters else "whole tensors"
    return _source(
        checkpoint, state, replace(model, shape=merged), weights, layout=layout, optimizer=optimizer, without_it=reason
    )


def stored_tensors(path: Path) -> Mapping[str, LazyTensor]:
    """The weights in the files of a step of any model."""
    return _read(path)[0].weights.stored


def open_experts(path: Path, mixture: Callable[[int], torch.Tensor]) -> Source:
    """Open an expert, or a mixture of experts, of a model that has one per cluster: an ordinary model.

    Args:
        mixture: from the number K of experts to their coefficients (K,): one-hot for a single one.

    Raises:
        CheckpointError: it is an ordinary model, or has no such mixture.
    """
    mixture_K = mixture(experts := expert_count(path))
    checkpoint, state = _read(path)
    model, is_one = _model(checkpoint.folder, state, None), bool(mixture_K.count_nonzero() == 1)
    if model.shape.projection is None and not is_one:
        raise CheckpointError(f"{checkpoint.folder}: its experts have no average: name one (--expert)")
    # In memory: it is as small as what it was trained to be.
    found, merged = (
        ordinary(checkpoint.weights, model.shape, mixture_K, where=checkpoint.folder),
        model.shape.base_config,
    )
    names = weight_specs(merged, vocabulary_size=model.vocabulary_size)
    weights = {name: found[name].contiguous() for name in names}
    layout = f"expert {int(mixture_K.argmax())} of {experts}" if is_one else f"average of {experts} experts"
    return _source(
        checkpoint, state, replace(model, shape=merged), weights, layout=layout, without_it="of all experts together"
    )


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
    if (experts := _model(step, read_json(step / STATE, _State), None).shape.window_experts) is None:
        raise CheckpointError(f"{step}: an ordinary model, without an expert per cluster: there is none to write")
    return experts


def _read(path: Path) -> tuple[Checkpoint, _State]:
    step = _step_of(path)
    return read_checkpoint(step, remedy=COPY_AGAIN), read_json(step / STATE, _State, remedy=COPY_AGAIN)


def _step_of(path: Path) -> Path:
    return path if (path / STATE).is_file() else find_final(path)


def _source(
    checkpoint: Checkpoint,
    state: _State,
    model: Model,
    weights: Mapping[str, LazyTensor],
    *,
    layout: str,
    optimizer: AdamState | None = None,
    without_it: str,
) -> Source:
    """A source of an ordinary model. `without_it`: why the optimizer's state is left out, where it is."""
    step = checkpoint.folder
    return Source(
        path=step,
        format=FORMAT,
        model=model,
        weights=weights,
        stored=checkpoint.weights.stored,
        layout=layout,
        step=int(step.name.removeprefix("step_")) if step.name.startswith("step_") else 0,
        dropped={"optimizer state": without_it} if checkpoint.optimizer_state and optimizer is None else {},
        optimizer=optimizer,
        tokenizer=_tokenizer_of(step.parent),
        tokenizer_fingerprint=state.tokenizer,
        fingerprint=read_fingerprint(step),
    )


def _model(step: Path, state: _State, given: Model | None) -> Model:
    if state.model is not None and state.vocabulary_size and state.context_length:
        refuse_given(step, given)
        return Model(state.model, state.vocabulary_size, state.context_length, state.special_ids)
    if given is None:
        raise CheckpointError(
            f"{step / STATE}: does not say its model, as in version 0.1: name a config.json of the model by --config"
        )
    return given


def _adam(stored: Mapping[str, LazyTensor], names: Collection[str], state: _State) -> AdamState | None:
    if "step" not in stored or any(f"{kind}/{name}" not in stored for kind in MOMENTS for name in names):
        return None
    rate = {} if state.learning_rate is None else {"lr": state.learning_rate}
    return read_adam(
        stored,
        step=int(stored["step"][()]),
        groups=[{**rate, **state.optimizer}],
        ours=lambda moments: {name: moments[name] for name in names},
    )


def _tokenizer_of(training: Path) -> Path | None:
    """The folder beside a converted step; or of the `tokenizer` task that a training of a run has used."""
    if (training / TOKENIZER).is_dir():
        return training / TOKENIZER
    if is_ours(training):  # of an import stage
        return training
    artifact = training.resolve()  # RUN/artifacts/STAGE/KEY/DIGEST
    if not (artifact / LABEL).is_file() or len(artifact.parents) < 4:
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
    """Write the folder of a training that ended: its only step, with a file of weights and one of the optimizer's state.
    Without that it is step 0; with it, a training goes on from the step if it finds it in its folder.

    `tokenizer/` beside the step has the tokenizer's files.
    """
    source, step = target.source, target.folder / ".step"
    step.mkdir()
    _write_tensors(target, step / "model-00000.safetensors", target.weights)
    state = {
        "model": source.model.shape.model_dump(mode="json"),
        "vocabulary_size": source.model.vocabulary_size,
        "context_length": source.model.context_length,
        "tokenizer": source.tokenizer_fingerprint,
        "special_ids": dict(source.model.special_ids),
        "converted_from": {"format": source.format, "path": str(source.path), "step": source.step},
    }
    if source.optimizer is not None:
        count = torch.tensor(float(source.optimizer.step))
        _write_tensors(target, step / "optimizer-00000.safetensors", {**source.optimizer.moments, "step": count})
        state |= {"progress": {"step": target.step}, "optimizer": dict(source.optimizer.settings)}
    target.fingerprint.save(step)
    write_json(step / STATE, state)
    publish_folder(step, step_folder(target.folder, target.step))
    declare_final(target.folder, step=target.step)
    if source.tokenizer is not None:
        copy_tokenizer(source.tokenizer, target.folder / TOKENIZER, context_length=source.model.context_length)


def _write_tensors(target: TargetSpec, path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    file = SafetensorsWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    target.for_each(tensors, lambda name, tensor: file.write(name, tensor[()]))
    file.close()
