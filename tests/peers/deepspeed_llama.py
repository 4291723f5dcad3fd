"""DeepSpeed trains a Llama of Transformers for two steps on two gloo processes, by each ZeRO stage, and saves it:
`python -m tests.peers.deepspeed_llama FOLDER`. FOLDER/zeroN has the checkpoint, FOLDER/zeroN.safetensors what DeepSpeed's own
zero_to_fp32 makes of it, FOLDER/config.json the model."""

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file

WORLD, STAGES = 2, (1, 2, 3)


def _rank(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    import deepspeed

    from tests.checkpoints import VOCABULARY, random_model

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    for stage in STAGES:
        model = random_model("llama 3")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        for _ in range(2):
            tokens = torch.randint(0, VOCABULARY, (2, 16))
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        engine.save_checkpoint(str(folder / f"zero{stage}"))
        engine.destroy()
    if rank == 0:
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    mp.spawn(_rank, args=(folder,), nprocs=WORLD)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage in STAGES:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder / f"zero{stage}"))
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / f"zero{stage}.safetensors")
