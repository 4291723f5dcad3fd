"""The shipped config of a mixture of experts on little text: trained, made of dense models, taught from, and exported.

With SPECIALM_TEST_VLLM, an interpreter that has vLLM, the export is also generated from by vLLM (CONTRIBUTING.md).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from megatron_specialm.base.files import read_json, verify_folder
from tests.commands import succeed
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DOCUMENT_WORDS = 120
CONFIG = f"""
extends: {ROOT}/configs/pipelines/moe.yaml
root: run
text:
  generic: {{train: generic.train.jsonl, test: generic.test.jsonl}}
  domains: {{legal: {{train: legal.train.jsonl, validation: null, test: legal.test.jsonl}}}}
defaults: {{train: {{schedule: {{warmup_steps: 2}}}}}}
stages:
  tokenizer: {{vocabulary_size: 300}}
  tokens: {{context_length: 32}}
  vectors: {{encoder: {{kind: tfidf, dimensions: 8}}}}
  clusters: {{k: 2}}
  dense: {{steps: 10}}
  moe: {{steps: 10}}
  # With no rate to speak of these stay what they were made as.
  upcycled: {{steps: 1, optimizer: {{learning_rate: 1.0e-30}}, schedule: {{warmup_steps: 0}}}}
  branches: {{steps: 4, schedule: {{warmup_steps: 2}}}}
  mixed: {{steps: 4, schedule: {{warmup_steps: 2}}}}
  dense-tuned: {{steps: 4, schedule: {{warmup_steps: 0}}, early_stopping: {{evaluate_every: 2}}}}
  moe-tuned: {{steps: 4, schedule: {{warmup_steps: 0}}, early_stopping: {{evaluate_every: 2}}}}
  student: {{steps: 4, schedule: {{warmup_steps: 0}}, early_stopping: {{evaluate_every: 2}}}}
  pupil: {{kind: train, data: domain, init: dense, method: pupil, distill: {{teacher: moe-tuned}}, steps: 4,
    global_batch_size: 8, micro_batch_size: 8, schedule: {{warmup_steps: 0}}, early_stopping: {{evaluate_every: 2}}}}
  perplexity: {{models: [dense, moe, upcycled, mixed, dense-tuned, moe-tuned, student, pupil]}}
  export: {{models: [moe, mixed, moe-tuned]}}
"""


@pytest.fixture(scope="module")
def folder(workplace: Path) -> Path:
    """Where the pipeline has run."""
    succeed(workplace, "run", "config.yaml")
    return workplace


def _loss(folder: Path, model: str, on: str) -> float:
    return read_json(folder / "run" / "perplexity" / f"{model}.{on}" / "evaluation.json", dict[str, Any])[on]["nll"]


def test_an_moe_made_of_a_dense_model_starts_at_its_loss(folder: Path) -> None:
    for on in ("generic", "legal"):
        key = "generic.legal" if on == "legal" else "generic"
        losses = [
            read_json(path, dict[str, Any])[on]["nll"]
            for name in ("dense", "upcycled")
            for path in (folder / "run" / "perplexity").glob(f"{name}.{key}/evaluation.json")
        ]
        assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_exports_are_loaded_and_generated_from_by_transformers(folder: Path) -> None:
    for name in ("moe.generic", "mixed.generic", "moe-tuned.legal"):
        exported = folder / "run" / "export" / name / "model"
        verify_folder(exported)
        model, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
        assert isinstance(model, MixtralForCausalLM) and not any(report.values()), report
        ids = torch.tensor([[model.config.bos_token_id, 5, 6]])
        assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
        assert "compute a token (a mixture of experts)" in (exported / "README.md").read_text()


def test_what_an_moe_was_made_of_is_in_the_ledger_and_on_its_card(folder: Path) -> None:
    label = read_json(folder / "run" / "mixed" / "generic" / "task.json", dict[str, Any])
    assert {"branches/c0", "branches/c1"} <= label["made_from"]["inputs"].keys()
    card = (folder / "run" / "export" / "mixed.generic" / "model" / "README.md").read_text()
    assert "`branches`: the generic text of one cluster" in card and "`mixed`: the generic text" in card
    rows = read_json(folder / "run" / "results.json", dict[str, Any])
    assert {"moe", "upcycled", "mixed", "student", "pupil"} <= {row["method"] for row in rows["rows"]}
    sizes = {row["method"]: (row["inference_parameters"], row["inference_active_parameters"]) for row in rows["rows"]}
    assert sizes["dense"][0] == sizes["dense"][1] < sizes["moe"][1] < sizes["moe"][0]  # active: also its routers


VLLM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=32, max_num_seqs=1)
    asked = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, detokenize=False)
    said = llm.generate([TokensPrompt(prompt_token_ids=json.loads(sys.argv[2]))], asked)[0].outputs[0]
    best = [max(one.logprob for one in each.values()) for each in said.logprobs]
    print("SAID", json.dumps([list(said.token_ids), best]))
"""


@pytest.mark.skipif("SPECIALM_TEST_VLLM" not in os.environ, reason="SPECIALM_TEST_VLLM names no interpreter with vLLM")
def test_vllm_generates_what_transformers_does(folder: Path, tmp_path: Path) -> None:
    exported = folder / "run" / "export" / "moe-tuned.legal" / "model"
    model = AutoModelForCausalLM.from_pretrained(exported).float().eval()
    prompt = [model.config.bos_token_id, 5, 6]
    (tmp_path / "said.py").write_text(VLLM)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment.pop("PYTHONPATH", None)
    command = [os.environ["SPECIALM_TEST_VLLM"], str(tmp_path / "said.py"), str(exported), json.dumps(prompt)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tokens, logprobs = json.loads(done.stdout.split("SAID ")[1].splitlines()[0])
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits_TV.log_softmax(-1).max(-1)
    assert tokens == best.indices.tolist()
    assert logprobs == pytest.approx(best.values.tolist(), abs=1e-3)
