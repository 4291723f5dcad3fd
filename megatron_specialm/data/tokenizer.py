"""Tokenizers: trained or imported once, then a folder that every later stage loads.

    tokenizer.json        the tokenizer as the `tokenizers` library reads it: what is exported
    sentencepiece.model   where it is a SentencePiece model, the model it was converted from
    settings.json         {"library": which of the two encodes, "eod": the end-of-document token}

A SentencePiece BPE model encodes with SentencePiece, which is faster, and converts exactly. A unigram model encodes with
`tokenizers`: SentencePiece adds up log-probabilities in 32 bits, so on long documents it picks between nearly equal
segmentations by rounding, which nothing else can repeat.

Trained models neither normalize nor add anything, and spell unknown characters in bytes, so decode(encode(x)) == x; the
one exception is U+2581, SentencePiece's sign for a space, which becomes one. Text never encodes to the end-of-document
token, not even where it spells it out.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import sentencepiece
import tokenizers

from megatron_specialm.base.errors import ArtifactError, DataError, MachineError
from megatron_specialm.base.files import atomic_path, read_json, sha256_file, sha256_json, write_json, write_text
from megatron_specialm.data.documents import cut_text

JSON, MODEL, SETTINGS = "tokenizer.json", "sentencepiece.model", "settings.json"
EOD = "</s>"
SENTENCE = 10_000  # characters of a training sentence; a longer document is several
PIECE = 1_000_000  # characters encoded at a time: bounds the memory a long document takes


class Tokenizer:
    """Text to token ids and back. Immutable; cheap to load (no torch)."""

    def __init__(
        self, library: "_SentencePiece | _Tokenizers", *, vocabulary_size: int, eod: int, fingerprint: str, folder: Path
    ) -> None:
        self._library = library
        self._folder = folder
        self.vocabulary_size = vocabulary_size
        self.eod = eod
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the folder that `train_sentencepiece` or `import_tokenizer` wrote.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        settings = read_json(folder / SETTINGS)
        try:
            exported = tokenizers.Tokenizer.from_file(str(folder / JSON))
            library = _SentencePiece(folder / MODEL) if settings["library"] == "sentencepiece" else _Tokenizers(exported)
        except Exception as error:  # the library raises bare Exceptions
            raise ArtifactError(f"{folder}: cannot be loaded ({error}): remove it and make the tokenizer again") from None
        files = sorted(path for path in folder.iterdir() if path.name in (JSON, MODEL, SETTINGS))
        return cls(
            library,
            vocabulary_size=_size(exported),
            eod=exported.token_to_id(settings["eod"]),
            fingerprint=sha256_json({path.name: sha256_file(path) for path in files}),
            folder=folder,
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of token ids per text, in one thread, without special tokens."""
        return [np.asarray(self._library.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; special tokens have none."""
        return self._library.decode(np.asarray(ids).tolist())

    def save_huggingface(self, folder: Path) -> None:
        """Write the files from which `transformers.AutoTokenizer` makes the same ids. bos and eos are the eod token."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / JSON, (self._folder / JSON).read_text(encoding="utf-8"))
        eod = read_json(self._folder / SETTINGS)["eod"]
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": eod,
                "eos_token": eod,
                "split_special_tokens": True,  # text that spells a special token stays text
                "clean_up_tokenization_spaces": False,
            },
        )


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.encode: Callable[[str], list[int]] = processor.encode
        self.decode: Callable[[list[int]], str] = processor.decode


class _Tokenizers:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # as ordinary text
        self._tokenizer = tokenizer
        self.decode: Callable[[list[int]], str] = tokenizer.decode

    def encode(self, text: str) -> list[int]:
        # A batch of one: unlike `encode`, this skips character offsets, and it stays in one thread.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _size(tokenizer: tokenizers.Tokenizer) -> int:
    """Rows an embedding table needs: ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


# --- making one -------------------------------------------------------------------------------------------------------


def train_sentencepiece(
    texts: Iterable[str],
    folder: Path,
    *,
    vocabulary_size: int,
    algorithm: Literal["bpe", "unigram"],
    sample_characters: int,
) -> Tokenizer:
    """Train a SentencePiece model on a sample of at most `sample_characters` spread evenly over the texts. Deterministic.

    Raises:
        DataError: no text, or the vocabulary is too large or too small for it.
    """
    sample = _spread(texts, sample_characters)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocabulary_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SENTENCE,  # in bytes; longer ones would be dropped
            unk_id=0,
            eos_id=1,
            eos_piece=EOD,
            bos_id=-1,
            pad_id=-1,
            num_threads=16,  # not the machine's: the sums of unigram training depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"vocabulary_size {vocabulary_size} does not suit the {sum(map(len, sample)):,} characters of training text "
            f"({_reason(error)}): change vocabulary_size or give more text"
        ) from None
    return _save_sentencepiece(model.getvalue(), folder)


def import_tokenizer(path: Path, folder: Path) -> Tokenizer:
    """Take a SentencePiece `.model` file or a Hugging Face folder with a `tokenizer.json`.

    Raises:
        DataError: it is neither, has no end-of-sentence token, or cannot be exported without changing its ids.
    """
    if path.suffix == ".model" and path.is_file():
        tokenizer = _save_sentencepiece(path.read_bytes(), folder, source=path)
    elif (path / JSON).is_file():
        tokenizer = _save_huggingface(path, folder)
    else:
        raise DataError(f"{path}: neither a SentencePiece .model file nor a folder with a {JSON}: correct tokenizer path")
    return tokenizer


def _spread(texts: Iterable[str], budget: int) -> list[str]:
    """Every n-th sentence, n doubled whenever those kept exceed the budget: one pass, bounded memory."""
    stride, total = 1, 0
    kept: list[str] = []
    sentences = (sentence for text in texts for sentence in cut_text(text, SENTENCE))
    for number, sentence in enumerate(sentences):
        if number % stride == 0:
            kept.append(sentence)
            total += len(sentence)
        while total > budget and len(kept) > 1:
            stride *= 2
            kept = kept[::2]
            total = sum(map(len, kept))
    return kept


def _reason(error: RuntimeError) -> str:
    """SentencePiece puts the failed C++ condition before the sentence that explains it."""
    return str(error).rpartition("] ")[2].strip() or "no text"


def _save_sentencepiece(model: bytes, folder: Path, source: Path | None = None) -> Tokenizer:
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:
        raise DataError(f"{source}: not a SentencePiece model ({error}): correct tokenizer path") from None
    eod = proto.trainer_spec.eos_id
    if not 0 <= eod < len(proto.pieces):
        raise DataError(f"{source}: has no end-of-sentence piece to end documents with: train it with eos_id set")
    is_bpe = proto.trainer_spec.model_type == schema.TrainerSpec.BPE
    with atomic_path(folder / MODEL) as path:
        path.write_bytes(model)
    write_text(folder / JSON, _converted(proto, schema).to_str(pretty=True))
    write_json(
        folder / SETTINGS, {"library": "sentencepiece" if is_bpe else "tokenizers", "eod": proto.pieces[eod].piece}
    )
    _check_conversion(folder, source)
    return Tokenizer.load(folder)
