"""Models that exist, as a stage: what the graph knows of them, and what is refused."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_specialm.base.artifacts import artifact_folder, begin_artifact
from megatron_specialm.base.errors import CheckpointError, ConfigError, DataError, MachineError, SpecialmError
from megatron_specialm.base.files import write_json
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.checkpoint.steps import RESULT, find_final
from megatron_specialm.config.load import configs_folder, dump_pipeline, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.convert.canonical_folder import open_folder
from megatron_specialm.convert.run import convert
from megatron_specialm.data.store import StoreWriter, TokenStore, describe_store
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.tokenizer_making import train_sentencepiece
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import imported_models, setup_of
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import TaskId
from tests.checkpoints import save_random_model
from tests.contexts import make_context
from tests.existing_models import ROWS, save_existing_model, save_tokenizer
from tests.texts import WORDS, write_sets

ADAPT = configs_folder() / "pipelines" / "adapt.yaml"
BASE = TaskId("base", "generic")


@pytest.fixture(scope="module")
def existing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("existing")
    return {
        "llama": save_existing_model(folder / "llama"),
        "mixtral": save_existing_model(folder / "mixtral", "mixtral"),
        "qwen2": save_existing_model(folder / "qwen2", "qwen2", max_shard_size="50KB"),  # several files
    }


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sets(tmp_path / "text", "generic", "law", words=40)


def _load(base: dict[str, Any], *overrides: str, **stages: Any) -> Pipeline:
    """The shipped config with another model, and more stages."""
    sets = {name: {part: f"text/{name}.{part}.jsonl" for part in ("train", "test")} for name in ("generic", "law")}
    config = {
        "extends": str(ADAPT), "root": "run",
        "text": {"generic": sets["generic"], "domains": {"support-tickets": None, "law": sets["law"]}},
        "stages": {"base": {"model": None, "vocabulary_size": None, "revision": None, **base}, **stages},
    }  # fmt: skip
    Path("config.yaml").write_text(json.dumps(config))
    return load_pipeline(Path("config.yaml"), overrides)


def _import(pipeline: Pipeline) -> Path:
    """Run the import stage; its artifact."""
    planned = make_plan(pipeline, Path("run"))[BASE]
    folder = begin_artifact(Path("run"), *BASE, digest=planned.digest, made_from=planned.made_from)
    stage = importlib.import_module("megatron_specialm.stages.import")
    stage.run(pipeline.stages["base"], make_context(pipeline, planned.task, Path("run"), folder))
    return folder


def test_the_shipped_config_knows_its_model_without_a_network() -> None:
    setup = setup_of(load_pipeline(ADAPT), "tuned")
    assert count_parameters(setup.model, setup.vocabulary_size) == 134_515_008, "as the hub says of SmolLM2-135M"


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_an_imported_model_is_that_of_transformers_with_its_tokenizer(existing: dict[str, Path], family: str) -> None:
    pipeline = _load({"path": str(existing[family])}, "stages.lora.lora={linears: [qkv, proj]}")  # not of experts
    folder = _import(pipeline)
    merged, tokenizer = read_merged(find_final(folder)), Tokenizer.load(folder)
    assert merged.state["tokenizer"] == tokenizer.fingerprint
    assert tokenizer.vocabulary_size == merged.vocabulary_size == ROWS == setup_of(pipeline, "tuned").vocabulary_size
    assert setup_of(pipeline, "tuned").model == merged.shape, "known from config.json before anything ran"
    assert tokenizer.encode(["drinkrest"])[0].max() < 300
    convert(folder, Path("back"), to="huggingface")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (existing[family], "back"))
    ids = torch.arange(0, ROWS, 7)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert open_folder(folder).tokenizer == folder / "tokenizer"


@pytest.mark.usefixtures("alone")
def test_windows_begin_with_its_own_start_token_as_in_transformers(tmp_path: Path) -> None:
    path = save_existing_model(tmp_path / "model", start="<|begin|>")
    pipeline, text = _load({"path": str(path)}), " ".join(WORDS[:6])
    folder = _import(pipeline)
    tokenizer, sizes = Tokenizer.load(folder), {"context_length": 64, "vocabulary_size": ROWS}
    writer = StoreWriter(tmp_path, "test", **sizes)
    writer.add_document(tokenizer.encode([text])[0])
    describe_store(
        tmp_path, splits={"test": writer.finish()}, tokenizer=tokenizer.fingerprint,
        eod=tokenizer.eod, bos=tokenizer.bos, **sizes,
    )  # fmt: skip
    batch = TokenStore.open(tmp_path, "test").batch(np.array([0]))
    theirs, ids = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)(text).input_ids
    count = len(ids) - 1
    assert batch.tokens[0, :count].tolist() == ids[:-1] and batch.targets[0, :count].tolist() == ids[1:]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        logits = read_merged(find_final(folder)).build().logits(torch.from_numpy(batch.tokens))[0, :count]
    torch.testing.assert_close(cross_entropy(logits, torch.tensor(ids[1:])), expected, atol=1e-5, rtol=0)
    convert(folder, tmp_path / "back", to="huggingface")
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text).input_ids == ids


def test_the_digest_is_of_the_content_wherever_it_stands(existing: dict[str, Path]) -> None:
    moved = Path(shutil.copytree(existing["llama"], "moved"))
    digests = []
    for path in (existing["llama"], moved):
        digests.append(make_plan(_load({"path": str(path)}), Path("run"))[BASE].digest)
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    digests.append(make_plan(_load({"path": str(moved)}), Path("run"))[BASE].digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_resolved_config_is_the_same_without_the_source(existing: dict[str, Path]) -> None:
    pipeline = _load({"path": str(existing["llama"])})
    Path("resolved.yaml").write_text(dump_pipeline(pipeline))
    assert load_pipeline(Path("resolved.yaml")) == pipeline
    assert load_pipeline(Path("resolved.yaml"), ["stages.base.path=gone"]).stages["base"].model.layers == 2


def test_a_checkpoint_of_ours_is_imported_with_its_tokenizer(existing: dict[str, Path]) -> None:
    convert(existing["llama"], Path("ours"), to="canonical")
    for path in ("ours", "ours/step_0000000"):
        pipeline = _load({"path": path})
        assert pipeline.stages["base"].vocabulary_size == ROWS
        found = read_merged(find_final(_import(pipeline)))
        expected = load_file("ours/step_0000000/model-00000.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.weights.items())


def test_an_import_of_what_was_imported_keeps_the_tokenizers_fingerprint(existing: dict[str, Path]) -> None:
    first = _import(_load({"path": str(existing["llama"])}))
    kept = Path(shutil.copytree(first, "kept", ignore=shutil.ignore_patterns("tokenizer")))
    again = _import(_load({"path": str(kept)}))
    assert Tokenizer.load(again).fingerprint == Tokenizer.load(first).fingerprint


def test_a_checkpoint_without_a_description_takes_one(existing: dict[str, Path]) -> None:
    convert(existing["llama"], Path("megatron"), to="megatron")
    described = {"model": _load({"path": str(existing["llama"])}).stages["base"].model.model_dump(mode="json")}
    with pytest.raises(ConfigError, match="give one of Transformers with `config`"):
        _load({"path": "megatron"})
    assert _import(_load({"path": "megatron", **described, "vocabulary_size": ROWS})).is_dir()


# --- refused before anything runs ------------------------------------------------------------------------------------------


def test_a_source_that_is_not_there_or_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        _load({"path": "/nowhere"})
    with pytest.raises(ConfigError, match="revision 'v1' goes with a name on the hub"):
        _load({"path": "/nowhere", "revision": "v1", "model": "nano-llama", "vocabulary_size": ROWS})
    Path("here").mkdir()
    with pytest.raises(ConfigError, match="revision 'v1' goes with a name on the hub, and path 'here' is a folder's"):
        _load({"path": "here", "revision": "v1", "model": "nano-llama", "vocabulary_size": ROWS})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match=r"owner/name: no such folder, .* `hf download owner/name`"):
        _load({"path": "owner/name"})
    Path("other").mkdir()
    write_json(Path("other/config.json"), {"architectures": ["LlamaForCausalML"]})
    with pytest.raises(CheckpointError, match="LlamaForCausalML is not known; the nearest is LlamaForCausalLM"):
        _load({"path": "other"})


def test_stages_that_do_not_share_its_tokenizer_are_refused(existing: dict[str, Path]) -> None:
    base = {"path": str(existing["llama"])}
    other = {
        "tokenizer": {"kind": "tokenizer"},
        "tokens-2": {"kind": "tokenize", "tokenizer": "tokenizer"},
    }
    student = {"kind": "train", "data": "domain", "model": "nano-llama", "steps": 9, "schedule": {"warmup_steps": 0}}
    wrong: dict[str, Any] = {
        "start": {**student, "model": None, "init": "base", "tokens": "tokens-2"},
        "student": {**student, "distill": {"teacher": "base"}, "tokens": "tokens-2"},
        "taught": {"kind": "teach", "teacher": "base", "tokens": "tokens-2", "keep": "exact"},
        "scores": {"kind": "evaluate", "tokens": "tokens-2", "models": ["base"]},
        "exports": {"kind": "export", "tokens": "tokens-2", "models": ["base"]},
    }
    for name, stage in wrong.items():
        stage = {key: value for key, value in stage.items() if value is not None}
        with pytest.raises(
            ConfigError, match=rf"stages\.{name}\.tokens: they are of tokenizer `tokenizer`, .*tokenizer: base"
        ):
            build_graph(_load(base, **other, **{name: stage}))
        build_graph(_load(base, **other, **{name: {**stage, "tokens": "tokens"}}))
    with pytest.raises(ConfigError, match=r"tokens\.tokenizer: 'lora' is a stage of kind 'train', not .*'import'"):
        build_graph(_load(base, "stages.tokens.tokenizer=lora"))


# --- refused by the stage, which then leaves no result ------------------------------------------------------------------------


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _with_a_larger_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, [" ".join(WORDS)] * 4, size=ROWS + 20)


def _half_written(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _without_a_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


DAMAGES: list[tuple[Callable[[Path], None], type[SpecialmError], str]] = [
    (_without_tokenizer, CheckpointError, r"has no tokenizer, .* stages\.base\.tokenizer"),
    (_with_a_larger_tokenizer, CheckpointError, "has ids up to 3.., and the model 320 rows"),
    (_half_written, SpecialmError, r"model\.safetensors"),
    (_without_a_shard, SpecialmError, r"model-00001-of-00002\.safetensors"),
]


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_source_that_is_not_whole_is_refused(
    existing: dict[str, Path], damage: Callable[[Path], None], error: type[SpecialmError], said: str
) -> None:
    source = Path(shutil.copytree(existing["llama"], "source"))
    damage(source)
    pipeline = _load({"path": str(source)})
    with pytest.raises(error, match=said):
        _import(pipeline)
    folder = artifact_folder(Path("run"), *BASE, make_plan(pipeline, Path("run"))[BASE].digest)
    assert not (folder / RESULT).exists() and not list(folder.glob("step_*"))


def test_another_tokenizer_is_named_where_the_source_has_none_or_not_its_own(existing: dict[str, Path]) -> None:
    source = save_random_model("llama", Path("bare"))
    save_tokenizer(Path("small"), ["ab"], size=257)
    with pytest.raises(DataError, match="has ids up to 256, and the model 99 rows"):
        _import(_load({"path": str(source), "tokenizer": "small"}))
    source = Path(shutil.copytree(existing["llama"], "source"))
    _without_tokenizer(source)
    assert Tokenizer.load(_import(_load({"path": str(source), "tokenizer": "small"}))).vocabulary_size == ROWS
    Path("trained").mkdir()
    texts = [" ".join(WORDS)] * 4
    train_sentencepiece(texts, Path("trained"), vocabulary_size=300, algorithm="bpe", sample_characters=10_000)
    shutil.copyfile("trained/sentencepiece.model", source / "tokenizer.model")
    imported = Tokenizer.load(_import(_load({"path": str(source)})))
    assert imported.vocabulary_size == ROWS and imported.decode(imported.encode(["drin flon"])[0]) == "drin flon"


def test_a_tokenizer_that_transformers_would_load_otherwise_beside_the_model_is_refused(
    existing: dict[str, Path],
) -> None:
    """It loads every Qwen2 with a class of its own, which normalizes text."""
    source = Path(shutil.copytree(existing["qwen2"], "source"))
    _without_tokenizer(source)
    save_tokenizer(source, [" ".join(WORDS)] * 4)
    with pytest.raises(DataError, match=r"cannot be exported: transformers .* gives other ids"):
        _import(_load({"path": str(source)}))


def test_an_import_that_was_interrupted_is_made_again(existing: dict[str, Path]) -> None:
    """After its step and before its result were in place, with files of a conversion that had begun."""
    pipeline = _load({"path": str(existing["llama"])})
    folder = _import(pipeline)
    whole = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    (folder / RESULT).unlink()
    (folder / "step_0000000" / "model-00000.safetensors").write_bytes(b"half")
    (folder / ".model.tmp").mkdir()
    assert _import(pipeline) == folder
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} == whole
    assert find_final(folder).name == "step_0000000" and not (folder / ".model.tmp").exists()


def test_trainings_of_every_kind_begin_with_it(existing: dict[str, Path]) -> None:
    """In any layout, as an MoE, beside it as a teacher; and it is no expert to select."""
    training = {"kind": "train", "data": "domain", "tokens": "tokens", "steps": 9, "schedule": {"warmup_steps": 0}}
    started = {**training, "init": "base"}
    stages = {
        "plain": {**started, "parallel": {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2}},
        "zero": {**started, "parallel": {"engine": "deepspeed", "zero_stage": 2, "data_parallel": 2}},
        "experts": {**started, "upcycle": {"experts": 4}, "method": "experts"},
        "mixture": {**started, "data": "cluster", "assignment": "assignment"},
        "mixed": {**started, "data": "generic", "domain_fraction": 0.1},
        "student": {**training, "model": "nano-llama", "distill": {"teacher": "base"}},
    }
    pipeline = _load({"path": str(existing["llama"])}, **stages)
    graph = build_graph(pipeline)
    base = pipeline.stages["base"].model
    for name in stages:
        inputs = {task.stage for key, one in graph.items() if key.stage == name for task in one.inputs}
        assert "base" in inputs and imported_models(pipeline, name) == ["base"]
        assert setup_of(pipeline, name).vocabulary_size == ROWS
    assert setup_of(pipeline, "plain").model == setup_of(pipeline, "student").teacher == base
    assert setup_of(pipeline, "experts").model.moe is not None
    chosen = {"kind": "select", "experts": "base", "tokens": "tokens"}
    with pytest.raises(ConfigError, match=r"stages\.chosen\.experts: 'base' makes one model"):
        build_graph(_load({"path": str(existing["llama"])}, chosen=chosen))


def test_a_pickled_checkpoint_is_read_without_executing_it(existing: dict[str, Path]) -> None:
    source = Path(shutil.copytree(existing["llama"], "source"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    found = [read_merged(find_final(_import(_load({"path": str(path)})))) for path in (source, existing["llama"])]
    assert all(torch.equal(tensor, found[1].weights[name]) for name, tensor in found[0].weights.items())


def test_a_model_that_is_not_the_sources_is_refused(existing: dict[str, Path]) -> None:
    pipeline = _load({"path": str(existing["llama"]), "model": "nano-llama", "vocabulary_size": ROWS})
    with pytest.raises(
        CheckpointError, match=r"stages\.base\.model: \w+ is .*: leave out `model` and `vocabulary_size`"
    ):
        _import(pipeline)
