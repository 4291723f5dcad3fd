"""Two checkpoints compared, tensor by tensor, under canonical names."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_specialm.convert.fingerprint import unequal_settings
from megatron_specialm.convert.source import Source


@dataclass(frozen=True)
class Difference:
    """A canonical tensor of two checkpoints. `largest` is the largest absolute difference of an element, `scale` the largest
    element of the first; None where the shapes differ or one has no such tensor."""

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    largest: float | None = None
    scale: float | None = None

    @property
    def is_equal(self) -> bool:
        """Whether all elements are equal, as fp32. NaNs of the same bits are equal."""
        return self.largest == 0.0


def settings_that_differ(first: Source, second: Source) -> Iterator[str]:
    """The settings that decide what is computed, and differ, as `rotary_base: 10000, 500000`."""
    for name, ours, theirs in unequal_settings(first.model.computes, second.model.computes):
        yield f"{name}: {ours}, {theirs}"


def differences(first: Source, second: Source) -> Iterator[Difference]:
    """Each canonical tensor of either, in the order of the forward pass. Two tensors are in memory at a time."""
    for name in {**first.weights, **second.weights}:
        pair = first.weights.get(name), second.weights.get(name)
        shapes = tuple(None if one is None else tuple(one.shape) for one in pair)
        if pair[0] is None or pair[1] is None or shapes[0] != shapes[1]:
            yield Difference(name, shapes)  # type: ignore[arg-type]
            continue
        ours, theirs = (one[()].float() for one in pair if one is not None)
        yield Difference(name, shapes, _largest(_distance(ours, theirs)), _largest(ours.abs()))  # type: ignore[arg-type]


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Absolute differences of elements in fp32; 0 where the bits are equal, though it were NaN or infinity."""
    return (ours - theirs).abs_().masked_fill_(ours.view(torch.int32) == theirs.view(torch.int32), 0.0)


def _largest(elements: torch.Tensor) -> float:
    return float(elements.max()) if elements.numel() else 0.0
