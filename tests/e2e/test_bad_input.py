"""What a user gets who hands in something broken, through the command line: one clear line, and nothing half-written."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.commands import Done, cli
from tests.conftest import ROOT


def _arguments(command: str, *arguments: str) -> list[str]:
    config = str(ROOT / "configs" / "pipelines" / "smoke.yaml")
    return [command, config, "stages.tokenizer.vocabulary_size=300", *arguments]


def _command(*arguments: str) -> list[str]:
    """For a process of its own."""
    return [sys.executable, "-m", "megatron_specialm", *_arguments(*arguments)]


def _specialm(folder: Path, *arguments: str) -> Done:
    return cli(folder, *_arguments(*arguments))


def _fails(folder: Path, code: int, *words: str, until: str = "tokens", overrides: tuple[str, ...] = ()) -> str:
    outcome = _specialm(folder, "run", *overrides, "--until", until)
    assert outcome.returncode == code, outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in outcome.stderr, outcome.stderr
    return outcome.stderr


def test_a_broken_line_is_named_the_rest_goes_on_and_the_fix_is_enough(folder: Path) -> None:
    path = folder / "data/smoke/torch.train.jsonl"
    good = path.read_text()
    path.write_text(good + '{"text": "cut of')
    _fails(folder, 1, "tokens/torch", "torch.train.jsonl:41", "JSON")
    done = {marker.parent.name for marker in (folder / "runs/smoke/tokens").glob("*/done.json")}
    assert done == {"generic", "scipy", "sklearn"}
    assert not (folder / "runs/smoke/tokens/torch/store.json").exists()
    path.write_text(good)
    assert "1 of 5 tasks to do" in _specialm(folder, "run", "--until", "tokens").stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"body": "x"}\n', ["no key 'text'", "'body'", "text_field"]),
        (b'{"text": 5}\n', ["'text' is int"]),
        (b'{"text": "\xff"}\n', ["not UTF-8"]),
        (b"", ["no text"]),
        (b'{"text": "   "}\n', ["no text"]),
    ],
)
def test_documents_that_are_none(folder: Path, content: bytes, words: list[str]) -> None:
    (folder / "data/smoke/generic.train.jsonl").write_bytes(content)
    _fails(folder, 1, "generic.train.jsonl", *words, until="tokenizer")


def test_a_missing_file_and_an_unknown_key_are_said_before_anything_runs(folder: Path) -> None:
    (folder / "data/smoke/scipy.test.jsonl").unlink()
    _fails(folder, 2, "scipy.test.jsonl", "no such file", "or make this config's text: python tools/smoke_corpus.py")
    _fails(folder, 2, "stages.slm.stepz", "did you mean 'steps'", overrides=("stages.slm.stepz=3",))
    assert not (folder / "runs/smoke/pipeline.yaml").exists()


def test_too_few_windows(folder: Path) -> None:
    few = ("stages.slm-nopt.global_batch_size=4096",)
    _fails(folder, 1, "fewer than one batch", "slm-nopt.global_batch_size", until="slm-nopt", overrides=few)
    many = ("stages.clusters.k=100000", "stages.vectors.encoder.kind=tfidf")
    _fails(folder, 1, "100000", "clusters", until="clusters", overrides=many)


def test_a_cluster_too_small_for_an_expert_and_a_domain_without_one(folder: Path) -> None:
    clusters = ("stages.clusters-4.k=8", "stages.vectors.encoder={kind: tfidf, dimensions: 8}")
    small = (*clusters, "stages.slm-mix.global_batch_size=200")
    said = _fails(
        folder,
        1,
        "too few for an expert",
        "fewer than stages.slm-mix.global_batch_size 200",
        until="slm-mix",
        overrides=small,
    )
    assert said.count("too few for an expert") == 8
    assert not list((folder / "runs/smoke/slm-mix").glob("*/step_*"))  # nothing was trained
    assert _specialm(folder, "run", *clusters, "--until", "assignment-4").returncode == 0
    histogram = np.load(folder / "runs/smoke/assignment-4/torch/histogram.npy")
    without = int(histogram.argmin())
    assert histogram[without] == 0, "this text has words of every cluster in every domain: the test needs other text"
    only = (*clusters, f"stages.slm-mix.clusters=[{without}]", "stages.slm-mix.global_batch_size=8")
    said = _fails(
        folder, 1, "slm-mix-chosen/torch: torch: none of its windows is in a cluster that an expert was trained for",
        until="slm-mix-tuned", overrides=only,
    )  # fmt: skip
    assert f"train the expert c{int(histogram.argmax())}" in said
    assert not (folder / "runs/smoke/slm-mix-tuned/torch").exists()


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    (folder / "runs").write_text("a file where the folder should be")
    outcome = _specialm(folder, "run", "--until", "tokenizer")
    assert outcome.returncode == 3 and "Traceback" not in outcome.stderr and "runs" in outcome.stderr


def test_one_run_at_a_time(folder: Path) -> None:
    (folder / "runs/smoke").mkdir(parents=True)
    with (folder / "runs/smoke/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711 login7")
        lock.flush()
        _fails(folder, 3, "another command (pid 4711 on login7)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_saves_ends_its_workers_and_says_how_to_go_on(folder: Path, number: signal.Signals) -> None:
    """The signal goes to all processes of its group, as from a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        _command("run", "--until", "slm", "stages.slm.steps=100000"),
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
    )  # fmt: skip
    metrics = folder / "runs/smoke/slm/generic/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or '"loss"' not in metrics.read_text():  # of a step
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors
    assert list(folder.glob("runs/smoke/slm/generic/**/step_*")), "what was trained is lost"
    size = metrics.stat().st_size
    time.sleep(1)
    assert metrics.stat().st_size == size, "a worker is still at work"


def test_ctrl_c_during_the_imports_prints_nothing() -> None:
    program = (
        "import os, signal, sys; from megatron_specialm.__main__ import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, "--version"], env=environment, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
