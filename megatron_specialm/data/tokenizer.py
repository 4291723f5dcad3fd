"""A tokenizer: a folder that `data/tokenizer_making.py` writes once and every later stage loads.

    tokenizer.json        the tokenizer for the `tokenizers` library: what is exported
    sentencepiece.model   of a SentencePiece model, the model that it was converted from
    settings.json         {"library": which of the two encodes, "eod": the end-of-document token,
                           "kept": further settings of an imported tokenizer, named as in tokenizer_config.json}

Trained models neither normalize nor add anything, and spell unknown characters in bytes, so decode(encode(x)) == x; the
one exception is U+2581, SentencePiece's sign for a space, which becomes one. Text never encodes to the end-of-document
token, not even the token's own name: an imported tokenizer in which it would is refused.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import sentencepiece
import tokenizers

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json, reading, sha256_file, sha256_json
from megatron_specialm.data.codec import PROBES, Codec, added_tokens, sentencepiece_codec, tokenizers_codec
from megatron_specialm.data.huggingface_tokenizer import JSON
from megatron_specialm.data.tokenizer_checks import refusing

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
    kept: _Imported = _Imported()


class Tokenizer:
    """Text to token ids and back. Immutable; loads quickly and without torch.

    Attributes:
        eod: id of the end-of-document token.
        pad: id of the token that fills batches of texts: the tokenizer's own, or the end-of-document token.
        special_tokens: the special tokens, padding side and chat template for an export, named as in tokenizer_config.json.
        added: the tokens beside the model's vocabulary, special or not.
        vocabulary_size: rows of an embedding table for it; ids may have gaps.
        fingerprint: SHA-256 over its files.
    """

    def __init__(self, folder: Path, codec: Codec, exported: tokenizers.Tokenizer, settings: _Settings) -> None:
        self.folder, self._codec = folder, codec
        imported = {name: value for name, value in asdict(settings.kept).items() if value is not None}
        eod = settings.eod
        self.special_tokens = {"pad_token": eod, **imported, "bos_token": eod, "eos_token": eod}
        self.added = added_tokens(exported)
        self.vocabulary_size = max(exported.get_vocab(with_added_tokens=True).values()) + 1
        self.eod, self.pad = (_id(folder, exported, name) for name in (eod, self.special_tokens["pad_token"]))
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
            match settings:
                case _Settings(library="sentencepiece"):
                    with reading(folder / MODEL, form="a SentencePiece model"):
                        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
                        codec = sentencepiece_codec(processor)
            with reading(folder / JSON, form="a tokenizer"):
                return cls(folder, codec, exported, settings)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of token ids per text, in one thread, without special tokens."""
        return [np.asarray(self._codec.encode(text), np.int32) for text in texts]

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
