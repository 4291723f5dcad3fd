"""A DeepSpeed program on two gloo processes: `python -m tests.peers.deepspeed save|resume FOLDER`.

`save` trains a small model for three steps and saves it, below FOLDER:
    zero1, zero2, zero3, zero1-bf16     a dense model, by ZeRO stage
    moe, moe-ep1                        a model with four experts, two on each rank (EP 2) or all on both, ZeRO-1
    universal                           `zero1`, by DeepSpeed's ds_to_universal
    KIND.json                           the loss of the step after
    KIND.safetensors                    what DeepSpeed's zero_to_fp32 makes of it
`resume` loads each FOLDER/KIND+... into a new engine and writes the losses of the next step to FOLDER/losses.json.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.peers import DEEPSPEED, run_ranks

WORLD, STEPS, TAG = 2, 3, "global_step3"
WIDTH, EXPERTS = 15, 4  # odd sizes: partitions cut through parameters, with padding at the end


class Dense(nn.Module):
    """Layers, a tied output, a buffer and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return nn.functional.cross_entropy(self.output(self.norm(hidden)).flatten(0, 1).float(), tokens.flatten())


class Experts(nn.Module):
    """Two layers of experts."""

    def __init__(self, expert_parallel: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            MoE(
                16,
                nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)),
                EXPERTS,
                expert_parallel,
                use_rts=False,
            )
            for _ in range(2)
        )
        for number, layer in enumerate(self.layers):
            for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                torch.manual_seed(100 * number + 2 * int(os.environ["RANK"]) * (expert_parallel - 1) + local)
                for parameter in expert.parameters():
                    nn.init.normal_(parameter, std=0.3)
        torch.manual_seed(1)
        self.output = nn.Linear(16, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return nn.functional.cross_entropy(self.output(hidden).flatten(0, 1), tokens.flatten())


def _engine(kind: str) -> Any:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(0)
    model: nn.Module = Experts(1 if kind == "moe-ep1" else 2) if kind.startswith("moe") else Dense()
    groups: Any = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1, "name": "decayed"},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "name": "others"},
    ]
    if kind.startswith("moe"):
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
    stage = {"zero2": 2, "zero3": 3}.get(kind, 1)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": kind.endswith("bf16")},
        "checkpoint": {"load_universal": kind == "universal"},
    }
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _step(engine: Any, number: int) -> float:
    """The mean of all ranks' losses."""
    generator = torch.Generator().manual_seed(10 * number + int(os.environ["RANK"]))
    loss = engine(torch.randint(11, (2, 5), generator=generator))
    engine.backward(loss)
    engine.step()
    total = loss.detach().float().clone()
    torch.distributed.all_reduce(total)
    return float(total) / WORLD


def _save(folder: Path) -> None:
    for kind in ("zero1", "zero2", "zero3", "zero1-bf16", "moe", "moe-ep1"):
        engine = _engine(kind)
        for number in range(STEPS):
            _step(engine, number)
        engine.save_checkpoint(str(folder / kind), tag=TAG)
        loss = _step(engine, STEPS)
        if os.environ["RANK"] == "0":
            (folder / f"{kind}.json").write_text(json.dumps({"loss": loss}))
        engine.destroy()


def _consolidate(folder: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import save_file

    for kind in ("zero1", "zero2", "zero3", "zero1-bf16"):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder / kind))
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / f"{kind}.safetensors")
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    places = {"input_folder": str(folder / "zero1" / TAG), "output_folder": str(folder / "universal" / TAG)}
    main(SimpleNamespace(**places, **options, inject_missing_state=True))
    (folder / "universal" / "latest_universal").write_text(TAG)


def _resume(folder: Path) -> None:
    losses = {}
    for source in sorted(folder.glob("*+*/latest")):
        engine = _engine(source.parent.name.split("+")[0])
        engine.load_checkpoint(str(source.parent), tag=TAG)
        losses[source.parent.name] = _step(engine, STEPS)
        engine.destroy()
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(losses))


def _rank(rank: int, action: str, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{folder}/meeting-{os.getppid()}", rank=rank, world_size=WORLD
    )
    {"save": _save, "resume": _resume}[action](folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    action, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    run_ranks(_rank, action, folder, processes=WORLD, imports=DEEPSPEED)
    if action == "save":
        _consolidate(folder)
