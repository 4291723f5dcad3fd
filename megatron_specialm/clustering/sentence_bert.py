"""Sentence-BERT through sentence-transformers, for texts of any length."""

import contextlib
import importlib.metadata
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError

from megatron_specialm.base.errors import ConfigError, MachineError
from megatron_specialm.base.files import give_usual_mode
from megatron_specialm.base.packages import import_package
from megatron_specialm.base.tensors import system_errors
from megatron_specialm.clustering.vectors import unit_rows
from megatron_specialm.config.schema import SentenceBertEncoder

PACKAGE = "package:"  # prefix of the name of an installed package that contains a model
SENTENCE_BERT_MARK = "modules.json"  # the file that identifies a sentence-transformers model


class SentenceBert:
    """A Sentence-BERT model (Reimers and Gurevych 2019, arXiv 1908.10084).

    Such models truncate text after a few hundred word pieces (all-MiniLM-L6-v2: 256), often less than a window. So a window is
    split into chunks of `chunk_words` words. Chunks that are still too long, as of code or formulas, are halved until they fit.
    The vector is the mean over chunks, weighted by word pieces.

    counts: `encoder_tokens`, the word pieces of all texts, and `encoder_tokens_read`, those that the model did not truncate.
    flops_per_token: 2 per parameter outside the embedding tables; attention and padding are not included.
    """

    def __init__(self, model: str, settings: SentenceBertEncoder, *, threads: int) -> None:
        """model: a folder or a hub name.

        Raises:
            ConfigError: the folder is not a model.
            MachineError: sentence-transformers is missing, or the model is neither a folder nor available from the hub.
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

    @classmethod
    def fit(cls, settings: SentenceBertEncoder, draw: Callable[[int], list[str]], *, seed: int, threads: int) -> Self:
        with sentence_bert_folder(settings.model) as model:
            return cls(model, settings, threads=threads)

    @classmethod
    def load(cls, folder: Path, settings: SentenceBertEncoder, *, threads: int) -> Self:
        return cls(str(folder / "model"), settings, threads=threads)

    def save(self, folder: Path) -> None:
        """Copy the weights: compute nodes may not reach the hub, and a model on the hub may change."""
        with system_errors(folder / "model"):
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
        """The chunks of a text, with their numbers of word pieces."""
        chunks = split_words(text, size=self._settings.chunk_words)
        return [part for chunk in chunks for part in cut_to_fit(chunk, self._room, self._length)]

    def _find_room(self) -> float:
        """The maximum word pieces of a text, without the model's special tokens and prompt."""
        limit = self._model.max_seq_length
        if limit is None or not self._tokenizes():
            return math.inf
        prompt = (self._model.prompts or {}).get(self._model.default_prompt_name or "") or ""
        return max(1, limit - len(self._model.tokenizer(prompt)["input_ids"]))

    def _length(self, text: str) -> int:
        """The number of word pieces of a text, or of words if the model has no word pieces."""
        if not self._tokenizes():
            return len(text.split())
        return len(self._model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokenizes(self) -> bool:
        """Whether the model has a tokenizer of Transformers. Word-vector models have other tokenizers and no length limit."""
        from transformers import PreTrainedTokenizerBase

        return isinstance(self._model.tokenizer, PreTrainedTokenizerBase)

    def _encode_chunks(self, chunks: list[str]) -> np.ndarray:
        """The vectors of chunks, (chunks, E) float32."""
        import torch

        bf16 = self._settings.precision == "bf16"
        with torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self._model.encode(chunks, batch_size=self._settings.batch_size, show_progress_bar=False)


def split_words(text: str, *, size: int) -> list[str]:
    """Cut a text into chunks of at most `size` words; an empty text is one empty chunk."""
    words = text.split()
    return [" ".join(words[start : start + size]) for start in range(0, max(len(words), 1), size)]


def cut_to_fit(text: str, room: float, length: Callable[[str], int]) -> list[tuple[str, int]]:
    """Halve a text, at a space if there is one, until the `length` of each part is at most `room`; returns parts and
    lengths."""
    size = length(text)
    if size <= room or len(text) < 2:
        return [(text, size)]
    middle = len(text) // 2
    cut = max(text.rfind(" ", 1, middle + 1), text.find(" ", 1)) if " " in text[1:-1] else middle
    return [part for half in (text[:cut], text[cut:].lstrip(" ")) for part in cut_to_fit(half, room, length)]


@contextlib.contextmanager
def sentence_bert_folder(model: str) -> Iterator[str]:
    """The folder or hub name from which sentence-transformers loads `model`. For `package:NAME` it is the folder in the
    installed package, which is not imported; a zip file in the package is unpacked for the duration of the context.

    For any other name, a folder has precedence over the hub, as in sentence-transformers.

    Raises:
        MachineError: the package is not installed, or has no model.
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
