"""Import a model that exists: convert its weights to a canonical checkpoint, and its tokenizer to ours.

The artifact reads like that of a training that ended at step 0 and like that of a tokenizer stage at the same time:

    step_0000000/  result.json                   the weights, with their fingerprint (`convert/run.py`)
    tokenizer.json settings.json                 the tokenizer (`data/tokenizer.py`), with as many rows as the model has
    tokenizer/                                   the tokenizer's files as they were
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_specialm.base.artifacts import Report, check_fence
from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import fsync_path
from megatron_specialm.base.hub import download
from megatron_specialm.config.architectures import Model
from megatron_specialm.config.schema import ImportStage
from megatron_specialm.convert.canonical_folder import FORMAT
from megatron_specialm.convert.run import open_convertible, write_target
from megatron_specialm.convert.source import Source
from megatron_specialm.convert.tokenizer_files import SENTENCEPIECE
from megatron_specialm.data.huggingface_tokenizer import JSON
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.tokenizer_making import import_tokenizer
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.graph.context import Context
from megatron_specialm.stages.tokenizer import check_exported

_DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors", "*.bin")  # the second kind where there is none of the first


def run(stage: ImportStage, context: Context) -> Report:
    """Write the model and its tokenizer.

    Raises:
        CheckpointError: the checkpoint cannot be read or converted, is not the model of the config, or has no tokenizer.
        DataError: the tokenizer cannot be used, or has ids for which the model has no rows.
        MachineError: the hub does not give the model, or there is no room on the disk.
    """
    path = Path(stage.path) if Path(stage.path).is_dir() else _downloaded(stage.path, stage.revision)
    source = open_convertible(path, config=None if stage.config is None else Path(stage.config))
    _check_model(stage, context, source)
    tokenizer = _import_tokenizer(stage, context, source)
    source = replace(source, tokenizer_fingerprint=tokenizer.fingerprint)
    aside = context.folder / ".model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    temporary = aside / "model"  # what a killed writer leaves is inside, too
    write_target(source, temporary, to=FORMAT, weights_only=True, threads=context.threads)
    _publish(temporary, context.folder)
    shutil.rmtree(aside)
    return Report(
        values={
            "steps": 0,
            "validation_loss": None,
            "source": {"path": stage.source, "format": source.format, "folder": path.name, "step": source.step},
            "parameters": count_parameters(stage.model, stage.vocabulary_size),
            "vocabulary_size": tokenizer.vocabulary_size,
            "fingerprint": tokenizer.fingerprint,
        }
    )


def _downloaded(name: str, revision: str | None) -> Path:
    """The folder of a model on the hub. Its name is the commit, which the report records."""
    for weights in _WEIGHTS:
        folder = download(name, revision, [*_DESCRIPTION, weights])
        if any(folder.glob(weights)):
            break
    return folder


def _check_model(stage: ImportStage, context: Context, source: Source) -> None:
    """Refuse a source that is not of the shape by which the graph was built."""
    wanted, found = Model(stage.model, stage.vocabulary_size, 1, {}).computes, source.model.computes
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"stages.{context.task.id.stage}.model: {name} is {value!r}, and {found.get(name)!r} in {source.path}: leave "
                "out `model` and `vocabulary_size`, which are then read from there"
            )


def _import_tokenizer(stage: ImportStage, context: Context, source: Source) -> Tokenizer:
    path = Path(stage.tokenizer) if stage.tokenizer else source.tokenizer
    if path is None:
        raise CheckpointError(
            f"{source.path}: has no tokenizer, without which no text can be prepared for the model: name a folder or a "
            f"SentencePiece model with stages.{context.task.id.stage}.tokenizer"
        )
    if (path / SENTENCEPIECE).is_file() and not (path / JSON).is_file():
        path = path / SENTENCEPIECE
    tokenizer = import_tokenizer(path, context.folder, rows=stage.vocabulary_size)
    check_exported(tokenizer, source.model if source.model.shape.export_refusal is None else None)
    return tokenizer


def _publish(temporary: Path, folder: Path) -> None:
    """Move a complete conversion into the artifact, the file that names the result last."""
    check_fence(folder)
    for name in sorted(os.listdir(temporary), reverse=True):  # `tokenizer`, `step_...`, `result.json`
        if (folder / name).is_dir():  # of an attempt that was interrupted here
            shutil.rmtree(folder / name)
        os.replace(temporary / name, folder / name)
    fsync_path(folder)
