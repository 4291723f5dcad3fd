"""What the engines do alike with the routers of a model: count, and set the biases by which experts are chosen."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_specialm.engine.protocol import GateStatistics
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.moe import moe_layers
from megatron_specialm.model.router import SUMS, Router


class Gates:
    """The routers of a model, if it has some that learn. Every process has those of its own layers, and counts the tokens that
    it routed itself."""

    def __init__(self, model: Gpt) -> None:
        moe = model.config.moe
        self._experts: dict[int, int] = {}
        self._routers: dict[int, Router] = {}
        if moe is not None and not moe.by_cluster:
            layers = range(model.config.layers)
            self._experts = {layer: count for layer in layers if (count := model.config.experts_of(layer))}
            self._routers = {layer: part.router for layer, part in moe_layers(model.chunks)}  # type: ignore[misc]
        self._sums = {
            layer: torch.zeros_like(router.sums) for layer, router in self._routers.items()
        }  # of applied steps
        self._has_biases = moe is not None and moe.bias_update_rate > 0

    def begin_step(self) -> None:
        """Forget what a step has counted that was not applied."""
        for router in self._routers.values():
            router.sums.zero_()

    def end_step(self) -> None:
        """After a step was applied: keep what it has counted, and update all biases by it."""
        for layer, router in self._routers.items():
            self._sums[layer] += router.sums
        if self._has_biases:
            counts = self._over_processes({layer: router.sums for layer, router in self._routers.items()})
            for layer, router in self._routers.items():
                if router.weight.requires_grad:
                    router.update_bias(counts[layer][: self._experts[layer]])

    def statistics(self) -> list[GateStatistics]:
        """See `Engine.gate_statistics`."""
        if not self._experts:
            return []
        sums = self._over_processes(self._sums)
        for own in self._sums.values():
            own.zero_()
        layers = {layer: vector.double().cpu() for layer, vector in sums.items()}
        return [_statistics(layer, own, self._experts[layer]) for layer, own in layers.items() if own.any()]

    def _over_processes(self, own: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Sums of each router by layer, over all processes, in one collective."""
        sizes = [experts + len(SUMS) for experts in self._experts.values()]
        device = next((vector.device for vector in own.values()), None)
        whole = torch.zeros(sum(sizes), device=device or _device())
        parts = dict(zip(self._experts, whole.split(sizes), strict=True))
        for layer, vector in own.items():
            parts[layer] += vector
        dist.all_reduce(whole)
        return parts


def _device() -> torch.device:
    """Of a process without MoE layers, on a pipeline stage."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _statistics(layer: int, sums: torch.Tensor, experts: int) -> GateStatistics:
    chosen, (tokens, dropped, aux_loss, z_loss, entropy) = sums[:experts], sums[experts:].clamp_min(0).tolist()
    choices, tokens = max(float(chosen.sum()), 1.0), max(tokens, 1.0)
    return GateStatistics(
        layer, (chosen / choices).tolist(), dropped / choices, aux_loss / tokens, z_loss / tokens, entropy / tokens
    )
