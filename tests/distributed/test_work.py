"""The ranks of a job, started as a supervisor starts them: torchrun, heartbeats, outcomes, a stop and a second attempt."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.base.artifacts import artifact_link, read_marker
from megatron_specialm.base.files import write_json, write_text
from megatron_specialm.base.protocol import ATTEMPT, DATAGRAM_BYTES, LAUNCHER, Channel, Heartbeat, encode_answer
from megatron_specialm.checkpoint.opening import newest_checkpoint
from megatron_specialm.config.load import dump_pipeline, load_pipeline
from megatron_specialm.graph.plan import make_plan
from tests.conftest import ROOT
from tests.training import read_metrics

CONFIG = ROOT / "configs" / "pipelines" / "smoke.yaml"
STEPS = 200


@pytest.fixture
def submission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A submission's folder as `specialm submit` leaves it, with jobs of an element per task."""
    monkeypatch.chdir(folder)
    overrides = [
        "stages.tokenizer.vocabulary_size=300", f"stages.slm.steps={STEPS}", "stages.slm.global_batch_size=16",
        "defaults.train.micro_batch_size=4", "stages.slm.parallel.data_parallel=2", "stages.slm.log_every=1",
    ]  # fmt: skip
    pipeline = load_pipeline(CONFIG, overrides)
    place = folder / "runs" / "smoke" / "jobs" / "0001"
    write_text(place / "pipeline.yaml", dump_pipeline(pipeline))
    jobs: dict[str, list] = {}
    for name, planned in make_plan(pipeline, folder / "runs" / "smoke").items():
        jobs.setdefault(name.stage, []).append(
            [{"key": name.key, "digest": planned.digest, "made_from": planned.made_from}]
        )
    for stage, elements in jobs.items():
        write_json(place / f"{stage}.json", {"stage": stage, "elements": elements})
    return place


def _work(submission: Path, stage: str, attempt: str, *launcher: str, **environ: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "megatron_specialm", "work", str(submission / f"{stage}.json")]
    return subprocess.Popen(
        command, cwd=submission.parents[3], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), ATTEMPT: str(submission / attempt),
            "SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "2", **environ,
        },
    )  # fmt: skip


def _ends(process: subprocess.Popen) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, said


def _left(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def _stop(supervisor: socket.socket, *, rank: int) -> None:
    """Answer the heartbeats of one rank alone, once it has done a step."""
    while True:
        datagram, sender = supervisor.recvfrom(DATAGRAM_BYTES)
        beat = Heartbeat.decode(datagram, token="secret", ranks=2)
        if beat is not None and beat.rank == rank and (beat.step or 0) >= 1:
            supervisor.sendto(encode_answer("secret", stop=True), sender)
            return


@pytest.mark.slow
def test_stopped_by_the_answer_to_one_ranks_heartbeat_the_second_attempt_goes_on(submission: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for stage in ("tokenizer", "tokens"):
        code, said = _ends(_work(submission, stage, f"{stage}-0"))
        assert code == 0, said
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(("127.0.0.1", 0))
        supervisor.settimeout(100)
        channel = Channel("127.0.0.1", supervisor.getsockname()[1], "secret", 0.05)
        first = _work(
            submission, "slm", "slm-0", *torchrun, **channel.variables(), **{LAUNCHER: "torchrun"},
        )  # fmt: skip
        try:
            _stop(supervisor, rank=1)
        finally:
            code, said = _ends(first)
    assert code != 0 and "Stopped" not in said and "error: stopped at step" in said, said
    task = submission.parents[1] / "slm" / "generic"
    saved, _ = newest_checkpoint(task)
    assert saved is not None
    step = int(saved.name.removeprefix("step_"))
    assert 0 < step < STEPS
    assert _left(submission / "slm-0") == {"stopped.json": {"step": step}}

    code, said = _ends(_work(submission, "slm", "slm-1", *torchrun))
    assert code == 0, said
    assert list(_left(submission / "slm-1")) == ["finished.json"]
    records = read_metrics(task)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    marker = read_marker(artifact_link(submission.parents[1], "slm", "generic"))
    assert marker is not None and marker.cost.processes == 2

    code, said = _ends(_work(submission, "slm", "slm-2", *torchrun))  # nothing is left to do
    assert code == 0 and list(_left(submission / "slm-2")) == ["finished.json"], said


def test_a_rank_that_fails_leaves_its_error(submission: Path) -> None:
    rank = {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }  # fmt: skip
    code, _ = _ends(_work(submission, "tokens", "tokens-0", **rank))
    left = _left(submission / "tokens-0")["error-0.json"]
    assert code == left["exit_code"] == 2 and "run the stage 'tokenizer' first" in left["error"]
    code, _ = _ends(_work(submission, "tokens", "tokens-1", **rank, SLURM_ARRAY_TASK_ID="9"))
    assert "has no element 9" in _left(submission / "tokens-1")["error-0.json"]["error"]
    code, _ = _ends(_work(submission, "tokens", "tokens-2", **rank, SLURM_ARRAY_TASK_ID=""))
    assert code == 3 and "--element" in _left(submission / "tokens-2")["error-0.json"]["error"]
