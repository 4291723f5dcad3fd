"""Each method of the paper as settings of a config: whose task it is, what it reads, and what is refused before it runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.load import dump_pipeline, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.convert.model_card import READS
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.digests import digest
from megatron_specialm.graph.lineage import domain_text, is_finetuned, method_of, model_of, trainings
from megatron_specialm.graph.tasks import Task, TaskId

MODEL = {"layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "attention_heads": 4}
GATED = {**MODEL, "moe": {"experts": 4, "route": "cluster"}}
TRAIN: dict[str, Any] = {
    "kind": "train", "tokens": "tokens", "steps": 10, "global_batch_size": 16, "micro_batch_size": 8,
    "schedule": {"warmup_steps": 0},
}  # fmt: skip
STAGES: dict[str, Any] = {
    "tokenizer": {"kind": "tokenizer", "vocabulary_size": 500},
    "tokens": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": 16},
    "vectors": {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "tfidf"}},
    "clusters": {"kind": "cluster", "vectors": "vectors", "k": 4},
    "assignment": {"kind": "assign", "clusters": "clusters", "vectors": "vectors"},
    "slm": {**TRAIN, "data": "generic", "model": MODEL},
    "llm": {**TRAIN, "data": "generic", "model": {**MODEL, "hidden_size": 64}},
    "mix": {**TRAIN, "data": "cluster", "assignment": "assignment", "model": MODEL},
    "pn": {
        **TRAIN, "data": "generic", "assignment": "assignment", "model": MODEL,
        "projection": {"experts": 4, "capacity": 3, "code_size": 5}, "windows_per_expert": 8,
    },
    "gated": {**TRAIN, "data": "generic", "assignment": "assignment", "model": GATED},
    "gated-chosen": {"kind": "select", "experts": "gated", "tokens": "tokens"},
    "gated-tuned": {**TRAIN, "data": "domain", "init": "gated-chosen"},
    "chosen": {"kind": "select", "experts": "mix", "tokens": "tokens"},
    "soup": {"kind": "select", "experts": "pn", "tokens": "tokens", "by": "histogram", "method": "pn-soup"},
    "tuned": {**TRAIN, "data": "domain", "init": "chosen"},
    "soup-tuned": {**TRAIN, "data": "domain", "init": "soup"},
    "llm-tuned": {**TRAIN, "data": "domain", "init": "llm"},
    "lora": {**TRAIN, "data": "domain", "init": "llm", "lora": {"rank": 2}},
    "taught": {"kind": "teach", "teacher": "llm-tuned", "tokens": "tokens", "keep": "sampled", "count": 8},
    "student": {**TRAIN, "data": "domain", "init": "slm", "distill": {"teacher": "llm-tuned"}},
    "cached": {**TRAIN, "data": "domain", "init": "slm", "distill": {"teacher": "llm-tuned", "cache": "taught"}},
    "replay": {**TRAIN, "data": "domain", "init": "slm", "replay_fraction": 0.01},
    "early": {**TRAIN, "data": "generic", "model": MODEL, "domain_fraction": 0.1},
    "moe": {**TRAIN, "data": "generic", "init": "slm", "upcycle": {"experts": 8}, "method": "moe"},
    "moe-mix": {**TRAIN, "data": "generic", "init": "mix", "upcycle": {"experts": 4}, "method": "moe-mix"},
    "moe-tuned": {**TRAIN, "data": "domain", "init": "moe-mix"},
    "perplexity": {"kind": "evaluate", "tokens": "tokens", "models": ["slm", "chosen", "tuned", "soup", "early"]},
}  # fmt: skip


def _load(folder: Path, **stages: Any) -> Pipeline:
    """The config with some stages' fields changed."""
    changed = {name: {**STAGES.get(name, {}), **fields} for name, fields in stages.items()}
    files = {"train": "train.txt", "test": "test.txt"}
    config = {
        "name": "methods", "root": "run", "text": {"generic": files, "domains": {"law": files, "art": files}},
        "stages": {**STAGES, **changed},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_pipeline(path)


def _tasks(graph: dict[TaskId, Task], stage: str) -> dict[str, Task]:
    return {name.key: task for name, task in graph.items() if name.stage == stage}


def test_a_mixture_is_one_task_per_cluster_and_everybodys_cost(tmp_path: Path) -> None:
    pipeline = _load(tmp_path)
    tasks = _tasks(build_graph(pipeline), "mix")
    assert list(tasks) == ["c0", "c1", "c2", "c3"]
    assert all(task.domain is None for task in tasks.values())
    assert TaskId("assignment", "generic") in tasks["c0"].inputs and TaskId("clusters", "generic") in tasks["c0"].inputs
    some = _load(tmp_path, mix={"clusters": [3, 1]})
    assert list(_tasks(build_graph(some), "mix")) == ["c3", "c1"]


def test_a_selection_reads_all_experts_and_is_the_domains_cost(tmp_path: Path) -> None:
    graph = build_graph(_load(tmp_path))
    task = _tasks(graph, "chosen")["law"]
    assert {TaskId("mix", f"c{c}") for c in range(4)} | {TaskId("assignment", "law"), TaskId("tokens", "law")} <= set(
        task.inputs
    )
    assert task.domain == "law"
    assert TaskId("pn", "generic") in _tasks(graph, "soup")["art"].inputs
    assert TaskId("chosen", "law") in _tasks(graph, "tuned")["law"].inputs


def test_what_is_selected_is_an_ordinary_model_of_its_method(tmp_path: Path) -> None:
    pipeline = _load(tmp_path)
    plain = model_of(pipeline, "slm")
    assert model_of(pipeline, "pn").projection is not None
    assert model_of(pipeline, "soup") == model_of(pipeline, "soup-tuned") == model_of(pipeline, "tuned") == plain
    assert model_of(pipeline, "lora").lora is not None and model_of(pipeline, "lora").base_config == model_of(
        pipeline, "llm"
    )
    assert model_of(pipeline, "gated").moe is not None
    assert model_of(pipeline, "gated-chosen") == model_of(pipeline, "gated-tuned") == plain
    methods = [method_of(pipeline, name) for name in ("chosen", "tuned", "soup-tuned", "gated-tuned")]
    assert methods == ["mix", "mix", "pn-soup", "gated"]
    assert [is_finetuned(pipeline, name) for name in ("chosen", "tuned", "mix")] == [False, True, False]


def test_a_model_says_how_it_has_read_the_domains_text(tmp_path: Path) -> None:
    tuned_later = {**TRAIN, "data": "domain", "init": "early"}
    importance = {**STAGES["early"], "data": "importance", "assignment": "assignment"}
    pipeline = _load(tmp_path, **{"early-tuned": tuned_later, "is-early": importance})
    said = {
        "slm": "none", "chosen": "none", "early": "mixed in", "is-early": "mixed in", "early-tuned": "fine-tuned",
        "replay": "fine-tuned",
    }  # fmt: skip
    assert {name: domain_text(pipeline, name) for name in said} == said
    assert {name: is_finetuned(pipeline, name) for name in said} == {name: how != "none" for name, how in said.items()}
    read = [("early", "generic+domain"), ("early-tuned", "domain")]
    assert trainings(pipeline, "early-tuned") == read and trainings(pipeline, "is-early")[0][1] == "importance+domain"
    assert trainings(pipeline, "replay")[-1] == ("replay", "domain+generic")
    assert {data for name in said for _, data in trainings(pipeline, name)} <= READS.keys()


def test_an_moe_is_made_of_one_model_or_of_all_of_a_mixture(tmp_path: Path) -> None:
    pipeline = _load(tmp_path)
    graph = build_graph(pipeline)
    models = {name: [one.key for one in task.inputs if one.stage in ("slm", "mix")] for name, task in (
        ("moe", graph[TaskId("moe", "generic")]), ("moe-mix", graph[TaskId("moe-mix", "generic")]))}  # fmt: skip
    assert models == {"moe": ["generic"], "moe-mix": ["c0", "c1", "c2", "c3"]}
    assert graph[TaskId("moe-mix", "generic")].domain is None
    assert set(_tasks(graph, "moe-tuned")) == {"law", "art"}
    shape = model_of(pipeline, "moe-tuned")
    assert shape.moe is not None and shape.model_copy(update={"moe": None}) == model_of(pipeline, "mix")
    assert [method_of(pipeline, name) for name in ("moe", "moe-mix", "moe-tuned")] == ["moe", "moe-mix", "moe-mix"]
    assert trainings(pipeline, "moe-tuned") == [("mix", "cluster"), ("moe-mix", "generic"), ("moe-tuned", "domain")]
    some = build_graph(_load(tmp_path, mix={"clusters": [0, 3]}))  # two experts of each
    assert [one.key for one in some[TaskId("moe-mix", "generic")].inputs if one.stage == "mix"] == ["c0", "c3"]


def test_a_student_reads_its_teacher_and_a_cached_one_the_cache_too(tmp_path: Path) -> None:
    graph = build_graph(_load(tmp_path))
    assert TaskId("llm-tuned", "law") in _tasks(graph, "student")["law"].inputs
    cached = _tasks(graph, "cached")["law"].inputs
    assert TaskId("taught", "law") in cached and TaskId("llm-tuned", "law") in cached  # so its cost is in the ledger
    assert TaskId("llm-tuned", "art") in _tasks(graph, "taught")["art"].inputs


def test_replay_and_specialized_pretraining_read_both_sets(tmp_path: Path) -> None:
    graph = build_graph(_load(tmp_path))
    for name in ("replay", "early"):
        task = _tasks(graph, name)["law"]
        assert {TaskId("tokens", "law"), TaskId("tokens", "generic")} <= set(task.inputs) and task.domain == "law"


def test_a_resolved_config_says_the_same(tmp_path: Path) -> None:
    pipeline = _load(tmp_path)
    (tmp_path / "resolved.yaml").write_text(dump_pipeline(pipeline))
    assert load_pipeline(tmp_path / "resolved.yaml") == pipeline


@pytest.mark.parametrize(
    ("stage", "fields", "words"),
    [
        ("mix", {"clusters": [0, 4]}, "clusters: 4 does not exist: `assignment` has clusters 0 to 3"),
        ("mix", {"assignment": None}, "`data: cluster` needs `assignment`: name an assign stage"),
        ("slm", {"assignment": "assignment"}, "need it: drop it"),
        ("slm", {"clusters": [1]}, "`clusters` goes with `data: cluster`, and this is `data: generic`: drop it"),
        ("pn", {"projection": {"experts": 5, "capacity": 3, "code_size": 5}},
         "projection.experts: 5, and `assignment` has 4 clusters"),
        ("gated", {"model": {**GATED, "moe": {"experts": 3, "route": "cluster"}}},
         "model.moe.experts: 3, and `assignment` has 4 clusters"),
        ("gated", {"model": {**GATED, "moe": {"experts": 4, "route": "cluster", "top_k": 2}}},
         "top_k 2 means nothing with route"),
        ("gated", {"assignment": None}, "need it: name an assign stage"),
        ("gated", {"model": {**MODEL, "moe": {"experts": 4}}}, "need it: drop it"),
        ("gated", {"data": "cluster"}, "`moe.route: cluster` goes with `data: generic`"),
        ("slm", {"model": GATED, "data": "domain"}, "`moe.route: cluster` goes with `data: generic`"),
        ("gated", {"domain_fraction": 0.1}, "`domain_fraction` does not go with `moe.route: cluster`"),
        ("gated", {"distill": {"teacher": "slm"}}, "`distill` does not go with `moe.route: cluster`"),
        ("gated", {"windows_per_expert": 8}, "`windows_per_expert` goes with `projection`"),
        ("pn", {"model": {**MODEL, "moe": {"experts": 4}}}, "`projection` and `model.moe` both replace"),
        ("tuned", {"init": "gated"}, "'gated' is an MoE that routes by cluster, not one model"),
        ("gated-chosen", {"by": "histogram"}, "histogram mixes the codes of a projected network"),
        ("pn", {"data": "importance"}, "`projection` goes with `data: generic`"),
        ("pn", {"windows_per_expert": 4, "packing": "sorted"},
         "with packing sorted windows_per_expert 4 must be a multiple of micro_batch_size 8"),
        ("pn", {"windows_per_expert": 32}, "global_batch_size 16 must be a multiple of windows_per_expert 32"),
        ("slm", {"windows_per_expert": 4}, "`windows_per_expert` goes with `projection`"),
        ("pn", {"windows_per_expert": None}, "`windows_per_expert` goes with `projection`, which needs it"),
        ("mix", {"clusters": [1, 1]}, "[1, 1]: one is there twice"),
        ("slm", {"distill": {"teacher": "llm-tuned"}}, "distill.teacher: 'llm-tuned' is made for each domain, and 'slm' is"),
        ("mix", {"model": None, "init": "early"}, "init: 'early' is made for each domain, and 'mix' is not (mix/c0)"),
        ("slm", {"soup": {}}, "`soup` goes with `projection`"),
        ("slm", {"continues": "chosen"}, "continues: 'chosen' is a stage of kind 'select', not 'train'"),
        ("slm", {"continues": "llm"}, "continues: 'llm' has another `model`"),
        ("slm-20", {**TRAIN, "data": "generic", "model": MODEL, "steps": 20, "continues": "slm",
                    "schedule": {"kind": "cosine", "warmup_steps": 0}},
         "no step of 'slm' that is kept is a step of 'slm-20' (the learning rates differ from step 1 on"),
        ("mix-20", {**TRAIN, "data": "cluster", "assignment": "assignment", "model": MODEL, "continues": "some"},
         "no stage 'some'"),
        ("slm-20", {**TRAIN, "data": "generic", "model": MODEL, "continues": "slm", "early_stopping": {"evaluate_every": 5},
                    "optimizer": {"learning_rate": [1e-3, 2e-3]}},
         "`continues` goes with one learning rate"),
        ("slm", {"lora": {}}, "`lora` adapts weights that were trained before"),
        ("lora", {"lora": {"linears": ["gate"]}}, "Input should be 'qkv', 'proj', 'fc1' or 'fc2'"),
        ("slm", {"upcycle": {"experts": 2}, "method": "x"}, "`upcycle` makes an MoE of trained models: give `init`"),
        ("moe", {"method": None}, "give `method`, its name in tables"),
        ("moe", {"lora": {}}, "`lora` trains adapters only"),
        ("moe", {"upcycle": {"experts": 8, "top_k": 1}}, "upcycle.top_k 1 scales an expert's output by its probability"),
        ("moe", {"upcycle": {"experts": 4, "route": "cluster"}}, "upcycle.route: cluster has no router to train: drop it"),
        ("moe", {"upcycle": {"experts": 8, "residual": True}}, "upcycle.residual have no weights to start from"),
        ("moe", {"upcycle": {"experts": 8, "ffn_hidden_size": 32}},
         "upcycle.ffn_hidden_size: 32, and the feed-forward parts of 'slm' have 64: drop it"),
        ("moe", {"upcycle": {"experts": 8, "every": 3}}, "moe.every 3 is more than layers 2"),
        ("moe", {"init": "moe-mix"}, "upcycle: 'moe-mix' is an MoE already: drop `upcycle`"),
        ("moe", {"init": "pn"}, "init: 'pn' is a projected network"),
        ("moe-mix", {"upcycle": {"experts": 6}}, "upcycle.experts: 6, and 'mix' has 4 models"),
        ("moe-tuned", {"lora": {}}, "lora.linears fc1, fc2: the feed-forward parts of this model are experts"),
        ("tuned", {"init": "mix"}, "init: 'mix' is a mixture of experts, not one model: choose one with a stage"),
        ("tuned", {"init": "pn"}, "'pn' is a projected network, not one model"),
        ("perplexity", {"models": ["pn"]}, "'pn' is a projected network"),
        ("chosen", {"experts": "slm"}, "'slm' makes one model: name a train stage with `data: cluster`"),
        ("chosen", {"by": "histogram"}, "histogram mixes the codes of a projected network"),
        ("chosen", {"by": "halving"}, "need a `trial`"),
        ("student", {"distill": {"teacher": "llm-tuned", "alpha": 1.5}}, "less than or equal to 1"),
        ("student", {"distill": {"teacher": "llm-tuned", "alpha": -0.1}}, "greater than or equal to 0"),
        ("student", {"distill": {"teacher": "mix"}}, "distill.teacher: 'mix' is a mixture of experts"),
        ("student", {"parallel": {"pipeline_parallel": 2}}, "make a cache with a stage of kind `teach`"),
        ("cached", {"distill": {"teacher": "slm", "cache": "taught"}},
         "distill.teacher: slm, and the cache `taught` was made with llm-tuned"),
        ("cached", {"distill": {"teacher": "llm-tuned", "cache": "taught", "temperature": 2.0}},
         "distill.temperature: 2.0, and the cache `taught` was made with 1.0"),
        ("cached", {"replay_fraction": 0.1}, "`distill.cache` holds the domain's windows only"),
        ("taught", {"keep": "top-k", "count": 501}, "count: 501 of a vocabulary of 500"),
        ("taught", {"count": None}, "`count` goes with"),
        ("slm", {"replay_fraction": 0.1}, "`replay_fraction` goes with `data: domain`"),
        ("slm", {"budget": "proportional"}, "`budget` goes with `data: cluster`"),
        ("tuned", {"domain_fraction": 0.1}, "`domain_fraction` goes with `data: generic` or `data: importance`"),
        ("slm", {"recipe": "paper"}, "`recipe` goes with `data: domain`"),
        ("tuned", {"assignment": "assignment"}, "`assignment` goes with"),
        ("pn", {"model": None, "init": "slm"}, "`projection` goes with a `model`"),
        ("pn", {"domain_fraction": 0.1}, "`domain_fraction` does not go with `projection`"),
        ("slm", {"data": "genric"}, "must be one of generic, cluster, importance, domain (got 'genric'); did you mean"),
        ("slm", {"data": None}, "slm.data: must be one of"),
        ("tuned", {"recpie": "paper"}, "tuned.recpie: unknown key; did you mean 'recipe'"),
        ("pn", {"projection": {"expert": 4}}, "pn.projection.expert: unknown key; did you mean 'experts'"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_before_anything_runs(
    tmp_path: Path, stage: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_graph(_load(tmp_path, **{stage: fields}))
    assert words in str(refusal.value)
    assert f"stages.{stage}" in str(refusal.value)


def test_settings_of_other_data_may_stand_at_their_defaults(tmp_path: Path) -> None:
    """Earlier versions wrote every setting into the configs that they resolved."""
    others = {
        "clusters": None, "budget": "equal", "replay_fraction": 0.0, "domain_fraction": 0.0, "recipe": None,
        "assignment": None, "projection": None, "windows_per_expert": None, "soup": None,
    }  # fmt: skip
    spelled = {name: {**others, **STAGES[name]} for name in ("slm", "mix", "pn", "tuned", "early", "replay")}
    assert _load(tmp_path, **spelled) == _load(tmp_path)


def test_defaults_of_trainings_are_for_those_that_have_the_setting(tmp_path: Path) -> None:
    _load(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    defaults = {"replay_fraction": 0.25, "clusters": [0, 1], "domain_fraction": 0.5, "recipe": "paper"}
    config["defaults"] = {"train": defaults}
    for name in ("pn", "cached", "gated", "gated-chosen", "gated-tuned"):  # with which some of these do not go
        del config["stages"][name]
    config["stages"]["soup"]["experts"] = "mix"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = load_pipeline(tmp_path / "config.yaml").model_dump()["stages"]
    has = {"slm": ["domain_fraction"], "mix": ["clusters"], "tuned": ["replay_fraction", "recipe"]}
    for name, settings in has.items():
        given = {key: found[name][key] for key in defaults if key in found[name]}
        assert given == {key: defaults[key] for key in settings}, name
    config["defaults"]["train"]["recpie"] = "paper"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"slm\.recpie: unknown key"):
        load_pipeline(tmp_path / "config.yaml")


def test_clusters_of_other_windows_are_refused(tmp_path: Path) -> None:
    other = {"short": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": 8}}
    with pytest.raises(
        ConfigError, match=r"mix.tokens: short, and `assignment` has the clusters of the windows of `tokens`"
    ):
        build_graph(_load(tmp_path, **other, mix={"tokens": "short"}, chosen={"tokens": "short"}))


def test_a_domain_is_not_named_as_an_expert(tmp_path: Path) -> None:
    config = yaml.safe_load((_load(tmp_path), (tmp_path / "config.yaml").read_text())[1])
    config["text"]["domains"]["c4"] = config["text"]["domains"]["law"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"domain name 'c4': .* by the experts of clusters"):
        load_pipeline(tmp_path / "config.yaml")


def test_more_experts_leave_those_that_are_there_as_they_are(tmp_path: Path) -> None:
    """And how many windows go through at a time decides nothing."""
    digests = []
    for clusters in ([0, 1], [0, 1, 3]):
        pipeline = _load(tmp_path, mix={"clusters": clusters}, **{"moe-mix": {"upcycle": {"experts": 6}}})
        task = build_graph(pipeline)[TaskId("mix", "c0")]
        digests.append(digest(pipeline, task, inputs=dict.fromkeys(task.inputs, ""), file_hashes={}))
    assert digests[0] == digests[1]


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    others = {"tokenizer-2": {"kind": "tokenizer"}, "tokens-2": {"kind": "tokenize", "tokenizer": "tokenizer-2"}}
    with pytest.raises(ConfigError, match="of tokenizer `tokenizer-2`: name tokens that"):
        build_graph(_load(tmp_path, **others, llm={"tokens": "tokens-2"}, **{"llm-tuned": {"tokens": "tokens-2"}}))


def test_an_override_of_one_stage_leaves_those_of_the_same_anchor(tmp_path: Path) -> None:
    _load(tmp_path)
    config = tmp_path / "config.yaml"
    anchored = "\n  one: &one {kind: train, tokens: tokens, data: domain, init: slm, steps: 3, global_batch_size: 8, "
    anchored += "schedule: {warmup_steps: 0}, optimizer: {learning_rate: 0.5}}\n  other: {<<: *one, init: llm}\n"
    config.write_text(config.read_text().replace("stages:\n", f"stages:{anchored}"))
    stages = load_pipeline(config, ["stages.other.optimizer.learning_rate=0.25"]).stages
    assert [stages[name].optimizer.learning_rate for name in ("one", "other")] == [0.5, 0.25]
