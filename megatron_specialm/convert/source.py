"""What a checkpoint of any format is to the driver: a source of canonical tensors, or a target that takes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from megatron_specialm.convert.architectures import Model
from megatron_specialm.convert.fingerprint import Fingerprint
from megatron_specialm.convert.lazy import LazyTensor


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. Every tensor in its files is in exactly one canonical weight, or in `dropped`.

    Attributes:
        path: the folder that was recognized: of a step or an iteration, if it has several.
        weights: canonical names, in the order of the forward pass.
        stored: the tensors under the format's own names.
        layout: how they are stored, in words.
        dropped: tensors that are left out on purpose, by name, with the reason.
        tokenizer: a folder with the tokenizer's files, or None.
        tokenizer_fingerprint: of the tokenizer that a training of ours used; empty for others.
    """

    path: Path
    format: str
    model: Model
    weights: Mapping[str, LazyTensor]
    stored: Mapping[str, LazyTensor]
    layout: str
    step: int = 0
    dropped: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None
    tokenizer_fingerprint: str = ""
    fingerprint: Fingerprint | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights; of several, the widest."""
        return max((tensor.dtype for tensor in self.weights.values()), key=lambda dtype: dtype.itemsize)


class Layout(NamedTuple):
    """How a target divides the model over processes."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1


@dataclass(frozen=True)
class Order:
    """What a target is to write, and where.

    Attributes:
        folder: a new one.
        source: what is converted: its model, step and tokenizer.
        dtype: the type of the weights in the files.
    """

    folder: Path
    source: Source
    layout: Layout
    dtype: torch.dtype


class Target(Protocol):
    """Writes canonical tensors into a folder. `write` is called once for each, from several threads, in any order."""

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole canonical tensor."""

    def finish(self, fingerprint: Fingerprint) -> None:
        """Write all else. All tensors have been written, else an AssertionError is raised."""
