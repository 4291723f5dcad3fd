"""What a training records of its MoE layers' routers, and the experts that it warns of."""

import logging
from typing import Any

from megatron_specialm.engine.protocol import GateStatistics

logger = logging.getLogger(__name__)

STARVED = 0.1  # of an even share: an expert with less learns next to nothing


class GateRecords:
    """The records of a training. Each starving expert is warned of once per attempt."""

    def __init__(self) -> None:
        self._warned: set[tuple[int, int]] = set()

    def record(self, statistics: list[GateStatistics], *, step: int) -> dict[str, Any]:
        """The field of a record of `metrics.jsonl`; empty for a dense model. Loads are relative to an even share."""
        self._warn(statistics, step)
        if not statistics:
            return {}
        return {
            "gates": [
                {
                    "layer": layer.layer,
                    "load_max": max(layer.load) * len(layer.load),
                    "load_min": min(layer.load) * len(layer.load),
                    "dropped": layer.dropped,
                    "aux_loss": layer.aux_loss,
                    "z_loss": layer.z_loss,
                    "entropy": layer.entropy,
                }
                for layer in statistics
            ]
        }

    def _warn(self, statistics: list[GateStatistics], step: int) -> None:
        for layer in statistics:
            for expert, share in enumerate(layer.load):
                load, name = share * len(layer.load), (layer.layer, expert)
                if load >= STARVED or name in self._warned:
                    continue
                self._warned.add(name)
                logger.warning(
                    "step %d: layer %d, expert %d: it got %.3f of an even share of the tokens since the last record, less than "
                    "%s: a larger moe.aux_loss or moe.bias_update_rate balances experts", step, *name, load, STARVED,
                )  # fmt: skip
