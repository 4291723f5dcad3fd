"""Tokenizers of which any field is of another type, or a number that cannot be: refused with the name of the file, never with a
traceback, and never a vocabulary of more rows than it has tokens."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.data.tokenizer import SETTINGS, Tokenizer
from megatron_specialm.data.tokenizer_making import import_tokenizer

END = "<|end|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VALUES: list[Any] = [None, [], {}, "x", True, -7, 2_000_000_000, 10**30, 1.5, float("nan"), [["x", 1]], {"x": 1}]
SAMPLED = 3  # of a large mapping or list these many entries are tried


def _small(model: Any, pre_tokenizer: Any, decoder: Any) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.add_special_tokens([AddedToken(END, normalized=False), AddedToken("<pad>", normalized=False)])
    return json.loads(tokenizer.to_str())


def _bpe() -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "th", "the"])}
    model = models.BPE(vocabulary, [("t", "h"), ("th", "e")])
    return _small(model, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def _unigram() -> dict[str, Any]:
    pieces = [("<unk>", 0.0), *((letter, -9.0) for letter in f"{LETTERS}▁<|>")]
    return _small(models.Unigram(pieces, unk_id=0), pre_tokenizers.Metaspace(), decoders.Metaspace())


def _word_piece() -> dict[str, Any]:
    words = ["[UNK]", "the", "time", "of", "year", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    model = models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    return _small(model, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())


SMALL: dict[str, Callable[[], dict[str, Any]]] = {"bpe": _bpe, "unigram": _unigram, "word piece": _word_piece}
CONFIG = {
    "eos_token": END, "pad_token": {"content": "<pad>", "lstrip": False}, "unk_token": None, "padding_side": "left",
    "chat_template": "{{ messages }}", "model_max_length": 32,
}  # fmt: skip
SPECIAL = {"eos_token": {"content": END}, "pad_token": "<pad>", "additional_special_tokens": [END]}


def _places(value: Any, inside: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each field."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, part) in enumerate(entries):
        if number < SAMPLED or len(value) < 20:
            yield (*inside, key)
            yield from _places(part, (*inside, key))


def _changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    changed = copy.deepcopy(value)
    around = changed
    for key in place[:-1]:
        around = around[key]
    around[place[-1]] = to
    return changed


def _write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def _imported(source: Path, folder: Path, rows: int) -> str:
    """What is said against it; empty where it is taken, with few rows and an end that is a token."""
    folder.mkdir(exist_ok=True)
    try:
        found = import_tokenizer(source, folder)
    except DataError as error:
        assert str(source) in str(error), error
        return str(error)
    except ArtifactError as error:  # our own folder, read back
        return str(error)
    assert found.vocabulary_size <= 2 * rows + 1000 and 0 <= found.eod < found.vocabulary_size
    return ""


@pytest.mark.parametrize("kind", SMALL)
def test_no_field_of_a_hugging_face_folder_is_a_traceback(kind: str, tmp_path: Path) -> None:
    whole = SMALL[kind]()
    rows = len(whole["model"]["vocab"]) + 2
    source = _write(tmp_path / "source", tokenizer=whole, tokenizer_config=CONFIG, special_tokens_map=SPECIAL)
    assert _imported(source, tmp_path / "ours", rows) == ""
    files = {"tokenizer": whole, "tokenizer_config": CONFIG, "special_tokens_map": SPECIAL}
    tried = refused = 0
    for name, content in files.items():
        for changed in (content, *VALUES[:6]):
            for place in _places(changed) if changed is content else [()]:
                for value in VALUES if place else [None]:
                    _write(source, **{name: _changed(content, place, value) if place else changed})
                    tried += 1
                    refused += bool(_imported(source, tmp_path / "ours", rows))
        _write(source, **{name: content})
    assert tried > 500 and 0.3 < refused / tried < 1, (tried, refused)


ADDED = {"id": 0, "content": "x", "special": False}
NAMED: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "a huge id": ("bpe", ("model", "vocab", "the"), 2_000_000_000, r"model\.vocab\['the'\]: .*got 2000000000"),
    "a far id": (
        "word piece",
        ("model", "vocab", "the"),
        4_000_000,
        r"model\.vocab\['the'\]: .*4,000,001 rows for 59 tokens",
    ),
    "a negative id": ("bpe", ("model", "vocab", "the"), -7, r"model\.vocab\['the'\]: .*got -7"),
    "an id twice": (
        "bpe",
        ("model", "vocab", "the"),
        5,
        r"model\.vocab\['the'\]: .*model\.vocab\[.*has it too \(got 5\)",
    ),
    "a true id": ("bpe", ("model", "vocab", "the"), True, r"model\.vocab\['the'\]: .*got True"),
    "no score": ("unigram", ("model", "vocab", 1), ["a", float("nan")], "NaN is no number"),
    "a text as score": ("unigram", ("model", "vocab", 1), ["a", "1"], r"model\.vocab\[1\]: .*finite number"),
    "a piece twice": ("unigram", ("model", "vocab", 2), ["a", -1.0], r"model\.vocab\[2\]: .*stands once \(got 'a'\)"),
    "an added token's huge id": (
        "bpe",
        ("added_tokens", 0, "id"),
        2_000_000_000,
        r"added_tokens\[0\]\.id: .*got 2000000000",
    ),
    "an added token's other id": ("bpe", ("added_tokens", 1, "id"), 300, r"added_tokens\[1\]\.id: .*got 300"),
    "an added token's id twice": (
        "bpe",
        ("added_tokens", 1, "id"),
        258,
        r"added_tokens\[1\]\.id: .*added_tokens\[0\]\.id has it",
    ),
    "an added token without text": (
        "bpe",
        ("added_tokens", 0, "content"),
        None,
        r"added_tokens\[0\]\.content: .*got None",
    ),
    "an added token that is none": ("bpe", ("added_tokens", 0), 5, r"added_tokens\[0\]: .*got 5"),
    "a flag": ("bpe", ("added_tokens", 0, "special"), "no", r"added_tokens\[0\]\.special: .*got 'no'"),
    "no vocabulary": ("bpe", ("model", "vocab"), None, r"model\.vocab: .*got None"),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_file_the_key_and_the_value_are_named(name: str, tmp_path: Path) -> None:
    kind, place, value, says = NAMED[name]
    source = _write(tmp_path / "source", tokenizer=_changed(SMALL[kind](), place, value), tokenizer_config=CONFIG)
    with pytest.raises(DataError, match=rf"source/tokenizer\.json: .*{says}"):
        import_tokenizer(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token", 5),
        ("pad_token", {"content": None}),
        ("unk_token", []),
        ("padding_side", "up"),
        ("chat_template", 5),
    ],
)
def test_settings_of_another_type_are_named(file: str, key: str, value: Any, tmp_path: Path) -> None:
    files = {"tokenizer": _bpe(), "tokenizer_config": CONFIG, file: {"eos_token": END, key: value}}
    with pytest.raises(DataError, match=rf"source/{file}\.json: {key}: must be .*\(got "):
        import_tokenizer(_write(tmp_path / "source", **files), tmp_path / "ours")


def test_a_few_ids_that_are_nobodys_are_taken(tmp_path: Path) -> None:
    whole = _changed(_word_piece(), ("model", "vocab", "the"), 500)
    found = import_tokenizer(_write(tmp_path / "source", tokenizer=whole, tokenizer_config=CONFIG), tmp_path / "ours")
    assert found.vocabulary_size == 501


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small SentencePiece model."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the time of the year"] * 5), model_prefix=str(prefix), vocab_size=290, byte_fallback=True,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    return prefix.with_suffix(".model").read_bytes()


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            proto = proto.pieces[int(name)] if name.lstrip("-").isdigit() else getattr(proto, name)
        setattr(proto, last, value)

    return change


IDS = ("unk_id", "bos_id", "eos_id", "pad_id")
PIECES: dict[str, tuple[Callable[[Any], None], str]] = {
    **{f"{name}={number}": (_set(f"trainer_spec.{name}", number), rf"trainer_spec\.{name}: .*got {number}")
       for name in IDS for number in (-7, -(2**31), 2**31 - 1, 100_000)},
    "unk_id of another": (_set("trainer_spec.unk_id", 5), r"trainer_spec\.unk_id: .*got 5"),
    **{f"score {score}": (_set("4.score", score), r"pieces\[4\]\.score: .*finite")
       for score in (float("nan"), float("inf"), float("-inf"))},
    "a piece twice": (lambda proto: setattr(proto.pieces[5], "piece", proto.pieces[4].piece), r"pieces\[5\]\.piece: "),
    "an empty piece": (_set("5.piece", ""), r"pieces\[5\]\.piece: .*got ''"),
    "no pieces": (lambda proto: proto.ClearField("pieces"), r"pieces: .*got 0"),
    "its normalizer": (_set("normalizer_spec.precompiled_charsmap", b"\xff" * 40), r"m\.model: "),
    "its kind": (_set("trainer_spec.model_type", 4), r"m\.model: "),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_a_sentencepiece_model_with_a_wrong_value(name: str, model: bytes, tmp_path: Path) -> None:
    change, says = PIECES[name]
    proto = schema.ModelProto.FromString(model)
    change(proto)
    (tmp_path / "m.model").write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match=says):
        import_tokenizer(tmp_path / "m.model", tmp_path / "ours")


def test_a_sentencepiece_model_of_other_bytes(model: bytes, tmp_path: Path) -> None:
    """Cut and flipped at many places: refused, or taken with as many rows as it has pieces."""
    path = tmp_path / "m.model"
    path.write_bytes(model)
    assert import_tokenizer(path, tmp_path / "whole").vocabulary_size < 300
    for place in range(0, len(model), len(model) // 40):
        for content in (model[:place], model[:place] + bytes([model[place] ^ 0x80]) + model[place + 1 :]):
            path.write_bytes(content)
            _imported(path, tmp_path / "ours", 300)


@pytest.mark.parametrize("key", ["eod", "kept"])
def test_our_own_folder_is_named(key: str, tmp_path: Path) -> None:
    source = _write(tmp_path / "source", tokenizer=_bpe(), tokenizer_config=CONFIG)
    import_tokenizer(source, tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / SETTINGS).read_text())
    for value in VALUES:
        if (key == "kept" and isinstance(value, dict)) or (key == "eod" and value == "x"):
            continue  # it may say nothing, or more; and that is a token
        (tmp_path / "ours" / SETTINGS).write_text(json.dumps({**settings, key: value}))
        with pytest.raises(ArtifactError, match="ours"):
            Tokenizer.load(tmp_path / "ours")
