"""The logits of one model in three places: on this process's device, on a CPU, and as Transformers computes what is exported.

python -m tests.logits FOLDER    the second: reads what `write` left in the folder, and writes its logits beside it
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_specialm.base.environment import ALONE
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Precision
from megatron_specialm.config.training import Optimizer
from megatron_specialm.convert.huggingface import huggingface_config, to_huggingface
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.model.gpt import Gpt

VOCABULARY, CONTEXT = 128, 64
# Sizes that every kernel takes. The families' functions: exact GELU, its approximation, SwiGLU.
NEOX = ModelConfig(layers=3, hidden_size=128, ffn_hidden_size=512, attention_heads=4)
SHAPES = {
    "gelu": NEOX,
    "gelu_tanh": NEOX.model_copy(update={"activation": "gelu_tanh"}),
    "swiglu": NEOX.model_copy(update={"family": "llama", "query_groups": 2}),
}
# Differences of logits relative to their standard deviation. fp32: the largest; sums of 512 terms in another order make
# 1e-6 to 1e-5, the wrong GELU 1e-3 after these steps, TF32 (10 bits) as much. bf16: their root mean square, as the largest
# of thousands says little; each of some 8 roundings per layer to 8 bits adds 2^-9, in all 2^-9 * sqrt(24) = 1e-2.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "bf16": 3e-2}
Weights = dict[str, torch.Tensor]


def trained(shape: ModelConfig, *, steps: int = 40) -> Weights:
    """Weights far from their first values: near those, all activations are small, and every GELU is nearly half its
    argument."""
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.initialize(seed=0)
    engine = MegatronEngine(
        model, parallel=ParallelConfig(), optimizer=Optimizer(learning_rate=1e-2, epsilon=1e-6), micro_batch_size=8
    )
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (8, CONTEXT + 1))
    batch = Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), np.ones((8, CONTEXT), np.float32))
    for _ in range(steps):
        engine.train_step(batch, learning_rate=1e-2)
    return engine.weights()


def tokens() -> torch.Tensor:
    """(B, T) ids of which most were never seen together."""
    return torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (4, CONTEXT)))


@torch.no_grad()
def logits(shape: ModelConfig, weights: Weights, precision: Precision) -> torch.Tensor:
    """(B, T, V) on the device that a training would take here, within a process group."""
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, precision=precision).train(False)
    model.load(weights)
    for chunk in model.chunks:  # norms are built in fp32, and the engine's wrapper rounds them
        chunk.to(chunk.config.params_dtype)
    return model.logits(tokens().to(model.device)).float().cpu()


def logits_on_cpu(shape: ModelConfig, weights: Weights, precision: Precision, folder: Path) -> torch.Tensor:
    """The same from a process that sees no GPU."""
    save_file(weights, folder / "weights.safetensors")
    (folder / "model.json").write_text(json.dumps({"shape": shape.model_dump(mode="json"), "precision": precision}))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.logits", str(folder)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr
    return load_file(folder / "logits.safetensors")["logits"]


@torch.no_grad()
def logits_of_export(shape: ModelConfig, weights: Weights, folder: Path) -> torch.Tensor:
    """Those of Transformers, on a CPU in fp32."""
    config = huggingface_config(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, eod=1)
    config.save_pretrained(folder)
    save_file(to_huggingface(weights, shape), folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()(tokens()).logits


def difference(ours: torch.Tensor, theirs: torch.Tensor, precision: Precision) -> float:
    """What `TOLERANCES` are of."""
    apart = (ours - theirs).abs()
    return float((apart.max() if precision == "fp32" else apart.square().mean().sqrt()) / theirs.std())


def _main(folder: Path) -> None:
    asked = json.loads((folder / "model.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    with process_group(ALONE):
        found = logits(ModelConfig(**asked["shape"]), weights, asked["precision"])
    save_file({"logits": found.contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
