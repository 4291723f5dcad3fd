"""Making a tokenizer: training one on text, or importing a SentencePiece model or a Hugging Face folder.

Both write the folder that `data/tokenizer.py` loads.
"""

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema

from megatron_specialm.base.errors import DataError
from megatron_specialm.base.files import atomic_path, read_json, write_json, write_text
from megatron_specialm.data.documents import cut_text
from megatron_specialm.data.huggingface_tokenizer import JSON, read_huggingface
from megatron_specialm.data.sentencepiece_conversion import SPACE, converted
from megatron_specialm.data.tokenizer import (
    MODEL,
    PROBES,
    SETTINGS,
    Codec,
    Tokenizer,
    added_tokens,
    sentencepiece_codec,
    tokenizers_codec,
)
from megatron_specialm.data.tokenizer_checks import check_pieces, read_file, refusing

EOD = "</s>"
SENTENCE = 10_000  # characters of a training sentence; a longer document is several
UNKNOWN = "▅"  # SentencePiece's own sign: it trains on no sentence that has it


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
            required_chars=SPACE,  # even if no training text has a space: spelled in bytes, it would not decode to a space
            max_sentence_length=4 * SENTENCE,  # in bytes; SentencePiece drops longer ones
            unk_id=0,
            eos_id=1,
            eos_piece=EOD,
            bos_id=-1,
            pad_id=-1,
            num_threads=16,  # fixed: the sums of unigram training depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        # The explanation of SentencePiece follows the failed C++ condition; there may be none.
        reason = str(error).rpartition("] ")[2].strip() or ("too small" if sample else "no text")
        raise DataError(
            f"vocabulary_size {vocabulary_size} does not suit {sum(map(len, sample)):,} characters of training text "
            f"({reason}): change vocabulary_size or give more text"
        ) from None
    return _save_sentencepiece(model.getvalue(), folder)


def import_tokenizer(path: Path, folder: Path, *, rows: int | None = None) -> Tokenizer:
    """Import a SentencePiece `.model` file, a Hugging Face folder with a `tokenizer.json`, or a tokenizer folder of ours.

    Args:
        rows: of the embedding of the model that it belongs to; default: as many as it has ids.

    Raises:
        DataError: it is none of these, has no end-of-sentence token or one that text can encode to, gives other ids when
            exported, decodes to other text than it encodes, or has ids beyond `rows`.
    """
    tokenizer = _import(path, folder)
    if rows is None or rows == tokenizer.vocabulary_size:
        return tokenizer
    if rows < tokenizer.vocabulary_size:
        raise DataError(
            f"{path}: has ids up to {tokenizer.vocabulary_size - 1}, and the model {rows} rows: it is the tokenizer of another "
            "model"
        )
    write_json(folder / SETTINGS, {**read_json(folder / SETTINGS, dict[str, Any]), "vocabulary_size": rows})
    return Tokenizer.load(folder)


def _import(path: Path, folder: Path) -> Tokenizer:
    with refusing(path, "cannot be used"):
        if path.suffix == ".model" and path.is_file():
            model = read_file(path)
            _check_sentencepiece(path, model)
            return _save_sentencepiece(model, folder)
        if (path / SETTINGS).is_file() and (path / JSON).is_file():
            for name in (JSON, SETTINGS, MODEL):
                if (path / name).is_file():
                    shutil.copyfile(path / name, folder / name)
            return Tokenizer.load(folder)
        if (path / JSON).is_file():
            description, settings = read_huggingface(path)
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
            _check_codec(path, tokenizers_codec(tokenizer), tokenizer, settings["eod"])
            write_json(folder / JSON, description)
            write_json(folder / SETTINGS, {"library": "tokenizers", **settings})
            return Tokenizer.load(folder)
    raise DataError(
        f"{path}: neither a SentencePiece .model file nor a folder with a {JSON}: correct the tokenizer's path"
    )


def _spread(texts: Iterable[str], budget: int) -> list[str]:
    """Every n-th sentence, where n doubles whenever the sample exceeds the budget: one pass, bounded memory."""
    stride, total = 1, 0
    sample: list[str] = []
    sentences = (sentence for text in texts for sentence in cut_text(text, SENTENCE))
    for number, sentence in enumerate(sentences):
        if number % stride == 0:
            sample.append(sentence)
            total += len(sentence)
        while total > budget and len(sample) > 1:
            stride *= 2
            sample = sample[::2]
            total = sum(map(len, sample))
    return sample


def _save_sentencepiece(model: bytes, folder: Path) -> Tokenizer:
    """Write the folder of a SentencePiece model: the model, its conversion and the settings."""
    proto = schema.ModelProto.FromString(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    is_bpe = proto.trainer_spec.model_type == schema.TrainerSpec.BPE
    with atomic_path(folder / MODEL) as path:
        path.write_bytes(model)
    write_text(folder / JSON, converted(proto).to_str())
    write_json(
        folder / SETTINGS,
        {
            "library": "sentencepiece" if is_bpe else "tokenizers",
            "eod": processor.id_to_piece(processor.eos_id()),
            **({} if processor.bos_id() < 0 else {"bos": processor.id_to_piece(processor.bos_id())}),
            "kept": {} if processor.pad_id() < 0 else {"pad_token": processor.id_to_piece(processor.pad_id())},
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
    theirs, ours = sentencepiece_codec(processor), tokenizers_codec(tokenizer)
    for text in (*PROBES, *(f"a{name}b {name}" for name in added_tokens(tokenizer))):
        if _ids(theirs, text) != _ids(ours, text):
            raise DataError(
                f"{source}: exported, it would give other ids, for instance of {text!r}: "
                "give it as a Hugging Face folder with a tokenizer.json"
            )
    _check_codec(source, theirs, tokenizer, processor.id_to_piece(processor.eos_id()))


def _check_codec(source: Path, codec: Codec, tokenizer: tokenizers.Tokenizer, end: str) -> None:
    """Refuse a tokenizer in which text can encode to the end token, or whose decoder does not fit its model."""
    eod = tokenizer.token_to_id(end)
    wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in end)  # NFKC undoes it
    decoder = tokenizer.decoder
    meant = decoder.decode([end]) if decoder else end  # of byte-level models: "Ċ" is a line break
    for name in (end, end.lower(), end.upper(), wide, meant):
        for text in (name, f"a {name} b", f"a{name}b", f"{name}{name}"):
            if eod in _ids(codec, text):
                raise DataError(
                    f"{source}: the text {text!r} encodes to the end token {end!r} itself, so it would end its document: "
                    "take the token out of the model's ordinary vocabulary (a user-defined symbol, or a word of it), or "
                    "name another eos_token"
                )
    ids = _ids(codec, text := "the time of the year")
    if _ids(codec, codec.decode(ids)) != ids and not _unknown(tokenizer) & set(ids):
        raise DataError(
            f"{source}: {text!r} becomes {codec.decode(ids)!r} when it is encoded and decoded: name the decoder that belongs "
            f"to its model in {JSON}"
        )


def _ids(codec: Codec, text: str) -> list[int]:
    return codec.encode([text])[0].tolist()


def _unknown(tokenizer: tokenizers.Tokenizer) -> set[int]:
    """The ids that stand for unknown text, which no decoder restores."""
    names = (getattr(tokenizer.model, "unk_token", None), "<unk>", "[UNK]")
    return {number for name in names if name and (number := tokenizer.token_to_id(name)) is not None}
