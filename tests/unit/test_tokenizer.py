"""Tokenizers that are imported: what could go wrong at the export is found before anything is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_specialm.base.errors import DataError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.llama_cpp import advice
from megatron_specialm.convert.tokenizer import disagreement, load_tokenizer, save_tokenizer
from megatron_specialm.data.encoding import Encoder
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.tokenizer_making import import_tokenizer, train_sentencepiece

END, START = "<|end|>", "<|begin|>"
WORDS = [f"{a}{b}{c}" for a in "ktpm" for b in "aeiou" for c in ("n", "l", "rs")]
SPELLED = [f"a text that quotes {END} in the middle", END, f"{END}{END}"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE, as most of today's models have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, **config}))
    return folder


def ended(special: bool, **flags: bool) -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(END, special=special, **{"normalized": False, **flags})])
    return tokenizer


def check(tokenizer: Tokenizer, folder: Path) -> Any:
    """Text never becomes the end token, and Transformers agrees; returns its tokenizer."""
    for text in SPELLED:
        assert tokenizer.eod not in tokenizer.encode([text])[0]
    assert tokenizer.decode(tokenizer.encode(["tan kel"])[0]).strip() == "tan kel"
    save_tokenizer(tokenizer, folder, context_length=32)
    assert disagreement(folder, tokenizer, context_length=32, texts=SPELLED) is None
    return load_tokenizer(folder)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True, "rstrip": True}], ids=str)
def test_text_that_spells_the_end_token_stays_text(special: bool, flags: dict[str, bool], tmp_path: Path) -> None:
    imported = import_tokenizer(save(ended(special, **flags), tmp_path / "source"), tmp_path / "ours")
    assert imported.eod == 300 and imported.vocabulary_size == 301
    check(imported, tmp_path / "theirs")


def test_an_end_token_of_a_unigram_models_ordinary_pieces(tmp_path: Path) -> None:
    """As in the tokenizers of T5 and XLM-R: `</s>` has the score 0, the best of all."""
    pieces = [("<unk>", 0.0), (END, 0.0), *((letter, -9.0) for letter in " <|>abcdefghijklmnopqrstuvwxyz▁")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert 1 in tokenizer.encode(SPELLED[0]).ids
    check(import_tokenizer(save(tokenizer, tmp_path / "source"), tmp_path / "ours"), tmp_path / "theirs")


@pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase(), normalizers.NFKC()])
def test_an_end_token_that_is_a_word_of_the_model_is_refused(normalizer: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, END: 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    with pytest.raises(DataError, match=r"encodes to the end token '<\|end\|>' itself"):
        import_tokenizer(save(tokenizer, tmp_path / "source"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_end_token_that_text_spells_otherwise_is_refused(tmp_path: Path) -> None:
    """Byte-level models write a line break as "Ċ": as the end token, it would end a document at each line."""
    line_break = "Ċ"
    assert byte_level().encode("a\nb").tokens[1] == line_break
    with pytest.raises(DataError, match=r"the text '\\n' encodes to the end token 'Ċ' itself"):
        import_tokenizer(save(byte_level(), tmp_path / "source", eos_token=line_break), tmp_path / "ours")


def test_user_defined_symbols_of_a_sentencepiece_model(tmp_path: Path) -> None:
    def train(**settings: Any) -> Path:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS)] * 5), model_prefix=str(tmp_path / "m"), vocab_size=300, byte_fallback=True,
            model_type="bpe", hard_vocab_limit=False, minloglevel=2, **settings,
        )  # fmt: skip
        return tmp_path / "m.model"

    plain = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    symbols = import_tokenizer(train(user_defined_symbols=["<tab>"], pad_id=3, **plain), tmp_path / "symbols")
    assert symbols.special_tokens["pad_token"] == "<pad>"
    assert check(symbols, tmp_path / "theirs").bos_token_id == symbols.bos == 1 != symbols.eod, "it has a start token"
    with pytest.raises(DataError, match="has no end-of-sentence piece"):
        import_tokenizer(train(user_defined_symbols=["</s>"], **plain), tmp_path / "ours")
    with pytest.raises(DataError, match="exported, it would give other ids, for instance of 'a<tab>b"):
        import_tokenizer(train(user_defined_symbols=["<tab>"]), tmp_path / "ours")  # a space before each part


def test_the_missing_decoder_is_noticed(tmp_path: Path) -> None:
    tokenizer = ended(True)
    tokenizer.decoder = None
    with pytest.raises(DataError, match="name the decoder"):
        import_tokenizer(save(tokenizer, tmp_path / "source"), tmp_path / "ours")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eos_token": None}, "names no eos_token"),
        ({"eos_token": "</s>"}, "eos_token '</s>' is not a token"),
        ({"eos_token": [END, "</s>"]}, "is not a token"),
        ({"eos_token": {"content": "</s>"}}, "is not a token"),
    ],
)
def test_an_end_token_that_is_none(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        import_tokenizer(save(ended(True), tmp_path / "source", **config), tmp_path / "ours")
    assert words in str(error.value) and "tokenizer_config.json" in str(error.value) and END in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": "1.0", "model": {"type": "New"}}', "[" * 100_000])
def test_a_folder_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    source = save(ended(True), tmp_path / "source")
    (source / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"source/tokenizer\.json"):
        import_tokenizer(source, tmp_path / "ours")


@pytest.mark.parametrize(("texts", "says"), [(["a text"] * 50, "too small"), ([], "no text")])
def test_a_vocabulary_that_does_not_suit_the_text(texts: list[str], says: str, tmp_path: Path) -> None:
    """SentencePiece itself gives no sentence for either."""
    with pytest.raises(DataError, match=rf"vocabulary_size 1 does not suit \S+ characters of training text \({says}\)"):
        train_sentencepiece(texts, tmp_path / "ours", vocabulary_size=1, algorithm="bpe", sample_characters=1000)


def test_a_chat_template_that_is_no_utf8(tmp_path: Path) -> None:
    source = save(ended(True), tmp_path / "source")
    (source / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match=r"chat_template\.jinja: cannot be read as UTF-8"):
        import_tokenizer(source, tmp_path / "ours")


def test_what_a_source_says_is_kept(tmp_path: Path) -> None:
    tokenizer = ended(True)
    tokenizer.add_tokens([AddedToken("<pad>", normalized=False)])  # not special: its role makes it so
    source = save(tokenizer, tmp_path / "source", pad_token="<pad>", padding_side="right", chat_template=TEMPLATE)
    imported = import_tokenizer(source, tmp_path / "ours")
    theirs = check(imported, tmp_path / "theirs")
    assert (theirs.pad_token, theirs.pad_token_id, theirs.padding_side) == ("<pad>", imported.pad, "right")
    assert imported.pad != imported.eod == theirs.eos_token_id == theirs.bos_token_id
    said = theirs.apply_chat_template([{"role": "user", "content": "tan"}], tokenize=False)
    assert said == "tan"


@pytest.mark.parametrize(
    ("is_in_json", "config", "begins"),
    [
        (True, {}, START),  # Llama 3
        (True, {"add_bos_token": True, "bos_token": START}, START),  # Llama 2
        (
            True,
            {"add_bos_token": False, "bos_token": START},
            START,
        ),  # Transformers ignores the setting beside tokenizer.json
        (False, {"add_bos_token": True, "bos_token": START}, END),
        (False, {"add_bos_token": False, "bos_token": None}, END),  # Qwen
        (False, {"bos_token": START}, END),
    ],
    ids=str,
)
def test_a_text_begins_with_its_tokenizers_own_start_token(
    is_in_json: bool, config: dict[str, Any], begins: str, tmp_path: Path
) -> None:
    tokenizer = ended(True)
    tokenizer.add_special_tokens([AddedToken(START, special=True)])
    start = tokenizer.token_to_id(START)
    if is_in_json:
        tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A", special_tokens=[(START, start)])
    source = save(tokenizer, tmp_path / "source", tokenizer_class="PreTrainedTokenizerFast", **config)
    imported = import_tokenizer(source, tmp_path / "ours")
    assert imported.bos == tokenizer.token_to_id(begins) and imported.eod == tokenizer.token_to_id(END)
    own = [start] if begins == START else []
    assert load_tokenizer(source)("tan kel").input_ids == [*own, *imported.encode(["tan kel"])[0]]
    assert check(imported, tmp_path / "theirs").bos_token == begins
    settings = json.loads((tmp_path / "ours" / "settings.json").read_text())
    assert settings.get("bos", END) == begins and ("bos" in settings) == (begins == START)


def test_what_a_source_does_not_say_is_set(tmp_path: Path) -> None:
    source = save(ended(True), tmp_path / "source", pad_token="[PAD]", unk_token="[UNK]")  # no tokens of tokenizer.json
    imported = import_tokenizer(source, tmp_path / "ours")
    theirs = check(imported, tmp_path / "theirs")
    assert theirs.pad_token == END and theirs.padding_side == "left" and theirs.model_max_length == 32
    assert len(theirs) == imported.vocabulary_size  # nothing was added that no model has a row for
    assert len(theirs("tan kel " * 100, truncation=True).input_ids) == 32


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_trained_tokenizer_makes_batches(algorithm: Any, tmp_path: Path) -> None:
    trained = train_sentencepiece(
        [f"{''.join(WORDS)}▅" for _ in range(20)],  # SentencePiece would pass over sentences with its own sign
        tmp_path / "ours", vocabulary_size=285, algorithm=algorithm, sample_characters=10**6,
    )  # fmt: skip
    theirs = check(trained, tmp_path / "theirs")  # no text had a space, and yet one is decoded to itself
    assert theirs.pad_token_id == theirs.eos_token_id == trained.pad == trained.eod


def test_ids_may_have_holes(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "tan": 5, "kel": 9, END: 20}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    imported = import_tokenizer(save(tokenizer, tmp_path / "source"), tmp_path / "ours")
    assert imported.vocabulary_size == 21
    check(imported, tmp_path / "theirs")


def test_an_end_inside_a_document_is_noticed_whatever_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_tokenizer(save(ended(True), tmp_path / "source"), tmp_path / "ours")
    with Encoder(tmp_path / "ours", workers=1) as encoder:
        assert [ids[-1] for ids in encoder.encode(SPELLED)] == [300] * 3
        monkeypatch.setattr(Tokenizer, "encode", lambda self, texts: [np.array([1, self.eod, 2], np.int32)])
        with pytest.raises(
            DataError, match="end-of-document token 300 is among the ids of a text that begins with 'a te"
        ):
            list(encoder.encode(SPELLED[:1]))


def test_what_transformers_makes_otherwise_is_said(tmp_path: Path) -> None:
    imported = import_tokenizer(save(ended(True), tmp_path / "source"), tmp_path / "ours")
    folder = tmp_path / "theirs"
    for change, words in (
        ({"split_special_tokens": False}, "gives other ids than tokenizers, for instance of"),
        ({"model_max_length": 40}, "cuts texts to 40, 40 ids for a context of 32"),
        ({"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}, "makes batches of"),
        ({"pad_token": "a"}, "fills batches with"),
    ):
        save_tokenizer(imported, folder, context_length=32)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        assert words in str(disagreement(folder, imported, context_length=32))


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def test_what_llama_cpp_converts_is_written_for_it(llama: ModelConfig, neox: ModelConfig, tmp_path: Path) -> None:
    texts = [" ".join(WORDS)] * 20
    ours = {}
    for kind in ("bpe", "unigram"):
        (tmp_path / kind).mkdir()
        ours[kind] = train_sentencepiece(
            texts, tmp_path / kind, vocabulary_size=290, algorithm=kind, sample_characters=10_000
        )
    save_tokenizer(ours["bpe"], tmp_path / "theirs", context_length=32)
    written = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == (tmp_path / "bpe/sentencepiece.model").read_bytes()
    assert written["add_prefix_space"] is False
    save_tokenizer(ours["bpe"], tmp_path / "without", context_length=32, sentencepiece=False)
    save_tokenizer(ours["unigram"], tmp_path / "unigram-theirs", context_length=32)
    assert not [path for name in ("without", "unigram-theirs") for path in (tmp_path / name).glob("tokenizer.model")]

    assert "converts this folder, tokenizer included" in advice(llama, ours["bpe"])
    assert "this is GPTNeoXForCausalLM" in advice(neox, ours["bpe"])
    qwen = llama.model_copy(update={"qkv_bias": True})
    assert "this is Qwen2ForCausalLM" in advice(qwen, ours["bpe"])
    assert "SentencePiece BPE only" in advice(llama, ours["unigram"])
    bytes_ = import_tokenizer(save(ended(True), tmp_path / "source"), tmp_path / "bytes")
    for shape in (llama, qwen):
        assert '"post_processor": null' in advice(shape, bytes_)
    assert "SentencePiece BPE only" in advice(neox, bytes_)
