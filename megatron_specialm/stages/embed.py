"""Windows -> one vector each.

train.npy   (N, E) float32, the vectors of the train windows in the store's order
encoder/    generic task only: the fitted encoder, which the domains' tasks load
"""

from collections.abc import Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.files import atomic_path
from megatron_specialm.clustering.encoders import Encoder, fit_encoder, load_encoder
from megatron_specialm.config.schema import EmbedStage, TokenizeStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.stages.context import Context

BATCH = 2_000  # windows whose text is in memory at a time


class Windows:
    """The train windows of a set as text: what their tokens decode to, so each method sees the same text."""

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
    """Encode the train windows of one set. flops: tokens times the encoder's estimate per token."""
    tokenize = context.pipeline.stages[stage.tokens]
    assert isinstance(tokenize, TokenizeStage)
    windows = Windows(
        TokenStore.open(context.artifact(stage.tokens, context.key), "train"),
        Tokenizer.load(context.artifact(tokenize.tokenizer, GENERIC)),
    )
    with threadpool_limits(context.threads):
        encoder = _encoder(stage, context, windows)
        with atomic_path(context.folder / "train.npy") as path:
            shape = (len(windows), encoder.dimensions)
            vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            for rows, texts in windows.batches():
                vectors[rows] = encoder.encode(texts)
            vectors.flush()
    return Report(
        tokens=windows.tokens,
        flops=windows.tokens * encoder.flops_per_token,
        values={"windows": len(windows), "dimensions": encoder.dimensions, "encoder": stage.encoder.kind},
    )


def _encoder(stage: EmbedStage, context: Context, windows: Windows) -> Encoder:
    """Fitted and kept by the generic task, read from there by the others."""
    if context.key != GENERIC:
        folder = context.artifact(context.task.id.stage, GENERIC) / "encoder"
        return load_encoder(stage.encoder, folder, threads=context.threads)
    seed = context.pipeline.seed
    encoder = fit_encoder(
        stage.encoder, lambda count: windows.draw(count, seed=seed), seed=seed, threads=context.threads
    )
    folder = context.folder / "encoder"
    folder.mkdir(exist_ok=True)
    encoder.save(folder)
    return encoder
