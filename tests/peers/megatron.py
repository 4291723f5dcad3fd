"""A megatron-core program: a dense model at TP2 x PP2 and one of experts at PP2 x EP2, on four gloo processes, saved in every
form that megatron-core and Megatron-LM have, or loaded from what the tests wrote.

`python -m tests.peers.megatron save|load FOLDER`

`save` writes, below FOLDER:
    stacked, singleton, per_layer    torch_dist, with the optimizer (`dist_checkpointing.save`), each in `iter_0000003`
    legacy                           `torch` format of Megatron-LM's training
    moe-stacked, moe-singleton, moe-legacy      the same of the model of experts, without an optimizer
    truth.safetensors, truth-moe.safetensors    full tensors that megatron-core itself reads from the stacked form

`load` has megatron-core read FOLDER/written and every rank its file of FOLDER/written-legacy. It writes what each rank's
modules then hold to FOLDER/loaded-TP-PP.safetensors and loaded-legacy-TP-PP.safetensors, its optimizer's state to
optimizer-TP-PP.pt, and whole tensors to plain.safetensors.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.peers import MEGATRON, run_ranks

TENSOR, PIPELINE = 2, 2
STEP = 3
FORMS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "singleton": {"singleton_local_shards": True},
    "per_layer": {"non_homogeneous_layers": True},
}


def _rank(rank: int, action: str, folder: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_specialm.model import cpu

    cpu.install()
    torch.cuda.synchronize = lambda *_: None  # dist_checkpointing calls these on any machine
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{action}", rank=rank, world_size=4)
    parallel_state.initialize_model_parallel(TENSOR, PIPELINE)
    model_parallel_cuda_manual_seed(0)
    {"save": _save, "load": _load}[action](folder)
    dist.barrier()
    dist.destroy_process_group()


def build_model(**experts: Any) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        use_cpu_initialization=True, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        **{"pipeline_dtype": torch.float32, **experts},
    )  # fmt: skip
    return GPTModel(
        config,
        get_gpt_layer_local_spec(experts.get("num_moe_experts"), normalization="RMSNorm"),
        vocab_size=96,
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def _optimizer(model: torch.nn.Module) -> Any:
    """Adam, as Megatron-LM's training has it without the distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_specialm.model.cpu import cuda_type_names

    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    with cuda_type_names():
        return get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.01, clip_grad=0.0), [wrapped])


def _save(folder: Path) -> None:
    from megatron.core.transformer.enums import AttnBackend

    torch.manual_seed(dist.get_rank())
    model = build_model()
    optimizer = _optimizer(model)
    for parameter in model.parameters():
        parameter.main_grad.copy_(
            torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
        )  # of norms, equal on all ranks
    optimizer.step()
    settings = argparse.Namespace(
        num_layers=4, hidden_size=32, attention_backend=AttnBackend.unfused, params_dtype=torch.float32,
        tensor_model_parallel_size=TENSOR, pipeline_model_parallel_size=PIPELINE, swiglu=True, save=Path("checkpoints"),
    )  # fmt: skip
    common = {"args": settings, "checkpoint_version": 3.0, "iteration": STEP}
    for form in FORMS:
        metadata = dict(FORMS[form])  # megatron-core adds groups to it
        weights = model.sharded_state_dict(metadata=metadata)
        moments = optimizer.sharded_state_dict(weights, metadata=metadata)
        _save_distributed(folder / form, {**common, "model": weights, "optimizer": moments})
    _save_truth(folder / "stacked", folder / "truth.safetensors")
    _save_legacy(folder / "legacy", {**common, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    _save_experts(folder, common)


def _save_experts(folder: Path, common: dict) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, PIPELINE, expert_model_parallel_size=2)
    torch.manual_seed(10 + _coordinates()[1])
    model = build_model(num_moe_experts=4, expert_model_parallel_size=2, moe_router_topk=2, moe_ffn_hidden_size=48)
    torch.manual_seed(20 + dist.get_rank())
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data.normal_()
    for form in ("stacked", "singleton"):
        weights = model.sharded_state_dict(metadata=dict(FORMS[form]))
        _save_distributed(folder / f"moe-{form}", {**common, "model": weights})
    _save_truth(folder / "moe-stacked", folder / "truth-moe.safetensors")
    settings = argparse.Namespace(pipeline_model_parallel_size=PIPELINE, expert_model_parallel_size=2)
    _save_legacy(folder / "moe-legacy", {**common, "args": settings, "model": model.state_dict()})


def _save_distributed(folder: Path, content: dict) -> None:
    from megatron.core import dist_checkpointing

    place = folder / f"iter_{STEP:07d}"
    if dist.get_rank() == 0:
        place.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    dist.barrier()
    dist_checkpointing.save(content, str(place))
    dist.barrier()


def _save_truth(folder: Path, file: Path) -> None:
    from megatron.core import dist_checkpointing

    whole = dist_checkpointing.load_plain_tensors(str(folder / f"iter_{STEP:07d}"))
    if dist.get_rank() == 0:
        save_file({name: one.contiguous() for name, one in whole.items() if isinstance(one, torch.Tensor)}, file)


def _coordinates() -> tuple[int, int]:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def _save_legacy(folder: Path, content: dict) -> None:
    from megatron.core import parallel_state

    tensor, stage = _coordinates()
    experts = parallel_state.get_expert_model_parallel_world_size()
    name = f"mp_rank_{tensor:02d}_{stage:03d}"
    if experts > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    place = folder / f"iter_{STEP:07d}" / name
    place.mkdir(parents=True)
    torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))


def _load(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    tensor, stage = _coordinates()
    place = str(folder / "written" / f"iter_{STEP:07d}")
    model = build_model()
    optimizer = _optimizer(model)
    weights = model.sharded_state_dict()
    moments = optimizer.sharded_state_dict(weights, is_loading=True)
    loaded = dist_checkpointing.load({"model": weights, "optimizer": moments}, place)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch.save(optimizer.state_dict(), folder / f"optimizer-{tensor}-{stage}.pt")
    save_file(_tensors(model), folder / f"loaded-{tensor}-{stage}.safetensors")
    whole = dist_checkpointing.load_plain_tensors(place)
    if dist.get_rank() == 0:
        save_file(
            {name: one for name, one in whole.items() if isinstance(one, torch.Tensor)}, folder / "plain.safetensors"
        )
    legacy = build_model()
    rank = folder / "written-legacy" / f"iter_{STEP:07d}" / f"mp_rank_{tensor:02d}_{stage:03d}" / "model_optim_rng.pt"
    legacy.load_state_dict(torch.load(rank, weights_only=False)["model"])
    save_file(_tensors(legacy), folder / f"loaded-legacy-{tensor}-{stage}.safetensors")


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


if __name__ == "__main__":
    run_ranks(_rank, sys.argv[1], Path(sys.argv[2]).resolve(), processes=4, imports=MEGATRON)
