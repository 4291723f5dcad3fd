"""DeepSpeed and a Mixtral of Transformers on two gloo processes: `python -m tests.peers.deepspeed_mixtral train FOLDER`.

FOLDER/layers-written is loaded into a model whose MoE layers are DeepSpeed's, with two of the four experts on each process, and
FOLDER/module-written, a universal checkpoint, into Transformers' own model. Of each, KIND.safetensors has the logits on fixed
tokens as `loaded`, and after a step of training as `next`; then DeepSpeed saves it as FOLDER/KIND-saved.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.checkpoints import VOCABULARY, random_model
from tests.peers import DEEPSPEED, run_ranks
from tests.peers.megatron_families import tokens

WORLD = EXPERT_PARALLEL = 2


def _rank(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    for kind, engine in (("layers", _with_deepspeeds_layers), ("module", _with_transformers_module)):
        _train(engine(), folder, kind)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _train(engine: Any, folder: Path, kind: str) -> None:
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    engine.load_checkpoint(str(folder / f"{kind}-written"))
    loaded = _logits(engine)
    ids = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    engine.train()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    found = {"loaded": loaded, "next": _logits(engine)}
    if torch.distributed.get_rank() == 0:
        save_file(found, folder / f"{kind}.safetensors")
    engine.save_checkpoint(str(folder / f"{kind}-saved"))
    engine.destroy()


@torch.no_grad()
def _logits(engine: Any) -> torch.Tensor:
    engine.eval()
    return engine(input_ids=tokens(VOCABULARY)).logits.contiguous()


def _with_deepspeeds_layers() -> Any:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    class Block(MoE):
        """Returns what Transformers' block does."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(hidden)[0]

    model: Any = random_model("mixtral")
    config = model.config
    expert = LlamaMLP(LlamaConfig(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size))
    for layer in model.model.layers:
        layer.mlp = Block(
            config.hidden_size, expert, config.num_local_experts, EXPERT_PARALLEL, config.num_experts_per_tok,
            drop_tokens=False, use_rts=False,
        )  # fmt: skip
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    return _engine(deepspeed, model, torch.optim.AdamW(groups, lr=0.01))


def _with_transformers_module() -> Any:
    import deepspeed

    model = random_model("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return _engine(deepspeed, model, optimizer, checkpoint={"load_universal": True})


def _engine(deepspeed: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Any:
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, **settings}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


if __name__ == "__main__":
    run_ranks(_rank, Path(sys.argv[2]).resolve(), processes=WORLD, imports=DEEPSPEED)
