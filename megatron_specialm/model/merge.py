"""Ordinary weights: an expert of a projected network or of an MoE that routes by cluster, or a base merged with its adapters.

All tensors are canonical and unsharded, so this needs neither a process group nor the model.
"""

from collections.abc import Mapping

import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.weights import EXPERT_CODES, EXPERTS, LINEAR_PLACES


def project(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, mixture_K: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The ordinary model of one expert of a projected network (one-hot), or of a mixture of experts.

    Args:
        weights: of the projected network.
        mixture_K: (K,) coefficients of the experts' codes.
    """
    assert config.projection is not None
    code_M = mixture_K.float() @ weights[EXPERT_CODES].float()
    plain = {}
    for name, tensor in weights.items():
        if name.endswith("_basis"):
            layer = name.split(".mlp.")[0]
            coefficients_H = code_M @ weights[f"{layer}.mlp.projection"].float()
            plain[name.removesuffix("_basis")] = torch.tensordot(coefficients_H, tensor.float(), 1)
        elif name != EXPERT_CODES and not name.endswith("mlp.projection"):
            plain[name] = tensor
    return plain


def take_expert(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, mixture_K: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The ordinary model of one expert of an MoE that routes by cluster.

    Args:
        weights: of the MoE.
        mixture_K: (K,) one-hot.
    """
    assert config.moe is not None and config.moe.by_cluster
    expert = int(mixture_K.argmax())
    return {
        name.replace(EXPERTS, "mlp"): tensor[expert] if EXPERTS in name else tensor for name, tensor in weights.items()
    }


def merge_lora(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The base merged with its adapters."""
    assert config.lora is not None
    plain = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    for number in range(config.layers):
        for linear in config.lora.linears:
            place = f"decoder.layers.{number}.{LINEAR_PLACES[linear]}"
            base, a, b = (weights[f"{place}.{part}"].float() for part in ("weight", "lora_a", "lora_b"))
            plain[f"{place}.weight"] = adapted(base, a, b, factor=config.lora.factor)
    return plain


def adapted(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, factor: float) -> torch.Tensor:
    """`base + factor * b a`: (out, in), (rank, in), (out, rank) -> (out, in)."""
    return torch.add(base, b @ a, alpha=factor)
