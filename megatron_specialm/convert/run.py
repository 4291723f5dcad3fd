"""The driver: writes a checkpoint's canonical tensors in another format, and proves that they arrived.

The source is read for its fingerprint; the target is written to a temporary folder, read back, compared by its fingerprint, and
then renamed: it is complete or it is not there. A few threads read tensors, or slices of them; at most one layer is in memory,
and a few tensors of the next.
"""

import contextlib
import logging
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from megatron_specialm.base.errors import CheckpointError, MachineError
from megatron_specialm.base.files import fsync_path
from megatron_specialm.convert.fingerprint import (
    Fingerprint,
    compare,
    compare_hashes,
    compare_weights,
    hash_tensor,
    make_fingerprint,
)
from megatron_specialm.convert.formats import TARGETS, Target, check_target, open_source
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.probe import Probe
from megatron_specialm.convert.source import Layout, Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import check_tokenizer, find_tokenizer, special_ids

Result = TypeVar("Result")
AHEAD = 2  # tensors that are read while another waits for its layer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What was converted, without what the target cannot hold. `fingerprint` is of what was written."""

    source: Source
    to: str
    target: Path
    dtype: torch.dtype
    fingerprint: Fingerprint
    bytes: int

    @property
    def is_rounded(self) -> bool:
        """Whether the weights that were written are rounded from the source's."""
        return not _is_exact(self.source, self.dtype if self.source.optimizer is None else torch.float32)


def convert(
    path: Path,
    target: Path,
    *,
    to: str,
    layout: Layout = Layout(),  # noqa: B008 (immutable)
    dtype: torch.dtype | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    weights_only: bool = False,
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
        weights_only: without the optimizer's state.

    Raises:
        CheckpointError: the source cannot be read or converted, is not what its fingerprint says, or the target is there
            already; the target is not written.
        MachineError: there is not enough room on the disk.
    """
    _refuse_existing(target)
    source = open_convertible(path, config=config, tokenizer=tokenizer)
    return write_target(source, target, to=to, layout=layout, dtype=dtype, weights_only=weights_only, threads=threads)


def open_convertible(path: Path, *, config: Path | None = None, tokenizer: Path | None = None) -> Source:
    """Open a checkpoint to convert it; arguments and errors as of `convert`."""
    return convertible(open_source(path, config=config), tokenizer=tokenizer)


def convertible(source: Source, *, tokenizer: Path | None = None) -> Source:
    """An opened checkpoint of floating-point weights, with a tokenizer that fits it; arguments and errors as of `convert`."""
    for name, tensor in source.stored.items():
        if name not in source.dropped and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2):
            raise CheckpointError(
                f"{source.path}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}: quantized weights are not "
                "converted: convert the checkpoint that they were made from"
            )
    if tokenizer is not None:
        source = replace(source, tokenizer=_given(tokenizer))
    if source.tokenizer is not None:
        check_tokenizer(source.tokenizer, vocabulary_size=source.model.vocabulary_size)
        ids = source.model.special_ids or special_ids(source.tokenizer)
        source = replace(source, model=replace(source.model, special_ids=ids))
    return source


def write_target(
    source: Source,
    target: Path,
    *,
    to: str,
    layout: Layout = Layout(),  # noqa: B008 (immutable)
    dtype: torch.dtype | None = None,
    weights_only: bool = False,
    threads: int = 2,
) -> Conversion:
    """Write an opened checkpoint, and compare what was written; arguments and errors as of `convert`."""
    _refuse_existing(target)
    check_target(to, source.model, layout)
    dtype = dtype or (torch.float32 if to == "canonical" else source.dtype)
    source = _without_what_is_not_held(source, TARGETS[to], dtype, weights_only=weights_only)
    _check_room(source, target, dtype.itemsize + TARGETS[to].more_bytes, TARGETS[to].optimizer_bytes)
    with new_folder(target) as temporary:
        main = dtype if source.optimizer is None else torch.float32
        expected = replace(stream(source, dtype=main, threads=threads), moments=hash_moments(source, threads=threads))
        TARGETS[to].write(TargetSpec(temporary, source, layout, dtype, expected, threads))
        _check_written(open_source(temporary), source, dtype, expected, where=target, threads=threads)
        files = [file for file in temporary.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        for file in files:
            fsync_path(file)
    return Conversion(source, to, target, dtype, expected, size)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a target. On success it gets the target's name; on any error or signal that raises one
    nothing is left, not even a parent that was made for it. Errors name the target.

    Raises:
        CheckpointError: the target is there already.
    """
    _refuse_existing(target)
    made = [parent for parent in target.parents if not parent.exists()]
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, target)
        fsync_path(target.parent)
        made = []
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(temporary), str(target))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # another has put something there
            for parent in made:
                parent.rmdir()


def _is_exact(source: Source, dtype: torch.dtype) -> bool:
    types = {tensor.dtype for tensor in source.weights.values()}
    return all(own == dtype or own.itemsize < dtype.itemsize for own in types)


def stream(source: Source, *, dtype: torch.dtype = torch.float32, threads: int = 2) -> Fingerprint:
    """Read all weights of a source once. A weight with NaN or infinite elements is logged as a warning.

    Args:
        dtype: to which they are rounded.

    Returns:
        The fingerprint of the rounded weights.

    Raises:
        CheckpointError: the source is not what its own fingerprint says.
    """
    model = source.model
    forms: list[torch.dtype | None] = [None] if _is_exact(source, dtype) else [None, dtype]  # as they are, and rounded
    probes = [Probe(model.shape, model.vocabulary_size) for _ in forms]
    hashes: list[dict[str, str]] = [{} for _ in forms]

    def read(name: str) -> list[tuple[torch.Tensor, str]]:
        own = source.weights[name][()]
        if not _is_finite(own):
            logger.warning("%s: %s has NaN or infinite elements", source.path, name)
        return [(tensor, hash_tensor(tensor)) for tensor in (own.to(form or own.dtype) for form in forms)]

    for name, found in _in_threads(read, source.weights, threads):
        for number, (tensor, digest) in enumerate(found):
            hashes[number][name] = digest
            probes[number].take(name, tensor)
    fingerprints = [make_fingerprint(model, *of) for of in zip(hashes, probes, strict=True)]
    if source.fingerprint is not None:
        compare(source.fingerprint, fingerprints[0], where=source.path)
    return fingerprints[-1]


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite; without a tensor of their truth values."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def hash_moments(source: Source, *, threads: int = 2) -> dict[str, str]:
    """Read Adam's moments once.

    Returns:
        The SHA-256 of each; nothing where there are none.

    Raises:
        CheckpointError: they are not what the source's fingerprint says.
    """
    if source.optimizer is None:
        return {}
    found = _hashes(source.optimizer.moments, threads)
    if source.fingerprint is not None and source.fingerprint.moments:
        compare_hashes(source.fingerprint.moments, found, where=source.path)
    return found


def _check_written(
    back: Source, source: Source, dtype: torch.dtype, expected: Fingerprint, *, where: Path, threads: int
) -> None:
    """Compare what was written, opened again, with what should be there."""
    compare_weights(expected, back.model.computes, _hashes(back.weights, threads), where=where)
    if source.optimizer is not None:
        compare_hashes(expected.moments, hash_moments(replace(back, fingerprint=None), threads=threads), where=where)
        if back.optimizer is None or back.optimizer.step != source.optimizer.step:
            raise CheckpointError(f"{where}: does not have Adam's step {source.optimizer.step}: it is damaged")
    for name, tensor in back.rounded.items():
        if not torch.equal(tensor[()], source.weights[name][()].to(dtype)):
            raise CheckpointError(f"{where}: {name} is not its main weight, rounded to {dtype}")


def _without_what_is_not_held(source: Source, target: Target, dtype: torch.dtype, *, weights_only: bool) -> Source:
    """The source without its optimizer's state, and with the reason, where the target cannot hold it."""
    reasons = [
        "weights alone were asked for" if weights_only else "",
        target.no_optimizer,
        target.no_optimizer_of_experts if source.model.shape.moe is not None else "",
        ""
        if target.has_main_weights or dtype == torch.float32
        else f"it needs weights in fp32, and they are in {dtype}",
    ]
    reason = next(filter(None, reasons), "")
    if source.optimizer is None or not reason:
        return source
    return replace(source, optimizer=None, dropped={**source.dropped, "optimizer state": reason})


def _hashes(tensors: Mapping[str, LazyTensor], threads: int) -> dict[str, str]:
    return dict(_in_threads(lambda name: hash_tensor(tensors[name][()]), tensors, threads))


def _in_threads(work: Callable[[str], Result], names: Iterable[str], threads: int) -> Iterator[tuple[str, Result]]:
    """The results of work on each tensor, in this order; few are begun before they are asked for."""
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


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: is there already: name a new folder")


def _given(folder: Path) -> Path:
    if (found := find_tokenizer(folder)) is None:
        raise CheckpointError(f"{folder}: has no tokenizer.json: name a folder with a tokenizer of Transformers")
    return found


def _check_room(source: Source, target: Path, bytes_per_element: int, optimizer_bytes: int) -> None:
    """Ask for room before anything is written: a disk that fills up would stop others too."""
    bytes_per_element += 0 if source.optimizer is None else optimizer_bytes
    need = sum(torch.Size(tensor.shape).numel() for tensor in source.weights.values()) * bytes_per_element
    free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
    if need > free:
        raise MachineError(f"{target}: needs {need / 2**30:,.1f} GiB, and the disk has {free / 2**30:,.1f} GiB free")
