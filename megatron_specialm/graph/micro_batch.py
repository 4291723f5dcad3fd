"""When the size of micro-batches is a part of a digest."""

from typing import Any

from megatron_specialm.config.model import ModelConfig


def micro_batch(model: ModelConfig, size: int) -> dict[str, Any]:
    """The size as a setting that a task reads (`Task.elsewhere`), or nothing: it decides a result only where an MoE balances or
    drops the tokens of a micro-batch together."""
    return {"micro_batch_size": size} if model.moe is not None and model.moe.depends_on_micro_batch else {}
