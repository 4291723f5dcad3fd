"""Many documents -> token ids, on several threads.

The libraries encode without Python's lock, so threads use as many cores as processes would. They need neither copies of this
process nor pipes, which took a tenth of the time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.data.documents import cut_text
from megatron_specialm.data.tokenizer import Tokenizer

PIECE = 1_000_000  # characters encoded at once: limits the memory for a long document
CHUNK = 250_000  # minimum of characters given to a thread: enough that the exchange costs little
AHEAD = 3  # chunks in flight per thread, so that threads do not wait


class _Piece(NamedTuple):
    text: str
    ends_document: bool


Encoded = tuple[list[_Piece], list[np.ndarray]]  # a chunk, and the token ids of each of its pieces


def characters(encoded: Encoded) -> int:
    """The number of characters of a chunk."""
    return sum(len(piece.text) for piece in encoded[0])


class Encoder:
    """Encodes a stream of documents on `workers` threads, in order, with a few chunks of text in memory.

    Use it as a context manager.
    """

    def __init__(self, folder: Path, *, workers: int) -> None:
        self._folder, self._tokenizer, self._workers = folder, Tokenizer.load(folder), workers
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def encode(
        self, documents: Iterable[str], *, counted: Callable[[Iterable[Encoded]], Iterable[Encoded]] = iter
    ) -> Iterator[np.ndarray]:
        """The token ids of each document, int32, ending with the end-of-document token.

        Args:
            counted: wraps the encoded chunks, to report progress.

        Raises:
            DataError: a text encodes to the end-of-document token, which would end its document early.
        """
        eod = np.array([self._tokenizer.eod], np.int32)
        parts: list[np.ndarray] = []
        for chunk, encoded in counted(self._encode_chunks(_chunks(documents))):
            for piece, ids in zip(chunk, encoded, strict=True):
                if (ids == self._tokenizer.eod).any():
                    raise DataError(
                        f"{self._folder}: its end-of-document token {self._tokenizer.eod} is among the ids of a text that "
                        f"begins with {piece.text[:60]!r}: use a tokenizer whose end token no text can spell"
                    )
                parts.append(ids)
                if piece.ends_document:
                    yield np.concatenate([*parts, eod])
                    parts = []

    def _encode_chunks(self, chunks: Iterable[list[_Piece]]) -> Iterator[Encoded]:
        pending: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, self._threads.submit(self._encode_chunk, chunk)))
            if len(pending) > AHEAD * self._workers:
                first, future = pending.popleft()
                yield first, future.result()
        for chunk, future in pending:
            yield chunk, future.result()

    def _encode_chunk(self, chunk: list[_Piece]) -> list[np.ndarray]:
        return self._tokenizer.encode([piece.text for piece in chunk])


def _chunks(documents: Iterable[str]) -> Iterator[list[_Piece]]:
    """Pieces of documents in lists of CHUNK to CHUNK + PIECE characters."""
    chunk: list[_Piece] = []
    characters = 0
    for document in documents:
        *head, tail = cut_text(document, PIECE)
        for piece in (*(_Piece(text, False) for text in head), _Piece(tail, True)):
            chunk.append(piece)
            characters += len(piece.text)
            if characters >= CHUNK:
                yield chunk
                chunk, characters = [], 0
    if chunk:
        yield chunk
