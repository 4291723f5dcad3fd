"""Tokenizers: trained or imported once, then a folder that every later stage loads.

    tokenizer.json        the tokenizer as the `tokenizers` library reads it: what is exported
    sentencepiece.model   where it is a SentencePiece model, the model it was converted from
    settings.json         {"library": which of the two encodes, "eod": the end-of-document token}

A SentencePiece BPE model encodes with SentencePiece, which is faster, and converts exactly. A unigram model encodes
with `tokenizers`: SentencePiece adds up log-probabilities in 32 bits, so on long documents it picks between nearly
equal segmentations by rounding, which nothing else can repeat.

Trained models neither normalize nor add anything, and spell unknown characters in bytes, so decode(encode(x)) == x; the
one exception is U+2581, SentencePiece's sign for a space, which becomes one. Text never encodes to the end-of-document
token, not even where it spells it out.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import atomic_path, read_json, sha256_file, sha256_json, write_json, write_text
from megatron_specialm.data.documents import cut_text

JSON, MODEL, SETTINGS = "tokenizer.json", "sentencepiece.model", "settings.json"
EOD = "</s>"
SENTENCE = 10_000  # characters of a training sentence; a longer document is several
Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


class Tokenizer:
    """Text to token ids and back. Immutable; cheap to load (no torch)."""

    def __init__(
        self, folder: Path, encode: Encode, decode: Decode, *, vocabulary_size: int, eod: int, fingerprint: str
    ) -> None:
        self._folder, self._encode, self._decode = folder, encode, decode
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
            native = settings["library"] == "sentencepiece"
            encode, decode = _sentencepiece_calls(folder / MODEL) if native else _tokenizers_calls(exported)
        except Exception as error:  # the library raises bare Exceptions
            raise ArtifactError(
                f"{folder}: cannot be loaded ({error}): remove it and make the tokenizer again"
            ) from None
        files = sorted(path for path in folder.iterdir() if path.name in (JSON, MODEL, SETTINGS))
        eod = exported.token_to_id(settings["eod"])
        if eod is None:
            raise ArtifactError(
                f"{folder / SETTINGS}: its eod {settings['eod']!r} is no token: make the tokenizer again"
            )
        return cls(
            folder,
            encode,
            decode,
            vocabulary_size=_size(exported),
            eod=eod,
            fingerprint=sha256_json({path.name: sha256_file(path) for path in files}),
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of token ids per text, in one thread, without special tokens."""
        return [np.asarray(self._encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; special tokens have none."""
        return self._decode(np.asarray(ids).tolist())

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


def _sentencepiece_calls(path: Path) -> tuple[Encode, Decode]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return processor.encode, processor.decode


def _tokenizers_calls(tokenizer: tokenizers.Tokenizer) -> tuple[Encode, Decode]:
    tokenizer.encode_special_tokens = True  # as ordinary text

    def encode(text: str) -> list[int]:
        # A batch of one: unlike `encode`, it skips character offsets. It stays in one thread.
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode, tokenizer.decode


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
            f"vocabulary_size {vocabulary_size} does not suit {sum(map(len, sample)):,} characters of training text "
            f"({_reason(error)}): change vocabulary_size or give more text"
        ) from None
    return _save_sentencepiece(model.getvalue(), folder)


def import_tokenizer(path: Path, folder: Path) -> Tokenizer:
    """Take a SentencePiece `.model` file or a Hugging Face folder with a `tokenizer.json`.

    Raises:
        DataError: it is neither, has no end-of-sentence token, or cannot be exported without changing its ids.
    """
    if path.suffix == ".model" and path.is_file():
        _check_importable(path)
        return _save_sentencepiece(path.read_bytes(), folder)
    if (path / JSON).is_file():
        return _save_huggingface(path, folder)
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
    """SentencePiece puts the failed C++ condition before the sentence that explains it."""
    return str(error).rpartition("] ")[2].strip() or "no text"


def _save_sentencepiece(model: bytes, folder: Path) -> Tokenizer:
    """Write a SentencePiece model, its conversion and the settings that name them."""
    proto = schema.ModelProto.FromString(model)
    is_bpe = proto.trainer_spec.model_type == schema.TrainerSpec.BPE
    with atomic_path(folder / MODEL) as path:
        path.write_bytes(model)
    write_text(folder / JSON, _converted(proto).to_str())
    eod = proto.pieces[proto.trainer_spec.eos_id].piece
    write_json(folder / SETTINGS, {"library": "sentencepiece" if is_bpe else "tokenizers", "eod": eod})
    return Tokenizer.load(folder)


def _check_importable(source: Path) -> None:
    """Refuse a SentencePiece model that has no end of sentence, or whose conversion gives other ids than itself."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{source}: not a SentencePiece model ({error}): correct the tokenizer's path") from None
    if processor.eos_id() < 0:
        raise DataError(f"{source}: has no end-of-sentence piece to end documents with: train it with eos_id set")
    converted, _ = _tokenizers_calls(_converted(schema.ModelProto.FromString(processor.serialized_model_proto())))
    for text in PROBES:
        if processor.encode(text) != converted(text):
            raise DataError(
                f"{source}: exported, it would give other ids, for instance of {text!r}: "
                "give it as a Hugging Face folder with a tokenizer.json"
            )


def _save_huggingface(source: Path, folder: Path) -> Tokenizer:
    """Keep a Hugging Face tokenizer, less what adds tokens to a text, cuts or pads it."""
    description = read_json(source / JSON) | {"post_processor": None, "truncation": None, "padding": None}
    eod = _eos_token(source)
    known = [token["content"] for token in description.get("added_tokens", [])]
    if eod not in known:
        raise DataError(
            f"{source}: its eos_token is {eod!r}, not one of its special tokens {known}: name one of those there"
        )
    write_json(folder / JSON, description)
    write_json(folder / SETTINGS, {"library": "tokenizers", "eod": eod})
    return Tokenizer.load(folder)


def _eos_token(source: Path) -> str | None:
    """The end-of-sentence token that a Hugging Face folder names: text, or a mapping with the text as its `content`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(source / name).get("eos_token") if (source / name).is_file() else None
        if token is not None:
            return token["content"] if isinstance(token, dict) else token
    return None


# --- SentencePiece -> tokenizers --------------------------------------------------------------------------------------

SPACE = "▁"
NEVER = -1e6  # the log-probability of pieces that no text may match: </s>, or a byte's piece <0x0A>

# What an imported model and its conversion have to agree on.
PROBES = (
    "The  quick\tbrown fox,\n\n  jumps over 1234567 lazy dogs!?  ",
    "for i in range(10):\r\n        x[i] += 0.5  # naïve café, Ångström ½ ﬁ",
    "Ελληνικά русский 日本語 العربية हिन्दी 👩‍👩‍👧 e\u0301 \u2003\u00a0\u200b",
    "</s> <s> <unk> <0x0A> <|endoftext|> \0 \u2581",
)


def _converted(proto: Any) -> tokenizers.Tokenizer:
    """The tokenizer that a SentencePiece model describes.

    SentencePiece BPE knows no merges, only pieces: it always joins the neighbours whose union has the best score. That
    is the same as merging any pair of pieces whose union is a piece, ranked by the union's score.
    """
    kind = schema.ModelProto.SentencePiece
    spec = proto.trainer_spec
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL}
    if spec.model_type == schema.TrainerSpec.BPE:
        ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        model: Any = tokenizers.models.BPE(
            ids,
            sorted(_pairs(normal), key=lambda pair: (-normal[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]])),
            unk_token=proto.pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    else:
        scores = [(piece.piece, normal.get(piece.piece, NEVER)) for piece in proto.pieces]
        model = tokenizers.models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    tokenizer.add_special_tokens([_token(piece.piece) for piece in proto.pieces if piece.type == kind.CONTROL])
    tokenizer.add_tokens([_token(piece.piece) for piece in proto.pieces if piece.type == kind.USER_DEFINED])
    return tokenizer


def _pairs(pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    known = set(pieces)
    for piece in known:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]


def _token(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, normalized=False)


def _normalizer(spec: Any) -> tokenizers.normalizers.Normalizer:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(tokenizers.normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(tokenizers.normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
        steps.append(tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(tokenizers.normalizers.Prepend(SPACE))
    steps.append(tokenizers.normalizers.Replace(" ", SPACE))
    return tokenizers.normalizers.Sequence(steps)


def _decoder(spec: Any) -> tokenizers.decoders.Decoder:
    steps: list[Any] = [
        tokenizers.decoders.Replace(SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if spec.add_dummy_prefix:
        steps.append(tokenizers.decoders.Strip(" ", 1, 0))
    return tokenizers.decoders.Sequence(steps)
