"""DeepSpeed and models of Transformers on two gloo processes: `python -m tests.peers.deepspeed_llama save|load|resume FOLDER`.

`save` trains each model of `KINDS` for two steps. FOLDER/KIND has the checkpoint, FOLDER/config-KIND its config.json,
FOLDER/KIND.json the losses of the two steps after (the second shows the optimizer's state), FOLDER/KIND.safetensors what
DeepSpeed's own zero_to_fp32 makes of it. `resume` loads each FOLDER/KIND+zero1 and FOLDER/KIND+universal that the tests wrote,
with a config.json, and writes its losses of these steps to FOLDER/KIND+....json. `load` has a model with other weights load
the universal checkpoint FOLDER/universal, and writes the module's weights to FOLDER/loaded.safetensors, after a step to
FOLDER/next.safetensors.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints import random_model
from tests.peers import DEEPSPEED, run_ranks

WORLD, STEPS, TOKENS = 2, 2, 90
# The model, the ZeRO stage that saves it, and whether it is trained in bf16.
KINDS = {
    "zero1": ("llama 3", 1, False),
    "zero2": ("llama 3", 2, False),
    "zero3": ("llama 3", 3, False),
    "bf16": ("llama 3", 1, True),
    "neox": ("neox", 1, False),
}


def _rank(rank: int, action: str, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/meeting-{action}", rank=rank, world_size=WORLD)
    {"save": _save, "load": _load, "resume": _resume}[action](folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _engine(model: torch.nn.Module, stage: int, *, bf16: bool, **settings: Any) -> Any:
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        **settings,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def batch(number: int, *, rank: int) -> torch.Tensor:
    """A rank's tokens of a step, (2, T)."""
    return torch.randint(0, TOKENS, (2, 16), generator=torch.Generator().manual_seed(10 * number + rank))


def _step(engine: Any, number: int) -> float:
    """The mean of all ranks' losses before the update."""
    tokens = batch(number, rank=torch.distributed.get_rank())
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    total = loss.detach().float().clone()
    torch.distributed.all_reduce(total)
    return float(total) / WORLD


def _next_losses(engine: Any, file: Path) -> None:
    losses = [_step(engine, STEPS + number) for number in range(2)]
    if torch.distributed.get_rank() == 0:
        file.write_text(json.dumps(losses))
    engine.destroy()


def _save(folder: Path) -> None:
    for kind, (name, stage, bf16) in KINDS.items():
        engine = _engine(random_model(name), stage, bf16=bf16)
        for number in range(STEPS):
            _step(engine, number)
        engine.save_checkpoint(str(folder / kind))
        engine.module.config.architectures = [type(engine.module).__name__]
        if torch.distributed.get_rank() == 0:
            engine.module.config.save_pretrained(folder / f"config-{kind}")
        _next_losses(engine, folder / f"{kind}.json")


def _resume(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for place in sorted(folder.glob("*+*")):
        kind, _, form = place.name.partition("+")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place)).float()
        engine = _engine(model, 1, bf16=kind == "bf16", checkpoint={"load_universal": form == "universal"})
        engine.load_checkpoint(str(place))
        _next_losses(engine, folder / f"{place.name}.json")


def _load(folder: Path) -> None:
    engine = _engine(random_model("llama 3"), 1, bf16=False, checkpoint={"load_universal": True})
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    engine.load_checkpoint(str(folder / "universal"))
    for name in ("loaded", "next"):
        if torch.distributed.get_rank() == 0:
            weights = {key: tensor.clone() for key, tensor in engine.module.state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")
        _step(engine, 0)


if __name__ == "__main__":
    folder = Path(sys.argv[2]).resolve()
    run_ranks(_rank, sys.argv[1], folder, processes=WORLD, imports=DEEPSPEED)
    if sys.argv[1] != "save":
        sys.exit()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for kind in KINDS:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder / kind))
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / f"{kind}.safetensors")
