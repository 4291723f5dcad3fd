"""A tokenizer: a folder that `data/tokenizer_making.py` writes once and every later stage loads.

    tokenizer.json        the tokenizer for the `tokenizers` library: what is exported
    sentencepiece.model   of a SentencePiece model, the model that it was converted from
    settings.json         {"library": which of the two encodes, "eod": the end-of-document token,
                           "bos": the start token, where it is another than that,
                           "kept": further settings of an imported tokenizer, named as in tokenizer_config.json,
                           "vocabulary_size": rows of its model's embedding, where it came with a model}

Trained models neither normalize nor add anything, and spell unknown characters in bytes, so decode(encode(x)) == x; the
one exception is U+2581, SentencePiece's sign for a space, which becomes one. Text never encodes to the end-of-document
token, not even the token's own name: an imported tokenizer in which it would is refused.

A SentencePiece BPE model encodes with SentencePiece, which is faster, and converts exactly. A unigram model encodes with
`tokenizers`: SentencePiece adds log-probabilities in 32 bits, so in long documents rounding decides between nearly equal
segmentations, which no other library reproduces.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import sentencepiece
import tokenizers

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json, reading, sha256_file, sha256_json
from megatron_specialm.base.shapes import Size
from megatron_specialm.data.huggingface_tokenizer import JSON
from megatron_specialm.data.tokenizer_checks import refusing

# Texts of many scripts, which a tokenizer, its conversion and its export must encode alike.
PROBES = (
    "The  quick\tbrown fox,\n\n  jumps over 1234567 lazy dogs!?  ",
    "for i in range(10):\r\n        x[i] += 0.5  # naïve café, Ångström ½ ﬁ",
    "Ελληνικά русский 日本語 العربية हिन्दी 👩‍👩‍👧 e\u0301 \u2003\u00a0\u200b",
    "</s> <s> <unk> <0x0A> <|endoftext|> \0 \u2581",
)


class Codec(NamedTuple):
    """encode: texts to token ids, int32 each, in one thread, without special tokens. decode: ids to the text."""

    encode: Callable[[list[str]], list[np.ndarray]]
    decode: Callable[[list[int]], str]


def sentencepiece_codec(processor: sentencepiece.SentencePieceProcessor) -> Codec:
    """The codec of a SentencePiece model."""
    return Codec(partial(processor.encode, num_threads=1, return_type="numpy"), processor.decode)


def tokenizers_codec(tokenizer: tokenizers.Tokenizer) -> Codec:
    """The codec of a tokenizer of the library `tokenizers`. From here on it encodes the names of special tokens as ordinary
    text."""
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> list[np.ndarray]:
        # Batches of one: unlike `encode`, they skip character offsets. They stay in one thread.
        batches = (tokenizer.encode_batch_fast([text], add_special_tokens=False) for text in texts)
        return [np.asarray(batch[0].ids, np.int32) for batch in batches]

    return Codec(encode, tokenizer.decode)


def added_tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The tokens beside the model's vocabulary, special or not."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


MODEL, SETTINGS = "sentencepiece.model", "settings.json"


@dataclass(frozen=True)
class _Imported:
    """Settings of an imported tokenizer that its export repeats."""

    pad_token: str | None = None
    unk_token: str | None = None
    padding_side: Literal["left", "right"] | None = None
    chat_template: Any = None


@dataclass(frozen=True)
class _Settings:
    """The content of `settings.json`."""

    library: Literal["sentencepiece", "tokenizers"]
    eod: str
    bos: str | None = None
    kept: _Imported = _Imported()
    vocabulary_size: Size | None = None


class Tokenizer:
    """Text to token ids and back. Immutable; loads quickly and without torch.

    Attributes:
        eod: id of the end-of-document token.
        bos: id of the start token, before each window: the one that the tokenizer itself puts before a text, or the
            end-of-document token.
        pad: id of the token that fills batches of texts: the tokenizer's own, or the end-of-document token.
        special_tokens: the special tokens, padding side and chat template for an export, named as in tokenizer_config.json.
        added: the tokens beside the model's vocabulary, special or not.
        sentencepiece: the file of a SentencePiece BPE model; None of another tokenizer.
        vocabulary_size: rows of an embedding table for it; ids may have gaps, and its model more rows than it has ids.
        fingerprint: SHA-256 over its files.
    """

    def __init__(self, folder: Path, codec: Codec, exported: tokenizers.Tokenizer, settings: _Settings) -> None:
        self.folder, self._codec = folder, codec
        self.sentencepiece = folder / MODEL if settings.library == "sentencepiece" else None
        imported = {name: value for name, value in asdict(settings.kept).items() if value is not None}
        eod, bos = settings.eod, settings.bos or settings.eod
        self.special_tokens = {"pad_token": eod, **imported, "bos_token": bos, "eos_token": eod}
        self.added = added_tokens(exported)
        ids = max(exported.get_vocab(with_added_tokens=True).values()) + 1
        self.vocabulary_size = settings.vocabulary_size or ids
        self.eod, self.bos, self.pad = (
            _id(folder, exported, name) for name in (eod, bos, self.special_tokens["pad_token"])
        )
        files = sorted(path for path in folder.iterdir() if path.name in (JSON, MODEL, SETTINGS))
        self.fingerprint = sha256_json({path.name: sha256_file(path) for path in files})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the folder that `train_sentencepiece` or `import_tokenizer` wrote.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        settings = read_json(folder / SETTINGS, _Settings)
        fix = "remove it and make the tokenizer again"
        with refusing(folder, "cannot be loaded", kind=ArtifactError, fix=fix):
            with reading(folder / JSON, form="a tokenizer"):
                exported = tokenizers.Tokenizer.from_file(str(folder / JSON))
                codec = tokenizers_codec(exported)
            if settings.library == "sentencepiece":
                with reading(folder / MODEL, form="a SentencePiece model"):
                    codec = sentencepiece_codec(sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL)))
            with reading(folder / JSON, form="a tokenizer"):
                return cls(folder, codec, exported, settings)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of token ids per text, read-only, in one thread, without special tokens."""
        return self._codec.encode(list(texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, without special tokens."""
        return self._codec.decode(np.asarray(ids).tolist())

    def probes(self) -> list[str]:
        """Texts on which different tokenizers differ: of many scripts, and of the names of all added tokens."""
        return [*PROBES, " ".join(f"a{name}b {name}" for name in self.added)]


def _id(folder: Path, tokenizer: tokenizers.Tokenizer, name: str) -> int:
    number = tokenizer.token_to_id(name)
    if number is None:
        raise ArtifactError(
            f"{folder / SETTINGS}: names {name!r}, which is no token of {JSON}: make the tokenizer again"
        )
    return number
