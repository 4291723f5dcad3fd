"""Adam's state under canonical names: what a training needs beside its weights to go on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_specialm.convert.lazy import LazyTensor, cast

MOMENTS = ("exp_avg", "exp_avg_sq")
# Of torch.optim.AdamW, for what a checkpoint does not say; the learning rate is DeepSpeed's and ours.
DEFAULTS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_PLAIN = (int, float, tuple, list)  # a learning rate may be a tensor

Weights = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class AdamState:
    """Adam's state of all canonical weights.

    Attributes:
        step: how many updates it has made.
        moments: `exp_avg/WEIGHT` and `exp_avg_sq/WEIGHT` of each weight, with its shape, in fp32.
        settings: learning rate, betas and the like, by torch's names; those that the checkpoint says.
    """

    step: int
    moments: Weights
    settings: Mapping[str, Any] = field(default_factory=dict)

    def named(self, theirs: Callable[[Weights], Weights]) -> dict[str, LazyTensor]:
        """The moments as `KIND/NAME`, with a format's names.

        Args:
            theirs: gives weights the format's names and shapes.
        """
        return {f"{kind}/{name}": one for kind in MOMENTS for name, one in theirs(_of(kind, self.moments)).items()}


def read_adam(
    stored: Weights, *, step: int | None, groups: Iterable[Mapping[str, Any]], ours: Callable[[Weights], Weights]
) -> AdamState | None:
    """Adam's state in a checkpoint; None where there is none, or no update was made.

    Args:
        stored: `exp_avg/NAME` and `exp_avg_sq/NAME`, by the format's names.
        groups: the optimizer's parameter groups; the settings are those of the one with the largest weight decay.
        ours: gives a format's tensors canonical names and shapes.

    Raises:
        CheckpointError: a moment is missing, or of another shape than its weight.
    """
    if not step or not stored:
        return None
    moments = {
        f"{kind}/{name}": cast(one, torch.float32) for kind in MOMENTS for name, one in ours(_of(kind, stored)).items()
    }
    first: Mapping[str, Any] = max(groups, key=lambda group: group.get("weight_decay", 0.0), default={})
    return AdamState(step, moments, {name: first[name] for name in DEFAULTS if isinstance(first.get(name), _PLAIN)})


def _of(kind: str, tensors: Weights) -> dict[str, LazyTensor]:
    return {name.removeprefix(f"{kind}/"): one for name, one in tensors.items() if name.startswith(f"{kind}/")}
