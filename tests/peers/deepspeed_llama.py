"""DeepSpeed and a Llama of Transformers on two gloo processes: `python -m tests.peers.deepspeed_llama save|load FOLDER`.

`save` trains for two steps by each ZeRO stage. FOLDER/zeroN has the checkpoint, FOLDER/zeroN.safetensors what DeepSpeed's own
zero_to_fp32 makes of it, FOLDER/config.json the model. `load` has a model with other weights load the universal checkpoint
FOLDER/universal, and writes the module's weights to FOLDER/loaded.safetensors, after a step to FOLDER/next.safetensors.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file

from tests.checkpoints import VOCABULARY, random_model

WORLD, STAGES = 2, (1, 2, 3)


def _rank(rank: int, action: str, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/meeting-{action}", rank=rank, world_size=WORLD)
    {"save": _save, "load": _load}[action](folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _engine(stage: int, **settings: Any) -> Any:
    import deepspeed

    model = random_model("llama 3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, **settings}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _step(engine: Any) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


def _save(folder: Path) -> None:
    for stage in STAGES:
        engine = _engine(stage)
        for _ in range(2):
            _step(engine)
        engine.save_checkpoint(str(folder / f"zero{stage}"))
        engine.module.config.architectures = ["LlamaForCausalLM"]
        if torch.distributed.get_rank() == 0:
            engine.module.config.save_pretrained(folder)
        engine.destroy()


def _load(folder: Path) -> None:
    engine = _engine(1, checkpoint={"load_universal": True})
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    engine.load_checkpoint(str(folder / "universal"))
    for name in ("loaded", "next"):
        if torch.distributed.get_rank() == 0:
            weights = {key: tensor.clone() for key, tensor in engine.module.state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")
        _step(engine)


if __name__ == "__main__":
    folder = Path(sys.argv[2]).resolve()
    mp.spawn(_rank, args=(sys.argv[1], folder), nprocs=WORLD)
    if sys.argv[1] == "load":
        sys.exit()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage in STAGES:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder / f"zero{stage}"))
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / f"zero{stage}.safetensors")
