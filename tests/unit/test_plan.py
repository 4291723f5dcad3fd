import json
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact
from megatron_specialm.base.errors import ArtifactError, ConfigError, DataError
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import make_plan, select_tasks, write_resolved
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.preflight import read_first_documents
from tests.texts import write_smoke_names

SMOKE = configs_folder() / "pipelines" / "smoke.yaml"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the smoke config's files."""
    monkeypatch.chdir(tmp_path)
    return write_smoke_names(tmp_path)


def _digests(*overrides: str) -> dict[TaskId, str]:
    return {name: planned.digest for name, planned in make_plan(_load(*overrides), Path("run")).items()}


def _load(*overrides: str) -> Pipeline:
    return load_pipeline(SMOKE, overrides)


def _changed(before: dict[TaskId, str], after: dict[TaskId, str]) -> set[str]:
    return {name.stage if name.key == "generic" else str(name) for name in before if before[name] != after[name]}


def test_a_setting_changes_its_stage_and_what_rests_on_it(text: Path) -> None:
    changed = _changed(_digests(), _digests("stages.slm.steps=11"))
    assert {"slm", "slm-tuned/torch", "perplexity/slm.generic"} <= changed
    assert not {"tokens", "slm-is/torch", "slm-nopt/torch"} & changed


def test_where_and_in_what_portions_it_runs_changes_nothing(text: Path) -> None:
    elsewhere = _digests("stages.slm.parallel.data_parallel=2", "stages.slm.micro_batch_size=4", "local.threads=2",
                         "root=other", "stages.slm.checkpoint.every=3", "text.made_by=make text")  # fmt: skip
    assert _digests() == elsewhere


def test_the_seed_and_the_texts_content_are_part_of_it(text: Path) -> None:
    before = _digests()
    assert _changed(before, _digests("seed=1")) >= {"tokenizer", "slm"}
    (text / "torch.train.jsonl").write_text(json.dumps({"text": "other words"}) + "\n")
    changed = _changed(before, _digests())
    assert {"tokens/torch", "slm-tuned/torch", "slm-is/torch"} <= changed
    assert not {"tokenizer", "slm", "slm-tuned/scipy"} & changed


def test_the_training_seed_is_that_of_trainings_alone(text: Path) -> None:
    before = _digests()
    assert _digests("training_seed=0") == before and _digests("seed=0") == before
    stages = _load().stages
    changed = {
        stages[name.stage].kind for name, digest in _digests("training_seed=1").items() if digest != before[name]
    }
    same = {stages[name.stage].kind for name, digest in _digests("training_seed=1").items() if digest == before[name]}
    assert changed == {"train", "select", "teach", "evaluate", "export"} & {stage.kind for stage in stages.values()}
    assert same == {"tokenizer", "tokenize", "embed", "cluster", "assign"}
    # All of them have their own: none is only the same as another seed's of text.
    assert not set(_digests("seed=1", "training_seed=0").values()) & {
        *before.values(),
        *_digests("seed=1").values(),
    } - {digest for name, digest in _digests("seed=1").items() if stages[name.stage].kind in same}


def test_states(text: Path) -> None:
    root, name = Path("run"), TaskId("tokenizer", "generic")
    plan = make_plan(_load(), root)
    assert plan[name].state == "to do"
    begin_artifact(root, *name, digest=plan[name].digest)
    assert make_plan(_load(), root)[name].state == "to do", "begun is not done"
    finish_artifact(root, *name, Marker(plan[name].digest, Cost(0, 0, 1.0, 1.0, "cpu", 1), {}, {}))
    assert make_plan(_load(), root)[name].state == "done"
    assert make_plan(_load("seed=3"), root)[name].state == "stale"


def test_beginning_keeps_an_unfinished_attempt_and_removes_nothing_of_another_digest(tmp_path: Path) -> None:
    folder = begin_artifact(tmp_path, "slm", "generic", digest="a")
    (folder / "half").touch()
    assert (begin_artifact(tmp_path, "slm", "generic", digest="a") / "half").exists()
    assert not (begin_artifact(tmp_path, "slm", "generic", digest="b") / "half").exists()
    assert (folder / "half").exists()


def test_missing_text_is_said_before_anything_runs(text: Path) -> None:
    (text / "torch.test.jsonl").unlink()
    with pytest.raises(DataError, match=r"torch\.test\.jsonl: no such file"):
        make_plan(_load(), Path("run"))


def test_check_reads_the_first_documents(text: Path) -> None:
    read_first_documents(_load())
    with pytest.raises(
        DataError, match=r"torch\.train\.jsonl:1: no key 'texd'; did you mean 'text'\?; its keys are 'text'"
    ):
        read_first_documents(_load("text.domains.torch.text_field=texd"))
    (text / "scipy.test.jsonl").write_text("no JSON\n")
    with pytest.raises(DataError, match=r"scipy\.test\.jsonl:1: not JSON"):
        read_first_documents(_load())


def test_a_part_of_the_plan(text: Path) -> None:
    plan = make_plan(_load(), Path("run"))
    assert {name.stage for name in select_tasks(plan, only=None, until="clusters")} == {
        "tokenizer",
        "tokens",
        "vectors",
        "clusters",
    }
    with pytest.raises(ArtifactError, match=r"slm/generic reads tokenizer/generic, which is to do: .* --until slm"):
        select_tasks(plan, only="slm", until=None)
    assert {name.stage for name in select_tasks(plan, only="tokenizer", until=None)} == {"tokenizer"}
    with pytest.raises(ConfigError, match="no stage 'slmm'"):
        select_tasks(plan, only="slmm", until=None)


def test_one_stage_alone_does_not_read_stale_work(text: Path) -> None:
    root = Path("run")
    for name, planned in make_plan(_load(), root).items():
        begin_artifact(root, *name, digest=planned.digest)
        finish_artifact(root, *name, Marker(planned.digest, Cost(0, 0, 0.0, 0.0, "cpu", 1), {}, {}))
    assert select_tasks(make_plan(_load(), root), only="clusters", until=None)
    with pytest.raises(ArtifactError, match="reads vectors/generic, which is stale"):
        select_tasks(make_plan(_load("stages.tokenizer.vocabulary_size=301"), root), only="clusters", until=None)


def test_a_run_folder_belongs_to_one_pipeline(text: Path) -> None:
    write_resolved(_load(), Path("run"))
    write_resolved(_load("seed=2"), Path("run"))
    with pytest.raises(ConfigError, match="holds the run of pipeline 'smoke'"):
        write_resolved(_load("name=another"), Path("run"))
