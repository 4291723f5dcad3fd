"""Legacy checkpoints of every version of Megatron-LM: order of queries, keys and values, older names, unequal stages; and an
older checkpoint of ours."""

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.megatron_legacy import open_megatron_legacy
from megatron_specialm.convert.megatron_legacy_writing import write_megatron_legacy
from megatron_specialm.convert.run import convert, stream
from megatron_specialm.convert.source import Layout
from tests.checkpoints import CONFIGS, save_random_model

HEADS, SIZE = 4, 8
_OLDER = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIGS["neox"].to_dict() | {"tie_word_embeddings": request.param}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "neox", GPTNeoXConfig(**config))
        return save_random_model("neox", tmp_path_factory.mktemp("neox"))


def _rows_before(tensor: torch.Tensor, version: int, heads: int) -> torch.Tensor:
    """Rows of (head, kind, place) in the order of an older version."""
    found = torch.empty_like(tensor)
    for head, kind, place in product(range(heads), range(3), range(SIZE)):
        old = {0: (kind * heads + head) * SIZE + place, 1: (head * SIZE + place) * 3 + kind}
        found[old.get(version, (head * 3 + kind) * SIZE + place)] = tensor[(head * 3 + kind) * SIZE + place]
    return found


def _make_older(folder: Path, version: int, tensor_parallel: int) -> None:
    """Rewrite a legacy checkpoint as an older Megatron-LM would have saved it."""
    for path in folder.glob("release/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        own, encoder, model = content["model"], {}, {}
        for name, tensor in own.items():
            older = name.removeprefix("decoder.")
            for ours, theirs in _OLDER.items():
                older = older.replace(ours, theirs)
            if ".query_key_value." in older:
                tensor = _rows_before(tensor, version, HEADS // tensor_parallel)
            if name.startswith("decoder."):
                encoder[older] = tensor
        language: dict[str, Any] = {"encoder": encoder}
        if "embedding.word_embeddings.weight" in own:
            language["embedding"] = {"word_embeddings": {"weight": own["embedding.word_embeddings.weight"]}}
        if "output_layer.weight" in own and content["args"].untie_embeddings_and_output_weights:
            language["output_layer"] = {"weight": own["output_layer.weight"]}
        elif "output_layer.weight" in own:
            model["word_embeddings_for_head"] = {"weight": own["output_layer.weight"]}
        content["args"].layernorm_epsilon = content["args"].norm_epsilon
        del content["args"].norm_epsilon
        torch.save({**content, "model": {**model, "language_model": language}, "checkpoint_version": version}, path)


@pytest.mark.parametrize(("version", "layout"), [(0, (2, 1)), (1, (1, 3)), (1, (2, 3)), (2, (2, 1))])
def test_every_version_has_the_same_weights(
    version: int, layout: tuple[int, int], source: Path, tmp_path: Path
) -> None:
    done = convert(source, tmp_path / "legacy", to="megatron-legacy", layout=Layout(*layout))
    (tmp_path / "legacy" / "release" / "fingerprint.json").unlink()
    _make_older(tmp_path / "legacy", version, layout[0])
    assert stream(open_source(tmp_path / "legacy")) == done.fingerprint


def test_a_version_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    convert(save_random_model("llama 3", tmp_path / "source"), tmp_path / "legacy", to="megatron-legacy")
    path = tmp_path / "legacy/release/mp_rank_00/model_optim_rng.pt"
    torch.save({**torch.load(path, weights_only=False), "checkpoint_version": 1.0}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint_version 1\.0 with 4 heads in 2 groups"):
        open_source(tmp_path / "legacy")


@pytest.mark.parametrize("layers", [[1, 2], [2, 1], [0, 3]])
def test_stages_of_unequal_layers_are_read(layers: list[int], tmp_path: Path) -> None:
    """As --decoder-first-pipeline-num-layers and its like make them; a first stage may have the embedding alone."""
    done = convert(save_random_model("llama", tmp_path / "source"), tmp_path / "equal", to="megatron-legacy")
    found = open_megatron_legacy(tmp_path / "equal")
    write_megatron_legacy(tmp_path / "legacy", found.shards, settings=found.settings, step=None, stage_layers=layers)
    opened = open_source(tmp_path / "legacy")
    assert opened.layout == "legacy, tensor_parallel 1, pipeline_parallel 2" and stream(opened) == done.fingerprint


def test_an_older_checkpoint_of_ours(tmp_path: Path) -> None:
    """Version 0.1 did not write which model a checkpoint is of."""
    step = Path(__file__).parents[1] / "distributed" / "earlier_checkpoint" / "step_0000002"
    with pytest.raises(CheckpointError, match=r"state\.json: does not say its model.*--config"):
        open_source(step)
    config = GPTNeoXConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, use_parallel_residual=False, hidden_act="gelu", tie_word_embeddings=True,
        architectures=["GPTNeoXForCausalLM"],
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 1.0},
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    shutil.copytree(step, tmp_path / "step_0000002")
    done = convert(tmp_path / "step_0000002", tmp_path / "theirs", to="megatron", config=tmp_path / "config")
    back = open_source(tmp_path / "theirs")
    assert back.optimizer is not None and (back.step, back.optimizer.step) == (2, 2)
    assert stream(back).weights == done.fingerprint.weights
