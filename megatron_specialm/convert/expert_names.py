"""The names of experts in files of Transformers and DeepSpeed, translated to those in the tables of `families.py`, and back.

...mlp.experts.E.gate_proj.weight (up_proj, down_proj)          the tables: files of Qwen2-MoE and Qwen3-MoE
...block_sparse_moe.experts.E.w1.weight (w3, w2)                files of Mixtral
...mlp.experts.gate_up_proj (E, 2F, H), down_proj (E, H, F)     modules of Transformers 5, as DeepSpeed saves them
...mlp.deepspeed_moe.experts.deepspeed_experts.E....            DeepSpeed's MoE layer where Transformers has its own
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import product

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.lazy import LazyTensor, part, row_range

_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TO_TABLE = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(?<=\.experts\.)(\d+)\.(w[123])\."), lambda found: f"{found[1]}.{_MIXTRAL[found[2]]}."),
    # An attribute between: of a module that returns the first of the results of DeepSpeed's layer.
    (re.compile(r"\.mlp(\.\w+)?\.deepspeed_moe\.gate\.wg\."), ".mlp.gate."),
    (re.compile(r"\.mlp(\.\w+)?\.deepspeed_moe\.experts\.deepspeed_experts\."), ".mlp.experts."),
)
_FUSED = re.compile(r"(?P<experts>.+\.mlp\.experts\.)(?P<part>gate_up_proj|down_proj)")


def table_names(stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors under the names of the tables. A tensor of all experts becomes one per expert.

    Raises:
        CheckpointError: two have the same name.
    """
    found: dict[str, LazyTensor] = {}
    for theirs, tensor in stored.items():
        for name, one in _apart(_table_name(theirs), tensor).items():
            if name in found:
                raise CheckpointError(f"{theirs}: {name} is there twice, under names of two kinds")
            found[name] = one
    return found


def _table_name(name: str) -> str:
    for pattern, replacement in _TO_TABLE:
        name = pattern.sub(replacement, name)
    return name


def _apart(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    match = _FUSED.fullmatch(name)
    if match is None or len(tensor.shape) != 3:
        return {name: tensor}
    experts, rows = tensor.shape[:2]
    parts = {"down_proj": (0, rows)}
    if match["part"] == "gate_up_proj":
        parts = {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)}
    return {
        f"{match['experts']}{expert}.{own}.weight": row_range(part(tensor, expert), *bounds)
        for expert in range(experts)
        for own, bounds in parts.items()
    }


def mixtral_name(name: str) -> str:
    """The name in Mixtral's files of a weight of the tables, also of one with E for the expert's number."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    for theirs, ours in _MIXTRAL.items():
        name = re.sub(rf"(?<=\.experts\.)(E|\d+)\.{ours}\.", partial(_with, theirs), name)
    return name


def _with(own: str, found: re.Match[str]) -> str:
    return f"{found[1]}.{own}."


def fused_name(name: str) -> str:
    """The name in a module of Transformers 5 of the weights of all experts, by a row's first name."""
    return name.replace(".E.gate_proj.weight", ".gate_up_proj").replace(".E.down_proj.weight", ".down_proj")


def deepspeed_name(name: str) -> str:
    """The name of a weight of the tables in a model of Transformers whose MoE layers are DeepSpeed's."""
    name = name.replace(".mlp.experts.", ".mlp.deepspeed_moe.experts.deepspeed_experts.")
    return name.replace(".mlp.gate.", ".mlp.deepspeed_moe.gate.wg.")


def deepspeed_names(module: Iterable[str], experts: int) -> Iterator[str]:
    """The names of the parameters of such a model, in its order, by those of Transformers' own module."""
    for name in module:
        match = _FUSED.fullmatch(name)
        if match is None:
            yield deepspeed_name(name)
        elif match["part"] == "gate_up_proj":  # an expert's parameters stand together
            for expert, part in product(range(experts), ("gate", "up", "down")):
                yield deepspeed_name(f"{match['experts']}{expert}.{part}_proj.weight")
