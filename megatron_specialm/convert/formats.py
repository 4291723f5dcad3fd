"""The formats that are recognized and written."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.architectures import CONFIG, Model, architecture_of, read_config
from megatron_specialm.convert import (
    canonical_folder,
    deepspeed_folder,
    deepspeed_models,
    huggingface_folder,
    megatron_folder,
    megatron_legacy,
    torch_dist,
)
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.source import Layout, Source, TargetSpec


class Format(NamedTuple):
    """How a format is recognized and read.

    Attributes:
        recognize: by any of its files, so that of an incomplete checkpoint `open` names what is missing.
        open: see `open_source`.
        tensors: the tensors in the files of a checkpoint of any model, by the format's own names.
    """

    name: str
    recognize: Callable[[Path], bool]
    open: Callable[[Path, Model | None], Source]
    tensors: Callable[[Path], Mapping[str, LazyTensor]]


# Transformers' is the last: others keep a config.json beside their files.
FORMATS = (
    Format(
        canonical_folder.FORMAT,
        canonical_folder.recognize,
        canonical_folder.open_folder,
        canonical_folder.stored_tensors,
    ),
    Format(
        megatron_folder.FORMAT,
        torch_dist.recognize,
        megatron_folder.open_torch_dist,
        lambda path: torch_dist.open_torch_dist(path).tensors,
    ),
    Format(
        deepspeed_models.FORMAT,
        deepspeed_folder.recognize,
        deepspeed_models.open_folder,
        lambda path: deepspeed_folder.open_deepspeed(path).tensors,
    ),
    Format(
        megatron_folder.FORMAT,
        megatron_legacy.recognize,
        megatron_folder.open_legacy,
        lambda path: megatron_legacy.open_megatron_legacy(path).by_rank,
    ),
    Format(
        huggingface_folder.FORMAT,
        huggingface_folder.recognize,
        huggingface_folder.open_folder,
        huggingface_folder.stored_tensors,
    ),
)


class Target(NamedTuple):
    """How a format is written: all its files, into the target's folder.

    Attributes:
        more_bytes: of each element, that are written beside it; `optimizer_bytes` more with the optimizer's state.
        no_optimizer: why it cannot hold that.
        no_optimizer_of_experts: the same, of a mixture of experts.
        has_main_weights: whether it has fp32 main weights beside a model in another type.
        degrees: the fields of a `Layout` that it has.
        check: refuses a layout or a model that it cannot have.
    """

    write: Callable[[TargetSpec], None]
    more_bytes: int = 0
    optimizer_bytes: int = 0
    no_optimizer: str = ""
    no_optimizer_of_experts: str = ""
    has_main_weights: bool = True
    degrees: tuple[str, ...] = ()
    check: Callable[[Model, Layout], object] = lambda model, layout: None


_MODEL_PARALLEL = ("tensor_parallel", "pipeline_parallel", "expert_parallel")
TARGETS = {
    canonical_folder.FORMAT: Target(canonical_folder.write_folder, optimizer_bytes=8, has_main_weights=False),
    huggingface_folder.FORMAT: Target(
        huggingface_folder.write_folder,
        no_optimizer="a folder of Transformers holds a model, no training",
        check=lambda model, layout: architecture_of(model.shape),
    ),
    megatron_folder.FORMAT: Target(
        megatron_folder.write_torch_dist,
        optimizer_bytes=12,
        no_optimizer_of_experts="Megatron-Core has an optimizer for experts and another for all else, which are not written",
        degrees=_MODEL_PARALLEL,
        check=megatron_folder.check_layout,
    ),
    megatron_folder.LEGACY: Target(
        megatron_folder.write_legacy,
        no_optimizer=f"{megatron_folder.LEGACY_OPTIMIZER}: convert to megatron",
        degrees=_MODEL_PARALLEL,
        check=megatron_folder.check_layout,
    ),
    deepspeed_models.FORMAT: Target(
        deepspeed_models.write_folder,
        more_bytes=12,
        degrees=("expert_parallel", "zero_stage", "data_parallel"),
        check=deepspeed_models.check_layout,
    ),
}


def check_target(to: str, model: Model, layout: Layout) -> None:
    """Check that a format can hold a model in a layout.

    Args:
        to: a key of `TARGETS`.

    Raises:
        CheckpointError: naming the option, or the setting of the model.
    """
    for name, degree in layout._asdict().items():
        if degree != Layout._field_defaults[name] and name not in TARGETS[to].degrees:
            raise CheckpointError(f"a {to} target has no --{name.replace('_', '-')} (here {degree}): leave it out")
    TARGETS[to].check(model, layout)


def open_source(path: Path, *, config: Path | None = None) -> Source:
    """Open a checkpoint of any format, which is recognized by its content.

    Args:
        config: a config.json of Transformers, or its folder, for a checkpoint that does not say which model it is of.

    Raises:
        CheckpointError: it is of no known format, not complete, or of a model that we do not have.
        ArtifactError: a file is damaged.
    """
    given = None if config is None else read_config(config / CONFIG if config.is_dir() else config)
    return format_of(path).open(path, given)


def format_of(path: Path) -> Format:
    """The format of a checkpoint.

    Raises:
        CheckpointError: it is no folder, or of no known format.
    """
    if path.is_file():
        raise CheckpointError(f"{path}: a file: name the checkpoint's folder, {path.parent}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder: name the folder of a checkpoint")
    for known in FORMATS:
        if known.recognize(path):
            return known
    files = ", ".join(sorted(found.name for found in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{path}: a checkpoint of no known format ({', '.join(dict.fromkeys(known.name for known in FORMATS))}). It has "
        f"{files}. Name the folder in which the checkpoint's own files are"
    )
