"""The tokenizer of a pipeline, trained on the generic set or imported."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import DataError
from megatron_specialm.config.architectures import Model
from megatron_specialm.config.schema import TokenizerStage
from megatron_specialm.convert.huggingface_folder import write_config
from megatron_specialm.convert.tokenizer import disagreement, save_tokenizer
from megatron_specialm.data.documents import Documents, resolve_files
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.tokenizer_checks import refusing
from megatron_specialm.data.tokenizer_making import import_tokenizer, train_sentencepiece
from megatron_specialm.graph.context import Context


def run(stage: TokenizerStage, context: Context) -> Report:
    """Write a tokenizer folder.

    Raises:
        DataError: the text or tokenizer cannot be read, the vocabulary does not fit the text, or the tokenizer cannot be
            exported.
    """
    tokenizer = _train(stage, context) if stage.path is None else import_tokenizer(Path(stage.path), context.folder)
    check_exported(tokenizer)
    return Report(values={"vocabulary_size": tokenizer.vocabulary_size, "fingerprint": tokenizer.fingerprint})


def _train(stage: TokenizerStage, context: Context) -> Tokenizer:
    generic = context.pipeline.text.generic
    if generic.shards > 1:
        texts = beginnings(resolve_files(generic.train), stage.sample_characters, text_field=generic.text_field)
    else:
        texts = Documents(generic.train, text_field=generic.text_field)
    return train_sentencepiece(
        texts,
        context.folder,
        vocabulary_size=stage.vocabulary_size,
        algorithm=stage.algorithm,
        sample_characters=stage.sample_characters,
    )


def check_exported(tokenizer: Tokenizer, model: Model | None = None) -> None:
    """Refuse a tokenizer that cannot be exported, before a model is trained with it.

    Args:
        model: an existing one that it is exported with, whose config decides the class that Transformers loads.
    """
    fix = "use another tokenizer, or another version of transformers"
    with TemporaryDirectory() as folder, refusing(tokenizer.folder, "cannot be exported", fix=fix):
        save_tokenizer(tokenizer, Path(folder), context_length=32)
        if model is not None:
            write_config(model, Path(folder), dtype=torch.float32)
        found = disagreement(Path(folder), tokenizer, context_length=32)
    if found is not None:
        raise DataError(
            f"{tokenizer.folder}: cannot be exported: transformers {transformers.__version__} {found}: {fix}"
        )


def beginnings(files: Sequence[Path | str], characters: int, *, text_field: str) -> Iterator[str]:
    """The first documents of each file, about `characters` in all: a sample of a set in shards, which is too large to read
    completely."""
    for file in files:
        found = 0
        for text in Documents([str(file)], text_field=text_field):
            yield text
            found += len(text)
            if found * len(files) >= characters:
                break
