"""Ordinary weights: an expert of a projected network or of an MoE that routes by cluster, or a base merged with its adapters.

All tensors are canonical and unsharded, so this needs neither a process group nor the model.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.weights import EXPERT_CODES, EXPERTS, LINEAR_PLACES


def ordinary(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, mixture_K: torch.Tensor | None = None, *, where: Path
) -> Mapping[str, torch.Tensor]:
    """The weights of the ordinary model (`config.base_config`): adapters merged, one expert of those that it has for clusters.

    Args:
        mixture_K: (K,) coefficients of a projected network's experts: one-hot for a single one. One-hot for an MoE that
            routes by cluster.
        where: the checkpoint.

    Raises:
        CheckpointError: a model with an expert per cluster, and no mixture or one of another number of experts.
    """
    if (experts := config.window_experts) is not None:
        if mixture_K is None or len(mixture_K) != experts:
            asked = "none was named" if mixture_K is None else f"a mixture of {len(mixture_K)} was asked for"
            raise CheckpointError(
                f"{where}: a model of {experts} experts, one per cluster, and {asked}: say which expert"
            )
        weights = (take_expert if config.projection is None else project)(weights, config, mixture_K)
    return weights if config.lora is None else merge_lora(weights, config)


def one_hot(expert: int, *, experts: int) -> torch.Tensor:
    """Coefficients (K,) of a mixture that is one expert.

    Raises:
        CheckpointError: there is no such expert.
    """
    if not 0 <= expert < experts:
        raise CheckpointError(f"expert {expert} does not exist: there are experts 0 to {experts - 1}")
    return torch.eye(experts)[expert]


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
