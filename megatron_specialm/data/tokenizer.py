"""Tokenizers: trained or imported once, then a folder that every later stage loads.

    tokenizer.json        the tokenizer as the `tokenizers` library reads it: what is exported
    sentencepiece.model   where it is a SentencePiece model, the model it was converted from
    settings.json         {"library": which of the two encodes, "eod": the end-of-document token,
                           "kept": what an imported tokenizer says beyond that, under tokenizer_config.json's names}

A SentencePiece BPE model encodes with SentencePiece, which is faster, and converts exactly. A unigram model encodes
with `tokenizers`: SentencePiece adds up log-probabilities in 32 bits, so on long documents it picks between nearly
equal segmentations by rounding, which nothing else can repeat.

Trained models neither normalize nor add anything, and spell unknown characters in bytes, so decode(encode(x)) == x; the
one exception is U+2581, SentencePiece's sign for a space, which becomes one. Text never encodes to the end-of-document
token, not even where it spells it out: an imported tokenizer in which it would is refused.
"""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import (
    atomic_path,
    read_json,
    reading,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from megatron_specialm.data.documents import cut_text
from megatron_specialm.data.huggingface_tokenizer import JSON, read_huggingface
from megatron_specialm.data.sentencepiece_conversion import SPACE, converted
from megatron_specialm.data.tokenizer_checks import check_pieces, read_file, refusing

MODEL, SETTINGS = "sentencepiece.model", "settings.json"
EOD = "</s>"
SENTENCE = 10_000  # characters of a training sentence; a longer document is several
UNKNOWN = "▅"  # SentencePiece's own sign: it trains on no sentence in which it stands
Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


# What a tokenizer, its conversion and its export have to agree on.
PROBES = (
    "The  quick\tbrown fox,\n\n  jumps over 1234567 lazy dogs!?  ",
    "for i in range(10):\r\n        x[i] += 0.5  # naïve café, Ångström ½ ﬁ",
    "Ελληνικά русский 日本語 العربية हिन्दी 👩‍👩‍👧 e\u0301 \u2003\u00a0\u200b",
    "</s> <s> <unk> <0x0A> <|endoftext|> \0 \u2581",
)


@dataclass(frozen=True)
class _Kept:
    pad_token: str | None = None
    unk_token: str | None = None
    padding_side: Literal["left", "right"] | None = None


@dataclass(frozen=True)
class _Settings:
    """The content of `settings.json`, as far as its types matter."""

    library: Literal["sentencepiece", "tokenizers"]
    eod: str
    kept: _Kept = _Kept()


class Tokenizer:
    """Text to token ids and back. Immutable; cheap to load (no torch).

    Attributes:
        eod: id of the end-of-document token.
        pad: id of the token that fills batches of texts: the tokenizer's own, or the end-of-document token.
        special_tokens: what an exported folder has to say of them, under tokenizer_config.json's names.
        added: the tokens that stand beside the model's vocabulary, special or not.
    """

    def __init__(
        self, folder: Path, encode: Encode, decode: Decode, exported: tokenizers.Tokenizer, settings: dict[str, Any]
    ) -> None:
        self.folder, self._encode, self._decode = folder, encode, decode
        eod = settings["eod"]
        self.special_tokens = {"pad_token": eod, **settings.get("kept", {}), "bos_token": eod, "eos_token": eod}
        self.added = [token.content for token in exported.get_added_tokens_decoder().values()]
        self.vocabulary_size = _size(exported)
        self.eod, self.pad = (_id(folder, exported, name) for name in (eod, self.special_tokens["pad_token"]))
        files = sorted(path for path in folder.iterdir() if path.name in (JSON, MODEL, SETTINGS))
        self.fingerprint = sha256_json({path.name: sha256_file(path) for path in files})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the folder that `train_sentencepiece` or `import_tokenizer` wrote.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        read_json(folder / SETTINGS, _Settings)
        settings = read_json(folder / SETTINGS, dict[str, Any])
        fix = "remove it and make the tokenizer again"
        with refusing(folder, "cannot be loaded", kind=ArtifactError, fix=fix):
            with reading(folder / JSON, form="a tokenizer"):
                exported = tokenizers.Tokenizer.from_file(str(folder / JSON))
                encode, decode = _tokenizers_calls(exported)
            if settings["library"] == "sentencepiece":
                with reading(folder / MODEL, form="a SentencePiece model"):
                    encode, decode = _sentencepiece_calls(folder / MODEL)
            with reading(folder / JSON, form="a tokenizer"):
                return cls(folder, encode, decode, exported, settings)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of token ids per text, in one thread, without special tokens."""
        return [np.asarray(self._encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; special tokens have none."""
        return self._decode(np.asarray(ids).tolist())

    def probes(self) -> list[str]:
        """Texts that tell apart tokenizers which are not the same: of many scripts, and of all added tokens' names."""
        return [*PROBES, " ".join(f"a{name}b {name}" for name in self.added)]


def _sentencepiece_calls(path: Path) -> tuple[Encode, Decode]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return processor.encode, processor.decode


def _tokenizers_calls(tokenizer: tokenizers.Tokenizer) -> tuple[Encode, Decode]:
    tokenizer.encode_special_tokens = True  # as ordinary text

    def encode(text: str) -> list[int]:
        # A batch of one: unlike `encode`, it skips character offsets. It stays in one thread.
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode, tokenizer.decode


def _id(folder: Path, tokenizer: tokenizers.Tokenizer, name: str) -> int:
    number = tokenizer.token_to_id(name)
    if number is None:
        raise ArtifactError(
            f"{folder / SETTINGS}: names {name!r}, which is no token of {JSON}: make the tokenizer again"
        )
    return number


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
    """Train a SentencePiece model on a sample of at most `sample_characters`, spread evenly over the texts.

    The same texts give the same model.

    Raises:
        DataError: no text, or the vocabulary is too large or too small for it.
    """
    sample = _spread(texts, sample_characters)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence.replace(UNKNOWN, " ") for sentence in sample),
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocabulary_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            required_chars=SPACE,  # also where no training text has a space: in bytes, its sign would not be one again
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
            f"vocabulary_size {vocabulary_size} does not suit {sum(map(len, sample)):,} characters of training text "
            f"({_reason(error) or ('too small' if sample else 'no text')}): change vocabulary_size or give more text"
        ) from None
    return _save_sentencepiece(model.getvalue(), folder)


def import_tokenizer(path: Path, folder: Path) -> Tokenizer:
    """Take a SentencePiece `.model` file or a Hugging Face folder with a `tokenizer.json`.

    Raises:
        DataError: it is neither, has no end-of-sentence token or one that text can encode to, cannot be exported without
            changing its ids, or decodes to other text than it encodes.
    """
    with refusing(path, "cannot be used"):
        if path.suffix == ".model" and path.is_file():
            model = read_file(path)
            _check_sentencepiece(path, model)
            return _save_sentencepiece(model, folder)
        if (path / JSON).is_file():
            description, settings = read_huggingface(path)
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
            _check_calls(path, *_tokenizers_calls(tokenizer), tokenizer, settings["eod"])
            write_json(folder / JSON, description)
            write_json(folder / SETTINGS, {"library": "tokenizers", **settings})
            return Tokenizer.load(folder)
    raise DataError(
        f"{path}: neither a SentencePiece .model file nor a folder with a {JSON}: correct the tokenizer's path"
    )


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
    """SentencePiece puts the failed C++ condition before the sentence that explains it, if there is one."""
    return str(error).rpartition("] ")[2].strip()


def _save_sentencepiece(model: bytes, folder: Path) -> Tokenizer:
    """Write a SentencePiece model, its conversion and the settings that name them."""
    proto = schema.ModelProto.FromString(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    is_bpe = proto.trainer_spec.model_type == schema.TrainerSpec.BPE
    kept = {} if processor.pad_id() < 0 else {"pad_token": processor.id_to_piece(processor.pad_id())}
    with atomic_path(folder / MODEL) as path:
        path.write_bytes(model)
    write_text(folder / JSON, converted(proto).to_str())
    write_json(
        folder / SETTINGS,
        {
            "library": "sentencepiece" if is_bpe else "tokenizers",
            "eod": processor.id_to_piece(processor.eos_id()),
            "kept": kept,
        },
    )
    return Tokenizer.load(folder)


def _check_sentencepiece(source: Path, model: bytes) -> None:
    """Refuse a SentencePiece model that has no end of sentence, or whose conversion gives other ids than itself."""
    with refusing(source, "not a SentencePiece model", fix="correct the tokenizer's path"):
        proto = schema.ModelProto.FromString(model)
        check_pieces(source, proto)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if processor.eos_id() < 0:
        raise DataError(f"{source}: has no end-of-sentence piece to end documents with: train it with eos_id set")
    tokenizer = converted(proto)
    encode, _ = _tokenizers_calls(tokenizer)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in (*PROBES, *(f"a{name}b {name}" for name in added)):
        if processor.encode(text) != encode(text):
            raise DataError(
                f"{source}: exported, it would give other ids, for instance of {text!r}: "
                "give it as a Hugging Face folder with a tokenizer.json"
            )
    end = processor.id_to_piece(processor.eos_id())
    _check_calls(source, processor.encode, processor.decode, tokenizer, end)


def _check_calls(source: Path, encode: Encode, decode: Decode, tokenizer: tokenizers.Tokenizer, end: str) -> None:
    """Refuse a tokenizer in which text can encode to the end token, or whose decoder is not that of its model."""
    eod = tokenizer.token_to_id(end)
    wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in end)  # NFKC undoes it
    decoder = tokenizer.decoder
    meant = decoder.decode([end]) if decoder else end  # of byte-level models: "Ċ" is a line break
    for name in (end, end.lower(), end.upper(), wide, meant):
        for text in (name, f"a {name} b", f"a{name}b", f"{name}{name}"):
            if eod in encode(text):
                raise DataError(
                    f"{source}: the text {text!r} encodes to the end token {end!r} itself, so it would end its document: "
                    "take the token out of the model's ordinary vocabulary (a user-defined symbol, or a word of it), or "
                    "name another eos_token"
                )
    ids = encode(text := "the time of the year")
    if encode(decode(ids)) != ids and not _unknown(tokenizer) & set(ids):
        raise DataError(
            f"{source}: {text!r} becomes {decode(ids)!r} when it is encoded and decoded: name the decoder that belongs to "
            f"its model in {JSON}"
        )


def _unknown(tokenizer: tokenizers.Tokenizer) -> set[int]:
    """The ids of text that the model does not know: such text is lost, with any decoder."""
    names = (getattr(tokenizer.model, "unk_token", None), "<unk>", "[UNK]")
    return {number for name in names if name and (number := tokenizer.token_to_id(name)) is not None}
