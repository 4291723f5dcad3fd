"""Documents -> windows of token ids, for the train, validation and test splits of one set of text.

Of a set in shards, a shard's task reads its range of the training files and holds out of them what it validates with; the
set's own task reads the other files and describes all as one store.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice

import numpy as np

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import DataError
from megatron_specialm.config.lineage import shard_keys, source_of, text_set
from megatron_specialm.config.schema import TokenizeStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.documents import Documents, cut_in_shards, read_documents
from megatron_specialm.data.encoding import Encoder, characters
from megatron_specialm.data.store import COUNTS, SPLITS, StoreWriter, describe_store, join_shards
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.stages.context import Context


def run(stage: TokenizeStage, context: Context) -> Report:
    """Write the token store of one set or shard. The report's `skipped` counts empty documents.

    Raises:
        DataError: text that cannot be read, is empty, is too short to hold some out for validation, or holds less than
            the set's `train_tokens`.
    """
    tokenizer_folder = context.artifact(stage.tokenizer, GENERIC)
    tokenizer = Tokenizer.load(tokenizer_folder)
    size = tokenizer.vocabulary_size
    readers = _readers(context)
    written = {*readers, "validation"} if "train" in readers and not _has_validation(context) else {*readers}
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
    tokens = sum(split["tokens"] for split in splits.values())
    if context.task.shard is None:  # what a set in shards has not written itself
        shards = [context.artifact(context.task.id.stage, key) for key in shard_keys(context.pipeline, context.key)]
        splits |= {split: join_shards(shards, split, store=context.folder) for split in SPLITS if split not in splits}
    describe_store(
        context.folder,
        splits=splits,
        tokenizer=tokenizer.fingerprint,
        context_length=stage.context_length,
        vocabulary_size=size,
        eod=tokenizer.eod,
    )
    values = {name: {split: splits[split][name] for split in SPLITS if split in splits} for name in COUNTS}
    return Report(tokens=tokens, values=values)


def _readers(context: Context) -> dict[str, Documents]:
    """The documents of each split that this task reads files of."""
    files, shard = text_set(context.pipeline, source_of(context.key)), context.task.shard
    entries = {"train": files.train, "validation": files.validation, "test": files.test}
    if shard is not None:
        entries = {"train": [str(file) for file in cut_in_shards(files.train, shard.shards)[shard.number]]}
    elif files.shards > 1:
        del entries["train"]
    return {split: read_documents(names, text_field=files.text_field) for split, names in entries.items() if names}


def _has_validation(context: Context) -> bool:
    """Whether the set has validation files: otherwise documents are held out of the training files."""
    return bool(text_set(context.pipeline, source_of(context.key)).validation)


def _assigned(
    stage: TokenizeStage, context: Context, readers: Mapping[str, Documents], encoder: Encoder
) -> Iterator[tuple[str, np.ndarray]]:
    """All documents of the set that are wanted, each with the split it belongs to."""
    number = "" if context.task.shard is None else f"/{context.task.shard.number}"
    for split, documents in readers.items():
        encoded = encoder.encode(
            documents, counted=lambda chunks: context.counted(chunks, unit="characters", size=characters)
        )
        assigned: Iterator[tuple[str, np.ndarray]] = ((split, ids) for ids in encoded)
        holds_out = split == "train" and not _has_validation(context)
        if holds_out:
            assigned = hold_out(
                encoded,
                fraction=stage.validation_fraction,
                seed=f"{context.pipeline.seed}{number}",
                context_length=stage.context_length,
                name=f"text {context.key!r}",
            )
        wanted = text_set(context.pipeline, source_of(context.key)).train_tokens
        if split == "train" and wanted is not None:
            assigned = cut_training_set(
                assigned, wanted, context_length=stage.context_length, name=context.key, holds_out=holds_out
            )
        yield from assigned


def cut_training_set(
    assigned: Iterable[tuple[str, np.ndarray]], wanted: int, *, context_length: int, name: str, holds_out: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Keep of the training documents the first whole windows that hold at most `wanted` tokens, and those that were held
    out among them, at least one where any are (`holds_out`). Nothing behind them is read: a set of 1M tokens costs and
    validates as one. A smaller size is the beginning of every larger one.

    Raises:
        DataError: the training documents hold fewer tokens, or the first one more than fit and `wanted` is no window.
    """
    left, found, waits, is_empty = wanted, 0, holds_out, True
    for split, ids in assigned:
        if split != "train":
            waits = False
            yield split, ids
        else:
            found += len(ids)
            kept = ids if len(ids) <= left else ids[: left // context_length * context_length]
            left = left - len(kept) if len(kept) == len(ids) else 0
            if len(kept):
                is_empty = False
                yield split, kept
        if not left and not waits:
            break
    if found < wanted:
        raise DataError(
            f"text.domains.{name}.train_tokens: {wanted:,} wanted, and its training documents hold {found:,} tokens: add "
            "documents, or ask for a smaller size"
        )
    if is_empty:
        raise DataError(
            f"text.domains.{name}.train_tokens: {wanted:,} are less than a window of {context_length} tokens, and the first "
            "training document has more: nothing is left to train on: ask for a larger size"
        )


def hold_out(
    documents: Iterable[np.ndarray], *, fraction: float, seed: int | str, context_length: int, name: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Assign training documents to `train` and `validation`: of every 1 / fraction in a row, a drawn one is held out.

    At least one is; the last windows of a single document are, where there is no other.

    Raises:
        DataError: the single document has a single window.
    """
    every = max(2, round(1 / fraction))
    documents = iter(documents)
    first = list(islice(documents, every))
    if len(first) == 1:
        yield from _cut_document(first[0], fraction=fraction, context_length=context_length, name=name)
        return
    for number, ids in enumerate(chain(first, documents)):
        block, place = divmod(number, every)
        drawn = _draw(seed, block) % (every if block else len(first))
        yield ("validation" if place == drawn else "train"), ids


def _cut_document(
    ids: np.ndarray, *, fraction: float, context_length: int, name: str
) -> Iterator[tuple[str, np.ndarray]]:
    windows = -(-len(ids) // context_length)
    if windows < 2:
        raise DataError(
            f"{name}: one training document of {len(ids)} tokens is a single window: nothing can be held out for "
            "validation: add documents, or name `validation` files"
        )
    cut = (windows - max(1, round(fraction * windows))) * context_length
    yield "train", ids[:cut]
    yield "validation", ids[cut:]


def _draw(seed: int | str, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{block}".encode()).digest()[:8])
