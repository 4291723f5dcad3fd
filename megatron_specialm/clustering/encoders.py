"""Sentence encoders: from the text of a window to a vector whose direction represents its subject.

There are three, from the cheapest to the paper's (Sentence-BERT; Grangier et al., arXiv 2402.01093, section 3):

    tfidf          words (clustering/words.py) weighted by rarity, projected by truncated SVD; fitted on the generic set,
                   needs no download
    static         the mean of word-piece embeddings from the package wordllama
    sentence-bert  a transformer through sentence-transformers (clustering/sentence_bert.py)

An encoder is saved as a folder without pickled objects, so that later domains are embedded exactly as the generic set.

Shapes: n texts, E dimensions, V words of the vocabulary.
"""

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from megatron_specialm.base.arrays import read_arrays
from megatron_specialm.base.errors import ArtifactError, ConfigError, DataError, MachineError
from megatron_specialm.base.files import (
    MANIFEST,
    REMAKE,
    atomic_path,
    publish_folder,
    read_json,
    verify_folder,
    write_json,
)
from megatron_specialm.base.packages import import_package
from megatron_specialm.clustering.sentence_bert import SentenceBert, sentence_bert_folder
from megatron_specialm.clustering.vectors import unit_rows
from megatron_specialm.clustering.words import words
from megatron_specialm.config.schema import Encoder as EncoderSettings
from megatron_specialm.config.schema import (
    SentenceBertEncoder,
    StaticEncoder,
    TfidfEncoder,
)

STATIC_DIMENSIONS = (64, 128, 256)  # the lengths to which wordllama's vectors may be cut


class Encoder(Protocol):
    """Texts -> unit vectors."""

    @property
    def dimensions(self) -> int:
        """E, the length of a vector."""

    @property
    def flops_per_token(self) -> int:
        """An estimate of the arithmetic per token of text; each class documents its own."""

    @property
    def counts(self) -> dict[str, int]:
        """Counts over the texts encoded so far, by name, for the report."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """One vector per text, (n, E) float32: of length 1, or 0 if the encoder knows no word of the text."""

    def save(self, folder: Path) -> None:
        """Write the files for `load_encoder` into an existing folder; `save_encoder` publishes it with a manifest."""


def fit_encoder(settings: EncoderSettings, draw: Callable[[int], list[str]], *, seed: int, threads: int) -> Encoder:
    """Fit the encoder on generic text, or get it from its package or the hub.

    Args:
        draw: returns the given number of generic windows, or all if there are fewer; called only by an encoder that is fitted.
        threads: CPU threads of a Sentence-BERT model.

    Raises:
        DataError: too little text to fit on.
        ConfigError: the encoder does not allow these dimensions.
        MachineError: a package, a model folder or the hub is missing.
    """
    match settings:
        case TfidfEncoder():
            return Tfidf.fit(draw(settings.sample), settings, seed=seed)
        case StaticEncoder():
            return StaticWordPieces(settings.dimensions)
        case SentenceBertEncoder():
            with sentence_bert_folder(settings.model) as model:
                return SentenceBert(model, settings, threads=threads)


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """Write `folder` for `load_encoder`, with a manifest; it appears when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    encoder.save(temporary)
    publish_folder(temporary, folder)


def load_encoder(settings: EncoderSettings, folder: Path, *, threads: int) -> Encoder:
    """Load the encoder that `save_encoder` wrote.

    Raises:
        ArtifactError: the folder has changed since, or is of another version of a package.
        MachineError: a package is missing.
    """
    # Folders of earlier versions have no manifest. The task's marker lists it, so that a missing one is noticed.
    if (folder / MANIFEST).exists():
        verify_folder(folder, alone=True)
    match settings:
        case TfidfEncoder():
            return Tfidf.load(folder)
        case StaticEncoder():
            return StaticWordPieces.load(folder)
        case SentenceBertEncoder():
            return SentenceBert(str(folder / "model"), settings, threads=threads)


# --- words ------------------------------------------------------------------------------------------------------------


class Tfidf:
    """(1 + log count) x inverse document frequency of each word, projected to E dimensions.

    flops_per_token: 2 E, a multiply-add per dimension for every word of the sparse product. The fit makes about twelve such
    products over its sample, which count in its wall seconds only.
    """

    def __init__(self, vocabulary: list[str], *, frequencies: np.ndarray, components: np.ndarray) -> None:
        """vocabulary: V words; frequencies: (V,) inverse document frequencies; components: (E, V) singular vectors."""
        self._words, self._frequencies, self._components = vocabulary, frequencies, components
        self._vectorizer = _vectorizer(vocabulary={word: column for column, word in enumerate(vocabulary)})
        self._vectorizer.idf_ = frequencies

    @classmethod
    def fit(cls, texts: list[str], settings: TfidfEncoder, *, seed: int) -> Self:
        """Choose the most frequent words and the directions of largest variance. The same seed and texts give the same encoder.

        Raises:
            DataError: fewer texts or words than dimensions.
        """
        vectorizer = _vectorizer(max_features=settings.vocabulary_size)
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
    def load(cls, folder: Path) -> Self:
        """Load the folder of `save`."""
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
    """The word counter of fitting and loading. Sublinear, since ten repetitions of a word add little to one."""
    return TfidfVectorizer(analyzer=words, sublinear_tf=True, dtype=np.float32, **vocabulary)


# --- word pieces ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Static:
    """The content of `static.json`: the package's version, and the number of dimensions used."""

    wordllama: str
    dimensions: int


class StaticWordPieces:
    """The mean of the word-piece embeddings of the package wordllama (`l2_supercat`, derived from Llama 2's).

    flops_per_token: E, one addition per dimension.
    """

    def __init__(self, dimensions: int) -> None:
        if dimensions not in STATIC_DIMENSIONS:
            raise ConfigError(f"encoder.dimensions {dimensions}: static vectors have 64, 128 or 256")
        try:
            wordllama = import_package("wordllama")
        except ImportError as error:
            raise MachineError(f"the static encoder cannot be used ({error}): pip install wordllama") from None
        package = Path(str(wordllama.__file__)).parent
        # The package searches its own tokenizer in a wrong folder, but also in its cache folder.
        self._model = wordllama.WordLlama.load(trunc_dim=dimensions, disable_download=True, cache_dir=package)
        self._dimensions = dimensions

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The weights are in the package, so its version must be the one that embedded the generic set."""
        saved, installed = read_json(folder / "static.json", _Static), importlib.metadata.version("wordllama")
        if saved.wordllama != installed:
            raise ArtifactError(
                f"{folder}: made with wordllama {saved.wordllama}, but {installed} is installed: "
                f"pip install wordllama=={saved.wordllama}, or remove the embed artifact and run again"
            )
        return cls(saved.dimensions)

    def save(self, folder: Path) -> None:
        version = importlib.metadata.version("wordllama")
        write_json(folder / "static.json", asdict(_Static(version, self._dimensions)))

    @property
    def dimensions(self) -> int:
        return self._dimensions

    @property
    def flops_per_token(self) -> int:
        return self._dimensions

    @property
    def counts(self) -> dict[str, int]:
        return {}

    def encode(self, texts: list[str]) -> np.ndarray:
        return unit_rows(self._model.embed(texts))
