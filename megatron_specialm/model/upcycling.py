"""First weights of an MoE from dense models (`upcycle` of a training).

From one model each expert is a copy of its feed-forward part (sparse upcycling, arXiv 2212.05055). A token's weights over its
experts sum to 1, so the MoE starts as the same function. From several, those of a mixture (`data: cluster`), each gives its
feed-forward part to experts, and all other weights are averaged (Branch-Train-MiX, arXiv 2403.07816). Routers are drawn.

All tensors are canonical. They are computed when their slices are read: a process that holds few experts reads few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.initial import first_weight
from megatron_specialm.model.weights import EXPERTS, Sliceable, weight_specs


def upcycled(
    models: Sequence[Mapping[str, Sliceable]], shape: ModelConfig, *, vocabulary_size: int, seed: int
) -> dict[str, Sliceable]:
    """The canonical first weights of an MoE.

    Args:
        models: canonical weights of dense models. Expert e of a layer starts from model `e % len(models)`.
        shape: of the MoE; without its `moe` that of each model.
        seed: of the routers' first weights.
    """
    found: dict[str, Sliceable] = {}
    for name, spec in weight_specs(shape, vocabulary_size=vocabulary_size).items():
        if spec.is_expert:
            found[name] = _Stacked(spec.shape, models, name.replace(EXPERTS, "mlp"))
        elif ".mlp.router." in name:
            found[name] = first_weight(name, spec, shape, seed=seed)
        else:
            found[name] = _Averaged(spec.shape, models, name)
    return found


@dataclass(frozen=True)
class _Of:
    """A weight that is computed from the weights `name` of dense models."""

    shape: tuple[int, ...]
    models: Sequence[Mapping[str, Sliceable]]
    name: str


class _Stacked(_Of):
    """(E, ...): expert e has that of model `e % len(models)`."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        experts, *rest = index if isinstance(index, tuple) and index else (slice(None),)
        chosen = range(*experts.indices(self.shape[0]))
        return torch.stack([self.models[expert % len(self.models)][self.name][tuple(rest)] for expert in chosen])


class _Averaged(_Of):
    """Their mean."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        first, *others = (model[self.name][index] for model in self.models)
        return sum(others, first.float()) / len(self.models) if others else first
