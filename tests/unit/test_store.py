from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.data.store import StoreWriter, TokenStore, describe_store

CONTEXT, EOD = 8, 0


def _store(folder: Path, documents: list[np.ndarray], *, vocabulary: int = 100) -> TokenStore:
    writer = StoreWriter(folder, "train", context_length=CONTEXT, vocabulary_size=vocabulary)
    for document in documents:
        writer.add_document(np.append(document, EOD))
    describe_store(
        folder, splits={"train": writer.finish()}, tokenizer="a" * 64, context_length=CONTEXT,
        vocabulary_size=vocabulary, eod=EOD,
    )  # fmt: skip
    return TokenStore.open(folder, "train")


@pytest.mark.parametrize("vocabulary", [100, 100_000])
def test_documents_are_cut_into_windows_that_do_not_overlap(tmp_path: Path, vocabulary: int) -> None:
    documents = [np.arange(1, 20), np.arange(1, 4), np.arange(1, 8)]
    store = _store(tmp_path, documents, vocabulary=vocabulary)
    assert store.lengths.tolist() == [8, 8, 4, 4, 8]
    assert store.documents.tolist() == [0, 0, 0, 1, 2]
    windows = [store.window(index) for index in range(len(store))]
    for number, document in enumerate(documents):
        own = np.concatenate([window for window, of in zip(windows, store.documents, strict=True) if of == number])
        np.testing.assert_array_equal(own, [*document, EOD])


def test_every_token_is_predicted_exactly_once(tmp_path: Path) -> None:
    store = _store(tmp_path, [np.arange(1, 12)])
    batch = store.batch(np.array([1, 0]))
    np.testing.assert_array_equal(batch.tokens, [[EOD, 9, 10, 11, EOD, EOD, EOD, EOD], [EOD, 1, 2, 3, 4, 5, 6, 7]])
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
