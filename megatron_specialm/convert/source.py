"""What a checkpoint of any format is to the driver: a source of canonical tensors, or a target."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_specialm.config.architectures import Model
from megatron_specialm.convert.adam import AdamState
from megatron_specialm.convert.fingerprint import Fingerprint
from megatron_specialm.convert.lazy import LazyTensor, cast


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. Every tensor in its files is in exactly one canonical weight, or in `dropped`.

    Attributes:
        path: the folder that was recognized: of a step or an iteration, if it has several.
        weights: canonical names, in the order of the forward pass. Of a training in bf16, the optimizer's fp32 main weights.
        stored: the tensors under the format's own names.
        layout: how they are stored, in words.
        dropped: tensors that are left out on purpose, by name, with the reason.
        optimizer: Adam's state, where it is there for all weights.
        rounded: the model's own weights, where `weights` are the main weights that they are rounded from.
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
    optimizer: AdamState | None = None
    rounded: Mapping[str, LazyTensor] = field(default_factory=dict)
    tokenizer: Path | None = None
    tokenizer_fingerprint: str = ""
    fingerprint: Fingerprint | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights; of several, the widest."""
        return max((tensor.dtype for tensor in self.weights.values()), key=lambda dtype: dtype.itemsize)


class Layout(NamedTuple):
    """How a target divides the model over processes. `data_parallel` is of a ZeRO checkpoint, whose files are the ranks';
    `zero_stage` 0 stands for a universal one."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    zero_stage: int = 0
    data_parallel: int = 1


@dataclass(frozen=True)
class TargetSpec:
    """What a target is to write, and where.

    Attributes:
        folder: a new one.
        source: what is converted: its model, step and tokenizer; `optimizer` is None unless it is to be written.
        dtype: the type of the model's weights in the files. Beside the optimizer's state the main weights are in fp32.
        fingerprint: of what is to be written.
        threads: that write.
    """

    folder: Path
    source: Source
    layout: Layout
    dtype: torch.dtype
    fingerprint: Fingerprint
    threads: int = 2

    @property
    def weights(self) -> dict[str, LazyTensor]:
        """The canonical weights, in the type that is written."""
        return {name: cast(tensor, self.dtype) for name, tensor in self.source.weights.items()}

    @property
    def step(self) -> int:
        """Of a training that can go on, else 0."""
        optimizer = self.source.optimizer
        return 0 if optimizer is None else self.source.step or optimizer.step

    def for_each_weight(self, write: Callable[[str, LazyTensor], None]) -> None:
        """Call `write` for each canonical weight, in threads."""
        self.for_each(self.weights, write)

    def for_each(self, tensors: Mapping[str, LazyTensor], write: Callable[[str, LazyTensor], None]) -> None:
        """Call `write` for each of some tensors, in threads."""
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in pool.map(write, *zip(*tensors.items(), strict=True)):
                pass
