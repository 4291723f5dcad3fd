"""Many documents -> token ids, on several processes."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from megatron_specialm.base.errors import DataError, MachineError
from megatron_specialm.data.documents import cut_text
from megatron_specialm.data.tokenizer import Tokenizer

PIECE = 1_000_000  # characters encoded at once: bounds the memory that a long document takes
CHUNK = 250_000  # characters sent to a worker at least: enough that sending costs little


class _Piece(NamedTuple):
    text: str
    ends_document: bool


class Encoder:
    """Encodes streams of documents on several processes, in order, holding only a few chunks of text in memory.

    Use it as a context manager. One worker is this process itself.
    """

    def __init__(self, folder: Path, *, workers: int) -> None:
        self._folder = folder
        self._tokenizer = Tokenizer.load(folder)
        self._here = workers == 1
        self._ahead = 3 * workers  # chunks in flight, so that no worker waits
        # Forked, so that a worker need not import again what the main module imports, which takes longer than encoding
        # a small set; and forked now, before any reader has started threads.
        self._pool = ProcessPoolExecutor(workers, get_context("fork"))
        if not self._here:
            self._pool.submit(_encode_in_worker, folder, [])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The token ids of each document, int32, the last one the end-of-document token.

        Raises:
            DataError: a text that encodes to the end-of-document token, which would end its document early.
            MachineError: a worker process died.
        """
        eod = np.array([self._tokenizer.eod], np.int32)
        parts: list[np.ndarray] = []
        for chunk, encoded in self._encode_chunks(_chunks(documents)):
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

    def _encode_chunks(self, chunks: Iterable[list[_Piece]]) -> Iterator[tuple[list[_Piece], list[np.ndarray]]]:
        if self._here:
            for chunk in chunks:
                yield chunk, self._tokenizer.encode([piece.text for piece in chunk])
            return
        pending: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
        try:
            for chunk in chunks:
                texts = [piece.text for piece in chunk]
                pending.append((chunk, self._pool.submit(_encode_in_worker, self._folder, texts)))
                if len(pending) > self._ahead:
                    first, future = pending.popleft()
                    yield first, future.result()
            for chunk, future in pending:
                yield chunk, future.result()
        except BrokenProcessPool:
            raise MachineError("a tokenizing process was killed, perhaps for memory: lower `workers`") from None


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


@functools.cache
def _worker_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _encode_in_worker(folder: Path, texts: list[str]) -> list[np.ndarray]:
    return _worker_tokenizer(folder).encode(texts)
