"""How much memory a computation takes on a CPU: bytes of all tensors that are alive, at their most."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within it, `peak` is the most bytes of tensors at a time, without those that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._older: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """After every operation, count."""
        self._older |= {key for key, _ in _storages((args, kwargs))} - self._alive.keys()
        result = func(*args, **(kwargs or {}))
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        for key, storage in _storages(result):
            if key not in self._older:
                self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _storages(value: Any) -> list[tuple[int, torch.UntypedStorage]]:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [(tensor.untyped_storage()._cdata, tensor.untyped_storage()) for tensor in tensors]
