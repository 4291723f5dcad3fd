"""What the engines do alike with the routers of a model: count, and set the biases by which experts are chosen."""

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
        self._has_biases = moe is not None and moe.bias_update_rate > 0

    def begin_step(self) -> None:
        """Forget what an earlier step counted, as it may have been skipped."""
        for router in self._routers.values():
            router.chosen.zero_()

    def update_biases(self) -> None:
        """Update all biases by the counts of the step, over all processes."""
        if self._has_biases:
            counts = self._summed("chosen", 0)
            for layer, router in self._routers.items():
                if router.weight.requires_grad:
                    router.update_bias(counts[layer])

    def statistics(self) -> list[GateStatistics]:
        """See `Engine.gate_statistics`."""
        if not self._experts:
            return []
        sums = self._summed("sums", len(SUMS))
        for router in self._routers.values():
            router.sums.zero_()
        return [_statistics(layer, vector.double().cpu(), self._experts[layer]) for layer, vector in sums.items()]

    def _summed(self, name: str, further: int) -> dict[int, torch.Tensor]:
        """A vector of each router by layer, over all processes, in one collective."""
        sizes = [experts + further for experts in self._experts.values()]
        device = next((router.sums.device for router in self._routers.values()), None)
        whole = torch.zeros(sum(sizes), device=device or _device())
        parts = dict(zip(self._experts, whole.split(sizes), strict=True))
        for layer, router in self._routers.items():
            parts[layer] += getattr(router, name)
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
