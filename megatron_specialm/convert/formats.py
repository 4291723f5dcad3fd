"""The formats that are recognized and written."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.architectures import CONFIG, Model, read_config
from megatron_specialm.convert import (
    canonical_folder,
    deepspeed_folder,
    deepspeed_models,
    huggingface_folder,
    megatron_folder,
    megatron_legacy,
    torch_dist,
)
from megatron_specialm.convert.source import Source, TargetSpec


class Format(NamedTuple):
    """How a format is recognized and read."""

    name: str
    recognize: Callable[[Path], bool]
    open: Callable[[Path, Model | None], Source]


# Transformers' is the last: others keep a config.json beside their files.
FORMATS = (
    Format(canonical_folder.FORMAT, canonical_folder.recognize, canonical_folder.open_folder),
    Format(megatron_folder.FORMAT, torch_dist.recognize, megatron_folder.open_torch_dist),
    Format(deepspeed_models.FORMAT, deepspeed_folder.recognize, deepspeed_models.open_folder),
    Format(megatron_folder.FORMAT, megatron_legacy.recognize, megatron_folder.open_legacy),
    Format(huggingface_folder.FORMAT, huggingface_folder.recognize, huggingface_folder.open_folder),
)


class Target(NamedTuple):
    """How a format is written: all its files, into the target's folder.

    Attributes:
        more_bytes: of each element, that are written beside it; `optimizer_bytes` more with the optimizer's state.
        no_optimizer: why it cannot hold that.
        no_optimizer_of_experts: the same, of a mixture of experts.
        has_main_weights: whether it has fp32 main weights beside a model in another type.
    """

    write: Callable[[TargetSpec], None]
    more_bytes: int = 0
    optimizer_bytes: int = 0
    no_optimizer: str = ""
    no_optimizer_of_experts: str = ""
    has_main_weights: bool = True


TARGETS = {
    canonical_folder.FORMAT: Target(canonical_folder.write_folder, optimizer_bytes=8, has_main_weights=False),
    huggingface_folder.FORMAT: Target(
        huggingface_folder.write_folder, no_optimizer="a folder of Transformers holds a model, no training"
    ),
    megatron_folder.FORMAT: Target(
        megatron_folder.write_torch_dist,
        optimizer_bytes=12,
        no_optimizer_of_experts="Megatron-Core has an optimizer for experts and another for all else, which are not written",
    ),
    megatron_folder.LEGACY: Target(
        megatron_folder.write_legacy, no_optimizer=f"{megatron_folder.LEGACY_OPTIMIZER}: convert to megatron"
    ),
    deepspeed_models.FORMAT: Target(deepspeed_models.write_folder, more_bytes=12),
}


def open_source(path: Path, *, config: Path | None = None) -> Source:
    """Open a checkpoint of any format, which is recognized by its content.

    Args:
        config: a config.json of Transformers, or its folder, for a checkpoint that does not say which model it is of.

    Raises:
        CheckpointError: it is of no known format, not complete, or of a model that we do not have.
        ArtifactError: a file is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder: name the folder of a checkpoint")
    given = None if config is None else read_config(config / CONFIG if config.is_dir() else config)
    for known in FORMATS:
        if known.recognize(path):
            return known.open(path, given)
    files = ", ".join(sorted(found.name for found in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{path}: a checkpoint of no known format ({', '.join(dict.fromkeys(known.name for known in FORMATS))}). It has "
        f"{files}. Name the folder in which the checkpoint's own files are"
    )
