"""Documents encoded on several threads: the same ids in the same order, without semaphores, and no silent loss."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.data import encoding
from megatron_specialm.data.encoding import Encoder
from megatron_specialm.data.tokenizer_making import train_sentencepiece

TEXT = "the quick brown fox jumps over the lazy dog and runs away "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece([TEXT] * 50, folder, vocabulary_size=290, algorithm="bpe", sample_characters=10_000)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few documents, and no semaphore for anybody, as where /dev/shm is missing or read-only."""
    import _multiprocessing

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(encoding, "CHUNK", 200)
    monkeypatch.setattr(encoding, "PIECE", 150)
    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)


def _documents() -> Iterator[str]:
    for number in range(60):
        yield TEXT * (1 + number % 7) + str(number)


def test_several_workers_give_what_one_gives(tokenizer: Path) -> None:
    with Encoder(tokenizer, workers=1) as one, Encoder(tokenizer, workers=3) as three:
        alone, together = list(one.encode(_documents())), list(three.encode(_documents()))
        assert list(one.encode([])) == list(three.encode([])) == []
    assert len(alone) == 60
    for ids, same in zip(alone, together, strict=True):
        np.testing.assert_array_equal(ids, same)


def test_a_reader_may_stop_early(tokenizer: Path) -> None:
    with Encoder(tokenizer, workers=2) as encoder:
        assert len(next(encoder.encode(_documents()))) > 1


def test_an_error_of_a_worker_is_the_readers(tokenizer: Path) -> None:
    with Encoder(tokenizer, workers=2) as encoder, pytest.raises(TypeError, match="must be str or bytes"):
        list(encoder.encode(["\ud800 alone"]))
