"""Early stopping validates on text that is like what the model is trained for: which windows, and the mean over them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_specialm.base.artifacts import begin_artifact
from megatron_specialm.base.errors import DataError
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import Optimizer, TrainStage
from megatron_specialm.data import training_data
from megatron_specialm.data.experts import ExpertStream
from megatron_specialm.data.store import MIXTURE, TokenStore
from megatron_specialm.data.training_data import TrainingData, open_training_data
from megatron_specialm.data.validation import HeldOut, all_windows, by_expert, clusters_of, like, of_cluster
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.estimate.flops import forward_flops
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import HELD_OUT
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.stages import assign, cluster, embed, select, tokenize, tokenizer, train
from megatron_specialm.train.evaluation import score
from megatron_specialm.train.work import WorkRecord
from tests.clusters import cluster_index
from tests.contexts import make_context
from tests.training import SHAPE, VOCABULARY, MemoryStore, read_metrics

CLUSTERS = np.array([0, 2, 1, 0, 0, 2, 0, 0, 1, 0, 2])  # of eleven held-out windows; none is in cluster 3
INDEX = cluster_index(CLUSTERS, k=4)
STORE = MemoryStore(len(CLUSTERS), seed=3)


@pytest.fixture
def engine(alone: None) -> MegatronEngine:
    model = Gpt(SHAPE, vocabulary_size=VOCABULARY, context_length=16)
    model.initialize(seed=0)
    return MegatronEngine(model, parallel=ParallelConfig(), optimizer=Optimizer(), micro_batch_size=4)


def _window_losses() -> list[tuple[float, int]]:
    """Of each held-out window alone: its summed loss and its tokens."""
    model = Gpt(SHAPE, vocabulary_size=VOCABULARY, context_length=16)
    model.initialize(seed=0)
    return [score(model, [STORE.batch(np.array([number]))])[:2] for number in range(len(CLUSTERS))]


def _mean(held_out: HeldOut, engine: MegatronEngine) -> float:
    return engine.evaluate(held_out.batches(batch_size=4)).mean


def test_clusters_are_those_of_the_index() -> None:
    assert clusters_of(INDEX).tolist() == CLUSTERS.tolist()


def test_a_clusters_expert_is_validated_on_its_own_windows(engine: MegatronEngine) -> None:
    held_out = of_cluster(STORE, INDEX, 2)
    assert held_out.ids.tolist() == [1, 5, 10]
    losses = _window_losses()
    total, tokens = (sum(losses[number][part] for number in (1, 5, 10)) for part in (0, 1))
    assert _mean(held_out, engine) == pytest.approx(total / tokens, rel=1e-5)


def test_weighted_tokens_are_counted_exactly(engine: MegatronEngine) -> None:
    """However they are dealt out to processes: in fp32 the count of a batch would be rounded."""
    weights = np.full(len(CLUSTERS), (1 << 24) - 3, np.float32)
    counted = engine.evaluate(HeldOut(STORE, np.arange(len(CLUSTERS)), weights).batches(batch_size=4)).tokens
    assert counted == ((1 << 24) - 3) * sum(tokens for _, tokens in _window_losses())


def test_importance_is_the_weighted_mean(engine: MegatronEngine) -> None:
    target = np.array([0.1, 0.6, 0.2, 0.1])
    held_out, lost = like(STORE, INDEX, target)
    assert held_out.ids.tolist() == list(range(11)) and lost == pytest.approx(0.1)
    weights = (target[:3] / [6, 2, 3])[CLUSTERS]
    losses = _window_losses()
    total, tokens = (sum(w * loss[part] for w, loss in zip(weights, losses, strict=True)) for part in (0, 1))
    assert _mean(held_out, engine) == pytest.approx(total / tokens, rel=1e-5)
    assert abs(_mean(held_out, engine) - _mean(all_windows(STORE), engine)) > 1e-3, (
        "another number than without weights"
    )


def test_a_domain_like_the_generic_set_is_validated_as_the_generic_set(engine: MegatronEngine) -> None:
    held_out, lost = like(STORE, INDEX, np.array([6, 2, 3, 0]) / 11)
    assert lost == 0
    assert _mean(held_out, engine) == pytest.approx(_mean(all_windows(STORE), engine), rel=1e-6)


def test_clusters_that_are_not_trained_on_are_not_computed() -> None:
    held_out, _ = like(STORE, INDEX, np.array([0.0, 1.0, 0.0, 0.0]))
    assert held_out.ids.tolist() == [2, 8]
    with pytest.raises(
        DataError, match=r"the 11 held-out .* in 3 clusters, and none of the 1 clusters that are trained"
    ):
        like(STORE, INDEX, np.array([0.0, 0.0, 0.0, 1.0]))


def test_unequal_weights_count_as_fewer_tokens() -> None:
    tokens = STORE.batch(np.arange(len(CLUSTERS))).mask.sum(axis=1).astype(int)
    assert all_windows(STORE).effective_tokens == by_expert(STORE, INDEX).effective_tokens == tokens.sum()
    assert of_cluster(STORE, INDEX, 2).effective_tokens == tokens[[1, 5, 10]].sum()
    assert of_cluster(STORE, INDEX, 3).effective_tokens == 0
    alike, _ = like(STORE, INDEX, np.array([6, 2, 3, 0]) / 11)
    assert alike.effective_tokens == pytest.approx(tokens.sum(), rel=1e-3), "rounded weights"
    unlike, _ = like(STORE, INDEX, np.array([0.01, 0.98, 0.01, 0.0]))
    both = tokens[[2, 8]].sum()
    assert both < unlike.effective_tokens < 1.1 * both, "nearly all weight is on two windows"


def test_windows_of_a_network_go_to_their_clusters_experts() -> None:
    held_out = by_expert(STORE, INDEX)
    seen = []
    for batch in held_out.batches(batch_size=4):
        mixtures = batch.extra_inputs[MIXTURE]
        assert mixtures.shape[1] == 4 and (mixtures == mixtures[0]).all()
        expected = STORE.batch(np.flatnonzero(mixtures[0].argmax() == CLUSTERS))
        assert all(row in expected.tokens.tolist() for row in batch.tokens.tolist())
        seen += batch.tokens.tolist()
    assert sorted(seen) == sorted(STORE.batch(np.arange(11)).tokens.tolist())


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("held_out", [all_windows(STORE), by_expert(STORE, INDEX), of_cluster(STORE, INDEX, 1)])
def test_all_processes_have_equally_many_batches_and_every_window_counts_once(
    held_out: HeldOut, processes: int
) -> None:
    dealt = [list(held_out.batches(batch_size=4, rank=rank, processes=processes)) for rank in range(processes)]
    assert len({len(batches) for batches in dealt}) == 1 and dealt[0]
    tokens = sum(batch.mask.sum() for batches in dealt for batch in batches)
    assert tokens == STORE.batch(held_out.ids).mask.sum()
    for batches in dealt:
        assert all((MIXTURE in batch.extra_inputs) == (held_out.clusters is not None) for batch in batches)


# --- the tasks that it takes ----------------------------------------------------------------------------------------------

TOPICS = ("sea", "law", "sun")
EARLY = {"evaluate_every": 2}
MODEL = {"layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "attention_heads": 2}
TRAIN: dict[str, Any] = {
    "kind": "train", "tokens": "tokens", "steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "model": MODEL,
    "packing": "none", "schedule": {"warmup_steps": 0}, "early_stopping": EARLY,
}  # fmt: skip
FLOOR = {
    "documents": 6,
    "tokens": 70,
}  # 6 documents of the domain are held out, and about 16 of each topic: 13 tokens each
BY_CLUSTER = {"assignment": "assignment"}
STAGES: dict[str, Any] = {
    "tokenizer": {"kind": "tokenizer", "vocabulary_size": 280},
    "tokens": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": 32, "validation_fraction": 0.2},
    "vectors": {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "tfidf", "dimensions": 3}},
    "clusters": {"kind": "cluster", "vectors": "vectors", "k": 3},
    "assignment": {"kind": "assign", "clusters": "clusters", "vectors": "vectors"},
    "slm": {**TRAIN, "data": "generic"},
    "mix": {**TRAIN, **BY_CLUSTER, "data": "cluster"},
    "is": {**TRAIN, **BY_CLUSTER, "data": "importance"},
    "early": {**TRAIN, "data": "generic", "domain_fraction": 0.2},
    "is-early": {**TRAIN, **BY_CLUSTER, "data": "importance", "domain_fraction": 0.2},
    "pn": {
        **TRAIN, **BY_CLUSTER, "data": "generic", "projection": {"experts": 3, "capacity": 2, "code_size": 2},
        "windows_per_expert": 2,
    },
    "moe": {
        **TRAIN, **BY_CLUSTER, "data": "generic", "model": {**MODEL, "moe": {"experts": 3, "route": "cluster"}},
    },
    "chosen": {
        "kind": "select", "experts": "mix", "tokens": "tokens", "by": "loss", "compare": ["finetuned"], "sample_windows": 8,
        "trial": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 4, "packing": "none"},
    },
    "tuned": {**TRAIN, "data": "domain", "init": "slm", "model": None},
}  # fmt: skip
RUN = {
    "tokenizer": tokenizer.run, "tokenize": tokenize.run, "embed": embed.run, "cluster": cluster.run, "assign": assign.run,
}  # fmt: skip


def _text(topics: list[int], *, seed: int) -> str:
    """A document a line; a topic's words are its own."""
    generator = np.random.default_rng(seed)
    words = [[f"{TOPICS[topic]}{number}" for number in generator.integers(0, 8, 6)] for topic in topics]
    return "".join(f'{{"text": "{" ".join(document)}"}}\n' for document in words)


def _config(root: Path, **generic: object) -> Pipeline:
    generic = {
        "train": str(root / "generic*.jsonl"),
        "test": str(root / "law.jsonl"),
        "validation_floor": FLOOR,
        **generic,
    }
    domain = {"train": str(root / "law.jsonl"), "test": str(root / "law.jsonl"), "validation_floor": FLOOR}
    text = {"generic": generic, "domains": {"law": domain}}
    return Pipeline.model_validate({"name": "v", "root": str(root / "run"), "text": text, "stages": STAGES})


@pytest.fixture(scope="module", params=[1, 2])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Path]:
    """Text of three topics, and all that a training reads, of a set in one piece and in two shards."""
    folder = tmp_path_factory.mktemp("text")
    for part in range(2):
        (folder / f"generic{part}.jsonl").write_text(_text([0, 1, 2] * 40, seed=part))
    (folder / "law.jsonl").write_text(_text([1] * 30, seed=2))
    config, root = _config(folder, shards=request.param), folder / "run"
    for task in build_graph(config).values():
        stage = config.stages[task.id.stage]
        if stage.kind in RUN:
            made = begin_artifact(root, *task.id, digest="t")
            RUN[stage.kind](stage, make_context(config, task, root, made))
    return config, root


def _reading(prepared: tuple[Pipeline, Path], stage: str, key: str) -> TrainingData:
    config, root = prepared
    task, settings = build_graph(config)[TaskId(stage, key)], config.stages[stage]
    assert isinstance(settings, TrainStage)
    return open_training_data(settings, make_context(config, task, root, root / stage / key))


def _held_out(prepared: tuple[Pipeline, Path], stage: str, key: str) -> HeldOut:
    held_out = _reading(prepared, stage, key).held_out
    assert held_out is not None
    return held_out


def _topics(prepared: tuple[Pipeline, Path], held_out: HeldOut) -> Iterator[str]:
    """Of each window that is validated on, its topic: the store's text decoded."""
    _, root = prepared
    words = tokenizer.Tokenizer.load(root / "tokenizer/generic")
    assert isinstance(held_out.store, TokenStore)
    for number in held_out.ids:
        yield words.decode(held_out.store.window(int(number))).strip()[:3]


def test_each_kind_of_training_is_validated_on_its_own_text(prepared: tuple[Pipeline, Path]) -> None:
    generic = _held_out(prepared, "slm", "generic")
    assert len(generic.ids) == len(generic.store) and set(_topics(prepared, generic)) >= set(TOPICS)
    found = {}
    for number in range(3):
        held_out = _held_out(prepared, "mix", f"c{number}")
        (topic,) = {topic for topic in _topics(prepared, held_out) if topic in TOPICS}
        found[topic] = set(held_out.ids.tolist())
    assert set(found) == set(TOPICS) and sum(map(len, found.values())) == len(generic.ids)
    assert set(_held_out(prepared, "is", "law").ids.tolist()) == found["law"], "all of the domain is in one cluster"
    network = _held_out(prepared, "pn", "generic")
    assert network.clusters is not None
    for topic, ids in found.items():
        assert len(set(network.clusters[sorted(ids)])) == 1, topic
    for stage in ("tuned", "early", "is-early"):
        held_out = _held_out(prepared, stage, "law")
        assert isinstance(held_out.store, TokenStore) and held_out.store.folder.name == "law"
        assert len(held_out.ids) == len(held_out.store)


@pytest.mark.parametrize(
    ("stage", "key"), [("mix", "c1"), ("is", "law"), ("pn", "generic"), ("moe", "generic"), ("early", "law")]
)
def test_the_training_validates_on_them_and_pays_for_it(prepared: tuple[Pipeline, Path], stage: str, key: str) -> None:
    config, root = prepared
    held_out, task = _held_out(prepared, stage, key), build_graph(config)[TaskId(stage, key)]
    folder = begin_artifact(root, stage, key, digest="t")
    report = train.run(config.stages[stage], make_context(config, task, root, folder))
    validations = [record for record in read_metrics(folder) if record.get("event") == "validation"]
    assert [record["step"] for record in validations] == [0, 2, 4]
    assert report.values["validation_loss"] == min(record["validation_loss"] for record in validations)
    parts = np.zeros(len(held_out.ids)) if held_out.clusters is None else held_out.clusters
    batches = sum(-(-count // 2) for count in np.unique(parts, return_counts=True)[1])  # of two windows
    assert report.values["passes"]["evaluated"] == 3 * batches * 2 * 32
    assert report.values["passes"]["trained"] == report.slots == 4 * 4 * 32
    if stage == "pn":  # an expert is projected once per step, and once per four batches of a validation
        stream = _reading(prepared, stage, key).stream
        assert isinstance(stream, ExpertStream)
        assert report.values["passes"]["trained_variants"] == sum(
            len(np.unique(stream.draw(step).mixtures, axis=0)) for step in range(4)
        )
        mixtures = [batch.extra_inputs[MIXTURE][0].argmax() for batch in held_out.batches(batch_size=2)]
        fours = [set(mixtures[first : first + 4]) for first in range(0, len(mixtures), 4)]
        assert report.values["passes"]["evaluated_variants"] == 3 * sum(map(len, fours))


def test_another_incarnation_that_still_counts_changes_no_cost(prepared: tuple[Pipeline, Path]) -> None:
    config, root = prepared
    folder = begin_artifact(root, "slm", "generic", digest="t")
    given_up = threading.Event()

    def count_on() -> None:
        with WorkRecord(folder, watch=Stopwatch()) as record:
            while not given_up.wait(0.001):
                record.write(Passes(trained=1))

    other = threading.Thread(target=count_on)
    context = make_context(config, build_graph(config)[TaskId("slm", "generic")], root, folder)
    other.start()
    try:
        report = train.run(config.stages["slm"].model_copy(update={"early_stopping": None}), context)
    finally:
        given_up.set()
        other.join()
    assert report.values["passes"]["trained"] in (4 * 4 * 32, 4 * 4 * 32 + 1)  # it may have begun before us


def test_a_selection_is_charged_the_criterion_that_decides_and_no_other(prepared: tuple[Pipeline, Path]) -> None:
    config, root = prepared
    graph = build_graph(config)
    for key in ("c0", "c1", "c2"):
        folder = begin_artifact(root, "mix", key, digest="t")
        train.run(config.stages["mix"], make_context(config, graph[TaskId("mix", key)], root, folder))
    folder = begin_artifact(root, "chosen", "law", digest="t")
    context = make_context(config, graph[TaskId("chosen", "law")], root, folder)
    report = select.run(config.stages["chosen"], context)
    criteria = report.values["criteria"]
    # Three experts read eight windows each, without padding.
    padded = 3 * 8 * 32 * forward_flops(ModelConfig.model_validate(MODEL), 280, 32)
    assert report.slots == report.tokens < 3 * 8 * 32
    assert report.flops == criteria["loss"]["flops"] < padded * report.tokens / (3 * 8 * 32)
    assert report.apart.flops == criteria["finetuned"]["flops"] > report.flops
    assert 0 < report.apart.seconds < context.watch.seconds
    alone = select.run(config.stages["chosen"].model_copy(update={"compare": []}), context).values["criteria"]
    # As it was planned, but for which windows a trial draws.
    assert alone["finetuned"]["choice"] is None
    assert report.apart.flops == pytest.approx(alone["finetuned"]["flops"], rel=0.1)


def test_a_cluster_without_held_out_windows_is_refused_before_training(
    prepared: tuple[Pipeline, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = prepared
    folder = root / "assignment" / HELD_OUT
    order, offsets = np.load(folder / "order.npy"), np.load(folder / "offsets.npy")
    law = int(np.load(root / "assignment/law/histogram.npy").argmax())
    kept = np.repeat(np.where(np.arange(3) == law, (law + 1) % 3, np.arange(3)), np.diff(offsets))
    emptied = np.empty(len(order), np.int64)
    emptied[order] = kept
    index = cluster_index(emptied, k=3)
    real = training_data.read_index
    monkeypatch.setattr(training_data, "read_index", lambda path, **how: index if path == folder else real(path, **how))
    with pytest.raises(DataError, match=rf"cluster {law} has 0 of the \d+ held-out generic windows.*early_stopping"):
        _held_out(prepared, "mix", "c0")
    with pytest.raises(DataError, match=r"is/law: the \d+ held-out .* none of the 1 clusters .*use fewer clusters"):
        _held_out(prepared, "is", "law")


def test_a_part_of_the_held_out_windows_below_the_floor_is_refused(prepared: tuple[Pipeline, Path]) -> None:
    """The set holds out enough, what falls to a cluster is not; and a domain's set that another config has made is not."""
    config, root = prepared
    text = config.model_dump(mode="json")
    for files in (text["text"]["generic"], text["text"]["domains"]["law"]):
        files["validation_floor"] = {"tokens": 350}
    changed = Pipeline.model_validate(text)
    for stage, key in (("slm", "generic"), ("pn", "generic")):
        _held_out((changed, root), stage, key)
    with pytest.raises(DataError, match=r"mix/c1: cluster 0 has \d+ of the 48 held-out .* at least 350 .*name others"):
        _held_out((changed, root), "mix", "c1")
    with pytest.raises(
        DataError, match=r"is/law: the clusters of law have \d+ of the 48 held-out .* use fewer clusters"
    ):
        _held_out((changed, root), "is", "law")
    for stage in ("tuned", "early", "is-early"):
        with pytest.raises(DataError, match=r"text\.domains\.law: 6 documents of 78 tokens held out"):
            _held_out((changed, root), stage, "law")
    with pytest.raises(DataError, match=r"text\.domains\.law: 6 documents of 78 tokens held out"):
        task = build_graph(changed)[TaskId("chosen", "law")]
        select.run(changed.stages["chosen"], make_context(changed, task, root, root / "chosen/law"))


def test_held_out_windows_have_tasks_of_their_own_only_where_a_training_asks(prepared: tuple[Pipeline, Path]) -> None:
    config, root = prepared
    graph = build_graph(config)
    held_out = TaskId("vectors", HELD_OUT), TaskId("assignment", HELD_OUT)
    assert all(graph[name].domain is None for name in held_out)
    readers = {name.stage for name, task in graph.items() if held_out[1] in task.inputs}
    assert readers == {"mix", "is", "pn", "moe"}
    silent = {name: {**stage, "early_stopping": None} if "steps" in stage else stage for name, stage in STAGES.items()}
    plain = Pipeline.model_validate({**config.model_dump(mode="json"), "stages": silent})
    assert not set(held_out) & set(build_graph(plain))
    ours, theirs = make_plan(config, root), make_plan(plain, root)
    for name in theirs:
        if config.stages[name.stage].kind in RUN:
            assert ours[name].digest == theirs[name].digest, "what was prepared before serves on"
