"""Finished work that is stale: what has changed is named, what it costs is asked about, and nothing is asked that is new."""

import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact
from megatron_specialm.base.errors import UnconfirmedError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.plan import make_plan, write_resolved
from megatron_specialm.graph.redo import Redo, device_time, find_redo, redo_lines, refuse_unconfirmed
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.report.plan_table import stage_table, task_table
from tests.conftest import ROOT
from tests.processes import free_port

CONFIG = """
name: small
root: run
text:
  generic: {train: [g0.txt, g1.txt], test: t.txt}
  domains:
    law: {train: law.txt, test: t.txt}
    tax: {train: tax.txt, test: t.txt}
defaults:
  train: {tokens: tokens, model: nano, global_batch_size: 8, micro_batch_size: 4, schedule: {warmup_steps: 0}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  vectors: {kind: embed, tokens: tokens, encoder: {kind: tfidf, dimensions: 4}}
  slm: {kind: train, data: generic, steps: 10}
  llm: {kind: train, data: generic, steps: 10, model: micro}
  tuned: {kind: train, data: domain, init: slm, steps: 10}
  perplexity: {kind: evaluate, tokens: tokens, models: [tuned]}
"""
SECONDS = 600.0  # what each finished task took


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config, its text, and a run folder in which all is done."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    for name in ("g0", "g1", "t", "law", "tax"):
        Path(f"{name}.txt").write_text(f"some words of {name}\n")
    _finish()
    return tmp_path


def _finish(*overrides: str, root: Path = Path("run")) -> None:
    pipeline = load_pipeline(Path("config.yaml"), overrides)
    write_resolved(pipeline, root)
    for name, planned in make_plan(pipeline, root).items():
        if planned.state != "done":
            begin_artifact(root, *name, digest=planned.digest, made_from=planned.made_from)
            cost = Cost(0, 0, SECONDS / 2, SECONDS, "cpu", 2)
            finish_artifact(root, *name, Marker(planned.digest, cost, {}, {}))


def _redo(*overrides: str) -> dict[str, Redo]:
    pipeline = load_pipeline(Path("config.yaml"), overrides)
    return {str(name): one for name, one in find_redo(pipeline, make_plan(pipeline, Path("run")), Path("run")).items()}


def _reasons(*overrides: str) -> dict[str, str]:
    return {name: str(one.reasons) for name, one in _redo(*overrides).items()}


@pytest.mark.parametrize(
    ("overrides", "task", "reason"),
    [
        (["stages.slm.steps=20"], "slm/generic", "steps: 10 -> 20"),
        (["stages.slm.optimizer.learning_rate=2e-3"], "slm/generic", "optimizer.learning_rate: 0.0001 -> 0.002"),
        (["stages.slm.optimizer={beta2: 0.9, beta1: 0.8}"], "slm/generic",
         "optimizer.beta1: 0.9 -> 0.8; optimizer.beta2: 0.999 -> 0.9"),
        (["stages.slm.schedule.kind=cosine"], "slm/generic", "schedule.kind: constant -> cosine"),
        (["stages.slm.model={layers: 3, hidden_size: 64, ffn_hidden_size: 256, attention_heads: 4}"], "slm/generic",
         "model.layers: 2 -> 3; model.name: nano -> custom"),
        (["stages.tuned.lora={rank: 4}"], "tuned/law", 'lora: unset -> {"rank": 4}'),
        (["stages.tuned.init=llm"], "tuned/law", "init: slm -> llm; llm/generic is read too; slm/generic is read no longer"),
        (["stages.vectors.encoder={kind: static}"], "vectors/generic.encoder",
         "encoder.kind: tfidf -> static; it reads the files of `encoder` too; tokenizer/generic, tokens/generic are read no "
         "longer"),
        (["stages.vectors.encoder.dimensions=8"], "vectors/law",
         "encoder.dimensions: 4 -> 8; vectors/generic.encoder is redone"),
        (["text.domains.law.text_field=body"], "tokens/law", "text_field: text -> body"),
        (["text.domains.law.validation_floor.documents=1"], "tokens/law", "validation_floor.documents: 4 -> 1"),
        (["text.domains.law.validation=tax.txt"], "tokens/law", "it reads the text of `validation` too"),
        (["text.domains.law.train=[law.txt, tax.txt]"], "tokens/law", "the text of `train` changed"),
        (["text.domains.law.train=tax.txt", "text.domains.law.test=law.txt"], "tokens/law",
         "the text of `train` changed; the text of `test` changed"),
        (["seed=3"], "tokens/law", "tokenizer/generic is redone"),
        (["seed=3"], "tokenizer/generic", "seed: 0 -> 3"),
        (["training_seed=3"], "slm/generic", "seed: 0 -> 3"),
        (["stages.slm.steps=20"], "tuned/tax", "slm/generic is redone"),
        (["stages.slm.steps=20"], "perplexity/tuned.tax", "tuned/tax is redone"),
    ],
)  # fmt: skip
def test_what_has_changed_is_named(folder: Path, overrides: list[str], task: str, reason: str) -> None:
    assert reason in _reasons(*overrides)[task]


def test_only_what_depends_on_it_is_stale_and_for_that_alone(folder: Path) -> None:
    assert _reasons() == {}
    Path("law.txt").write_text("other words\n")
    assert _reasons() == {
        "tokens/law": "the text of `train` changed", "vectors/law": "tokens/law is redone",
        "tuned/law": "tokens/law is redone", "perplexity/tuned.law": "tuned/law, tokens/law are redone",
    }  # fmt: skip


def test_an_input_that_was_made_anew_already_is_another(folder: Path) -> None:
    law = load_pipeline(Path("config.yaml"), ["stages.slm.steps=20"])
    name = TaskId("slm", "generic")
    planned = make_plan(law, Path("run"))[name]
    begin_artifact(Path("run"), *name, digest=planned.digest, made_from=planned.made_from)
    finish_artifact(Path("run"), *name, Marker(planned.digest, Cost(0, 0, 1.0, 1.0, "cpu", 1), {}, {}))
    assert _reasons("stages.slm.steps=20")["tuned/law"] == "slm/generic is another"
    assert _reasons() == {}, "what there was is there, and counts"


def test_work_whose_label_does_not_say_from_what_is_said_to_be_so(folder: Path) -> None:
    for label in Path("run").glob("artifacts/slm/generic/*/task.json"):
        write_json(label, {**read_json(label), "made_from": {}})
    assert "did not write down from what" in _reasons("stages.slm.steps=20")["slm/generic"]


def test_the_same_reason_is_said_once_for_a_stage(folder: Path) -> None:
    pipeline = load_pipeline(Path("config.yaml"), ["stages.slm.steps=20", "stages.tokens.context_length=64"])
    plan = make_plan(pipeline, Path("run"))
    lines = list(redo_lines(find_redo(pipeline, plan, Path("run"))))
    assert lines == [
        "13 finished tasks must be redone: about 2.3 h; the existing results took 2.2 h and are kept",
        "  tokens (generic, law, tax): context_length: 32 -> 64; about 30 min",
        "  vectors/generic.encoder: tokens/generic is redone; about 10 min",
        "  vectors (generic, law, tax): vectors, tokens are redone; about 30 min",
        "  slm/generic: steps: 10 -> 20; tokens/generic is redone; about 20 min",
        "  llm/generic: tokens/generic is redone; about 10 min",
        "  tuned (law, tax): tokens, slm are redone; about 20 min",
        "  perplexity (tuned.law, tuned.tax): tuned, tokens are redone; about 20 min",
    ], lines


def test_only_making_anew_asks_and_only_above_the_limit(folder: Path) -> None:
    def refused(*overrides: str, tasks: list[TaskId] | None = None) -> bool:
        pipeline = load_pipeline(Path("config.yaml"), overrides)
        try:
            refuse_unconfirmed(find_redo(pipeline, make_plan(pipeline, Path("run")), Path("run"), tasks), pipeline)
        except UnconfirmedError:
            return True
        return False

    assert not refused(), "nothing is stale"
    assert not refused("root=elsewhere"), "nothing was ever finished"
    assert not refused(
        "stages.more={kind: train, data: generic, tokens: tokens, model: nano, steps: 10, global_batch_size: 8}"
    )
    anew = ["stages.slm.steps=11"]  # slm, tuned and perplexity of two domains: 50 minutes and a bit
    assert not refused(*anew) and refused(*anew, "ask_above_device_hours=0.5")
    assert not refused(*anew, "ask_above_device_hours=0.5", tasks=[TaskId("slm", "generic")]), "the chosen tasks count"
    longer = ["stages.slm.steps=40"]  # by four times the steps
    assert refused(*longer) and not refused(*longer, "ask_above_device_hours=1.5")
    pipeline = load_pipeline(Path("config.yaml"), longer)
    planned = make_plan(pipeline, Path("run"))[TaskId("slm", "generic")]
    begin_artifact(Path("run"), "slm", "generic", digest=planned.digest, made_from=planned.made_from)
    assert not refused(*longer), "what was begun goes on"


@pytest.mark.parametrize(
    ("schedule", "change", "minutes"),
    [
        ("constant", {"steps": 11}, 1),
        ("constant", {"steps": 40}, 30),
        ("constant", {"steps": 5}, 5),  # none of the steps that are kept is one of its own
        ("constant", {"steps": 11, "learning_rate": 2e-3}, 11),
        ("wsd", {"steps": 12}, 4),  # from step 8, before the decay
        ("cosine", {"steps": 11}, 11),
    ],
)
def test_a_longer_training_costs_what_it_does_not_go_on_from(
    folder: Path, schedule: str, change: dict[str, float], minutes: int
) -> None:
    """Also where the finished one had gone on itself: its marker's own cost is that of a part."""
    rest = [f"stages.slm.schedule.kind={schedule}"]
    name, pipeline = TaskId("slm", "generic"), load_pipeline(Path("config.yaml"), rest)
    planned = make_plan(pipeline, Path("run"))[name]
    begin_artifact(Path("run"), *name, digest=planned.digest, made_from=planned.made_from)
    own, earlier = (Cost(0, 0, share * SECONDS, share * SECONDS, "cpu", 1) for share in (0.2, 0.8))
    finish_artifact(Path("run"), *name, Marker(planned.digest, own, {"steps": 10}, {}, earlier=earlier))
    rate = [f"stages.slm.optimizer.learning_rate={change['learning_rate']}"] if "learning_rate" in change else []
    found = _redo(*rest, *rate, f"stages.slm.steps={change['steps']}")["slm/generic"]
    assert found.spent == pytest.approx(SECONDS) and found.seconds == pytest.approx(60 * minutes)
    lines = {line[0]: line for line in stage_table(make_plan(pipeline, Path("run")), {}, Path("run")).lines}
    assert lines["slm"][3] == "10 min"


def test_damaged_work_is_made_anew_too_and_says_which_file(folder: Path) -> None:
    (marker,) = Path("run").glob("artifacts/slm/generic/*")
    (marker / "model.bin").write_bytes(b"weights")
    name = TaskId("slm", "generic")
    planned = make_plan(load_pipeline(Path("config.yaml")), Path("run"))[name]
    begin_artifact(Path("run"), *name, digest=planned.digest, made_from=planned.made_from)
    finish_artifact(Path("run"), *name, Marker(planned.digest, Cost(0, 0, 7200.0, 7200.0, "cpu", 1), {}, {}))
    (marker / "model.bin").unlink()
    assert "model.bin: No such file" in _reasons()["slm/generic"]
    with pytest.raises(UnconfirmedError, match=r"about 2\.0 h, more than the 1 device-hours .*--yes"):
        pipeline = load_pipeline(Path("config.yaml"))
        refuse_unconfirmed(find_redo(pipeline, make_plan(pipeline, Path("run")), Path("run")), pipeline)


def test_a_plan_has_a_line_per_stage_or_per_task(folder: Path) -> None:
    pipeline = load_pipeline(Path("config.yaml"), ["stages.tuned.steps=20"])
    plan = make_plan(pipeline, Path("run"))
    redo = find_redo(pipeline, plan, Path("run"))
    stages = {line[0]: line[1:] for line in stage_table(plan, redo, Path("run")).lines}
    assert list(stages) == list(pipeline.stages)
    assert stages["tokens"] == ["3 done", "", "30 min", ""]
    assert stages["tuned"] == ["2 stale", "steps: 10 -> 20", "20 min", "40 min"]
    assert stages["perplexity"] == ["2 stale", "tuned is redone", "20 min", "20 min"]
    tasks = {line[0]: line[1:] for line in task_table(plan, redo, Path("run")).lines}
    assert list(tasks) == [str(name) for name in plan]
    assert tasks["perplexity/tuned.law"] == [
        "stale", "law", "tuned/law, tokens/law", "tuned/law is redone", "10 min", "10 min",
    ]  # fmt: skip


def test_time_of_devices_is_short() -> None:
    assert [device_time(seconds) for seconds in (0.4, 99, 600, 5940, 7200, 2.16e6)] == [
        "0 s", "99 s", "10 min", "99 min", "2.0 h", "600.0 h",
    ]  # fmt: skip


# --- the commands -----------------------------------------------------------------------------------------------------


def _specialm(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_specialm", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _content() -> dict[Path, tuple[bytes, int]]:
    files = (path for path in sorted(Path().rglob("*")) if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


STEPS = "stages.slm.steps=40"
NAMED = "slm/generic: steps: 10 -> 40; about 40 min"


def test_check_names_what_is_stale_and_writes_nothing(folder: Path) -> None:
    before = _content()
    checked = _specialm("check", "config.yaml", STEPS)
    assert checked.returncode == 0 and NAMED in checked.stdout, checked.stdout + checked.stderr
    assert _content() == before
    checked = _specialm("check", "config.yaml", "root=nowhere")
    assert checked.returncode == 0 and "redone" not in checked.stdout and _content() == before


@pytest.mark.parametrize("command", ["run", "submit"])
def test_without_a_terminal_it_takes_a_yes_and_nothing_is_done(folder: Path, command: str) -> None:
    before = _content()
    refused = _specialm(command, "config.yaml", STEPS)
    assert refused.returncode == 2 and NAMED in refused.stdout, refused.stdout + refused.stderr
    assert "more than the 1 device-hours that" in refused.stderr and "--yes" in refused.stderr
    after = _content()
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {Path("run/.lock"), Path("run/file_hashes.json")}


def test_ranks_of_a_launcher_are_refused_alike(folder: Path) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(lambda rank: _specialm("run", "config.yaml", STEPS, RANK=rank, **meeting), "01"))
    assert [rank.returncode for rank in ranks] == [2, 4], "the others end with it"
    assert NAMED in ranks[0].stdout and "--yes" in ranks[0].stderr
    assert ranks[1].stdout == "", "the first one speaks for all"


def _on_terminal(answer: bytes, *arguments: str, **variables: str) -> tuple[int, str]:
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_specialm", *arguments], stdin=side, stdout=side, stderr=side,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables},
    )  # fmt: skip
    os.close(side)
    said, answered = b"", False
    while True:
        try:
            said += os.read(main, 65536)
        except OSError:  # the other side has ended
            break
        if b"Redo this work?" in said and not answered:
            os.write(main, answer)
            answered = True
    os.close(main)
    return process.wait(100), said.decode()


@pytest.fixture
def cluster(folder: Path) -> str:
    """The PATH of a cluster that takes every job."""
    programs = folder / "programs"
    programs.mkdir()
    for name, body in {"sbatch": "echo 7", "squeue": "true", "sacct": "true", "scancel": "true"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


def test_on_a_terminal_it_asks(folder: Path, cluster: str) -> None:
    code, said = _on_terminal(b"n\n", "run", "config.yaml", STEPS)
    assert code == 2 and NAMED in said and "Redo this work? [y/N]" in said and "Nothing was done" in said
    assert _reasons() == {}
    code, said = _on_terminal(b"", "run", "config.yaml", STEPS, RANK="0", WORLD_SIZE="1")
    assert code == 2 and "Redo this work?" not in said, "ranks share a terminal"
    code, said = _on_terminal(b"y\n", "submit", "config.yaml", STEPS, PATH=cluster)
    assert code == 0 and "Redo this work?" in said and "5 tasks submitted" in said, said


def test_a_submit_that_was_agreed_to_queues_and_one_that_only_looks_asks_nothing(folder: Path, cluster: str) -> None:
    arguments = ["submit", "config.yaml", STEPS, "--only", "slm", "ask_above_device_hours=0"]
    shown = _specialm(*arguments, "--dry-run", PATH=cluster)
    assert shown.returncode == 0 and NAMED in shown.stdout, shown.stderr
    queued = _specialm(*arguments, "--yes", PATH=cluster)
    assert queued.returncode == 0 and NAMED in queued.stdout and "1 tasks submitted" in queued.stdout, queued.stderr
