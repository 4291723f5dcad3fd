"""Megatron's two formats, there and back in every layout; what the settings leave open or get wrong is refused."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert import megatron_folder, torch_dist
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.lazy import stacked, with_rows
from megatron_specialm.convert.megatron_names import joined_ranks, rank_part, read_settings, settings_of
from megatron_specialm.convert.run import convert, stream
from megatron_specialm.convert.source import Layout
from megatron_specialm.model.weights import WeightSpec
from tests.checkpoints import CONFIGS, MIXTURES, VOCABULARY, save_random_model

FORMS = ("megatron", "megatron-legacy")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: save_random_model(name, root / name.replace(" ", "")) for name in CONFIGS}


@pytest.mark.parametrize(("family", "form"), list(product(CONFIGS, FORMS)))
def test_a_family_there_and_back_in_every_layout(
    family: str, form: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Qwen3 here has one key/value head. Tied embeddings are copied to the last stage of a legacy checkpoint; the vocabulary is
    padded to 128 or 256 rows."""
    expected = stream(open_source(sources[family]))
    for tensor, pipeline, experts in product(
        (1,) if family == "qwen3" else (1, 2), *(((1, 2), (1, 2)) if family in MIXTURES else ((1, 3), (1,)))
    ):
        folder = tmp_path / f"{tensor}-{pipeline}-{experts}"
        convert(sources[family], folder, to=form, layout=Layout(tensor, pipeline, experts))
        opened = open_source(folder)
        assert opened.model.vocabulary_size == VOCABULARY
        assert stream(opened) == expected
        if form == "megatron":
            rows = torch_dist.open_torch_dist(folder).tensors["embedding.word_embeddings.weight"].shape[0]
            assert rows == 128 * tensor
        else:
            assert len(list(folder.glob("release/mp_rank_*"))) == tensor * pipeline * experts
            assert ("output_layer.weight" in opened.dropped) == (opened.model.shape.tie_embeddings and pipeline > 1)


@pytest.mark.parametrize("family", CONFIGS)
def test_settings_there_and_back(family: str, sources: dict[str, Path]) -> None:
    model = open_source(sources[family]).model
    settings = settings_of(model, tensor_parallel=2, pipeline_parallel=1)
    assert read_settings(settings, where=Path("x"), rows=256).computes == model.computes
    del settings["vocab_size"]
    assert read_settings(settings, where=Path("x"), rows=256).vocabulary_size == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": None}, "no num_layers.*--config"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm', which cannot be converted"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"position_embedding_type": "learned_absolute"}, "positions are rotary"),
        ({"rotary_percent": 0.25}, "rotary_percent is 0.25"),
        ({"num_experts": 8, "moe_router_pre_softmax": True}, "moe_router_pre_softmax is True.*with top-2"),
        ({"num_experts": 8, "moe_router_topk": 1}, "moe_router_pre_softmax is None.*with top-1"),
        ({"num_experts": 8, "moe_layer_freq": 2}, r"moe_layer_freq is 2.*as in \[0, 1, 0, 1\]"),
        ({"num_experts": 8, "moe_shared_expert_intermediate_size": 16}, "moe_shared_expert_gate is None"),
        ({"num_experts": 8, "moe_router_score_function": "sigmoid"}, "moe_router_score_function is 'sigmoid'"),
        ({"num_experts": 8, "moe_router_num_groups": 2}, "moe_router_num_groups is 2"),
        ({"num_attention_heads": 5}, "head size"),
    ],
)
def test_settings_that_cannot_be_converted(change: dict, message: str, sources: dict[str, Path]) -> None:
    settings = settings_of(open_source(sources["llama"]).model, tensor_parallel=1, pipeline_parallel=1)
    settings = {name: value for name, value in {**settings, "kv_channels": None, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        read_settings(settings, where=Path("x"), rows=128)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor_parallel=3), "tensor_parallel 3 does not divide the model's 4 heads"),
        (Layout(pipeline_parallel=2), "pipeline_parallel 2 does not divide the model's 3 layers"),
        (Layout(expert_parallel=2), "the model has no experts"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_layout_that_does_not_divide_the_model(
    form: str, layout: Layout, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(sources["llama"], tmp_path / "target", to=form, layout=layout)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_settings_takes_a_config(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["llama"], tmp_path / "theirs", to="megatron")
    (tmp_path / "theirs" / "release" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"have no num_attention_heads.*--config"):
        open_source(tmp_path / "theirs")
    assert stream(open_source(tmp_path / "theirs", config=sources["llama"])) == stream(open_source(sources["llama"]))
    with pytest.raises(CheckpointError, match=re.escape("of another model")):
        open_source(tmp_path / "theirs", config=sources["neox"])


@pytest.mark.parametrize("form", FORMS)
def test_swapped_layers_are_named(
    form: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that mixes up two layers leaves nothing, and says which."""

    def swapped(name: str) -> str:
        return re.sub(r"layers\.[01]\.mlp", lambda place: f"layers.{1 - int(place[0][7])}.mlp", name)

    padded = megatron_folder._padded

    def mixed(order):  # type: ignore[no-untyped-def]
        weights = padded(order)
        return {name: weights[swapped(name)] for name in weights}

    monkeypatch.setattr(megatron_folder, "_padded", mixed)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.linear_fc1\.weight \(has the content of decoder\.layers\.1"
    ):
        convert(sources["llama"], tmp_path / "target", to=form)
    assert not list(tmp_path.iterdir())


def test_tensor_parallel_ranks_of_a_gated_mlp() -> None:
    """Each rank has [gate; up] of its own rows."""
    whole, spec = torch.arange(8.0)[:, None].expand(8, 2), WeightSpec((8, 2), cut=0, blocks=2)
    parts = [rank_part(whole, spec, rank=rank, size=2) for rank in range(2)]
    assert [part[()][:, 0].tolist() for part in parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert torch.equal(joined_ranks(parts, spec, name="w", where=Path("x"))[()], whole)
    columns = WeightSpec((8, 2), cut=1)
    halves = [rank_part(whole, columns, rank=rank, size=2) for rank in range(2)]
    assert torch.equal(joined_ranks(halves, columns, name="w", where=Path("x"))[()], whole)


def test_lazy_tensors_read_slices() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(with_rows(rows, 5)[2:5], torch.tensor([[4.0, 5.0], [0, 0], [0, 0]]))
    assert torch.equal(with_rows(rows, 2)[()], rows[:2])
    pair = stacked([rows, rows + 10])
    assert pair.shape == (2, 3, 2)
    assert torch.equal(pair[1:2, 1:], (rows + 10)[None, 1:])
