"""A megatron-core program: models of several families that it makes itself, and what it computes with those that it loads.
`python -m tests.peers.megatron_families save|load FOLDER SETTINGS.json`.

SETTINGS.json has Megatron-LM's settings of a model by its name, the layout among them. `save` writes NAME/torch_dist and
NAME/legacy with them, from random weights; `load` reads NAME/torch_dist, and NAME/legacy if it is there. Both write logits on
fixed tokens, NAME/logits.safetensors.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn import functional

from megatron_specialm.model.weights import FUSED_NORMS
from tests.peers import MEGATRON, run_ranks

TENSOR = 2  # of dense models
LENGTH = 24
_ON_CPU = ("utils", *(f"moe.{name}" for name in (
    "router", "moe_utils", "token_dispatcher", "experts", "moe_layer", "shared_experts")))  # fmt: skip


def tokens(vocabulary: int) -> torch.Tensor:
    """(2, T)."""
    return torch.randint(0, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _rank(rank: int, action: str, folder: Path, settings: dict[str, dict[str, Any]], world: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_specialm.model import cpu

    cpu.install()
    for name in _ON_CPU:  # they make their masks on "cuda"
        importlib.import_module(f"megatron.core.transformer.{name}").torch = cpu._TorchOnCpu()  # type: ignore[attr-defined]
    importlib.import_module("megatron.core.transformer.moe.moe_utils").te_general_gemm = None  # type: ignore[attr-defined]
    torch.cuda.synchronize = lambda *_: None  # dist_checkpointing calls these on any machine
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign]  # of tied embeddings under pipelines
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{action}", rank=rank, world_size=world)
    for name, values in settings.items():
        tensor, pipeline, expert = sizes(values)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor, pipeline, expert_model_parallel_size=expert)
        model_parallel_cuda_manual_seed(0)
        model = _build(argparse.Namespace(**values), norms_of_transformer_engine=action == "load")
        found = {}
        for form in {"save": _save, "load": _load}[action](model, folder / name, values):
            found[form] = _logits(model, values)
        if parallel_state.is_pipeline_last_stage() and _coordinates() == (0, pipeline - 1, 0):
            save_file(found, folder / name / "logits.safetensors")
        dist.barrier()
    dist.destroy_process_group()


def sizes(settings: dict[str, Any]) -> tuple[int, ...]:
    """Of tensor, pipeline and expert parallelism."""
    return tuple(settings[f"{kind}_model_parallel_size"] for kind in ("tensor", "pipeline", "expert"))


def _coordinates() -> tuple[int, int, int]:
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )


@torch.no_grad()
def _logits(model: Any, settings: dict[str, Any]) -> torch.Tensor:
    """(2, T, V) on the last pipeline stage; elsewhere what the next one is sent."""
    from megatron.core import parallel_state

    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(LENGTH, 2, settings["hidden_size"])
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(tokens(settings["vocab_size"]), torch.arange(LENGTH).expand(2, -1), None)
    if not parallel_state.is_pipeline_last_stage():
        dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    return output[..., : settings["vocab_size"]].contiguous()


def _build(args: argparse.Namespace, *, norms_of_transformer_engine: bool) -> torch.nn.Module:
    """As Megatron-LM builds a model from its settings.

    Args:
        norms_of_transformer_engine: the norm before experts has Transformer Engine's name in torch_dist.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts: dict[str, Any] = {}
    if getattr(args, "num_experts", None):
        experts = {name: value for name, value in vars(args).items() if name.startswith("moe_")}
        experts["num_moe_experts"] = args.num_experts

    gelu = partial(functional.gelu, approximate="tanh") if args.bias_gelu_fusion else functional.gelu
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups, kv_channels=args.kv_channels,
        normalization=args.normalization, gated_linear_unit=args.swiglu, add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias, qk_layernorm=args.qk_layernorm, layernorm_epsilon=args.norm_epsilon,
        activation_func=functional.silu if args.swiglu else gelu, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=args.tensor_model_parallel_size, expert_model_parallel_size=args.expert_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size, pipeline_dtype=torch.float32, init_method_std=0.2,
        **experts,
    )  # fmt: skip
    spec: Any = get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm)
    if experts:
        spec = get_gpt_decoder_block_spec(config, False, normalization=args.normalization)
        for layer in spec.layer_specs:
            if norms_of_transformer_engine and layer.submodules.mlp.module is MoELayer:
                layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).eval()


@torch.no_grad()
def _randomize(model: torch.nn.Module, settings: dict[str, Any]) -> None:
    """Random weights, equal where ranks hold copies: all but experts on expert-parallel ranks, what is not split on
    tensor-parallel ranks, a tied output and the embedding."""
    tensor, stage, expert = _coordinates()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        seed = 1000 * stage + 2 * number
        if name.startswith("embedding.") or (
            name.startswith("output_layer.") and not settings["untie_embeddings_and_output_weights"]
        ):
            seed = 10**6
        seed = 10 * seed + (tensor if getattr(parameter, "tensor_model_parallel", False) else 0)
        torch.manual_seed(10 * seed + (expert if ".experts." in name else 0))
        if parameter.ndim == 1:
            parameter += torch.randn_like(parameter) * 0.3
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.2)


def _save(model: torch.nn.Module, folder: Path, settings: dict[str, Any]) -> Iterator[str]:
    from megatron.core import dist_checkpointing

    _randomize(model, settings)
    common = {"args": argparse.Namespace(**settings), "checkpoint_version": 3.0, "iteration": 5}
    place = folder / "torch_dist" / "iter_0000005"
    if dist.get_rank() == 0:
        place.mkdir(parents=True)
        (folder / "torch_dist" / "latest_checkpointed_iteration.txt").write_text("5")
    dist.barrier()
    dist_checkpointing.save({**common, **model.sharded_state_dict()}, str(place))
    own = folder / "legacy" / "iter_0000005" / _rank_folder(settings)
    own.mkdir(parents=True)
    torch.save({**common, "model": model.state_dict()}, own / "model_optim_rng.pt")
    (folder / "legacy" / "latest_checkpointed_iteration.txt").write_text("5")
    yield "logits"


def _rank_folder(settings: dict[str, Any]) -> str:
    """As Megatron-LM's `get_checkpoint_name`."""
    (tensor, stage, expert), (_, pipeline, experts) = _coordinates(), sizes(settings)
    name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
    return name + (f"_{expert:03d}" if experts > 1 else "")


def _load(model: torch.nn.Module, folder: Path, settings: dict[str, Any]) -> Iterator[str]:
    from megatron.core import dist_checkpointing

    _forget(model)
    weights = dist_checkpointing.load(model.sharded_state_dict(), str(folder / "torch_dist" / "release"))
    for name in ("common", "args", "checkpoint_version", "iteration"):
        weights.pop(name, None)
    _take(model, weights)
    yield "logits"
    if (folder / "legacy").is_dir():
        own = folder / "legacy" / "release" / _rank_folder(settings) / "model_optim_rng.pt"
        _forget(model)
        named = torch.load(own, weights_only=False)["model"]
        for theirs, plain in FUSED_NORMS.items():  # this model's layers are not Transformer Engine's
            named = {name.replace(theirs, plain): tensor for name, tensor in named.items()}
        _take(model, named)
        yield "legacy"


@torch.no_grad()
def _forget(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def _take(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert all(name.endswith("_extra_state") for name in missing) and not unexpected, (missing, unexpected)


if __name__ == "__main__":
    everything = json.loads(Path(sys.argv[3]).read_text())
    world = max(math.prod(sizes(values)) for values in everything.values())
    run_ranks(_rank, sys.argv[1], Path(sys.argv[2]).resolve(), everything, world, processes=world, imports=MEGATRON)
