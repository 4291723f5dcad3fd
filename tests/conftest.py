"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest

from megatron_specialm.config.model import ModelConfig


@pytest.fixture
def neox() -> ModelConfig:
    """A GPT-NeoX-style shape small enough for any test."""
    return ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=64, attention_heads=4)


@pytest.fixture
def llama() -> ModelConfig:
    """A Llama-style shape with grouped queries."""
    return ModelConfig(family="llama", layers=2, hidden_size=32, ffn_hidden_size=48, attention_heads=4, query_groups=2)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    from megatron_specialm.base.environment import ALONE
    from megatron_specialm.train.distributed import process_group

    with process_group(ALONE):
        yield
