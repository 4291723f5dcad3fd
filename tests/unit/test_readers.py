"""Every kind of file that a reader opens, damaged in every way: the error is typed and names the file and what to do."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_specialm.base.arrays import write_array
from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact, read_label, read_marker
from megatron_specialm.base.errors import ArtifactError, SpecialmError
from megatron_specialm.base.files import MANIFEST, publish_folder, read_json, sha256_json, write_json
from megatron_specialm.base.hash_cache import _read_cache
from megatron_specialm.base.tensors import save_tensors
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.checkpoint.opening import newest_checkpoint, open_checkpoint, read_checkpoint
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import declare_final, find_final, step_folder
from megatron_specialm.checkpoint.tensor_files import TensorFiles
from megatron_specialm.clustering.encoders import fit_encoder, load_encoder, save_encoder
from megatron_specialm.clustering.vectors import Vectors, describe_vectors
from megatron_specialm.config.load import configs_folder, dump_pipeline, load_pipeline
from megatron_specialm.config.schema import TfidfEncoder
from megatron_specialm.convert.fingerprint import FINGERPRINT
from megatron_specialm.data import clusters
from megatron_specialm.data.store import StoreWriter, TokenStore, describe_store
from megatron_specialm.data.teacher import CacheFormat, CacheWriter, TeacherCache
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.tokenizer_making import train_sentencepiece
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.report.rows import Row, read_csv, to_csv
from megatron_specialm.report.seeds import read_runs
from megatron_specialm.slurm.nodes import exclude_node, excluded_nodes
from megatron_specialm.slurm.records import JobRecord, TaskRecord, read_job_file, read_registry, write_registry
from megatron_specialm.stages.generation import open_model
from megatron_specialm.train.work import Work
from tests.clusters import cluster_index
from tests.training import SHAPE

WINDOWS, K, E, CONTEXT, VOCABULARY = 30, 3, 4, 8, 100
STATE = {"model": SHAPE.model_dump(mode="json"), "vocabulary_size": 100, "context_length": 16, "tokenizer": "t"}
TFIDF = TfidfEncoder(kind="tfidf", dimensions=3)
TEXTS = [f"{animal} {verb} in the {place}" for animal in ["cat", "dog", "cow"] for verb in ["sits", "runs"]
         for place in ["sun", "rain"]]  # fmt: skip
COSTS = {
    f"{phase}_{what}": 1
    for phase in ("generic", "specialization")
    for what in ("tokens", "flops", "device_seconds", "slots")
}
MODEL = {"method": "a", "stage": "slm", "size": None, "finetuned": True, "domain_text": "a", "perplexity": 2.7, "seed": 0,
         "devices": "cpu", "inference_parameters": 1, **COSTS}  # fmt: skip
ROW: dict[str, Any] = {**MODEL, "domain": "law", "base_domain": "law", "nll": 1}


class Kind(NamedTuple):
    """A file, what makes it (and the files around it) in a folder, and what reads it. `sealed`: no changed bit may pass."""

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    sealed: bool = False


def _make_store(folder: Path) -> None:
    writer = StoreWriter(folder, "train", context_length=CONTEXT, vocabulary_size=VOCABULARY)
    for length in range(1, WINDOWS + 1):
        writer.add_document(np.arange(length) % 90 + 1)
    describe_store(
        folder, splits={"train": {**writer.finish(), "skipped": 0}}, tokenizer="t", context_length=CONTEXT,
        vocabulary_size=VOCABULARY, eod=0,
    )  # fmt: skip


def _read_store(folder: Path) -> None:
    store = TokenStore.open(folder, "train")
    store.batch(np.arange(len(store)))


def _make_vectors(folder: Path) -> None:
    write_array(folder / "train.npy", np.random.default_rng(0).normal(size=(WINDOWS, E)).astype(np.float32))
    describe_vectors(folder)


def _make_cache(folder: Path) -> None:
    draw = np.random.default_rng(0)
    writer = CacheWriter(
        folder, CacheFormat("top-k", VOCABULARY, count=2), context_length=CONTEXT, teacher="te", store="st"
    )
    for length in (3, 8, 1):
        values = {"log_probabilities": draw.normal(size=(length, 2)), "tail": draw.normal(size=length)}
        writer.add({"ids": draw.integers(0, VOCABULARY, (length, 2)), **values})
    writer.finish()


def _read_cache_of_teacher(folder: Path) -> None:
    cache = TeacherCache.open(folder, teacher="te", store="st")
    cache.extra_inputs(np.arange(len(cache)))


def _make_clusters(folder: Path) -> None:
    clusters = (np.arange(WINDOWS) % K).astype(np.int32)
    index = cluster_index(clusters, k=K)
    assert index.order is not None
    write_array(folder / "clusters.npy", clusters)
    write_array(folder / "order.npy", index.order)
    write_array(folder / "offsets.npy", index.offsets)
    write_array(folder / "histogram.npy", index.sizes / WINDOWS)
    write_array(folder / "centroids.npy", np.random.default_rng(0).normal(size=(K, E)).astype(np.float32))


def _read_index(folder: Path) -> None:
    clusters.read_index(folder, windows=WINDOWS, k=K)


def _make_training(folder: Path) -> None:
    for step in (1, 2):
        save_checkpoint(
            folder, step=step, weights={"w": torch.full((4,), float(step))}, optimizer_state={"step": torch.ones(1)},
            state={**STATE, "progress": {"step": step}},
        )  # fmt: skip
    declare_final(folder, step=2)


def _read_training(folder: Path) -> None:
    assert read_merged(find_final(folder)).weights["w"].tolist() == [2.0] * 4


def _make_encoder(folder: Path) -> None:
    save_encoder(fit_encoder(TFIDF, lambda count: TEXTS[:count], seed=0, threads=1), folder)


def _read_encoder(folder: Path) -> None:
    load_encoder(TFIDF, folder, threads=1).encode(TEXTS)


def _make_tokenizer(folder: Path) -> None:
    train_sentencepiece(TEXTS * 5, folder, vocabulary_size=290, algorithm="bpe", sample_characters=10**6)


def _make_registry(folder: Path) -> None:
    job = JobRecord("0001", "slm", "slm", "17", "c", ((TaskRecord("law", "d"),),), ("15",), 1.5, 4)
    write_registry(folder, [job])
    task = {**asdict(job.elements[0][0]), "made_from": {"seed": 0}}
    write_json(folder / "jobs" / "slm.json", {"stage": job.stage, "elements": [[task]]})


def _make_results(folder: Path) -> None:
    cluster = {"stage": "assignment", "domain": "law", "base_domain": "law", "size": None, "k": 2, "windows": 9,
               "top_share": 0.5, "entropy": 1.0, "effective_clusters": 2.7, "seed": 0}  # fmt: skip
    parts = {"rows": [ROW], "macro": [{**MODEL, "domains": 1}], "concentration": [cluster]}
    write_json(folder / "results.json", {"pipeline": "p", **parts, "selection": [], "learning_rates": []})


def _make_export(folder: Path) -> None:
    (folder / "aside").mkdir()
    write_json(folder / "aside" / "config.json", {"model_type": "llama"})
    write_json(folder / "aside" / FINGERPRINT, {})  # by which it is known as ours where the manifest is missing
    save_tensors({"w": torch.ones(4)}, folder / "aside" / "model.safetensors")
    publish_folder(folder / "aside", folder / "model")


def _make_artifact(folder: Path) -> None:
    digest = sha256_json(made_from := {"seed": 0})
    made = begin_artifact(folder, "slm", "law", digest=digest, made_from=made_from)
    finish_artifact(folder, "slm", "law", Marker(digest, Cost(1, 2, 3.5, 4.0, "cpu", 1), {"sets": {}}, {"torch": "2"}))
    for name in ("done.json", "task.json"):
        (made / name).rename(folder / name)


def _make_config(folder: Path) -> None:
    config = load_pipeline(configs_folder() / "pipelines" / "smoke.yaml")
    (folder / "pipeline.yaml").write_text(dump_pipeline(config))


KINDS = [
    *(Kind(name, _make_store, _read_store) for name in ("store.json", "train.bin", "train.idx")),
    *(Kind(name, _make_vectors, lambda f: Vectors(f).rows(np.arange(WINDOWS))) for name in ("vectors.json", "train.npy")),
    *(
        Kind(name, _make_cache, _read_cache_of_teacher)
        for name in ("cache.json", "lengths.bin", "ids.bin", "log_probabilities.bin", "tail.bin")
    ),
    Kind("clusters.npy", _make_clusters, lambda f: clusters.read_clusters(f, k=K)),
    Kind("histogram.npy", _make_clusters, lambda f: clusters.read_histogram(f, k=K)),
    Kind("centroids.npy", _make_clusters, lambda f: clusters.read_centroids(f, k=K, dimensions=E)),
    *(Kind(name, _make_clusters, _read_index) for name in ("order.npy", "offsets.npy")),
    Kind("result.json", _make_training, _read_training),
    *(
        Kind(f"step_0000002/{name}", _make_training, _read_training, sealed=name != MANIFEST)
        for name in (MANIFEST, "state.json", "model-00000.safetensors", "optimizer-00000.safetensors")
    ),
    *(Kind(name, _make_encoder, _read_encoder, sealed=name != MANIFEST) for name in (MANIFEST, "words.json", "tfidf.npz")),
    *(
        Kind(name, _make_tokenizer, lambda f: Tokenizer.load(f).encode(TEXTS))
        for name in ("tokenizer.json", "settings.json", "sentencepiece.model")
    ),
    Kind("jobs/jobs.json", _make_registry, read_registry),
    Kind("jobs/slm.json", _make_registry, lambda f: read_job_file(f / "jobs" / "slm.json")),
    Kind("done.json", _make_artifact, read_marker, sealed=True),
    Kind("task.json", _make_artifact, read_label),
    Kind("nodes.json", lambda f: exclude_node(f, "node1", reason="r"), excluded_nodes),
    Kind("results.json", _make_results, lambda f: read_runs([f / "results.json"])),
    Kind("rows.csv", lambda f: (f / "rows.csv").write_text(to_csv([ROW])), lambda f: read_csv(f / "rows.csv", Row)),
    Kind("pipeline.yaml", _make_config, lambda f: load_pipeline(f / "pipeline.yaml")),
    *(
        Kind(f"model/{name}", _make_export, lambda f: open_model(f / "model"), sealed=name != MANIFEST)
        for name in (MANIFEST, "config.json", "model.safetensors")
    ),
]  # fmt: skip
# Where nothing was submitted, no node has failed, a task has not finished, and of an encoder of earlier versions.
MAY_BE_MISSING = {"jobs/jobs.json", "nodes.json", "done.json", MANIFEST}


def _noise(content: bytes) -> bytes:
    return random.Random(0).randbytes(len(content))


def _npy(dtype: str, shape: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(69)
    return b"\x93NUMPY\x01\x00\x46\x00" + text.encode() + b"\n."


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: max(content.find(b":", len(content) // 2), len(content) // 2)],  # of YAML: in a key
    "its last byte cut": lambda content: content[:-2],
    "zeros": lambda content: bytes(len(content)),
    "noise": _noise,
    "a number": lambda _: b"7",
    "a list": lambda _: b"[1, null]",
    "an empty mapping": lambda _: b"{}",
    "deep": lambda _: b"[" * 100_000,
    "an array of objects": lambda _: _npy("|O", "(1,)"),
    "an array of nothing": lambda _: _npy("<f4", "(0,)"),
}  # fmt: skip


# What is as good as another content, to a reader that does not know the hash which the task's marker has.
STILL_GOOD = {
    *(
        ("train.bin", "zeros"),
        ("ids.bin", "zeros"),
        ("nodes.json", "an empty mapping"),
        ("rows.csv", "its last byte cut"),
    ),
    *((name, damage) for name in ("log_probabilities.bin", "tail.bin") for damage in ("zeros", "noise")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """A folder with the files of a kind, whole; it is made once."""
    folders: dict[Any, Path] = {}

    def make(kind: Kind) -> Path:
        if kind.make not in folders:
            folders[kind.make] = tmp_path_factory.mktemp("made")
            kind.make(folders[kind.make])
        return folders[kind.make]

    return make


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.file)
def test_whatever_is_wrong_with_a_file_is_said_of_it(made: Callable[[Kind], Path], kind: Kind) -> None:
    folder = made(kind)
    path = folder / kind.file
    whole = path.read_bytes()
    if not kind.file.startswith("model/"):  # of an export that no library could load, only the damage is looked at
        kind.read(folder)
    try:
        for name, damage in DAMAGES.items():
            path.write_bytes(damage(whole))
            _refused(kind, folder, name, may_pass=(kind.file, name) in STILL_GOOD)
        path.unlink()
        if kind.file not in MAY_BE_MISSING:
            _refused(kind, folder, "missing")
        path.mkdir()
        _refused(kind, folder, "a folder")
        path.rmdir()
    finally:
        path.write_bytes(whole)


def _refused(kind: Kind, folder: Path, damage: str, *, may_pass: bool = False) -> None:
    try:
        kind.read(folder)
    except SpecialmError as error:  # of two files that do not fit together, a reader may name the other one
        assert may_pass or Path(kind.file).name in str(error), f"{damage}: {error}"
    except Exception as error:
        raise AssertionError(f"{kind.file}, {damage}: {error!r}") from error
    else:
        assert may_pass, f"{kind.file}, {damage}: nothing was said"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.file)
def test_no_changed_bit_is_a_bug_of_ours(made: Callable[[Kind], Path], kind: Kind) -> None:
    """Of a file without a hash of its own a reader may not notice it, but it gets no exception from a library."""
    folder = made(kind)
    path = folder / kind.file
    whole = path.read_bytes()
    draw = random.Random(0)
    places = [*range(min(len(whole), 140)), *(draw.randrange(len(whole)) for _ in range(60))]
    try:
        for place in draw.sample(places, min(len(places), 90)):
            content = bytearray(whole)
            content[place] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            _refused(kind, folder, f"a bit of byte {place}", may_pass=not kind.sealed)
    finally:
        path.write_bytes(whole)


def _array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda path: np.save(path, change(np.load(path)))


def _text(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def _bytes(place: int, new: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:place] + new + content[place + len(new) :])

    return change


def _put(array: np.ndarray, place: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("order.npy", _array(lambda a: _put(a, 3, WINDOWS)), "order.npy: has numbers from 0 to 30"),
        ("order.npy", _array(lambda a: a[:-1]), r"order.npy: int32 of shape \(29,\), where int32 of shape \(30\) belongs"),
        ("order.npy", _array(lambda a: a.astype(np.int64)), "order.npy: int64 of shape"),
        ("offsets.npy", _array(lambda a: a[[0, 2, 1, 3]]), "offsets.npy: does not rise"),
        ("centroids.npy", _array(lambda a: _put(a, (1, 2), np.nan)), "centroids.npy: has values that are not finite"),
        ("centroids.npy", _array(lambda a: a[:, :2]), r"centroids.npy: float32 of shape \(3, 2\)"),
        ("centroids.npy", _array(np.asfortranarray), "centroids.npy: .* column after column"),
        ("histogram.npy", _array(lambda a: _put(a, 0, -a[0])), "histogram.npy: not the frequencies"),
        ("clusters.npy", _array(lambda a: _put(a, 0, K)), "clusters.npy: has numbers from 0 to 3"),
        ("train.bin", _bytes(6, b"\xf0\xff"), "train.bin, .* has token ids from 0 to 65520 for a vocabulary of 100"),
        ("train.idx", _bytes(34, b"\x00\x00\x00\x00"), "train.idx: window 0 has 0 tokens"),
        ("train.idx", _bytes(34, b"\x00\x10\x00\x00"), "train.idx: window 0 has 4096 tokens"),
        ("store.json", _text('"windows": ', '"windows": -'), "store.json: splits.train.windows"),
        ("store.json", _text('"windows": ', '"windows": 1'), "store.json: 1.* windows of .* tokens in train, and its files"),
        ("ids.bin", _bytes(0, b"\xff\xff"), "ids.bin: has token ids"),
        ("lengths.bin", _bytes(0, b"\x04"), "lengths.bin: not the lengths of windows with 12 tokens"),
        ("cache.json", _text('"top-k"', '"best"'), "cache.json: kept.kind: Input should be"),
        ("cache.json", _text('"count": 2', '"count": 0'), "cache.json: kept: .*keeps at least 1 entry"),
        ("results.json", _text('"nll": 1', '"nll": "x"'), "results.json: rows.0.nll: .*number, and is 'x'"),
        ("results.json", _text('"perplexity": 2.7', '"perplexity": NaN'), "results.json: .*NaN is no number"),
        ("result.json", _text("step_0000002", "../other/step_0000002"), "result.json: names '../other/.* is no step of this"),
        ("result.json", _text('"step": 2', '"step": 3'), "result.json: names .* for step 3, which is no step of this"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_noticed(
    tmp_path: Path, file: str, damage: Callable[[Path], object], says: str
) -> None:
    kind = next(kind for kind in KINDS if kind.file == file)
    kind.make(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ArtifactError, match=says):
        kind.read(tmp_path)


def test_a_window_that_there_is_not(tmp_path: Path) -> None:
    _make_store(tmp_path)
    store = TokenStore.open(tmp_path, "train")
    for ids in ([0, len(store)], [-1, 0]):
        with pytest.raises(ArtifactError, match=rf"{tmp_path}: has windows 0 to .*, and windows .* are asked for"):
            store.batch(np.array(ids))


# --- what a manifest lists is what is read ----------------------------------------------------------------------------


def test_an_unlisted_file_of_weights_changes_nothing_and_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _make_training(tmp_path)
    save_tensors({"w": torch.zeros(4)}, step_folder(tmp_path, 2) / "model-00001.safetensors")
    assert read_checkpoint(find_final(tmp_path)).weights["w"].tolist() == [2.0] * 4
    assert "model-00001.safetensors: is not read" in caplog.text
    newest, passed_over = newest_checkpoint(tmp_path)
    assert newest == step_folder(tmp_path, 2) and not passed_over


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: {}, "manifest.json: lists no files"),
        (lambda files: {name: seal for name, seal in files.items() if "model" not in name}, "lists no weights"),
        (lambda files: {name: seal for name, seal in files.items() if "state" not in name}, "lists no state.json"),
        (lambda files: {**files, "../step_0000001/state.json": files["state.json"]}, "which is no file of its folder"),
        (lambda files: {**files, "/etc/hostname": files["state.json"]}, "which is no file of its folder"),
    ],
)
def test_a_manifest_must_list_weights_and_state_and_files_of_its_folder(
    tmp_path: Path, change: Callable[[dict], dict], says: str
) -> None:
    _make_training(tmp_path)
    manifest = step_folder(tmp_path, 2) / MANIFEST
    write_json(manifest, {"files": change(read_json(manifest)["files"])})
    with pytest.raises(ArtifactError, match=says):
        read_checkpoint(step_folder(tmp_path, 2))
    newest, passed_over = newest_checkpoint(tmp_path)
    assert newest == step_folder(tmp_path, 1) and says[:9] in passed_over[0]


def test_a_step_is_what_its_folder_says(tmp_path: Path) -> None:
    _make_training(tmp_path)
    step_folder(tmp_path, 2).rename(step_folder(tmp_path, 3))
    with pytest.raises(ArtifactError, match=r"step_0000003/state.json: is of step 2"):
        read_checkpoint(step_folder(tmp_path, 3))
    assert newest_checkpoint(tmp_path)[0] == step_folder(tmp_path, 1)


def test_a_tensor_stands_in_one_file_and_no_other_is_made_up(tmp_path: Path) -> None:
    paths = [tmp_path / f"model-0000{number}.safetensors" for number in range(2)]
    for path in paths:
        save_tensors({"w": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match=r"model-00001.safetensors: has w, which .*model-00000.safetensors has too"):
        TensorFiles(paths)
    with pytest.raises(ArtifactError, match=rf"{tmp_path}: has no tensor v"):
        TensorFiles(paths[:1])["v"]
    assert "v" not in TensorFiles(paths[:1])


def test_an_export_with_a_file_too_many_is_refused(tmp_path: Path) -> None:
    _make_export(tmp_path)
    write_json(tmp_path / "model" / "adapter_config.json", {})  # which Transformers would follow
    with pytest.raises(ArtifactError, match=r"adapter_config.json: manifest.json does not list it"):
        open_model(tmp_path / "model")


# --- files in which a kill or a crash may leave a part ----------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", bytes(256)])
def test_what_a_lost_machine_leaves_of_the_record_of_work_counts_as_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "work.json").write_bytes(content)
    assert Work.read(tmp_path) == Work()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"passes": {"trained": -1}, "seconds": 1.0}', '{"passes": {}, "seconds": -7195.0}', "\x01"]
)
def test_another_record_of_work_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "work.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"work.json: .*: remove it: what earlier attempts have cost"):
        Work.read(tmp_path)


def test_a_record_of_work_is_read_as_it_was_written(tmp_path: Path) -> None:
    work = Work(Passes(4, 3, 2, 1), 1.5)
    write_json(tmp_path / "work.json", {"passes": work.passes._asdict(), "seconds": work.seconds})
    assert Work.read(tmp_path) == replace(work)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"stamp": "x", "read": 0, "sha256": ""}}', ""])
def test_a_damaged_cache_of_hashes_costs_time_only(tmp_path: Path, content: str) -> None:
    (tmp_path / "file_hashes.json").write_text(content)
    assert _read_cache(tmp_path / "file_hashes.json") == {}


def test_json_has_no_other_numbers_than_computers_have(tmp_path: Path) -> None:
    for text in ("NaN", "[1e999]", "-Infinity", json.dumps("\ud800")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"a\.json"):
            read_json(tmp_path / "a.json", list[float])


def test_a_state_without_a_model_is_said(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=0, weights={"w": torch.ones(1)}, optimizer_state={}, state={"tokenizer": "t"})
    assert open_checkpoint(step_folder(tmp_path, 0)).state == {"tokenizer": "t"}
    with pytest.raises(ArtifactError, match=r"step_0000000/state.json: model: Field required"):
        read_merged(step_folder(tmp_path, 0))
