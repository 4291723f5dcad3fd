"""Exports of the `llama` family as users of other programs meet them: Transformers, lm-eval and llama.cpp.

lm-eval and llama.cpp run where the environment names them (CONTRIBUTING.md): SPECIALM_TEST_LM_EVAL, an interpreter that has
lm-eval; SPECIALM_TEST_GGUF, one that has gguf, Transformers and xllamacpp, with SPECIALM_TEST_LLAMA_CPP, the folder of
llama.cpp's `convert_hf_to_gguf.py`.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_specialm.base.files import read_json
from megatron_specialm.data.store import TokenStore
from tests.commands import succeed
from tests.texts import WORDS, write_documents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DOCUMENT_WORDS = 120
CONFIG = """
name: exports
root: run
text:
  generic: {train: generic.train.jsonl, test: generic.test.jsonl}
  domains: {legal: {train: legal.train.jsonl, test: legal.test.jsonl}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 400}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 64}
  slm: {kind: train, data: generic, tokens: tokens, model: nano-llama, steps: 80, global_batch_size: 16, micro_batch_size: 8,
    optimizer: {learning_rate: 2.0e-3}, schedule: {warmup_steps: 2}}
  neox: {kind: train, data: generic, tokens: tokens, model: nano, steps: 1, global_batch_size: 8, micro_batch_size: 8,
    schedule: {warmup_steps: 0}}
  perplexity: {kind: evaluate, tokens: tokens, models: [slm]}
  export: {kind: export, tokens: tokens, models: [slm, neox]}
  half: {kind: export, tokens: tokens, models: [slm], dtype: bf16}
"""
# Of test documents, all shorter than a window: spaces at the beginning, line breaks, letters that are spelled in bytes.
SAID = (
    "brarn  dest\n\tflirk gon", "  kralst", "def f(x):\r\n    return x**2  # naïve ½ 日本 👩‍👧", "</s> and <s>",
    *(" ".join(WORDS[start : start + 9]) for start in range(8)),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(workplace: Path) -> Path:
    """Where the pipeline has run."""
    write_documents(workplace / "legal.test.jsonl", SAID)
    succeed(workplace, "run", "config.yaml")
    return workplace


def _run(*command: object, at: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=at, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _exported(folder: Path) -> Path:
    return folder / "run" / "export" / "slm.generic" / "model"


@torch.no_grad()
def _nats(folder: Path) -> tuple[float, float]:
    """By Transformers, the negative log-likelihood of the domain's test text: with the end of each document, and without."""
    model = AutoModelForCausalLM.from_pretrained(_exported(folder)).float().eval()
    store = TokenStore.open(folder / "run" / "tokens" / "legal", "test")
    assert len(store) == len(SAID)  # a window is a document
    batch = store.batch(np.arange(len(store)))
    logits_BTV = model(torch.from_numpy(batch.tokens)).logits
    targets_BT = torch.from_numpy(batch.targets)
    nats_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none").double()
    nats_BT *= torch.from_numpy(batch.mask)
    return float(nats_BT.sum()), float(nats_BT[targets_BT != store.eod].sum())


def test_transformers_scores_as_we_do_and_generates(folder: Path) -> None:
    scored = read_json(folder / "run/perplexity/slm.generic.legal/evaluation.json", dict[str, Any])["legal"]
    assert scored["nats"] == pytest.approx(_nats(folder)[0], rel=1e-4)
    assert scored["bytes"] == sum(len(text.encode()) for text in SAID)

    exported = _exported(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    assert tokenizer.pad_token_id is not None and tokenizer.model_max_length == 64
    batch = tokenizer(list(SAID), padding=True, return_tensors="pt")
    for ids, text in zip(batch.input_ids.tolist(), SAID, strict=True):
        assert ids[-len(tokenizer(text).input_ids) :] == tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape == (
        len(SAID),
        batch.input_ids.shape[1] + 3,
    )


def test_weights_are_in_the_type_that_was_asked_for(folder: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder / "run/half/slm.generic/model")
    whole = AutoModelForCausalLM.from_pretrained(_exported(folder))
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    for name, weight in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16())


def test_the_card_says_what_llama_cpp_converts(folder: Path) -> None:
    assert "converts this folder, tokenizer included" in (_exported(folder) / "README.md").read_text()
    other = folder / "run/export/neox.generic/model"
    assert (
        "does not convert it: it reads this tokenizer for LlamaForCausalLM and MixtralForCausalLM, and this is GPTNeoX"
        in (other / "README.md").read_text()
    )
    assert (_exported(folder) / "tokenizer.model").is_file() and not (other / "tokenizer.model").exists()


TASK = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.skipif("SPECIALM_TEST_LM_EVAL" not in os.environ, reason="SPECIALM_TEST_LM_EVAL names no interpreter")
def test_lm_eval_gives_our_perplexity(folder: Path, tmp_path: Path) -> None:
    """But for the end of documents, which it does not count."""
    (tmp_path / "ours.yaml").write_text(TASK.format(path=folder / "legal.test.jsonl"))
    options = f"pretrained={_exported(folder)},dtype=float32,add_bos_token=False"
    _run(
        os.environ["SPECIALM_TEST_LM_EVAL"], "-m", "lm_eval", "--model", "hf", "--model_args", options, "--tasks", "ours",
        "--include_path", tmp_path, "--device", "cpu", "--batch_size", 4, "--output_path", tmp_path / "out",
        at=tmp_path, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1", PYTHONPATH="",
    )  # fmt: skip
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["ours"]["bits_per_byte,none"]
    size = sum(len(text.encode()) for text in SAID)
    print(f"lm-eval {found}, ours without and with the end {[one / math.log(2) / size for one in _nats(folder)[::-1]]}")
    assert found == pytest.approx(_nats(folder)[1] / math.log(2) / size, rel=1e-4)


# Of each text its ids with the start token, and 8 greedy tokens with their log-probabilities.
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.port = sys.argv[1], 64, 1, 0
settings.warmup, settings.cpuparams.n_threads = False, 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
def ask(path, **body):
    form = {"Content-Type": "application/json"}
    asked = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), form)
    return json.load(urllib.request.urlopen(asked))
said = []
for text in json.load(open(sys.argv[2])):
    ids = ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
    best = ask("/completion", prompt=ids, n_predict=8, temperature=0, n_probs=1, ignore_eos=True, cache_prompt=False)
    said.append([ids, [[one["id"], one["logprob"]] for one in best.get("completion_probabilities", [])]])
json.dump(said, open(sys.argv[3], "w"))
"""


@pytest.mark.skipif(
    not {"SPECIALM_TEST_GGUF", "SPECIALM_TEST_LLAMA_CPP"} <= os.environ.keys(),
    reason="SPECIALM_TEST_GGUF names no interpreter, or SPECIALM_TEST_LLAMA_CPP no folder of llama.cpp",
)
@torch.no_grad()
def test_llama_cpp_says_what_transformers_does(folder: Path, tmp_path: Path) -> None:
    python, converter = os.environ["SPECIALM_TEST_GGUF"], Path(os.environ["SPECIALM_TEST_LLAMA_CPP"])
    convert = (python, converter / "convert_hf_to_gguf.py", "--outtype", "f32")
    _run(*convert, _exported(folder), "--outfile", tmp_path / "model.gguf", at=tmp_path, PYTHONPATH="")
    (tmp_path / "texts.json").write_text(json.dumps(SAID))
    (tmp_path / "said.py").write_text(LLAMA_CPP)
    _run(python, "said.py", "model.gguf", "texts.json", "said.json", at=tmp_path, PYTHONPATH="")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(_exported(folder)),
        AutoModelForCausalLM.from_pretrained(_exported(folder)),
    )
    differences = []
    for text, (ids, best) in zip(SAID, json.loads((tmp_path / "said.json").read_text()), strict=True):
        assert ids == tokenizer(text).input_ids
        if len(best) < 8:  # it reports no tokens that end within a character
            continue
        tokens, logprobs = [number for number, _ in best], [value for _, value in best]
        logits_TV = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        ours = logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert torch.allclose(ours, logits_TV.max(-1).values, atol=1e-3)  # its greedy token is ours, or equally likely
        differences.append(float((ours - torch.tensor(logprobs)).abs().max()))
    assert len(differences) > 2
    print(f"largest difference of log-probabilities: {max(differences):.1e}")
    assert max(differences) < 1e-4

    refused = subprocess.run(
        [*map(str, convert), folder / "run/export/neox.generic/model", "--outfile", tmp_path / "other.gguf"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode != 0
