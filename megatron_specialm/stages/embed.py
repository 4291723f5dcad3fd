"""Windows -> one vector each.

encoder/       of the encoder's own task: fitted on the generic set or taken from a package, and loaded by all others
train.npy      (N, E) float32, the vectors of the train windows in the store's order; shards have them for their set. The
               task `generic.validation` has those of the generic set's held-out windows under the same name
vectors.json   which files they are in (see clustering/vectors.py)
"""

from collections.abc import Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from megatron_specialm.base.arrays import new_array
from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import DataError
from megatron_specialm.clustering.coverage import check_coverage, count_zero
from megatron_specialm.clustering.encoders import fit_encoder, load_encoder, save_encoder
from megatron_specialm.clustering.vectors import FILE, Vectors, describe_vectors, join_vectors
from megatron_specialm.config.schema import EmbedStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.graph.lineage import ENCODER, HELD_OUT, shard_keys, tokenize_stage
from megatron_specialm.stages.context import Context

BATCH = 500  # windows whose text is in memory at a time; a slow encoder takes seconds for them, so that its progress is seen


class Windows:
    """The windows of a set as text: what their tokens decode to, so each method sees the same text."""

    def __init__(self, store: TokenStore, tokenizer: Tokenizer) -> None:
        self._store, self._tokenizer = store, tokenizer

    def __len__(self) -> int:
        return len(self._store)

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self._store.tokens

    def texts(self, ids: np.ndarray) -> list[str]:
        """The text of some windows."""
        return [self._tokenizer.decode(self._store.window(int(i))) for i in ids]

    def draw(self, count: int, *, seed: int) -> list[str]:
        """`count` windows without replacement, or all where there are fewer, in the store's order."""
        ids = np.random.default_rng(seed).choice(len(self), min(count, len(self)), replace=False)
        return self.texts(np.sort(ids))

    def batches(self) -> Iterator[tuple[slice, list[str]]]:
        """All windows in order: which they are, and their text."""
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            yield slice(start, stop), self.texts(np.arange(start, stop))


def run(stage: EmbedStage, context: Context) -> Report:
    """Make the encoder ready, encode the windows of a set or shard, or gather a set's shards.

    Raises:
        DataError: there are none.
    """
    with threadpool_limits(context.threads):
        if context.key == ENCODER:
            return _fit(stage, context)
        shards = [] if context.task.shard or context.key == HELD_OUT else shard_keys(context.pipeline, context.key)
        return _gather(stage, context, shards) if shards else _encode(stage, context)


def _fit(stage: EmbedStage, context: Context) -> Report:
    """Fit or fetch the encoder; its time is all that it is charged."""
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
        DataError: the encoder knows nothing of half of the windows, or gives vectors that are not finite.
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
        if context.task.shard is None and context.key != HELD_OUT:  # a part is judged with the set that it is of
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


def _gather(stage: EmbedStage, context: Context, shards: list[str]) -> Report:
    """Nothing is copied: the set's vectors stay in its shards.

    Raises:
        DataError: the encoder knows nothing of half of the windows.
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
