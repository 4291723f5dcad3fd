import contextlib
from types import SimpleNamespace

import pytest
import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.model.gpt import Gpt

VOCABULARY = 100  # not a multiple of the padding

pytestmark = pytest.mark.usefixtures("alone")


def _model(shape: ModelConfig, seed: int = 0, vocabulary: int = VOCABULARY) -> Gpt:
    model = Gpt(shape, vocabulary_size=vocabulary, context_length=16)
    model.initialize(seed=seed)
    return model


def _weights(model: Gpt) -> dict[str, torch.Tensor]:
    return {name: parameter.detach()[: spec.shape[0]].clone() for name, parameter, spec in model.weights()}


@pytest.mark.parametrize("family", ["neox", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_right(family: str, tied: bool, request: pytest.FixtureRequest) -> None:
    shape = request.getfixturevalue(family).model_copy(update={"tie_embeddings": tied})
    assert sum(tensor.numel() for tensor in _weights(_model(shape)).values()) == count_parameters(shape, VOCABULARY)


def test_first_weights_follow_from_seed_and_name_alone(neox: ModelConfig) -> None:
    first, again, other = (_weights(_model(neox, seed=seed)) for seed in (0, 0, 1))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["decoder.layers.1.mlp.linear_fc1.weight"])
    assert first[name].std().item() == pytest.approx(neox.init_std, rel=0.1)


def test_padding_never_reaches_logits_or_weights(neox: ModelConfig) -> None:
    model = _model(neox)
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    clean = model.logits(tokens)
    assert clean.shape == (2, 16, VOCABULARY)
    with torch.no_grad():
        model.chunks[0].embedding.word_embeddings.weight[VOCABULARY:] = 1e3
    assert torch.equal(model.logits(tokens), clean)
    assert _weights(model)["embedding.word_embeddings.weight"].shape[0] == VOCABULARY


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_a_token_sees_only_what_stands_before_it(family: str, request: pytest.FixtureRequest) -> None:
    model = _model(request.getfixturevalue(family))
    tokens = torch.randint(0, VOCABULARY, (1, 16))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % VOCABULARY
    before, after = (model.logits(ids) for ids in (tokens, changed))
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_fused_attention_is_megatrons_own(llama: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduction: replacing the core attention module changes nothing but rounding."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    # Its dropout (of probability 0) asks for CUDA's random state.
    tracker = SimpleNamespace(fork=contextlib.nullcontext)
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    model = _model(llama)
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    ours = model.logits(tokens)
    for layer in model.chunks[0].decoder.layers:
        fused = layer.self_attention.core_attention
        layer.self_attention.core_attention = DotProductAttention(
            config=model.chunks[0].config,
            layer_number=layer.layer_number,
            attn_mask_type=fused.attn_mask_type,
            attention_type="self",
        )
    mask = torch.ones(16, 16).triu(1).bool()[None, None]
    positions = torch.arange(16).expand(2, 16)
    theirs = model.chunks[0](tokens, positions, mask, labels=tokens)[..., :VOCABULARY].transpose(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_another_models_weights_are_refused(neox: ModelConfig, llama: ModelConfig) -> None:
    model, weights = _model(neox), _weights(_model(neox))
    with pytest.raises(CheckpointError, match="lacks"):
        model.load(_weights(_model(llama)))
    with pytest.raises(CheckpointError, match="no place for"):
        model.load({**weights, "extra": torch.zeros(1)})
    weights["decoder.layers.0.mlp.linear_fc1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"linear_fc1.bias.*\(3,\).*\(64,\)"):
        model.load(weights)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"attention_heads": 5}, "head size"), ({"query_groups": 3}, "multiple"), ({"query_groups": 2}, "family neox")],
)
def test_impossible_shapes_are_refused(neox: ModelConfig, change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig(**{**neox.model_dump(), **change})
