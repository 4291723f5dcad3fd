"""`specialm merge` and `specialm project`: the ordinary model that they write computes what the trained one did."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_specialm.base.errors import ArtifactError, SpecialmError
from megatron_specialm.checkpoint.merged import read_merged, read_trained
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import declare_final, find_final
from megatron_specialm.cli.app import app
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.run import convert
from megatron_specialm.data.clusters import HISTOGRAM
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.weights import weight_specs
from tests.checkpoints import assert_same_logits

VOCABULARY, CONTEXT, EXPERTS = 50, 16, 3
NETWORK = {"projection": Projection(experts=EXPERTS, capacity=4, code_size=2)}
ROUTED = {"moe": MixtureOfExperts(experts=EXPERTS, route="cluster")}
TOKENS = torch.randint(0, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("alone")


def _train(folder: Path, shape: ModelConfig, *, seed: int = 0) -> Path:
    """What a training leaves, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    specs = weight_specs(shape, vocabulary_size=VOCABULARY)
    weights = {name: torch.randn(spec.shape, generator=generator) * 0.3 for name, spec in specs.items()}
    state = {"vocabulary_size": VOCABULARY, "context_length": CONTEXT, "tokenizer": "t"}
    save_checkpoint(
        folder, step=2, weights=weights, optimizer_state={}, state={**state, "model": shape.model_dump(mode="json")}
    )
    declare_final(folder, step=2)
    return folder


@torch.no_grad()
def _logits(folder: Path, mixture_K: Sequence[float] | None = None) -> torch.Tensor:
    """Of the model as it was trained: adapters beside their base, a network with a mixture of its experts."""
    trained = read_trained(find_final(folder))
    model = Gpt(trained.shape, vocabulary_size=VOCABULARY, context_length=CONTEXT).train(False)
    model.load(trained.weights)
    if model.derived is not None:
        model.derived.materialize(torch.tensor([mixture_K or [1.0]]))
        model.derived.bind(0, 0)
    return model.logits(TOKENS)


def _specialm(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def _is_whole(folder: Path) -> bool:
    """It has a fingerprint, and nothing is left beside it."""
    return read_fingerprint(find_final(folder)) is not None and not list(folder.parent.glob(".*"))


def test_adapters_are_merged_into_their_base(llama: ModelConfig, tmp_path: Path) -> None:
    source = _train(tmp_path / "lora", llama.model_copy(update={"lora": LowRank(rank=4, alpha=8)}))
    assert "adapters merged" in _specialm("merge", source, tmp_path / "plain")
    plain = read_trained(find_final(tmp_path / "plain"))
    assert plain.shape.lora is None and _is_whole(tmp_path / "plain")
    assert_same_logits(_logits(tmp_path / "plain"), _logits(source))
    base = _train(tmp_path / "base", llama)
    assert (_logits(base) - _logits(source)).abs().max() > 0.1

    _specialm("merge", source, tmp_path / "theirs", "--to", "huggingface", "--dtype", "bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert model.dtype == torch.bfloat16
    kept = plain.weights["decoder.final_layernorm.weight"]
    assert torch.equal(model.state_dict()["model.norm.weight"], kept.bfloat16())


def test_what_has_no_adapters_is_not_merged(llama: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(SpecialmError, match=r"has no adapters \(LoRA\) to merge"):
        _specialm("merge", _train(tmp_path / "base", llama), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_expert_of_a_network_and_an_average_are_what_the_network_computes(neox: ModelConfig, tmp_path: Path) -> None:
    source = _train(tmp_path / "network", neox.model_copy(update=NETWORK))
    assert "expert 1 of 3" in _specialm("project", source, tmp_path / "one", "--expert", 1)
    assert_same_logits(_logits(tmp_path / "one"), _logits(source, [0.0, 1.0, 0.0]))

    (tmp_path / "assignment").mkdir()
    np.save(tmp_path / "assignment" / HISTOGRAM, np.array([0.2, 0.5, 0.3]))
    _specialm("project", source, tmp_path / "soup", "--histogram", tmp_path / "assignment")
    assert_same_logits(_logits(tmp_path / "soup"), _logits(source, [0.2, 0.5, 0.3]))
    selected = read_trained(find_final(source)).merged(torch.tensor([0.2, 0.5, 0.3]))  # as `select` does
    written = read_merged(find_final(tmp_path / "soup")).weights
    assert all(torch.equal(written[name], weight) for name, weight in selected.weights.items())
    assert _is_whole(tmp_path / "one") and _is_whole(tmp_path / "soup")


def test_every_expert_of_a_network_becomes_a_folder_of_transformers(neox: ModelConfig, tmp_path: Path) -> None:
    source = _train(tmp_path / "network", neox.model_copy(update=NETWORK))
    _specialm("project", source, tmp_path / "all", "--mixture", "--to", "huggingface")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["c0", "c1", "c2"]
    for expert in range(EXPERTS):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "all" / f"c{expert}").eval()
        with torch.no_grad():
            theirs = model(TOKENS).logits
        torch.testing.assert_close(theirs, _logits(source, torch.eye(EXPERTS)[expert].tolist()), rtol=0, atol=1e-4)


def test_an_expert_of_an_moe_that_routes_by_cluster(llama: ModelConfig, tmp_path: Path) -> None:
    source = _train(tmp_path / "moe", llama.model_copy(update=ROUTED))
    _specialm("project", source, tmp_path / "own", "--expert", 2)
    own, expected = read_merged(find_final(tmp_path / "own")), read_trained(find_final(source)).merged(torch.eye(3)[2])
    assert own.shape.moe is None and own.weights.keys() == expected.weights.keys()
    assert all(torch.equal(own.weights[name], weight) for name, weight in expected.weights.items())
    (tmp_path / "assignment").mkdir()
    np.save(tmp_path / "assignment" / HISTOGRAM, np.array([0.2, 0.5, 0.3]))
    with pytest.raises(SpecialmError, match="its experts have no average"):
        _specialm("project", source, tmp_path / "soup", "--histogram", tmp_path / "assignment")


def test_a_mixture_of_checkpoints(neox: ModelConfig, tmp_path: Path) -> None:
    stage = tmp_path / "slm-mix"
    sources = {key: _train(stage / key, neox, seed=number) for number, key in enumerate(("c0", "c2", "c10"))}
    _specialm("project", stage, tmp_path / "all", "--mixture")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(sources)
    _specialm("project", stage, tmp_path / "one", "--expert", 10)
    for ours, theirs in (
        (tmp_path / "one", sources["c10"]),
        *((tmp_path / "all" / key, sources[key]) for key in sources),
    ):
        assert torch.equal(_logits(ours), _logits(theirs))
    with pytest.raises(SpecialmError, match="expert 1 does not exist: there are c0, c2, c10"):
        _specialm("project", stage, tmp_path / "two", "--expert", 1)


def test_a_mixture_is_whole_or_not_there(neox: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "slm-mix"
    for key in ("c0", "c1"):
        _train(stage / key, neox)
    (stage / "c1" / "step_0000002" / "model-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"c1.step_0000002.model-00000\.safetensors"):
        _specialm("project", stage, tmp_path / "all", "--mixture")
    assert [path.name for path in tmp_path.iterdir()] == ["slm-mix"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "name one of --expert NUMBER, --histogram RUN/STAGE/SET and --mixture"),
        (("--expert", 1, "--mixture"), "name one of --expert"),
        (("--expert", 3), "expert 3 does not exist: there are experts 0 to 2"),
        (("--expert", -1), "expert -1 does not exist"),
        (("--histogram", "absent"), "absent"),
    ],
)
def test_mistakes(options: tuple[object, ...], says: str, neox: ModelConfig, tmp_path: Path) -> None:
    source = _train(tmp_path / "network", neox.model_copy(update=NETWORK))
    with pytest.raises(SpecialmError, match=says):
        _specialm("project", source, tmp_path / "out", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["network"]


def test_other_folders_and_targets_are_refused(neox: ModelConfig, tmp_path: Path) -> None:
    plain = _train(tmp_path / "plain", neox)
    with pytest.raises(SpecialmError, match="an ordinary model, without an expert per cluster"):
        _specialm("project", plain, tmp_path / "out", "--expert", 0)
    with pytest.raises(SpecialmError, match=r"no result\.json: name the folder of a training that has ended"):
        _specialm("project", tmp_path, tmp_path / "out", "--mixture")
    network = _train(tmp_path / "network", neox.model_copy(update=NETWORK))
    for options in (("--expert", 0), ("--mixture",)):
        with pytest.raises(SpecialmError, match="is there already"):
            _specialm("project", network, tmp_path, *options)
    with pytest.raises(SpecialmError, match="`specialm project`"):
        convert(network, tmp_path / "out", to="canonical")


def test_experts_by_cluster_are_not_converted_as_if_a_router_chose(llama: ModelConfig, tmp_path: Path) -> None:
    source = _train(tmp_path / "moe", llama.model_copy(update=ROUTED))
    for to in ("canonical", "huggingface"):
        with pytest.raises(SpecialmError, match="`specialm project`"):
            convert(source, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
