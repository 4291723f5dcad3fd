"""The driver: streams a checkpoint's canonical tensors from its format into another, and proves that they arrived.

Tensors are read, hashed and written by a few threads; at most one layer is in memory, and a few tensors of the next. The
target is written to a temporary folder, read back and compared by its fingerprint, and then renamed: it is complete or it is
not there.
"""

import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from megatron_specialm.base.errors import CheckpointError, MachineError
from megatron_specialm.base.files import fsync_path
from megatron_specialm.convert.fingerprint import Fingerprint, compare, hash_tensor, make_fingerprint
from megatron_specialm.convert.formats import TARGETS, open_source
from megatron_specialm.convert.probe import Probe
from megatron_specialm.convert.source import Layout, Order, Source
from megatron_specialm.convert.tokenizer_files import check_tokenizer, find_tokenizer

Result = TypeVar("Result")
AHEAD = 2  # tensors that are read while another waits for its layer


@dataclass(frozen=True)
class Conversion:
    """What was converted. `fingerprint` is of what was written."""

    source: Source
    target: Path
    dtype: torch.dtype
    fingerprint: Fingerprint
    bytes: int


def convert(
    path: Path,
    target: Path,
    *,
    to: str,
    layout: Layout = Layout(),  # noqa: B008 (immutable)
    dtype: torch.dtype | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    threads: int = 2,
) -> Conversion:
    """Write a checkpoint in another format.

    Args:
        path: the checkpoint; see `open_source`.
        target: a folder to be made.
        to: a key of `TARGETS`.
        dtype: of the weights; default: the source's, and fp32 for a canonical target.
        config: see `open_source`.
        tokenizer: a folder with tokenizer files, instead of the source's.

    Raises:
        CheckpointError: the source cannot be read or converted, is not what its fingerprint says, or the target is there
            already; the target is not written.
        MachineError: there is not enough room on the disk.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: is there already: name a folder to make")
    source = open_source(path, config=config)
    if tokenizer is not None:
        source = replace(source, tokenizer=_given(tokenizer))
    if source.tokenizer is not None:
        check_tokenizer(source.tokenizer, vocabulary_size=source.model.vocabulary_size)
    dtype = dtype or (torch.float32 if to == "canonical" else source.dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(source, target, dtype)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        writer = TARGETS[to](Order(temporary, source, layout, dtype))
        written = stream(source, dtype=dtype, write=writer.write, threads=threads)
        writer.finish(written)
        compare(written, stream(open_source(temporary), threads=threads), where=target)
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        os.replace(temporary, target)
        fsync_path(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Conversion(source, target, dtype, written, size)


def stream(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    write: Callable[[str, torch.Tensor], None] | None = None,
    threads: int = 2,
) -> Fingerprint:
    """Read all tensors of a source once, and write them.

    Returns:
        The fingerprint of what is written.

    Raises:
        CheckpointError: the source is not what its own fingerprint says.
    """
    model = source.model
    read, written = (Probe(model.shape, model.vocabulary_size) for _ in range(2))
    hashes_read: dict[str, str] = {}
    hashes_written: dict[str, str] = {}

    def take(name: str) -> tuple[torch.Tensor, torch.Tensor, str, str]:
        tensor = source.weights[name][()]
        rounded = tensor.to(dtype)
        if write is not None:
            write(name, rounded)
        exact = rounded.dtype.itemsize >= tensor.dtype.itemsize and rounded.dtype != torch.float16
        own = hash_tensor(tensor)
        return tensor.float(), rounded.float(), own, own if exact else hash_tensor(rounded)

    for name, (tensor, rounded, own, kept) in _in_order(take, list(source.weights), threads):
        hashes_read[name], hashes_written[name] = own, kept
        written.take(name, rounded)
        if source.fingerprint is not None:
            read.take(name, tensor)
    if source.fingerprint is not None:
        compare(source.fingerprint, make_fingerprint(model, hashes_read, read), where=source.path)
    return make_fingerprint(model, hashes_written, written)


def _in_order(work: Callable[[str], Result], names: list[str], threads: int) -> Iterator[tuple[str, Result]]:
    """The results of work in threads, in the order of the names; few are begun before they are asked for."""
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[tuple[str, Future[Result]]] = deque()
        try:
            for name in names:
                begun.append((name, pool.submit(work, name)))
                if len(begun) > threads + AHEAD:
                    first, future = begun.popleft()
                    yield first, future.result()
            while begun:
                first, future = begun.popleft()
                yield first, future.result()
        finally:
            for _, future in begun:
                future.cancel()


def _given(folder: Path) -> Path:
    if (found := find_tokenizer(folder)) is None:
        raise CheckpointError(f"{folder}: has no tokenizer.json: name a folder with a tokenizer of Transformers")
    return found


def _check_room(source: Source, target: Path, dtype: torch.dtype) -> None:
    """Ask for room before anything is written: a disk that fills up would stop others too."""
    need = sum(torch.Size(tensor.shape).numel() for tensor in source.weights.values()) * dtype.itemsize
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise MachineError(f"{target}: needs {need / 2**30:,.1f} GiB, and the disk has {free / 2**30:,.1f} GiB free")
