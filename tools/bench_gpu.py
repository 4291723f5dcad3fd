"""Training steps on one GPU: ours in bf16 and FP8 beside Transformers' GPT-NeoX (torch.compile) and plain PyTorch.

    python tools/bench_gpu.py [--models slm-126m llm-771m] [--micro-batch 16] [--steps 10] [--rounds 5]

Random tokens, sequence 1,024, vocabulary 32,000, AdamW; turns within each round. Prints milliseconds per step (median),
MFU by this project's count of FLOPs against the device's dense bf16 peak, and the ratio to ours in bf16.
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from rich.table import Table
from torch.nn import functional
from transformers import GPTNeoXForCausalLM

from megatron_specialm.base.accelerator import find_accelerator
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.terminal import console
from megatron_specialm.base.throughput import utilisation
from megatron_specialm.config.capabilities import lacking
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision
from megatron_specialm.config.setup import Setup
from megatron_specialm.config.training import Optimizer
from megatron_specialm.convert.huggingface import huggingface_config
from megatron_specialm.data.store import Batch
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.distributed import process_group
from megatron_specialm.train.megatron_engine import MegatronEngine

CONTEXT, VOCABULARY = 1024, 32_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["slm-126m", "llm-771m"])
    for name, value in {"micro-batch": 16, "steps": 10, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise MachineError("this benchmark needs a CUDA device; on a CPU use tools/bench_step.py")
    with process_group(ALONE):
        for name in args.models:
            _compare(name, args)


def _compare(name: str, args: argparse.Namespace) -> None:
    page = configs_folder() / "pipelines" / "smoke.yaml"
    shape = load_pipeline(page, [f"stages.slm.model={name}"]).stages["slm"].model  # type: ignore[union-attr]
    assert shape is not None
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (args.micro_batch, CONTEXT + 1))
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((args.micro_batch, CONTEXT), np.float32))
    contenders = {
        "megatron_specialm bf16": _ours(shape, args, batch, "bf16", None),
        "transformers, compiled": _transformers(shape, batch),
        "plain PyTorch": _plain(shape, batch),
    }
    for recipe in ("delayed", "tensorwise", "blockwise"):
        fp8 = Fp8Config(recipe=recipe)
        setup = Setup(shape, ParallelConfig(), "fp8", VOCABULARY, CONTEXT, args.micro_batch, args.micro_batch, fp8)
        reason = lacking(setup, find_accelerator())
        if reason:
            print(f"{name}: {reason}")
        else:
            contenders[f"megatron_specialm FP8 {recipe}"] = _ours(shape, args, batch, "fp8", fp8)
    _print(name, shape, batch, _seconds(contenders, args))


def _seconds(contenders: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step, by the GPU's clock, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        for _ in range(5):
            step()
    for _ in range(args.rounds):
        for name, step in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(args.steps):
                step()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / args.steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _ours(
    shape: ModelConfig, args: argparse.Namespace, batch: Batch, precision: Precision, fp8: Fp8Config | None
) -> Callable[[], object]:
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, precision=precision, fp8=fp8)
    model.initialize(seed=0)
    engine = MegatronEngine(model, parallel=ParallelConfig(), optimizer=Optimizer(), micro_batch_size=args.micro_batch)
    return lambda: engine.train_step(batch, learning_rate=1e-4)


def _transformers(shape: ModelConfig, batch: Batch) -> Callable[[], object]:
    config = huggingface_config(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, eod=0)
    model = GPTNeoXForCausalLM(config).cuda()
    compiled = torch.compile(model)
    return _loop(model, lambda tokens: compiled(tokens).logits, batch)


def _plain(shape: ModelConfig, batch: Batch) -> Callable[[], object]:
    """PyTorch's own transformer layers, pre-norm, causal."""
    layer = torch.nn.TransformerEncoderLayer(
        shape.hidden_size, shape.attention_heads, shape.ffn_hidden_size, dropout=0.0, activation="gelu",
        batch_first=True, norm_first=True,
    )  # fmt: skip
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(VOCABULARY, shape.hidden_size),
            "layers": torch.nn.TransformerEncoder(layer, shape.layers, torch.nn.LayerNorm(shape.hidden_size)),
        }
    ).cuda()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(CONTEXT, device="cuda")

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model["layers"](model["embedding"](tokens), mask=mask, is_causal=True)
        return hidden @ model["embedding"].weight.t()

    return _loop(model, forward, batch)


def _loop(
    model: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], batch: Batch
) -> Callable[[], object]:
    """Autocast to bf16, clip, fused AdamW: what one would write by hand."""
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = (torch.from_numpy(part).cuda() for part in (batch.tokens, batch.targets))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(tokens)
        functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def _print(name: str, shape: ModelConfig, batch: Batch, seconds: dict[str, float]) -> None:
    flops = batch.tokens.size * shape.training_flops(VOCABULARY, CONTEXT)
    ours = seconds["megatron_specialm bf16"]
    table = Table(name, "ms per step", "tokens/s", "MFU", "speed to ours, bf16")
    for contender, value in seconds.items():
        mfu = utilisation(flops=flops, seconds=value, devices=1, device_name=torch.cuda.get_device_name())
        rate = batch.tokens.size / value
        table.add_row(
            contender, f"{value * 1e3:,.1f}", f"{rate:,.0f}", f"{mfu:.1%}" if mfu else "", f"{ours / value:.2f}"
        )
    console().print(table)


if __name__ == "__main__":
    main()
