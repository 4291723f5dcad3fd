"""Turn documents into windows of token ids, for the train, validation and test splits of one set of text.

For a set in shards, each shard's task reads a range of the training files and holds out some of their documents. The set's own
task reads the other files, and describes all shards as one store.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from megatron_specialm.base.artifacts import Report
from megatron_specialm.config.schema import TokenizeStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.documents import Documents, cut_in_shards
from megatron_specialm.data.encoding import Encoder, characters
from megatron_specialm.data.splits import cut_training_set, hold_out
from megatron_specialm.data.store import SPLITS, StoreWriter, describe_store, join_shards, read_counts
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import shard_keys, source_of, text_set
from megatron_specialm.graph.validation import refuse_too_little


def run(stage: TokenizeStage, context: Context) -> Report:
    """Write the token store of one set or shard. The report's `skipped` counts empty documents.

    Raises:
        DataError: text cannot be read, is empty, or has less than the set's `train_tokens`; or a stage validates on the set,
            and less is held out than required.
    """
    tokenizer_folder = context.artifact(stage.tokenizer, GENERIC)
    tokenizer = Tokenizer.load(tokenizer_folder)
    size = tokenizer.vocabulary_size
    readers = _readers(context)
    # Without validation files, training documents are held out.
    has_validation = bool(text_set(context.pipeline, source_of(context.key)).validation)
    written = {*readers, "validation"} if "train" in readers and not has_validation else {*readers}
    writers = {
        split: StoreWriter(context.folder, split, context_length=stage.context_length, vocabulary_size=size)
        for split in SPLITS
        if split in written
    }
    with Encoder(tokenizer_folder, workers=stage.workers or context.threads) as encoder:
        assigned = _assigned(stage, context, readers, encoder)
        for split, ids in assigned:
            writers[split].add_document(ids)
    skipped = {split: readers[split].skipped if split in readers else 0 for split in writers}
    splits = {split: {**writer.finish(), "skipped": skipped[split]} for split, writer in writers.items()}
    for split in readers.keys() - {"train"}:  # of training documents some may be held out or left over
        splits[split]["text_bytes"] = readers[split].text_bytes
    tokens = sum(split["tokens"] for split in splits.values())
    if context.task.shard is None:  # adds the splits of the shards
        shards = [context.artifact(context.task.id.stage, key) for key in shard_keys(context.pipeline, context.key)]
        splits |= {split: join_shards(shards, split, store=context.folder) for split in SPLITS if split not in splits}
    describe_store(
        context.folder,
        splits=splits,
        tokenizer=tokenizer.fingerprint,
        context_length=stage.context_length,
        vocabulary_size=size,
        eod=tokenizer.eod,
        bos=tokenizer.bos,
    )
    counts = read_counts(context.folder)
    if context.task.shard is None:
        refuse_too_little(context.pipeline, context.task.id.stage, context.key, counts)
    return Report(tokens=tokens, values=counts)


def _readers(context: Context) -> dict[str, Documents]:
    """The documents of each split whose files this task reads."""
    files, shard = text_set(context.pipeline, source_of(context.key)), context.task.shard
    entries = {"train": files.train, "validation": files.validation, "test": files.test}
    if shard is not None:
        entries = {"train": [str(file) for file in cut_in_shards(files.train, shard.shards)[shard.number]]}
    elif files.shards > 1:
        del entries["train"]
    return {split: Documents(names, text_field=files.text_field) for split, names in entries.items() if names}


def _assigned(
    stage: TokenizeStage, context: Context, readers: Mapping[str, Documents], encoder: Encoder
) -> Iterator[tuple[str, np.ndarray]]:
    """The documents of the set, each with its split's name."""
    files, shard = text_set(context.pipeline, source_of(context.key)), context.task.shard
    floor = files.validation_floor
    number = "" if shard is None else f"/{shard.number}"
    for split, documents in readers.items():
        encoded = encoder.encode(
            documents, counted=lambda chunks: context.counted(chunks, unit="characters", size=characters)
        )
        assigned: Iterator[tuple[str, np.ndarray]] = ((split, ids) for ids in encoded)
        holds_out = split == "train" and not files.validation
        if holds_out:
            assigned = hold_out(
                encoded,
                fraction=stage.validation_fraction,
                floor=floor if shard is None else floor.per_shard(shard.shards),
                seed=f"{context.pipeline.seed}{number}",
                context_length=stage.context_length,
            )
        if split == "train" and files.train_tokens is not None:
            assigned = cut_training_set(
                assigned,
                files.train_tokens,
                context_length=stage.context_length,
                name=context.key,
                floor=floor if holds_out else None,
            )
        yield from assigned
