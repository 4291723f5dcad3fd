"""The smoke pipeline as Slurm jobs: what one machine makes, through dependencies and arrays, and by any launcher."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.config.load import load_pipeline
from tests.cluster.runs import CONFIG, ROOT, Run, assert_same_bits, prepared, weights
from tests.cluster.testbed import Cluster

TEXT = ("tokenizer", "tokens")
# What is left has every kind of stage and of training, in fewer jobs, each of which imports torch and Megatron-Core.
LEFT_OUT = ("llm-lora", "slm-mix-tuned", "slm-pn-tuned", "slm-is-tuned", "slm-nopt", "slm-pn-soup", "slm-soup-tuned")
MODELS = "slm, slm-tuned, slm-mix-chosen, slm-pn-chosen, slm-is, slm-d, llm-tuned"  # in the order of the config
EVERY_KIND = [
    *(f"stages.{stage}=null" for stage in LEFT_OUT),
    f"stages.perplexity.models=[{MODELS}]",
    "stages.export.models=[slm-mix-chosen, slm-d]",
]
SHORT, SHORTER = {"tasks_per_job": 4}, {"tasks_per_job": 16}  # starting Python takes longer than a task of this config


@pytest.mark.timeout(1200)
def test_every_kind_of_stage_makes_what_one_machine_makes(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> None:
    jobs = {kind: SHORT for kind in ("tokenize", "assign", "train", "select")}
    jobs |= {"evaluate": SHORTER, "export": SHORTER}
    run = Run(cluster, prepared(smoke_run, tmp_path), list(EVERY_KIND), site={"jobs": jobs})
    assert "77 tasks submitted, 0 on their way, 0 done" in run.submit()
    assert "0 tasks submitted" in run.submit()  # all of them are on their way
    run.until(lambda: not cluster.run("squeue", "--noheader"), "all jobs have ended", 300)
    assert {stage: (entry["done"], entry["failures"]) for stage, entry in run.status().items()} == {
        stage: (entry["tasks"], []) for stage, entry in run.status().items()
    }
    assert "0 tasks submitted, 0 on their way, 77 done" in run.submit()
    here, there = smoke_run / "runs/smoke", run.root
    trained = [path.parent for path in there.glob("*/*/result.json") if not path.parent.name.startswith("trial")]
    assert len(trained) > 20
    for folder in trained:
        assert_same_bits(here / folder.relative_to(there), folder)
    run.specialm("results")
    rows = {
        name: json.loads((root / "results.json").read_text())["rows"]
        for name, root in (("here", here), ("there", there))
    }
    stages = {row["stage"] for row in rows["there"]}
    assert len(stages) == 7
    assert [_outcome(row) for row in rows["there"]] == [_outcome(row) for row in rows["here"] if row["stage"] in stages]


def _outcome(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "domain", "finetuned", "nll", "tokens_evaluated", "generic_tokens"))


LAUNCHERS = ("srun", "torchrun", "mpi")


@pytest.mark.timeout(1200)
def test_four_ranks_on_two_nodes_by_any_launcher(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> None:
    """The weights are equal whoever starts the ranks, and the perplexities those of one process."""
    overrides = ["stages.slm.parallel.data_parallel=4", "stages.slm.micro_batch_size=4"]
    runs = {}
    for launcher in LAUNCHERS:
        folder = prepared(smoke_run, tmp_path / launcher, *TEXT)
        runs[launcher] = run = Run(cluster, folder, overrides, site={"launcher": launcher})
        run.submit("--only", "slm")
        if launcher == "srun":
            assert f"after {run.job('slm')}_0" in run.submit("--only", "perplexity", "--keys", "slm.generic")
    for run in runs.values():  # they run beside each other
        assert run.wait("slm", 200) == ["COMPLETED"], run.log("slm")
        (attempt,) = run.attempts("slm")
        assert len(attempt.begin.nodes) == 2 and attempt.begin.ranks == 4
    for launcher in LAUNCHERS[1:]:
        assert_same_bits(runs[launcher].root / "slm/generic", runs["srun"].root / "slm/generic")
    alone = weights(smoke_run / "runs/smoke/slm/generic")
    for name, tensor in weights(runs["srun"].root / "slm/generic").items():
        assert float((tensor - alone[name]).norm() / alone[name].norm()) < 1e-2, name
    runs["srun"].wait("perplexity")
    marker = "perplexity/slm.generic/done.json"
    here, there = (
        json.loads((root / marker).read_text())["values"] for root in (smoke_run / "runs/smoke", runs["srun"].root)
    )
    assert there["sets"]["generic"]["nll"] == pytest.approx(here["sets"]["generic"]["nll"], rel=1e-4)


@pytest.mark.timeout(1200)
def test_experts_on_two_nodes(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> None:
    """An MoE with EP 2 on 2 nodes x 2 ranks: both engines end with the same weights, but for rounding."""
    model = "stages.slm.model=nano-moe"
    layout = ["stages.slm.parallel.data_parallel=4", "stages.slm.parallel.expert_parallel=2", "stages.slm.steps=20"]
    engines = {"megatron": [], "deepspeed": ["stages.slm.parallel.engine=deepspeed"]}
    runs = {}
    for engine, settings in engines.items():
        overrides = [model, *settings, *layout, "stages.slm.micro_batch_size=4"]
        runs[engine] = run = Run(cluster, prepared(smoke_run, tmp_path / engine, *TEXT), overrides)
        run.submit("--only", "slm")
    for run in runs.values():
        assert run.wait("slm", 200) == ["COMPLETED"], run.log("slm")
        (attempt,) = run.attempts("slm")
        assert len(attempt.begin.nodes) == 2 and attempt.begin.ranks == 4
    one, other = (weights(run.root / "slm/generic") for run in runs.values())
    assert any(".experts." in name for name in one) and one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).norm() / tensor.norm()) < 1e-2, name


@pytest.mark.timeout(1200)
def test_learning_rates_are_tried_in_a_job_before_that_of_the_models(
    cluster: Cluster, smoke_run: Path, tmp_path: Path
) -> None:
    """The best one is the smoke config's own, so its models are made."""
    best = load_pipeline(CONFIG).stages["slm-nopt"].optimizer.learning_rate
    rates = f"stages.slm-nopt.optimizer.learning_rate=[1.0e-6, {best}]"
    run = Run(cluster, prepared(smoke_run, tmp_path, *TEXT), [rates, "stages.slm-nopt.trial_steps=10"])
    assert "9 tasks submitted" in run.submit("--only", "slm-nopt")
    trials, models = json.loads((run.root / "jobs/jobs.json").read_text())["jobs"]
    assert (trials["name"], models["name"]) == ("slm-nopt", "slm-nopt.1")
    assert [len(element) for element in models["elements"]] == [3]
    assert run.wait("slm-nopt") == ["COMPLETED"], run.log("slm-nopt.1")
    for domain in ("scipy", "sklearn", "torch"):
        assert_same_bits(run.root / "slm-nopt" / domain, smoke_run / "runs/smoke/slm-nopt" / domain)
        told = json.loads((run.root / f"slm-nopt/{domain}/done.json").read_text())["values"]
        assert told["learning_rate"] == best and list(told["learning_rates"]) == ["1e-06", repr(best)]
    assert run.status()["slm-nopt"]["done"] == 9


@pytest.mark.timeout(600)
def test_kmeans_over_mpi_gives_the_centroids_of_one_process(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> None:
    run = Run(cluster, prepared(smoke_run, tmp_path, *TEXT, "vectors"), ["stages.clusters.processes=4"])
    run.submit("--only", "clusters")
    assert run.wait("clusters") == ["COMPLETED"], run.log("clusters")
    assert len(run.attempts("clusters")[0].begin.nodes) == 2
    name = "clusters/generic/centroids.npy"
    assert (run.root / name).read_bytes() == (smoke_run / "runs/smoke" / name).read_bytes()


@pytest.mark.timeout(600)
def test_by_hand(cluster: Cluster, smoke_run: Path, tmp_path: Path) -> None:
    """`sbatch slurm/stage.sbatch CONFIG STAGE`, with the options of this cluster."""
    run = Run(cluster, prepared(smoke_run, tmp_path, *TEXT))
    config, root = str(CONFIG), "root=runs/smoke"
    options = ["--parsable", "--ntasks-per-node=2", "--nodes=1", "--cpus-per-task=1", "--mem=1G", "--time=10"]
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    command = ["sbatch", *options, "slurm/stage.sbatch", config, "slm", root, "stages.slm.steps=20"]
    job = subprocess.check_output(command, cwd=tmp_path, env=run.environment, text=True).strip()
    (ended,) = cluster.wait(job, 90)
    log = (tmp_path / f"specialm-{job}.log").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "finished: all tasks are done" in log and run.saved_step("slm") == 20
