"""Megatron-Core on a CPU: a proxy of the torch module in which "cuda" means the CPU.

Some Megatron-Core modules allocate small tensors on a literal "cuda" or use CUDA streams. On a machine without a GPU, and in
those modules only, the name `torch` is bound to the proxy below. torch itself is unchanged, so other code is not affected.

Modules that may be the first to import Megatron-Core import this one before it: see `import_uncompiled`.
"""

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_MODULES = (
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.utils",
)


def import_uncompiled(name: str) -> None:
    """Import a module. Without a GPU, torch.compile returns the functions that it decorates unchanged.

    A model on a CPU calls none of them (`gpt.transformer_config`), but the decorator imports torch's compiler, which takes
    seconds of CPU time.
    """
    original = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        importlib.import_module(name)
    finally:
        torch.compile = original


def _uncompiled(function: Callable | None = None, **_: Any) -> Callable:
    return function or (lambda decorated: decorated)


import_uncompiled("megatron.core.jit")


class _TorchOnCpu(ModuleType):
    """A proxy of torch that makes tensors on the CPU and whose `cuda` has no-ops."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("zeros", "ones", "empty", "full", "tensor"):
            setattr(self, name, _on_cpu(getattr(torch, name)))
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.cuda = SimpleNamespace(
            current_device=lambda: torch.device("cpu"),
            current_stream=lambda *_: stream,
            default_stream=lambda *_: stream,
            empty_cache=lambda: None,
            get_rng_state=lambda *_: torch.get_rng_state(),
            is_available=lambda: False,
            manual_seed=torch.manual_seed,
            stream=lambda _: contextlib.nullcontext(),
            synchronize=lambda *_: None,
            Stream=lambda **_: stream,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made_on_cpu


@functools.cache
def install() -> None:
    """Bind the proxy in the modules that need it. Idempotent; does nothing on a machine with a GPU."""
    if torch.cuda.is_available():
        return
    _keep_freed_memory()
    view = _TorchOnCpu()
    for name in _MODULES:
        importlib.import_module(name).torch = view  # type: ignore[attr-defined]
    # Recomputation must restore the random state of the forward pass: here, the CPU's.
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]
    _take_no_fused_optimizer()


def _take_no_fused_optimizer() -> None:
    """Replace the optimizer, norm and scaling kernels of Transformer Engine and apex by Megatron-Core's own. Megatron-Core
    selects those kernels if the packages are installed, even without a GPU, as on a login node or in a container."""
    optimizers, norms, scalings = (
        importlib.import_module(f"megatron.core.optimizer{name}") for name in ("", ".clip_grads", ".optimizer")
    )
    utils = importlib.import_module("megatron.core.utils")
    optimizers.USING_PYTORCH_OPTIMIZER = True  # type: ignore[attr-defined]
    norms.l2_norm_impl = utils.local_multi_tensor_l2_norm  # type: ignore[attr-defined]
    for module in (norms, scalings):
        module.multi_tensor_applier = utils.local_multi_tensor_applier  # type: ignore[attr-defined]
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale  # type: ignore[attr-defined]


def _keep_freed_memory() -> None:
    """Have the C library keep large freed blocks instead of returning them to the kernel.

    Every step allocates and frees the same tens of megabytes of logits. New memory pages for each made the softmax of a small
    model six times slower and a training step 20% slower (docs/benchmarks.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Within, CPU tensors report CUDA type names, by which Megatron-Core's mixed-precision optimizer groups parameters."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = named  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
