"""Each test on a GPU begins with the memory that the ones before it gave back."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _memory_given_back() -> None:
    """Megatron-Core's wrappers refer to themselves, so their weights stay until the collector runs; a test that counts bytes
    or fills the GPU would find them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
