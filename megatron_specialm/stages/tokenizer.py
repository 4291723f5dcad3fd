"""The tokenizer of a pipeline: trained on the generic set, or taken as it is."""

from pathlib import Path

from megatron_specialm.base.artifacts import Report
from megatron_specialm.config.schema import TokenizerStage
from megatron_specialm.data.documents import read_documents
from megatron_specialm.data.tokenizer import Tokenizer, import_tokenizer, train_sentencepiece
from megatron_specialm.stages.context import Context


def run(stage: TokenizerStage, context: Context) -> Report:
    """Write a tokenizer folder.

    Raises:
        DataError: text or a tokenizer that cannot be read, or a vocabulary that does not suit the text.
    """
    tokenizer = _train(stage, context) if stage.path is None else import_tokenizer(Path(stage.path), context.folder)
    return Report(values={"vocabulary_size": tokenizer.vocabulary_size, "fingerprint": tokenizer.fingerprint})


def _train(stage: TokenizerStage, context: Context) -> Tokenizer:
    generic = context.pipeline.text.generic
    return train_sentencepiece(
        read_documents(generic.train, text_field=generic.text_field),
        context.folder,
        vocabulary_size=stage.vocabulary_size,
        algorithm=stage.algorithm,
        sample_characters=stage.sample_characters,
    )
