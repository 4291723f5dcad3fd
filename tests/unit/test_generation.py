"""What models say: the weights are those of the checkpoint, and equal seeds give equal text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.formats import TARGETS
from megatron_specialm.convert.run import convert
from megatron_specialm.stages.generation import Writer, open_model, transformers_model
from tests.checkpoints import save_random_model
from tests.existing_models import save_existing_model
from tests.unit.test_convert_huggingface import CONTEXT, VOCABULARY, _logits, _random_weights, every_shape


def _writer(shape: ModelConfig) -> Writer:
    """Whose tokens are characters, and whose documents end with a newline."""
    weights = _random_weights(shape)
    model = transformers_model(shape, weights, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    return Writer(
        model, lambda text: [ord(c) - 28 for c in text], lambda ids: "".join(chr(i + 28) for i in ids), 0, (0,)
    )


@every_shape
@pytest.mark.usefixtures("alone")
def test_it_is_the_checkpoints_model(shape: ModelConfig) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, CONTEXT))
    ours = _logits(shape, _random_weights(shape), tokens)
    with torch.no_grad():
        theirs = _writer(shape).model(torch.from_numpy(tokens)).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_the_likeliest_token_a_seed_and_the_contexts_end(neox: ModelConfig) -> None:
    writer = _writer(neox.model_copy(update={"ffn_hidden_size": 48}))
    settings = {"tokens": 5, "temperature": 1.0, "top_k": 50}
    ids = [0, *writer.encode("ab")]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(writer.model(torch.tensor([ids])).logits[0, -1].argmax()))
    likeliest = ids[1 : ids.index(0, 1)] if 0 in ids[1:] else ids[1:]
    assert writer.write("ab", **{**settings, "temperature": 0.0}, seed=0) == writer.decode(likeliest)
    drawn = {writer.write("ab", **settings, seed=seed) for seed in (3, 3, 4, 5, 6)}
    assert 1 < len(drawn) <= 4 and all(text.startswith("ab") for text in drawn)
    assert len(writer.write("ab", **{**settings, "tokens": 1000}, seed=1)) < CONTEXT
    with pytest.raises(ConfigError, match=f"the prompt has 20 tokens, and the model's context {CONTEXT}"):
        writer.write("a" * 20, **settings, seed=0)


# --- folders of any kind ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Transformers' own making, with a byte-level tokenizer; no manifest and no fingerprint."""
    folder = save_random_model("llama", tmp_path_factory.mktemp("source") / "llama")
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<|end|>"])
    tokenizer.train_from_iterator(["brarn dest flirk gon kralst"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder


def _said(folder: Path) -> str:
    return open_model(folder).write("brarn", tokens=5, temperature=0.0, top_k=1, seed=0)


def test_a_checkpoint_of_any_format_says_the_same(source: Path, tmp_path: Path) -> None:
    expected = _said(source)
    assert expected.startswith("brarn") and len(expected) > len("brarn")
    for to in TARGETS:
        convert(source, tmp_path / to, to=to)
        assert _said(tmp_path / to) == expected, to
    convert(tmp_path / "canonical", tmp_path / "export", to="huggingface")
    assert _said(tmp_path / "export") == expected
    assert _said(next((tmp_path / "canonical").glob("step_*"))) == expected


def test_it_begins_with_the_start_token_and_ends_at_each_end_token(tmp_path: Path) -> None:
    folder = save_existing_model(tmp_path / "llama", start="<|begin|>")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("brarn", return_tensors="pt")
    assert ids.input_ids[0, 0] == tokenizer.bos_token_id != tokenizer.eos_token_id
    written = model.generate(**ids, max_new_tokens=5, do_sample=False)[0].tolist()
    new = max(place for place in range(len(written)) if written[place] not in written[:place])
    assert new >= ids.input_ids.shape[1], "a token of the continuation, to end it with"
    config = json.loads((folder / "config.json").read_text())
    for ends, last in ((tokenizer.eos_token_id, len(written)), ([tokenizer.eos_token_id, written[new]], new)):
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
        expected = tokenizer.decode(written[1:last])
        assert _said(folder) == expected, ends
        for to in ("canonical", "huggingface"):
            convert(folder, tmp_path / f"{to} {last}", to=to)
            assert _said(tmp_path / f"{to} {last}") == expected, to


def test_a_folder_that_cannot_say_anything_is_refused(source: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "special*"))
    convert(bare, tmp_path / "canonical", to="canonical")
    for folder in (bare, tmp_path / "canonical"):
        with pytest.raises(ConfigError, match="has no tokenizer to read the prompt with"):
            open_model(folder)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="no model: name the folder"):
            open_model(folder)
    convert(source, tmp_path / "export", to="huggingface")
    for name in ("manifest.json", "model.safetensors"):  # an export of ours is compared with its manifest
        damaged = shutil.copytree(tmp_path / "export", tmp_path / name)
        (damaged / name).unlink()
        with pytest.raises(ArtifactError, match=name):
            open_model(damaged)
