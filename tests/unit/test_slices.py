"""Slices of canonical tensors: whatever layout writes them, they make the whole, and any layout reads its part."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.tensors import save_tensors
from megatron_specialm.checkpoint.slices import slice_key
from megatron_specialm.checkpoint.tensor_files import TensorFiles
from megatron_specialm.model.weights import WeightSpec

SPECS = {
    "norm": WeightSpec((24,)),
    "bias": WeightSpec((24,), cut=0, blocks=2),
    "embedding": WeightSpec((21, 6), cut=0, padded=24),
    "column": WeightSpec((24, 6), cut=0),
    "gated": WeightSpec((24, 6), cut=0, blocks=2),
    "row": WeightSpec((6, 24), cut=1),
    "basis": WeightSpec((3, 24, 4), cut=1, blocks=2),
    "row basis": WeightSpec((3, 4, 24), cut=2),
}
LAYOUTS = list(itertools.product((1, 2, 4), (1, 2, 3, 7)))  # tensor-parallel processes, shards of the optimizer


def _local(spec: WeightSpec, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What process `rank` of `size` holds, by definition."""
    if spec.padded:
        whole = torch.cat([whole, whole.new_zeros(spec.padded - len(whole), *whole.shape[1:])])
    if spec.cut is None:
        return whole
    blocks = whole.chunk(spec.blocks, spec.cut)
    return torch.cat([block.chunk(size, spec.cut)[rank] for block in blocks], spec.cut).contiguous()


def _shards(count: int, shards: int) -> Iterator[tuple[int, int]]:
    """Ranges of unlike length, none of which need end at a row."""
    ends = [count * part**2 // shards**2 for part in range(shards + 1)]
    return itertools.pairwise(ends)


def _whole(spec: WeightSpec) -> torch.Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(0))


def _save(folder: Path, spec: WeightSpec, size: int, shards: int) -> list[Path]:
    whole, paths = _whole(spec), []
    for rank in range(size if spec.cut is not None else 1):
        local = _local(spec, whole, rank, size).flatten()
        for start, stop in _shards(len(local), shards):
            pieces = spec.pieces(local[start:stop], rank=rank, size=size, first=start)
            found = {slice_key("w", index, spec.shape): piece.contiguous() for index, piece in pieces}
            if found:
                paths.append(folder / f"model-{len(paths):05d}.safetensors")
                save_tensors(found, paths[-1])
    return paths


@pytest.mark.parametrize("name", SPECS)
def test_what_one_layout_writes_any_other_reads(tmp_path: Path, name: str) -> None:
    spec, whole = SPECS[name], _whole(SPECS[name])
    for before in LAYOUTS:
        folder = tmp_path / "-".join(map(str, before))
        folder.mkdir()
        stored = TensorFiles(_save(folder, spec, *before))
        assert torch.equal(stored["w"], whole)
        for size, shards in LAYOUTS:
            for rank in range(size):
                local = _local(spec, whole, rank, size).flatten()
                for start, stop in _shards(len(local), shards):
                    own = torch.zeros(stop - start)
                    for index, piece in spec.pieces(own, rank=rank, size=size, first=start):
                        piece.copy_(stored.stored["w"][index])
                    assert torch.equal(own, local[start:stop])


def test_a_whole_tensor_is_under_its_plain_name() -> None:
    """As in every checkpoint of earlier versions."""
    for name in SPECS:
        ((index, piece),) = SPECS[name].pieces(_local(SPECS[name], _whole(SPECS[name]), 0, 1).flatten(), rank=0, size=1)
        assert slice_key("w", index, SPECS[name].shape) == "w"
        assert torch.equal(piece, _whole(SPECS[name]))


def test_numpy_reads_the_same(tmp_path: Path) -> None:
    paths = _save(tmp_path, SPECS["row"], 2, 3)
    found = TensorFiles(paths, framework="np")
    assert isinstance(found["w"], np.ndarray)
    np.testing.assert_array_equal(found["w"], _whole(SPECS["row"]).numpy())
    np.testing.assert_array_equal(found.stored["w"][slice(1, 4), slice(3, 20)], _whole(SPECS["row"])[1:4, 3:20].numpy())


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("w[0:2/4,0:3/3]", "w[3:4/4,0:3/3]", r"model-0.safetensors and 1 more files: the slices of w have 9 of its 12 el"),
        ("w[0:2/4,0:3/3]", "w[1:4/4,0:3/3]", r"model-1.safetensors: has w\[1:4/4,0:3/3\], which .*model-0.safetensors has too"),
        ("w[0:2/4,0:3/3]", "w", r"model-1.safetensors: has w, which .*model-0.safetensors has too, as w\[0:2/4,0:3/3\]"),
        ("w[0:2/4,0:3/3]", "w[2:4/5,0:3/3]", r"model-1.safetensors: w has shape \(5, 3\), and \(4, 3\) in .*model-0"),
        ("w[0:2/4,0:3/3]", "w[2:4/4,1:3/3]", r"model-0.safetensors and 1 more files: .* w have 10 of its 12 elements"),
    ],
)  # fmt: skip
def test_slices_that_make_no_whole_are_refused(tmp_path: Path, one: str, other: str, says: str) -> None:
    paths = []
    for number, key in enumerate((one, other)):
        sizes = (
            [part.split("/")[0].split(":") for part in key[2:-1].split(",")] if "[" in key else [["0", "4"], ["0", "3"]]
        )
        paths.append(tmp_path / f"model-{number}.safetensors")
        save_tensors({key: torch.ones([int(stop) - int(start) for start, stop in sizes])}, paths[-1])
    with pytest.raises(ArtifactError, match=says):
        TensorFiles(paths)


@pytest.mark.parametrize("key", ["w[0:2/4]", "w[2:5/4,0:3/3]", "w[2:2/4,0:3/3]", "w[0:1/4,0:3/3]"])
def test_a_key_that_is_not_of_its_tensor_is_refused(tmp_path: Path, key: str) -> None:
    save_tensors({key: torch.ones(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ArtifactError, match=r"model.safetensors: w\[.* has shape \(2, 3\), which is not that of this slice"
    ):
        TensorFiles([tmp_path / "model.safetensors"])
