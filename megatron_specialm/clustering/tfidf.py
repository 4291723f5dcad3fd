"""TF-IDF vectors of words, projected by truncated SVD.

Most scripts separate words by spaces: a word is a run of two or more letters or digits, as with scikit-learn's
`\\b\\w\\w+\\b`. A run of a script without spaces is cut into overlapping pairs of characters (the usual index for Chinese and
Japanese; Nie et al., IRAL 2000, find them as good as words); a single character stays. Signs of Indic scripts that `\\w` does
not match belong to their words, and marks of scripts without spaces to their runs.

Shapes: n texts, E dimensions, V words of the vocabulary.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from megatron_specialm.base.arrays import read_arrays
from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import REMAKE, atomic_path, read_json, write_json
from megatron_specialm.clustering.vectors import unit_rows
from megatron_specialm.config.schema import TfidfEncoder

# Blocks of Unicode without their punctuation and digits.
_SPACELESS = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ece\u0edc-\u0edf"  # Lao
    "\u0f00\u0f40-\u0fbc"  # Tibetan
    "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
    "\u1950-\u19cf\u1a20-\u1a7f\u1aa0-\u1aad"  # Tai Le, New Tai Lue, Tai Tham
    "\ua980-\ua9c0"  # Javanese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\ua000-\ua48c"  # Yi
)
_INDIC = "\u0900-\u0963\u0971-\u0dff"  # Devanagari to Sinhala
_RUN = re.compile(f"[{_SPACELESS}]+")
_WORD = re.compile(rf"[\w{_INDIC}]{{2,}}")


def words(text: str) -> list[str]:
    """The words of a text in lower case, and pairs of characters for scripts without spaces."""
    text = text.lower()
    found: list[str] = _WORD.findall(_RUN.sub(" ", text))
    for run in _RUN.findall(text):
        found += map("".join, pairwise(run)) if len(run) > 1 else [run]
    return found


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
