"""Checkpoints of older versions of Megatron-LM: their names, and the order of rows of queries, keys and values.

checkpoint_version      rows of query_key_value on each tensor-parallel rank
0                       (3, heads, head size)
1                       (heads, head size, 3)
2                       (heads, 3, head size), as now
3                       the same, in groups of heads that share key and value
"""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.lazy import Computed, LazyTensor

_OLDER = "language_model."
# Of GPT models before Megatron-Core had them.
_NAMES = {
    r"^language_model\.": "",
    r"^word_embeddings_for_head\.": "output_layer.",
    r"^(encoder|transformer)\.": "decoder.",
    r"\.attention\.": ".self_attention.",
    r"\.query_key_value\.": ".linear_qkv.",
    r"\.dense\.": ".linear_proj.",
    r"\.dense_h_to_4h\.": ".linear_fc1.",
    r"\.dense_4h_to_h\.": ".linear_fc2.",
    r"\.input_norm\.": ".input_layernorm.",
    r"\.post_attention_(layer)?norm\.": ".pre_mlp_layernorm.",
    r"\.final_norm\.": ".final_layernorm.",
}
# Before version 2, the dimension that is over heads, over queries, keys and values, and over a head.
_ROWS = {0.0: (1, 0, 2), 1.0: (0, 2, 1)}


def present_names(shard: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A rank's weights by Megatron-Core's names."""
    if not any(name.startswith(_OLDER) for name in shard):
        return dict(shard)
    found = {}
    for name, tensor in shard.items():
        own = name
        for theirs, ours in _NAMES.items():
            own = re.sub(theirs, ours, own)
        found[own] = tensor
    return found


def present_order(
    shard: Mapping[str, LazyTensor], version: float, shape: ModelConfig, *, tensor_parallel: int, where: Path
) -> dict[str, LazyTensor]:
    """A rank's weights with the rows of each linear_qkv in the order of `checkpoint_version` 2 and later.

    Raises:
        CheckpointError: the version is unknown, or of another model: before 2 no heads shared keys and values.
    """
    if version >= 2:
        return dict(shard)
    if version not in _ROWS or shape.kv_heads != shape.attention_heads:
        raise CheckpointError(
            f"{where}: checkpoint_version {version} with {shape.attention_heads} heads in {shape.kv_heads} groups: there are "
            "versions 0, 1, 2 and 3, and groups since 3: the settings are of another model"
        )
    order = _ROWS[version]
    present = (shape.attention_heads // tensor_parallel, 3, shape.head_size)
    stored = [present[order.index(dimension)] for dimension in range(3)]

    def rows(tensor: LazyTensor) -> LazyTensor:
        return Computed(
            tuple(tensor.shape),
            tensor.dtype,
            lambda: tensor[()].unflatten(0, stored).movedim(order, (0, 1, 2)).flatten(0, 2).contiguous(),
        )

    return {name: rows(tensor) if ".linear_qkv." in name else tensor for name, tensor in shard.items()}
