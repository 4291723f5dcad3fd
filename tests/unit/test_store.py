import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.data.store import StoreWriter, TokenStore, describe_store, join_shards

CONTEXT, EOD = 8, 0


def _store(folder: Path, documents: list[np.ndarray], *, vocabulary: int = 100, bos: int | None = None) -> TokenStore:
    folder.mkdir(exist_ok=True)
    writer = StoreWriter(folder, "train", context_length=CONTEXT, vocabulary_size=vocabulary)
    for document in documents:
        writer.add_document(np.append(document, EOD))
    describe_store(
        folder, splits={"train": {**writer.finish(), "skipped": 1}}, tokenizer="a" * 64, context_length=CONTEXT,
        vocabulary_size=vocabulary, eod=EOD, bos=bos,
    )  # fmt: skip
    return TokenStore.open(folder, "train")


@pytest.mark.parametrize("vocabulary", [100, 100_000])
def test_documents_are_cut_into_windows_that_do_not_overlap(tmp_path: Path, vocabulary: int) -> None:
    documents = [np.arange(1, 20), np.arange(1, 4), np.arange(1, 8)]
    store = _store(tmp_path, documents, vocabulary=vocabulary)
    windows = [store.window(index) for index in range(len(store))]
    assert [len(window) for window in windows] == [8, 8, 4, 4, 8]
    assert store.tokens == 32
    for document, own in zip(documents, (slice(0, 3), slice(3, 4), slice(4, 5)), strict=True):
        own = np.concatenate(windows[own])
        np.testing.assert_array_equal(own, [*document, EOD])


@pytest.mark.parametrize("bos", [None, 77])
def test_every_token_is_predicted_exactly_once(tmp_path: Path, bos: int | None) -> None:
    store = _store(tmp_path, [np.arange(1, 12)], bos=bos)
    batch, start = store.batch(np.array([1, 0])), EOD if bos is None else bos
    np.testing.assert_array_equal(batch.tokens, [[start, 9, 10, 11, EOD, EOD, EOD, EOD], [start, 1, 2, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(batch.targets, [[9, 10, 11, EOD, EOD, EOD, EOD, EOD], [1, 2, 3, 4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8])


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
def test_a_store_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    _store(tmp_path, [np.arange(1, 30)])
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match=f"{name}.*cut short"):
        TokenStore.open(tmp_path, "train")


def test_another_tokenizer_and_a_missing_split_are_refused(tmp_path: Path) -> None:
    _store(tmp_path, [np.arange(1, 30)])
    with pytest.raises(ArtifactError, match=r"made with the tokenizer aaaa.*, not bbbb"):
        TokenStore.open(tmp_path, "train", tokenizer="b" * 64)
    with pytest.raises(ArtifactError, match="no split 'test'; it has train"):
        TokenStore.open(tmp_path, "test")


def test_no_store_before_its_description(tmp_path: Path) -> None:
    StoreWriter(tmp_path, "train", context_length=CONTEXT, vocabulary_size=100).finish()
    with pytest.raises(ArtifactError, match="no such file"):
        TokenStore.open(tmp_path, "train")


DOCUMENTS = [np.arange(1, 20), np.arange(1, 4), np.arange(1, 8), np.arange(1, 30)]


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """The folder of a store of two shards, beside theirs."""
    shards, folder = [tmp_path / "generic.00000", tmp_path / "generic.00001"], tmp_path / "generic"
    for shard, documents in zip(shards, (DOCUMENTS[:3], DOCUMENTS[3:]), strict=True):
        _store(shard, documents)
    folder.mkdir()
    describe_store(
        folder, splits={"train": join_shards(shards, "train", store=folder)}, tokenizer="a" * 64,
        context_length=CONTEXT, vocabulary_size=100, eod=EOD,
    )  # fmt: skip
    return folder


def test_shards_are_read_as_one_store(joined: Path, tmp_path: Path) -> None:
    store, whole = TokenStore.open(joined, "train"), _store(tmp_path / "whole", DOCUMENTS)
    assert (len(store), store.tokens) == (len(whole), whole.tokens)
    for index in range(len(whole)):
        np.testing.assert_array_equal(store.window(index), whole.window(index))
    ids = np.random.default_rng(0).permutation(len(whole))
    for ours, theirs in zip(store.batch(ids)[:3], whole.batch(ids)[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_folder_with_shards_can_be_moved(joined: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name in ("generic", "generic.00000", "generic.00001"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert len(TokenStore.open(tmp_path / "moved" / "generic", "train")) == 9


def test_a_damaged_or_missing_shard_is_named(joined: Path, tmp_path: Path) -> None:
    path = tmp_path / "generic.00001" / "train.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(ArtifactError, match=r"generic\.00001/train\.bin: 58 bytes, store.json says 60: cut short"):
        TokenStore.open(joined, "train")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"generic\.00001/train\.bin: missing"):
        TokenStore.open(joined, "train")


def test_what_a_store_keeps_in_memory_does_not_grow_with_its_windows(tmp_path: Path) -> None:
    """Allocations that Python and NumPy know of: the index and the tokens are mapped, so none is made per window."""
    kept = []
    for windows in (100, 20_000):
        folder = tmp_path / str(windows)
        _store(folder, [np.arange(1, CONTEXT)] * windows)
        tracemalloc.start()
        store = TokenStore.open(folder, "train")
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(store) == windows
    assert kept[1] - kept[0] < 20_000


def test_more_shards_than_the_limit_of_open_files(tmp_path: Path) -> None:
    """In a process of its own, with room for 40 files and a store of 30 shards, two files each."""
    shards = [tmp_path / f"generic.{number:05d}" for number in range(30)]
    for shard in shards:
        _store(shard, DOCUMENTS[1:2])
    (tmp_path / "generic").mkdir()
    describe_store(
        tmp_path / "generic", splits={"train": join_shards(shards, "train", store=tmp_path / "generic")},
        tokenizer="a" * 64, context_length=CONTEXT, vocabulary_size=100, eod=EOD,
    )  # fmt: skip
    program = (
        "import resource, sys; from pathlib import Path; from megatron_specialm.data.store import TokenStore; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096)); "
        "print(len(TokenStore.open(Path(sys.argv[1]), 'train')))"
    )
    output = subprocess.check_output([sys.executable, "-c", program, str(tmp_path / "generic")], text=True)
    assert output.split()[-1] == "30"
