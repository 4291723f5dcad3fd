"""Text encoders: from the text of a window to a vector whose direction represents its subject.

From the cheapest to the paper's (Sentence-BERT; Grangier et al., arXiv 2402.01093, section 3):

    tfidf          word counts weighted by rarity, projected by truncated SVD; fitted on the generic set, needs no download
                   (clustering/tfidf.py)
    static         the mean of word-piece embeddings from the package wordllama (clustering/static_word_pieces.py)
    sentence-bert  a transformer through sentence-transformers (clustering/sentence_bert.py)

An encoder is saved as a folder without pickled objects, so that later domains are embedded like the generic set. To add a kind,
write a class with the members of `Encoder` and its settings, and add it to `ENCODERS`.

Shapes: n texts, E dimensions.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from megatron_specialm.base.files import MANIFEST, publish_folder, verify_folder
from megatron_specialm.clustering.sentence_bert import SentenceBert
from megatron_specialm.clustering.static_word_pieces import StaticWordPieces
from megatron_specialm.clustering.tfidf import Tfidf
from megatron_specialm.config.schema import Encoder as EncoderSettings


class Encoder(Protocol):
    """Texts -> unit vectors."""

    @classmethod
    def fit(cls, settings: Any, draw: Callable[[int], list[str]], *, seed: int, threads: int) -> Self:
        """See `fit_encoder`; `settings` are those of this kind."""

    @classmethod
    def load(cls, folder: Path, settings: Any, *, threads: int) -> Self:
        """Load the folder of `save`; see `load_encoder`."""

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


ENCODERS: dict[str, type[Encoder]] = {"tfidf": Tfidf, "static": StaticWordPieces, "sentence-bert": SentenceBert}


def fit_encoder(settings: EncoderSettings, draw: Callable[[int], list[str]], *, seed: int, threads: int) -> Encoder:
    """Fit the encoder on generic text, or load it from its package or the hub.

    Args:
        draw: returns a number of generic windows, or all if there are fewer; only encoders that are fitted call it.
        threads: CPU threads of a Sentence-BERT model.

    Raises:
        DataError: too little text to fit on.
        ConfigError: the encoder does not allow these dimensions.
        MachineError: a package, a model folder or the hub is missing.
    """
    return ENCODERS[settings.kind].fit(settings, draw, seed=seed, threads=threads)


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """Write `folder` for `load_encoder`, with a manifest. It is published only when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    encoder.save(temporary)
    publish_folder(temporary, folder)


def load_encoder(settings: EncoderSettings, folder: Path, *, threads: int) -> Encoder:
    """Load the encoder that `save_encoder` wrote.

    Raises:
        ArtifactError: the folder has changed since, or belongs to another version of a package.
        MachineError: a package is missing.
    """
    # Folders of earlier versions have no manifest. If one is missing from a newer folder, the task's marker shows it.
    if (folder / MANIFEST).exists():
        verify_folder(folder, alone=True)
    return ENCODERS[settings.kind].load(folder, settings, threads=threads)
