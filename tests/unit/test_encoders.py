"""Each encoder gives unit vectors, gives them again after saving and loading, and says what is missing."""

import importlib.metadata
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.base.errors import ArtifactError, ConfigError, DataError, MachineError
from megatron_specialm.clustering.encoders import Encoder, fit_encoder, load_encoder, save_encoder
from megatron_specialm.clustering.sentence_bert import cut_to_fit, sentence_bert_folder, split_words
from megatron_specialm.clustering.tfidf import words
from megatron_specialm.clustering.vectors import check_coverage, count_zero, unit_rows
from megatron_specialm.config.schema import Encoder as EncoderSettings
from megatron_specialm.config.schema import SentenceBertEncoder, StaticEncoder, TfidfEncoder

TEXTS = [
    f"{animal} {verb} in the {place}"
    for animal in ("cat", "dog")
    for verb in ("sits", "runs")
    for place in ("sun", "rain")
]
TFIDF = TfidfEncoder(kind="tfidf", dimensions=3)


def fitted(settings: EncoderSettings, *, seed: int = 0) -> Encoder:
    return fit_encoder(settings, lambda count: TEXTS[:count], seed=seed, threads=1)


def check_contract(encoder: Encoder, settings: EncoderSettings, folder: Path) -> None:
    """What the protocol promises of every encoder."""
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert not encoder.encode([""]).any()
    assert encoder.flops_per_token > 0

    save_encoder(encoder, folder)
    assert np.array_equal(load_encoder(settings, folder, threads=1).encode(TEXTS), vectors)
    assert not {".pkl", ".pickle", ".bin", ".joblib"} & {path.suffix for path in folder.rglob("*")}


def test_unit_rows_keeps_zeros() -> None:
    assert unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[np.float32(0.6), np.float32(0.8)], [0.0, 0.0]]


# --- words ------------------------------------------------------------------------------------------------------------


def test_tfidf_keeps_the_contract(tmp_path: Path) -> None:
    check_contract(fitted(TFIDF), TFIDF, tmp_path)


def test_tfidf_same_seed_same_vectors() -> None:
    assert np.array_equal(fitted(TFIDF).encode(TEXTS), fitted(TFIDF).encode(TEXTS))


def test_tfidf_is_the_projected_matrix_of_scikit_learn() -> None:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    matrix = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(TEXTS)
    expected = unit_rows(TruncatedSVD(3, random_state=0).fit(matrix).transform(matrix))
    np.testing.assert_allclose(fitted(TFIDF).encode(TEXTS), expected, atol=1e-5)


def test_tfidf_fits_on_the_sample_only() -> None:
    encoder = fitted(TfidfEncoder(kind="tfidf", dimensions=2, sample=4))
    assert not encoder.encode(["dog dog dog"]).any()  # the first four texts are about the cat


def test_tfidf_needs_more_text_than_dimensions() -> None:
    with pytest.raises(DataError, match=r"dimensions 64 .* 8 windows with 8 words"):
        fitted(TfidfEncoder(kind="tfidf"))
    with pytest.raises(DataError, match=r"no words, .* another encoder\.kind"):
        fit_encoder(TFIDF, lambda count: ["", "?"], seed=0, threads=1)


def test_tfidf_names_the_missing_file(tmp_path: Path) -> None:
    save_encoder(fitted(TFIDF), tmp_path / "encoder")
    (tmp_path / "encoder/tfidf.npz").unlink()
    with pytest.raises(ArtifactError, match=r"tfidf\.npz: missing"):
        load_encoder(TFIDF, tmp_path / "encoder", threads=1)


def test_what_nobody_published_is_no_part_of_an_encoder(tmp_path: Path) -> None:
    """sentence-transformers chooses by itself which files of a folder it reads."""
    save_encoder(fitted(TFIDF), tmp_path / "encoder")
    (tmp_path / "encoder/modules.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"encoder/modules\.json: manifest\.json does not list it"):
        load_encoder(TFIDF, tmp_path / "encoder", threads=1)


def test_tfidf_of_text_without_spaces() -> None:
    """Two topics of Chinese characters, no spaces: windows of one point one way, and none is unknown."""
    rng = np.random.default_rng(0)
    topics = [
        ["".join(chr(first + rng.integers(300)) for _ in range(2)) for _ in range(40)] for first in (0x4E00, 0x6000)
    ]
    texts = ["，".join("".join(rng.choice(topics[number % 2], 6)) for _ in range(5)) + "。" for number in range(80)]
    encoder = fit_encoder(TFIDF, lambda count: texts[:40], seed=0, threads=1)
    vectors = encoder.encode(texts[40:])
    assert vectors.any(axis=1).all()
    alike = vectors @ vectors.T
    assert alike[::2, ::2].mean() > 0.5 > alike[::2, 1::2].max()


def test_words_are_scikit_learns_where_spaces_set_them_apart() -> None:
    ordinary = re.compile(r"(?u)\b\w\w+\b")
    corpus = [path.read_text() for path in sorted((Path(__file__).parents[2]).glob("*/*.md"))]
    corpus += ["Ünïcödé naïve café, Ελληνικά русский العربية 한국어 문장 x_1 3.14 a I'm --no"]
    assert all(words(text) == ordinary.findall(text.lower()) for text in corpus) and len(corpus) > 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("中文文本, A1 一 x", ["a1", "中文", "文文", "文本", "一"]),
        ("日本語テキスト", ["日本", "本語", "語テ", "テキ", "キス", "スト"]),
        ("ไทย", ["ไท", "ทย"]),
        ("ខ្មែរ", ["ខ្", "្ម", "មែ", "ែរ"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("the中文cat", ["the", "cat", "中文"]),
        ("？！。 ", []),
    ],
)
def test_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


# --- windows of which nothing is known ----------------------------------------------------------------------------------


def test_zero_vectors_are_counted_warned_of_and_refused(caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.ones((10, 3), np.float32)
    vectors[5:7] = 0
    assert count_zero(vectors, name="law", first=0) == 2
    check_coverage("law", zero=0, windows=5)
    assert not caplog.records
    check_coverage("law", zero=2, windows=7)
    assert "text 'law': the encoder knows nothing of 2 of 7 windows (28.6%)" in caplog.text
    with pytest.raises(DataError, match=r"text 'law': .* 5 of 10 windows \(50\.0%\).*static, sentence-bert"):
        check_coverage("law", zero=5, windows=10)
    vectors[1, 2] = np.nan
    with pytest.raises(DataError, match=r"text 'law': .*vectors of 1 of 10 windows from 30 on are not finite"):
        count_zero(vectors, name="law", first=30)


# --- word pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [64, 256])
def test_static_keeps_the_contract(dimensions: int, tmp_path: Path) -> None:
    pytest.importorskip("wordllama")
    settings = StaticEncoder(kind="static", dimensions=dimensions)
    check_contract(fitted(settings), settings, tmp_path)


def test_static_knows_that_cats_are_animals() -> None:
    pytest.importorskip("wordllama")
    cat, dog, law = fitted(StaticEncoder(kind="static")).encode(
        ["the cat purrs", "a dog barks", "liability of the licensor"]
    )
    assert cat @ dog > cat @ law


def test_static_refuses_other_dimensions() -> None:
    with pytest.raises(ConfigError, match=r"300.*64, 128 or 256"):
        fitted(StaticEncoder(kind="static", dimensions=300))


def test_static_refuses_vectors_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wordllama")
    settings = StaticEncoder(kind="static")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
    save_encoder(fitted(settings), tmp_path / "encoder")
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=r"pip install wordllama==0\.0\.1"):
        load_encoder(settings, tmp_path / "encoder", threads=1)


def test_static_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(MachineError, match="pip install wordllama"):
        fitted(StaticEncoder(kind="static"))


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder with random weights: the files and code of a real one, without a download."""
    modules = pytest.importorskip("sentence_transformers.models")
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in TEXTS for word in text.split()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=16, **shape)).save_pretrained(folder)
    transformer = modules.Transformer(str(folder), max_seq_length=16)
    model = SentenceTransformer(modules=[transformer, modules.Pooling(32)], device="cpu")
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def sentence_bert(model: Path | str, **settings: object) -> SentenceBertEncoder:
    return SentenceBertEncoder(kind="sentence-bert", model=str(model), **settings)  # type: ignore[arg-type]


def test_sentence_bert_keeps_the_contract(tiny_bert: Path, tmp_path: Path) -> None:
    settings = sentence_bert(tiny_bert)
    check_contract(fitted(settings), settings, tmp_path)


def test_sentence_bert_is_sentence_transformers_on_short_text(tiny_bert: Path) -> None:
    from sentence_transformers import SentenceTransformer

    expected = unit_rows(SentenceTransformer(str(tiny_bert)).encode(TEXTS))
    np.testing.assert_allclose(fitted(sentence_bert(tiny_bert)).encode(TEXTS), expected, atol=1e-5)


def test_sentence_bert_averages_the_chunks_of_long_text(tiny_bert: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_bert))
    first, last = model.encode(["cat sits in the sun", "dog runs"])
    encoder = fitted(sentence_bert(tiny_bert, chunk_words=5))
    long, short = encoder.encode(["cat sits in the sun dog runs", "dog runs"])
    np.testing.assert_allclose(long, unit_rows((5 * first + 2 * last)[None])[0], atol=1e-5)
    np.testing.assert_allclose(short, unit_rows(last[None])[0], atol=1e-5)


def test_sentence_bert_reads_what_is_longer_than_the_model_reads_at_once(tiny_bert: Path) -> None:
    """The model reads 16 word pieces, two of them its own. A chunk of 40 is halved twice, and all of it counts."""
    from sentence_transformers import SentenceTransformer

    quarters = [" ".join(f"{animal} {verb}" for _ in range(5)) for animal, verb in
                (("cat", "sits"), ("dog", "runs"), ("cat", "runs"), ("dog", "sits"))]  # fmt: skip
    encoder = fitted(sentence_bert(tiny_bert))
    found = encoder.encode([" ".join(quarters), "dog runs"])
    mean = SentenceTransformer(str(tiny_bert)).encode(quarters).mean(axis=0)
    np.testing.assert_allclose(found[0], unit_rows(mean[None])[0], atol=1e-5)
    assert encoder.counts == {"encoder_tokens": 42, "encoder_tokens_read": 42}


def test_cut_to_fit() -> None:
    def letters(text: str) -> int:
        return len(text.replace(" ", ""))

    for text in ("abc", "ab cd ef gh ij", "a " + "x" * 50, "x" * 50 + " a b", "", "é" * 9):
        parts = cut_to_fit(text, 5, letters)
        assert "".join(part for part, _ in parts).replace(" ", "") == text.replace(" ", "")
        assert all(size == letters(part) <= 5 for part, size in parts)
    assert cut_to_fit("ab cd ef gh", 4, letters) == [("ab cd", 4), ("ef gh", 4)]


def test_sentence_bert_in_bf16_is_nearly_the_same(tiny_bert: Path) -> None:
    full = fitted(sentence_bert(tiny_bert)).encode(TEXTS)
    half = fitted(sentence_bert(tiny_bert, precision="bf16")).encode(TEXTS)
    assert half.dtype == np.float32
    assert (full * half).sum(axis=1).min() > 0.999
    assert not np.array_equal(full, half)


@pytest.mark.parametrize("zipped", [False, True])
def test_sentence_bert_of_an_installed_package(
    zipped: bool, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = install(tmp_path, tiny_bert, zipped=zipped)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = fitted(sentence_bert(tiny_bert)).encode(TEXTS)
    assert np.array_equal(fitted(sentence_bert("package:tiny-bert")).encode(TEXTS), expected)
    assert package not in sys.modules


def test_which_wins_of_a_folder_a_package_and_the_hub(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, tiny_bert, zipped=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package:tiny-bert").mkdir()  # never looked at: what is written as a package is the package
    expected = fitted(sentence_bert(tiny_bert)).encode(TEXTS)
    assert np.array_equal(fitted(sentence_bert("package:tiny-bert")).encode(TEXTS), expected)
    shutil.copytree(tiny_bert, tmp_path / "hub" / "name")
    assert np.array_equal(fitted(sentence_bert("hub/name")).encode(TEXTS), expected)
    weights = tmp_path / "hub" / "name" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for damage in (lambda: None, lambda: shutil.rmtree(tmp_path / "hub" / "name")):
        damage()
        (tmp_path / "hub" / "name").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"hub/name.* is no sentence-transformers model .* rename the folder"):
            fitted(sentence_bert("hub/name"))


def install(site: Path, model: Path, *, zipped: bool) -> str:
    """What pip leaves behind of a package with a model in it. Importing it fails; that is not how to find a model."""
    shutil.copytree(model, site / "tiny_bert" / "model")
    if zipped:
        archive = shutil.make_archive(str(site / "tiny_bert" / "weights"), "zip", site / "tiny_bert" / "model")
        shutil.rmtree(site / "tiny_bert" / "model")
        assert "modules.json" in zipfile.ZipFile(archive).namelist()
    (site / "tiny_bert" / "__init__.py").write_text("raise ImportError('must not be imported')")
    record = [path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()]
    info = site / "tiny_bert-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in record))
    return "tiny_bert"


def test_sentence_bert_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(MachineError, match="pip install no-such-package"),
        sentence_bert_folder("package:no-such-package"),
    ):
        pass
    with (
        pytest.raises(MachineError, match=r"no folder or zip file with a modules\.json"),
        sentence_bert_folder("package:numpy"),
    ):
        pass
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MachineError, match=r"pip install 'megatron_specialm\[bert\]'"):
        fitted(sentence_bert(tmp_path))


def test_sentence_bert_without_a_model() -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(MachineError, match=r"/no/such/folder.*give a local folder"):
        fitted(sentence_bert("/no/such/folder"))


def test_split_words() -> None:
    assert split_words("a b  c\nd e", size=2) == ["a b", "c d", "e"]
    assert split_words("", size=2) == [""]
