"""Embed windows: one vector each.

encoder/       in the encoder's own task: fitted on the generic set or copied from a package; the other tasks load it
train.npy      (N, E) float32, the vectors of the training windows in the store's order; in the task `generic.validation`, of
               the generic set's held-out windows; absent for a set in shards
vectors.json   the files of the vectors (clustering/vectors.py)
"""

from collections.abc import Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from megatron_specialm.base.arrays import new_array
from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import DataError
from megatron_specialm.clustering.encoders import fit_encoder, load_encoder, save_encoder
from megatron_specialm.clustering.vectors import (
    FILE,
    Vectors,
    check_coverage,
    count_zero,
    describe_vectors,
    join_vectors,
)
from megatron_specialm.config.schema import EmbedStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import ENCODER, HELD_OUT, shard_keys, tokenize_stage

BATCH = 500  # windows whose text is in memory, and between progress reports; a slow encoder takes seconds for them


class Windows:
    """The windows of a set as text, decoded from their tokens: encoders see the same text as models."""

    def __init__(self, store: TokenStore, tokenizer: Tokenizer) -> None:
        self._store, self._tokenizer = store, tokenizer

    def __len__(self) -> int:
        return len(self._store)

    @property
    def tokens(self) -> int:
        """The number of tokens of all windows."""
        return self._store.tokens

    def texts(self, ids: np.ndarray) -> list[str]:
        """The text of some windows."""
        return [self._tokenizer.decode(self._store.window(int(i))) for i in ids]

    def draw(self, count: int, *, seed: int) -> list[str]:
        """`count` windows without replacement, or all if there are fewer, in the store's order."""
        ids = np.random.default_rng(seed).choice(len(self), min(count, len(self)), replace=False)
        return self.texts(np.sort(ids))

    def batches(self) -> Iterator[tuple[slice, list[str]]]:
        """All windows in order: their numbers and texts."""
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            yield slice(start, stop), self.texts(np.arange(start, stop))


def run(stage: EmbedStage, context: Context) -> Report:
    """Fit the encoder, encode the windows of a set or shard, or join the shards of a set.

    Raises:
        DataError: there are no windows.
    """
    with threadpool_limits(context.threads):
        if context.key == ENCODER:
            return _fit(stage, context)
        shards = [] if context.task.shard or context.key == HELD_OUT else shard_keys(context.pipeline, context.key)
        return _join(stage, context, shards) if shards else _encode(stage, context)


def _fit(stage: EmbedStage, context: Context) -> Report:
    """Fit or fetch the encoder. Its cost is its time, without flops."""
    seed = context.pipeline.seed
    encoder = fit_encoder(
        stage.encoder,
        lambda count: _windows(stage, context, GENERIC).draw(count, seed=seed),
        seed=seed,
        threads=context.threads,
    )
    save_encoder(encoder, context.folder / "encoder")
    return Report(values={"dimensions": encoder.dimensions, "encoder": stage.encoder.kind})


def _encode(stage: EmbedStage, context: Context) -> Report:
    """flops: tokens times the encoder's estimate per token.

    Raises:
        DataError: half of the windows have zero vectors, or a vector is not finite.
    """
    windows = _windows(stage, context, context.key)
    if not len(windows):
        raise DataError(f"{context.task.id}: there are no windows to embed: add text")
    folder = context.artifact(context.task.id.stage, ENCODER) / "encoder"
    encoder = load_encoder(stage.encoder, folder, threads=context.threads)
    zero = 0
    shape = (len(windows), encoder.dimensions)
    with new_array(context.folder / FILE, dtype=np.float32, shape=shape) as vectors:
        batches = context.counted(
            windows.batches(), unit="windows", of=len(windows), size=lambda batch: batch[0].stop - batch[0].start
        )
        for rows, texts in batches:
            vectors[rows] = encoder.encode(texts)
            zero += count_zero(vectors[rows], name=context.key, first=rows.start)
        if context.task.shard is None and context.key != HELD_OUT:  # shards are checked together, as a set
            check_coverage(context.key, zero=zero, windows=len(windows))
    describe_vectors(context.folder, zero=zero)
    return Report(
        tokens=windows.tokens,
        flops=windows.tokens * encoder.flops_per_token,
        values={
            "windows": len(windows),
            "zero_vectors": zero,
            "dimensions": encoder.dimensions,
            "encoder": stage.encoder.kind,
            **encoder.counts,
        },
    )


def _join(stage: EmbedStage, context: Context, shards: list[str]) -> Report:
    """Describe the vectors of a set's shards as one array, without copying them.

    Raises:
        DataError: half of the windows have zero vectors.
    """
    folders = [context.artifact(context.task.id.stage, key) for key in shards]
    join_vectors(folders, folder=context.folder)
    vectors = Vectors(context.folder)
    windows, dimensions = vectors.shape
    check_coverage(context.key, zero=vectors.zero, windows=windows)
    values = {"windows": windows, "zero_vectors": vectors.zero, "dimensions": dimensions}
    return Report(values={**values, "encoder": stage.encoder.kind})


def _windows(stage: EmbedStage, context: Context, key: str) -> Windows:
    tokenizer = tokenize_stage(context.pipeline, stage.tokens).tokenizer
    source, split = (GENERIC, "validation") if key == HELD_OUT else (key, "train")
    return Windows(
        TokenStore.open(context.artifact(stage.tokens, source), split),
        Tokenizer.load(context.artifact(tokenizer, GENERIC)),
    )
