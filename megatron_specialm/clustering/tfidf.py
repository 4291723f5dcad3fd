"""TF-IDF vectors of words (clustering/words.py), projected by truncated SVD.

Shapes: n texts, E dimensions, V words of the vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from megatron_specialm.base.arrays import read_arrays
from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import REMAKE, atomic_path, read_json, write_json
from megatron_specialm.clustering.vectors import unit_rows
from megatron_specialm.clustering.words import words
from megatron_specialm.config.schema import TfidfEncoder


class Tfidf:
    """(1 + log count) x inverse document frequency of each word, projected to E dimensions.

    flops_per_token: 2 E, a multiply-add per dimension for every word of the sparse product. The fit makes about twelve such
    products over its sample; only its wall seconds are counted.
    """

    def __init__(self, vocabulary: list[str], *, frequencies: np.ndarray, components: np.ndarray) -> None:
        """vocabulary: V words; frequencies: (V,) inverse document frequencies; components: (E, V) singular vectors."""
        self._words, self._frequencies, self._components = vocabulary, frequencies, components
        self._vectorizer = _vectorizer(vocabulary={word: column for column, word in enumerate(vocabulary)})
        self._vectorizer.idf_ = frequencies

    @classmethod
    def fit(cls, settings: TfidfEncoder, draw: Callable[[int], list[str]], *, seed: int, threads: int) -> Self:
        """Choose the most frequent words and the directions of largest variance. The same seed and texts give the same encoder.

        Raises:
            DataError: fewer texts or words than dimensions.
        """
        texts, vectorizer = draw(settings.sample), _vectorizer(max_features=settings.vocabulary_size)
        try:
            counts = vectorizer.fit_transform(texts)
        except ValueError:
            raise DataError(
                f"the {len(texts)} generic windows have no words, which are of two letters or digits at least: give other "
                "text, or another encoder.kind, which reads word pieces"
            ) from None
        if min(counts.shape) <= settings.dimensions:
            raise DataError(
                f"encoder.dimensions {settings.dimensions} needs more than that many windows and words, but there are "
                f"{counts.shape[0]} windows with {counts.shape[1]} words: use fewer dimensions or more generic text"
            )
        svd = TruncatedSVD(settings.dimensions, random_state=seed % 2**32).fit(counts)
        return cls(
            vectorizer.get_feature_names_out().tolist(),
            frequencies=vectorizer.idf_,
            components=svd.components_.astype(np.float32),
        )

    @classmethod
    def load(cls, folder: Path, settings: TfidfEncoder, *, threads: int) -> Self:
        vocabulary = read_json(folder / "words.json", list[str])
        if len(set(vocabulary)) != len(vocabulary):
            raise ArtifactError(f"{folder / 'words.json'}: has a word twice: {REMAKE}")
        shapes = {"frequencies": (np.float32, (len(vocabulary),)), "components": (np.float32, (None, len(vocabulary)))}
        return cls(vocabulary, **read_arrays(folder / "tfidf.npz", shapes))

    def save(self, folder: Path) -> None:
        write_json(folder / "words.json", self._words)
        with atomic_path(folder / "tfidf.npz") as path, path.open("wb") as file:
            np.savez(file, frequencies=self._frequencies, components=self._components)

    @property
    def dimensions(self) -> int:
        return len(self._components)

    @property
    def flops_per_token(self) -> int:
        return 2 * self.dimensions

    @property
    def counts(self) -> dict[str, int]:
        return {}

    def encode(self, texts: list[str]) -> np.ndarray:
        return unit_rows(self._vectorizer.transform(texts) @ self._components.T)


def _vectorizer(**vocabulary: object) -> TfidfVectorizer:
    """The word counter for fitting and loading. Sublinear: ten repetitions of a word add little to one."""
    return TfidfVectorizer(analyzer=words, sublinear_tf=True, dtype=np.float32, **vocabulary)
