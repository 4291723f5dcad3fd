"""Many documents -> token ids, on several processes.

A thread per worker process sends it texts through a pipe and waits for the answer. Python's own pools need semaphores, which
are files in /dev/shm; containers and sandboxes may not have it.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Self

import numpy as np

from megatron_specialm.base.errors import DataError, MachineError
from megatron_specialm.data.documents import cut_text
from megatron_specialm.data.tokenizer import Tokenizer

PIECE = 1_000_000  # characters encoded at once: limits the memory for a long document
CHUNK = 250_000  # minimum of characters sent to a worker: enough that sending costs little
AHEAD = 3  # chunks in flight per worker, so that workers do not wait


class _Piece(NamedTuple):
    text: str
    ends_document: bool


Encoded = tuple[list[_Piece], list[np.ndarray]]  # a chunk, and the token ids of each of its pieces


def characters(encoded: Encoded) -> int:
    """The number of characters of a chunk."""
    return sum(len(piece.text) for piece in encoded[0])


class Encoder:
    """Encodes a stream of documents on several processes, in order, with a few chunks of text in memory.

    Use it as a context manager. With `workers` of 1 it encodes in this process.
    """

    def __init__(self, folder: Path, *, workers: int) -> None:
        self._folder, self._tokenizer = folder, Tokenizer.load(folder)
        # Forked, so that workers do not repeat the main module's imports, which take longer than encoding a small set; and
        # forked now, before any reader starts threads.
        self._workers = [_Worker(self._tokenizer) for _ in range(workers)] if workers > 1 else []
        self._threads = ThreadPoolExecutor(workers)
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in reversed(self._workers):  # a worker also holds the pipes of those forked before it
            worker.end()

    def encode(
        self, documents: Iterable[str], *, counted: Callable[[Iterable[Encoded]], Iterable[Encoded]] = iter
    ) -> Iterator[np.ndarray]:
        """The token ids of each document, int32, ending with the end-of-document token.

        Args:
            counted: wraps the encoded chunks, to report progress.

        Raises:
            DataError: a text encodes to the end-of-document token, which would end its document early.
            MachineError: a worker process died.
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
        if not self._workers:
            for chunk in chunks:
                yield chunk, self._tokenizer.encode([piece.text for piece in chunk])
            return
        pending: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, self._threads.submit(self._encode_in_worker, [piece.text for piece in chunk])))
            if len(pending) > AHEAD * len(self._workers):
                first, future = pending.popleft()
                yield first, future.result()
        for chunk, future in pending:
            yield chunk, future.result()

    def _encode_in_worker(self, texts: list[str]) -> list[np.ndarray]:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that encodes each list of texts it receives, until its pipe is closed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(tokenizer, self._pipe, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Called by one thread at a time.

        Raises:
            MachineError: the process has died.
        """
        try:
            self._pipe.send(texts)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise MachineError("a tokenizing process was killed, perhaps for memory: lower `workers`") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(tokenizer: Tokenizer, parents: Connection, pipe: Connection) -> None:
    parents.close()  # otherwise this process would not notice that the parent ended
    while True:
        try:
            texts = pipe.recv()
        except EOFError:
            return
        try:
            answer: object = tokenizer.encode(texts)
        except Exception as error:  # raised in the parent
            answer = error
        pipe.send(answer)


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
