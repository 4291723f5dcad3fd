"""The model of an `import` stage, read from its description without opening its weights: a config.json of Transformers, or
what a step of our own records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.artifacts import RESULT, STATE
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import read_json
from megatron_specialm.base.hub import download, is_hub_name
from megatron_specialm.config.architectures import CONFIG, read_config
from megatron_specialm.config.model import ModelConfig


def describe_source(path: Path, *, revision: str | None, config: Path | None) -> dict[str, Any]:
    """`model` and `vocabulary_size` of an import stage that does not set them.

    Args:
        path, revision, config: of the stage.

    Raises:
        ConfigError: nothing describes the model, or there is no such folder.
        CheckpointError: the model is of an architecture that is not known.
        MachineError: the hub does not give its config.json.
    """
    if config is not None:
        return _of_transformers(config / CONFIG if config.is_dir() else config)
    if not path.is_dir():
        if not is_hub_name(str(path)):
            raise ConfigError(
                f"{path}: no such folder: name the folder of a checkpoint, or a model on the Hugging Face hub"
            )
        return _of_transformers(download(str(path), revision, [CONFIG]) / CONFIG)
    step = path / read_json(path / RESULT, _Result).folder if (path / RESULT).is_file() else path
    if (step / STATE).is_file():
        state = read_json(step / STATE, _State)
        return {"model": state.model.base_config.model_dump(mode="json"), "vocabulary_size": state.vocabulary_size}
    if (path / CONFIG).is_file():
        return _of_transformers(path / CONFIG)
    raise ConfigError(
        f"{path}: has no {CONFIG} that describes the model: give one of Transformers with `config`, or, of a checkpoint that "
        "`specialm inspect` describes, `model` and `vocabulary_size`"
    )


def _of_transformers(config: Path) -> dict[str, Any]:
    described = read_config(config)
    return {"model": described.shape.model_dump(mode="json"), "vocabulary_size": described.vocabulary_size}


@dataclass(frozen=True)
class _Result:
    """What is read here of a training's result."""

    folder: str


@dataclass(frozen=True)
class _State:
    """What is read here of a step's state."""

    model: ModelConfig
    vocabulary_size: int
