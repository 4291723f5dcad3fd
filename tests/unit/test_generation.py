"""What models say: the weights are those of the checkpoint, and equal seeds give equal text."""

import numpy as np
import pytest
import torch

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.stages.generation import Writer, transformers_model
from tests.unit.test_convert_huggingface import CONTEXT, VOCABULARY, _logits, _random_weights, every_shape


def _writer(shape: ModelConfig) -> Writer:
    """Whose tokens are characters, and whose documents end with a newline."""
    weights = _random_weights(shape)
    model = transformers_model(shape, weights, vocabulary_size=VOCABULARY, context_length=CONTEXT, eod=0)
    return Writer(model, lambda text: [ord(c) - 28 for c in text], lambda ids: "".join(chr(i + 28) for i in ids), 0)


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
