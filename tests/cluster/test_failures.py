"""What goes wrong with a stage, a task, a disk, the controller or a submit: it is said, it stays where it is, and the next
submit finishes what is missing."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.runs import Run, assert_same_bits, prepared
from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def run(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> Run:
    return Run(cluster, prepared(smoke_run, tmp_path, "tokenizer", "tokens"))


def test_a_loss_that_is_not_finite_ends_the_chain(run: Run, smoke_run: Path) -> None:
    """Three failures at the same step: no fourth attempt. What rests on it is cancelled, and status says why. With the
    mistake mended, the next submit does what is missing and nothing else."""
    good = ["stages.slm.checkpoint.every=5"]
    run.overrides = [*good, "stages.slm.optimizer.learning_rate=1.0e+30", "stages.slm.max_skipped_steps=2"]
    run.submit("--until", "slm-tuned")
    assert run.wait("slm", 120) == ["FAILED"], run.log("slm")
    assert run.outcomes("slm") == ["failed"] * 3
    last = run.attempts("slm")[-1].end
    assert last is not None and not last.requeued and "it has failed 3 times at step" in last.reason
    run.until(lambda: not run.cluster.run("squeue", "--noheader"), "what rests on it is cancelled", 30)
    assert set(run.wait("slm-tuned")) == {"CANCELLED"}
    said = run.specialm("status")
    assert "were not finite" in " ".join(said.split()) and "slm.0.log" in said
    run.overrides = good
    assert "2 tasks submitted" not in run.submit("--only", "slm")
    assert run.wait("slm") == ["COMPLETED"]
    assert_same_bits(run.root / "slm/generic", smoke_run / "runs/smoke/slm/generic")


def test_one_task_of_many_fails(run: Run, smoke_run: Path) -> None:
    """Its siblings end well, and it alone is done again. An input that is damaged is no reason to try three times."""
    run.overrides = ["stages.slm-nopt.steps=20"]
    run.site = {"jobs": {"slm-nopt": {"tasks_per_job": 1}}}
    damaged = run.root / "tokens/scipy/train.bin"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size: a plan does not notice
    run.submit("--only", "slm-nopt")
    assert sorted(run.wait("slm-nopt")) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert run.outcomes("slm-nopt") == ["failed"]
    (failure,) = run.status()["slm-nopt"]["failures"]
    assert failure["tasks"] == ["slm-nopt/scipy"] and "its bytes have changed" in failure["error"]
    damaged.write_bytes(content)
    assert "1 tasks submitted, 0 on their way, 2 done" in run.submit("--only", "slm-nopt")
    assert run.wait("slm-nopt") == ["COMPLETED"]


def test_a_full_disk(cluster: Cluster, smoke_run: Path) -> None:
    """A save finds no room: the job says so and ends. With room, it goes on."""
    folder = cluster.small_disk / "work"
    run = Run(cluster, prepared(smoke_run, folder, "tokenizer", "tokens"), ["stages.slm.checkpoint.every=10"])
    run.submit("--only", "slm")
    ballast = cluster.small_disk / "ballast"
    run.until(lambda: run.saved_step("slm") > 0, "a step is saved")
    _fill(ballast)
    run.until(lambda: run.attempts("slm")[0].end, "the disk is full", 60)
    ballast.unlink()
    states = run.wait("slm", 90)
    if states == ["FAILED"]:  # by then it had failed for good
        run.submit("--only", "slm")
        assert run.wait("slm") == ["COMPLETED"]
    first = run.attempts("slm")[0].end
    assert first is not None and first.outcome == "failed" and "the disk is full" in first.reason
    assert_same_bits(run.root / "slm/generic", smoke_run / "runs/smoke/slm/generic")


def _fill(path: Path) -> None:
    """Leave less room than a checkpoint takes, but enough for the words that say so."""
    disk = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - (200 << 10))


def test_the_controller_is_restarted(run: Run, smoke_run: Path) -> None:
    """Jobs run on, a submit in the meantime waits, and those that depend on them start."""
    run.submit("--only", "slm")
    run.until(lambda: (run.root / "slm/generic/metrics.jsonl").exists(), "the training has begun")
    run.submit("--dry-run", "--only", "slm-tuned")
    command = [
        *run.command("submit", "--only", "slm-tuned", "--keys", "torch"),
        "--site",
        str(run.folder / "site.yaml"),
    ]
    run.cluster.stop_controller()
    submit = subprocess.Popen(command, cwd=run.folder, env=run.environment, stdout=subprocess.PIPE, text=True)
    time.sleep(3)
    run.cluster.start_controller()
    assert "1 tasks submitted" in submit.communicate(timeout=200)[0]
    assert run.wait("slm") == ["COMPLETED"] and run.wait("slm-tuned") == ["COMPLETED"]
    assert run.outcomes("slm") == ["finished"]
    assert_same_bits(run.root / "slm-tuned/torch", smoke_run / "runs/smoke/slm-tuned/torch")


def test_two_submits_at_once(run: Run) -> None:
    """One queues all, the other finds all on their way."""
    run.submit("--dry-run")  # writes the profile
    command = [*run.command("submit"), "--site", str(run.folder / "site.yaml"), "--until", "vectors"]
    racers = [
        subprocess.Popen(command, cwd=run.folder, env=run.environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [racer.communicate(timeout=200)[0].splitlines()[-1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sorted(line.split(":")[1].split(" tasks")[0].strip() for line in said) == ["0", "0", "5"], said
    assert len(run.cluster.run("squeue", "--noheader").splitlines()) == 2  # the encoder, and what is embedded by it


def test_a_submit_that_dies_behind_sbatch(run: Run, tmp_path: Path) -> None:
    """Killed when sbatch has queued the job and its id is not yet on record: the next submit finds it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text('#!/bin/sh\nPATH=${PATH#*:}\nsbatch "$@" && kill -9 $PPID\n')
    (programs / "sbatch").chmod(0o755)
    run.submit("--dry-run")
    command = [*run.command("submit"), "--site", str(run.folder / "site.yaml"), "--only", "slm"]
    environment = {**run.environment, "PATH": f"{programs}:{run.environment['PATH']}"}
    died = subprocess.run(command, cwd=run.folder, env=environment, capture_output=True, timeout=200)
    assert died.returncode == -signal.SIGKILL
    assert "0 tasks submitted, 1 on their way" in run.submit("--only", "slm")
    assert len(run.cluster.run("squeue", "--noheader").splitlines()) == 1
    assert run.wait("slm") == ["COMPLETED"]


def test_words_of_a_config_are_no_commands(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> None:
    """Quotes, spaces, semicolons and substitutions in paths and in the profile, through a real sbatch."""
    word = "a b;touch hit;'\"`touch hit`$(touch hit)&|>hit"
    folder = prepared(smoke_run, tmp_path / word)
    run = Run(cluster, folder, name=f"runs/{word}", site={"environment": {"NOTE": word}})
    text = folder / f"{word}.jsonl"
    text.write_bytes((smoke_run / "data/smoke/generic.train.jsonl").read_bytes())
    run.overrides = [f"text.generic.train={json.dumps([text.name])}"]
    run.submit("--until", "tokenizer")
    assert run.wait("tokenizer") == ["COMPLETED"]
    assert run.outcomes("tokenizer") == ["finished"]
    assert not list(tmp_path.rglob("hit"))
    (tmp_path / "new\nline").mkdir()
    refused = Run(cluster, tmp_path / "new\nline", name="runs/100%")
    (refused.folder / "data").symlink_to(smoke_run / "data")
    assert "choose another root" in refused.submit("--until", "tokenizer", code=2)
