"""The smoke pipeline, end to end on real text, through the command line: its table, its exports, kill and resume."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from tests.commands import cli
from tests.conftest import ROOT, copied

CONFIG = ROOT / "configs" / "pipelines" / "smoke.yaml"
GOLDEN = Path(__file__).parent / "golden"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def finished(smoke_copy: Path) -> Path:
    """A working directory in which the smoke pipeline has run to its end."""
    return smoke_copy


def _results(folder: Path) -> dict:
    return json.loads((folder / "runs/smoke/results.json").read_text())


def test_every_method_domain_and_state_has_a_row(finished: Path) -> None:
    rows = {(row["method"], row["domain"], row["finetuned"]): row for row in _results(finished)["rows"]}
    domains = ["scipy", "sklearn", "torch"]
    shared = {("slm", False), ("llm", False)}
    tuned = ("slm", "slm-nopt", "slm-mix", "slm-pn", "slm-pn-soup", "slm-is", "slm-d", "llm", "llm-lora")
    of_domains = {(method, True) for method in tuned}
    of_domains |= {(method, False) for method in ("slm-mix", "slm-pn", "slm-pn-soup", "slm-is")}
    assert {(method, tuned) for method, _, tuned in rows} == shared | of_domains
    for domain in domains:
        assert {(method, tuned) for method, of, tuned in rows if of == domain} == shared | of_domains
    assert all(row["perplexity"] == pytest.approx(math.exp(row["nll"])) for row in rows.values())
    for domain in domains:
        assert rows["slm", domain, True]["nll"] < rows["slm", domain, False]["nll"]
        # SLM pretrains for everybody, SLM-is for the domain, on equally many windows; SLM-nopt for nobody.
        slm, slm_is, nopt, mix = (rows[method, domain, True] for method in ("slm", "slm-is", "slm-nopt", "slm-mix"))
        assert slm["generic_tokens"] > 0 and slm_is["generic_tokens"] == nopt["generic_tokens"] == 0
        assert slm_is["specialization_tokens"] > slm["specialization_tokens"] > 0
        assert slm_is["generic_device_seconds"] > nopt["generic_device_seconds"] > 0
        # The experts are everybody's, choosing one is the domain's. A student pays for its teacher.
        assert (
            mix["generic_tokens"] > 0
            and mix["specialization_flops"] > rows["slm-mix", domain, False]["specialization_flops"]
        )
        student, teacher = rows["slm-d", domain, True], rows["llm", domain, True]
        for cost in ("generic_flops", "specialization_flops"):
            assert student[cost] > teacher[cost]
        # What is served of the large ones is as large, and of the others small.
        assert mix["inference_parameters"] == slm["inference_parameters"] < teacher["inference_parameters"]
        assert rows["slm-pn", domain, True]["inference_parameters"] == slm["inference_parameters"]


def test_macro_is_the_mean_of_domains_log_likelihoods(finished: Path) -> None:
    results = _results(finished)
    for macro in results["macro"]:
        own = [
            row["nll"]
            for row in results["rows"]
            if row["domain"] != "generic" and (row["method"], row["finetuned"]) == (macro["method"], macro["finetuned"])
        ]
        assert len(own) == 3
        assert macro["perplexity"] == pytest.approx(math.exp(sum(own) / 3))


def test_a_selection_says_what_each_criterion_chose_and_cost(finished: Path) -> None:
    for domain in ("scipy", "sklearn", "torch"):
        chosen = json.loads((finished / f"runs/smoke/slm-mix-chosen/{domain}/selection.json").read_text())
        criteria = chosen["criteria"]
        assert set(criteria) == {"frequency", "loss", "halving", "finetuned"} and chosen["by"] == "halving"
        assert criteria["halving"]["rank"] == 1 and criteria["halving"]["choice"] == chosen["choice"]
        assert 1 <= criteria["frequency"]["rank"] <= chosen["experts"] == 3
        assert criteria["loss"]["choice"] is None and criteria["loss"]["flops"] > 0  # not run: what it would have cost
        assert criteria["frequency"]["flops"] == 0 < criteria["halving"]["flops"] < criteria["finetuned"]["flops"]
        assert not (finished / f"runs/smoke/slm-mix-chosen/{domain}/trials").exists()
    assert np.load(finished / "runs/smoke/slm-mix/c1/centroid.npy").shape == (256,)


def test_an_expert_is_projected_without_the_generic_data(finished: Path, tmp_path: Path) -> None:
    """From a copy of the network alone; what comes out computes what the run's own selection computes."""
    network = tmp_path / "network"
    shutil.copytree(finished / "runs/smoke/slm-pn/generic", network)
    chosen = finished / "runs/smoke/slm-pn-chosen/torch"
    expert = json.loads((chosen / "selection.json").read_text())["choice"].removeprefix("c")
    done = cli(tmp_path, "project", str(network), "expert", "--expert", expert)
    assert done.returncode == 0, done.stderr
    ours, theirs = (dict(read_checkpoint(find_final(folder)).weights) for folder in (tmp_path / "expert", chosen))
    assert ours.keys() == theirs.keys()
    # Close, not equal: a matrix product's last bits follow from the number of threads.
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight)
    missing = cli(tmp_path, "project", str(network), "other", "--expert", "4")
    assert missing.returncode != 0 and "expert 4 does not exist: there are experts 0 to 3" in missing.stderr
    assert not (tmp_path / "other").exists()


def test_the_table_is_printed(finished: Path) -> None:
    table = (finished / "stdout").read_text()
    for word in ("slm-is", "slm-nopt", "scipy", "macro"):
        assert word in table


def test_what_the_cap_ended_is_told_and_marked(finished: Path) -> None:
    """30 steps with a validation every 10 do not wear out a patience of 3 while the loss falls."""
    said = (finished / "stdout").read_text()
    assert (
        "warning: the cap on steps, not early stopping, ended slm-tuned/scipy (30 steps, best step 30: still falling)"
        in said
    )
    assert "* ended by the cap on steps" in said
    assert "ended slm-tuned/torch (30 steps" in (finished / "runs/smoke/jobs/slm-tuned.torch.log").read_text()
    capped = {row["stage"]: row["capped"] for row in _results(finished)["rows"]}
    assert capped["slm-tuned"] is True and capped["slm"] is None


def test_all_files_may_be_read_by_whom_the_umask_lets(finished: Path) -> None:
    probe = finished / "probe"
    probe.touch()
    modes = {oct(path.stat().st_mode) for path in (finished / "runs").rglob("*") if path.is_file()}
    assert modes == {oct(probe.stat().st_mode)}


def test_models_go_on_with_a_text(finished: Path) -> None:
    """A checkpoint says what its export says; equal seeds say the same, and each method's fine-tuned model is heard."""
    models = ("runs/smoke/slm-tuned/scipy", "runs/smoke/export/slm-tuned.scipy", "runs/smoke/slm-tuned/scipy")
    said = cli(finished, "generate", *models, "Compute the", "--tokens", "20")
    assert said.returncode == 0, said.stderr
    parts = re.split(r"==> (.*) <==\n", said.stdout)[1:]
    assert tuple(parts[::2]) == models and len(set(parts[1::2])) == 1
    assert parts[1].startswith("Compute the") and len(parts[1].strip()) > len("Compute the")

    sampled = cli(finished, "samples", str(CONFIG))
    first, *others = sampled.stdout.splitlines()
    assert first.startswith("scipy: how each method goes on from ")
    methods = ["llm", "llm-lora", "slm", "slm-d", "slm-is", "slm-mix", "slm-nopt", "slm-pn", "slm-pn-soup"]
    assert sorted(line.partition(":")[0] for line in others) == methods, sampled.stdout + sampled.stderr
    network = cli(finished, "generate", "runs/smoke/slm-pn/generic", "Compute the")
    assert network.returncode == 2 and "say which expert" in network.stderr


def test_transformers_gives_our_perplexity(finished: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_specialm.data.store import TokenStore

    model = AutoModelForCausalLM.from_pretrained(finished / "runs/smoke/export/slm-tuned.torch/model").eval()
    store = TokenStore.open(finished / "runs/smoke/tokens/torch", "test")
    total, count = 0.0, 0
    for start in range(0, len(store), 32):
        batch = store.batch(np.arange(start, min(start + 32, len(store))))
        with torch.no_grad():
            logits = model(torch.from_numpy(batch.tokens)).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), reduction="none"
        )
        total += float((losses.double() * torch.from_numpy(batch.mask).flatten()).sum())
        count += int(batch.mask.sum())
    row = next(
        row
        for row in _results(finished)["rows"]
        if (row["method"], row["domain"], row["finetuned"]) == ("slm", "torch", True)
    )
    assert row["tokens_evaluated"] == count
    assert math.exp(total / count) == pytest.approx(row["perplexity"], rel=1e-3)
    lines = (finished / "data/smoke/torch.test.jsonl").read_text().splitlines()
    size = sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert (row["bytes_evaluated"], row["bytes_estimated"]) == (size, False)
    assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-3)


def test_a_second_run_does_nothing_again(finished: Path) -> None:
    marker = finished / "runs/smoke/slm/generic/done.json"
    before = marker.stat().st_mtime_ns
    again = cli(finished, "run", str(CONFIG))
    assert again.returncode == 0 and "0 of 132 tasks to do" in again.stdout, again.stdout + again.stderr
    assert marker.stat().st_mtime_ns == before


MORE = """
extends: {config}
text: {{domains: {{scipy: null}}}}
stages:
  taught:      {{kind: teach, teacher: llm-tuned, tokens: tokens, keep: sampled, count: 8}}
  exact:       {{kind: teach, teacher: llm-tuned, tokens: tokens, keep: exact}}
  cached: &tuned
    {{kind: train, data: domain, init: slm, steps: 6, global_batch_size: 8, schedule: {{kind: constant}},
      optimizer: {{learning_rate: 3.0e-4}}, distill: {{teacher: llm-tuned, cache: taught}}}}
  exact-taught: {{<<: *tuned, distill: {{teacher: llm-tuned, cache: exact}}}}
  online:      {{<<: *tuned, distill: {{teacher: llm-tuned}}}}
  replay:      {{<<: *tuned, distill: null, replay_fraction: 0.25, recipe: paper}}
  early:       {{kind: train, data: generic, domain_fraction: 0.2, model: nano, steps: 6, global_batch_size: 16}}
  btm:
    {{kind: train, data: cluster, assignment: assignment-4, init: slm, clusters: [0, 2], steps: 6, global_batch_size: 16}}
  btm-chosen:
    {{kind: select, experts: btm, tokens: tokens, by: frequency, compare: [loss, finetuned, halving],
      trial: {{steps: 4, global_batch_size: 8}}}}
  btm-tuned:   {{<<: *tuned, distill: null, init: btm-chosen}}
  more:        {{kind: evaluate, tokens: tokens, models: [cached, exact-taught, online, replay, early, btm-tuned]}}
"""


def test_what_else_a_config_can_say(smoke_run: Path, tmp_path: Path) -> None:
    """Caches of a teacher, replay, the domain from the start, experts that branch off a model, and every criterion."""
    folder = copied(smoke_run, tmp_path)
    config = folder / "more.yaml"
    config.write_text(MORE.format(config=CONFIG))
    done = cli(folder, "run", str(config), "--until", "more")
    assert done.returncode == 0, done.stdout + done.stderr
    root = folder / "runs/smoke"
    for domain in ("sklearn", "torch"):
        logs = {
            name: [json.loads(line) for line in (root / name / domain / "metrics.jsonl").read_text().splitlines()]
            for name in ("online", "exact-taught", "cached")
        }
        losses = {name: [record["loss"] for record in log if "loss" in record] for name, log in logs.items()}
        # The same teacher, beside the student and from its cache; a sample of it says nearly the same.
        assert losses["exact-taught"] == pytest.approx(losses["online"], rel=1e-4)
        assert losses["cached"] == pytest.approx(losses["online"], rel=0.1)
        selection = json.loads((root / "btm-chosen" / domain / "selection.json").read_text())
        assert {name: len(entry["order"]) for name, entry in selection["criteria"].items()} == dict.fromkeys(
            ("frequency", "loss", "finetuned", "halving"), 2
        )
        assert selection["choice"] == selection["criteria"]["frequency"]["order"][0]
    assert {path.name for path in (root / "btm").glob("c*")} == {"c0", "c2"}
    size = json.loads((root / "taught/torch/done.json").read_text())["values"]["bytes"]
    assert size < json.loads((root / "exact/torch/done.json").read_text())["values"]["bytes"] / 50


def test_the_jobs_of_every_stage_are_as_recorded(finished: Path) -> None:
    """Directives and command of each job that `submit` would queue: `golden/smoke-jobs.txt`, with the names of folders and of
    this submission taken out. A change that is meant is recorded by deleting the file and running this test."""
    options = ("root=elsewhere", "--site", str(ROOT / "slurm" / "site.yaml"), "--dry-run")
    printed = cli(finished, "submit", str(CONFIG), *options)
    assert printed.returncode == 0, printed.stderr
    names = {str(finished.resolve()): "FOLDER", str(finished): "FOLDER", sys.executable: "PYTHON"}
    lines = [line for line in printed.stdout.splitlines() if line.startswith(("==>", "#SBATCH", "exec "))]
    text = "".join(f"{line}\n" for line in lines if "--comment=" not in line)
    for name, stands_for in names.items():
        text = text.replace(name, stands_for)
    golden = GOLDEN / "smoke-jobs.txt"
    if not golden.exists():
        golden.write_text(text)
    assert text == golden.read_text()


def test_the_final_weights_are_as_recorded(finished: Path) -> None:
    """Bit for bit, on a machine like the one that `golden/smoke-weights.json` was recorded on; elsewhere
    other kernels round otherwise, and installed packages have other docstrings. To record a change that is meant, delete this
    machine's entry."""
    golden = GOLDEN / "smoke-weights.json"
    recorded = json.loads(golden.read_text()) if golden.exists() else {}
    weights = {
        f"{result.parent.parent.name}/{result.parent.name}": _digest(read_checkpoint(find_final(result.parent)).weights)
        for result in sorted((finished / "runs/smoke").glob("*/*/result.json"))
    }
    assert len(weights) > 30
    if _machine(finished) not in recorded:
        golden.write_text(json.dumps({**recorded, _machine(finished): weights}, indent=1, sort_keys=True) + "\n")
    assert weights == recorded.get(_machine(finished), weights)


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _machine(folder: Path) -> str:
    """What the last bits of a training depend on beside its settings: the processor, torch, and the text."""
    text = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((folder / "data").rglob("*.jsonl"))))
    return f"{_processor()}, torch {torch.__version__}, text {text.hexdigest()[:16]}"


def _processor() -> str:
    """Its name, which a virtual machine may shorten, and a digest of all that kernels are chosen by."""
    environment = {**os.environ, "LC_ALL": "C"}
    said = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True, env=environment).stdout
    fields = {entry["field"].rstrip(":"): entry["data"] for entry in json.loads(said)["lscpu"]}
    names = "CPU(s)", "CPU family", "Model", "Stepping", "Flags", "L1d cache", "L2 cache", "L3 cache"
    chosen_by = json.dumps([fields.get(name) for name in names])
    return f"{fields['Model name']} {hashlib.sha256(chosen_by.encode()).hexdigest()[:8]}"
