"""Each test on a GPU begins as in a process of its own."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    """Megatron-Core's wrappers refer to themselves, so their weights stay until the collector runs; a test that counts bytes or
    fills the GPU would find them. Transformer Engine keeps the scales of FP8 modules that are gone, with their groups."""
    gc.collect()
    if not torch.cuda.is_available():
        return
    torch.cuda.empty_cache()
    try:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    except ImportError:
        return
    FP8GlobalStateManager.reset()
