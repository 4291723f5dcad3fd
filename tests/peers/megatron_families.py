"""A megatron-core program at tensor parallelism 2: models of several families that it makes itself, and what it computes with
those that it loads. `python -m tests.peers.megatron_families save|load FOLDER SETTINGS.json`.

SETTINGS.json has Megatron-LM's settings of a model by its name. `save` writes NAME/torch_dist and NAME/legacy with them, from
random weights; `load` reads NAME/torch_dist. Both write logits on fixed tokens, NAME/logits.safetensors.
"""

import argparse
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.nn import functional

TENSOR = 2
LENGTH = 24


def tokens(vocabulary: int) -> torch.Tensor:
    """(2, T)."""
    return torch.randint(0, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _rank(rank: int, action: str, folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_specialm.model import cpu

    cpu.install()
    masks = importlib.import_module("megatron.core.transformer.utils")
    masks.torch = cpu._TorchOnCpu()  # type: ignore[attr-defined]  # it makes its causal mask on "cuda"
    torch.cuda.synchronize = lambda *_: None  # dist_checkpointing calls these on any machine
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{action}", rank=rank, world_size=TENSOR)
    parallel_state.initialize_model_parallel(TENSOR)
    model_parallel_cuda_manual_seed(0)
    for name, values in settings.items():
        model = _build(argparse.Namespace(**values))
        {"save": _save, "load": _load}[action](model, folder / name, values)
        with torch.no_grad():
            logits = model(tokens(values["vocab_size"]), torch.arange(LENGTH).expand(2, -1), None)
        if rank == 0:
            save_file(
                {"logits": logits[..., : values["vocab_size"]].contiguous()}, folder / name / "logits.safetensors"
            )
        dist.barrier()
    dist.destroy_process_group()


def _build(args: argparse.Namespace) -> torch.nn.Module:
    """As Megatron-LM builds a model from its settings."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    gelu = partial(functional.gelu, approximate="tanh") if args.bias_gelu_fusion else functional.gelu
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups, kv_channels=args.kv_channels,
        normalization=args.normalization, gated_linear_unit=args.swiglu, add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias, qk_layernorm=args.qk_layernorm, layernorm_epsilon=args.norm_epsilon,
        activation_func=functional.silu if args.swiglu else gelu, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=TENSOR, init_method_std=0.2,
    )  # fmt: skip
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
    ).eval()


def _save(model: torch.nn.Module, folder: Path, settings: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    torch.manual_seed(2)  # equal on all ranks: norms and biases that are not split must be
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.3
    common = {"args": argparse.Namespace(**settings), "checkpoint_version": 3.0, "iteration": 5}
    place = folder / "torch_dist" / "iter_0000005"
    if dist.get_rank() == 0:
        place.mkdir(parents=True)
        (folder / "torch_dist" / "latest_checkpointed_iteration.txt").write_text("5")
    dist.barrier()
    dist_checkpointing.save({**common, **model.sharded_state_dict()}, str(place))
    own = folder / "legacy" / "iter_0000005" / f"mp_rank_{dist.get_rank():02d}"
    own.mkdir(parents=True)
    torch.save({**common, "model": model.state_dict()}, own / "model_optim_rng.pt")
    (folder / "legacy" / "latest_checkpointed_iteration.txt").write_text("5")


def _load(model: torch.nn.Module, folder: Path, _: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    weights = dist_checkpointing.load(model.sharded_state_dict(), str(folder / "torch_dist" / "release"))
    weights.pop("common", None)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert all(name.endswith("_extra_state") for name in missing), missing


if __name__ == "__main__":
    everything = json.loads(Path(sys.argv[3]).read_text())
    mp.spawn(_rank, args=(sys.argv[1], Path(sys.argv[2]).resolve(), everything), nprocs=TENSOR)
