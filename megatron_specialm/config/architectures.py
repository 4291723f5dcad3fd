"""The architectures of Hugging Face Transformers that our models are, and their config.json.

A setting of theirs that would change what is computed has a row in `_FIXED`: a checkpoint with another value is refused.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json, reading
from megatron_specialm.config.model import Activation, ModelConfig

CONFIG = "config.json"
_REMEDY = "copy it again from where the model was written"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Llama 3's rotary scaling. Megatron-Core has all of it built in but the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Model:
    """What a checkpoint is of.

    Attributes:
        special_ids: bos_token_id, eos_token_id and pad_token_id as config.json has them; empty where nothing says.
    """

    shape: ModelConfig
    vocabulary_size: int
    context_length: int
    special_ids: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "context_length"):
            if type(value := getattr(self, name)) is not int or not 0 < value < 2**31:
                raise ValueError(f"its {name.replace('_', ' ')} is {value!r}, not a positive whole number below 2^31")

    @property
    def computes(self) -> dict[str, Any]:
        """All that decides what is computed from weights. Two models of equal weights and this are equal."""
        shape = self.shape.model_dump(mode="json", exclude={"name", "init_std"})
        return {**shape, "query_groups": self.shape.kv_heads, "kv_channels": self.shape.head_size,
                "vocabulary_size": self.vocabulary_size, **_experts_compute(self.shape)}  # fmt: skip


def _experts_compute(shape: ModelConfig) -> dict[str, Any]:
    """The settings of `Model.computes` of a mixture of experts: without those of training, and the size of dense layers only
    if there are any."""
    moe = shape.moe
    if moe is None:
        return {}
    size = moe.ffn_hidden_size or shape.ffn_hidden_size
    only = {
        "experts": moe.counts if len(set(moe.counts)) > 1 else moe.counts[0],
        "every": moe.every,
        "top_k": moe.top_k,
        "ffn_hidden_size": size,
        "scores": "sigmoid" if moe.bias_update_rate else "softmax",
        "shared_expert": moe.shared_expert,
        "residual": moe.residual,
    }
    return {"moe": only, "ffn_hidden_size": size if moe.every == 1 else shape.ffn_hidden_size}


class _Fixed(NamedTuple):
    """A setting that must have one of these values; `missing` is what Transformers takes where it is not set."""

    setting: str
    values: tuple[Any, ...]
    missing: Any
    reason: str


@dataclass(frozen=True)
class _Architecture:
    family: str
    fixed: tuple[_Fixed, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # what Transformers takes where it is not set; None: hidden size / heads
    epsilon: tuple[str, float] = ("rms_norm_eps", 1e-6)
    tied: bool = False
    rotary_base: int = 10_000  # what Transformers takes where it is not set
    experts: "_Experts | None" = None


class _Experts(NamedTuple):
    """The names of settings of a mixture of experts; None for what the architecture has not."""

    size: str = "moe_intermediate_size"
    every: str | None = "decoder_sparse_step"
    normalized: str | None = "norm_topk_prob"  # always so where there is no such setting
    shared: str | None = None
    qkv_bias: bool = False  # whether `qkv_bias` is a setting, which is true where it is missing


_SWIGLU = _Fixed("hidden_act", ("silu", "swish"), "silu", "the feed-forward part is SwiGLU")
_NO_BIAS = _Fixed("attention_bias", (False,), False, "the attention's output has no bias here")
_NO_WINDOW = _Fixed("use_sliding_window", (False,), False, "attention sees the whole context here")
_SPARSE = _Fixed("mlp_only_layers", ([], None), None, "here the last of every `decoder_sparse_step` layers has experts")
_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(
        "llama", (_SWIGLU, _NO_BIAS, _Fixed("mlp_bias", (False,), False, "SwiGLU has no biases here"))
    ),
    "Qwen2ForCausalLM": _Architecture("llama", (_SWIGLU, _NO_WINDOW), qkv_bias=True),
    "Qwen3ForCausalLM": _Architecture("llama", (_SWIGLU, _NO_BIAS, _NO_WINDOW), qk_norm=True, head_dim=128),
    "MistralForCausalLM": _Architecture(
        "llama", (_SWIGLU, _Fixed("sliding_window", (None,), 4096, "attention sees the whole context here"))
    ),
    "MixtralForCausalLM": _Architecture(
        "llama", (_SWIGLU, _Fixed("sliding_window", (None,), None, "attention sees the whole context here")),
        epsilon=("rms_norm_eps", 1e-5), rotary_base=1_000_000,
        experts=_Experts("intermediate_size", every=None, normalized=None),
    ),
    "Qwen2MoeForCausalLM": _Architecture(
        "llama", (_SWIGLU, _NO_WINDOW, _SPARSE),
        experts=_Experts(shared="shared_expert_intermediate_size", qkv_bias=True),
    ),
    "Qwen3MoeForCausalLM": _Architecture(
        "llama", (_SWIGLU, _NO_BIAS, _NO_WINDOW, _SPARSE), qk_norm=True, experts=_Experts(),
    ),
    "GPTNeoXForCausalLM": _Architecture(
        "neox",
        (
            _Fixed(
                "use_parallel_residual", (False,), True,
                "attention and feed-forward part of a layer read the same input (Pythia), and in Megatron-Core's layer the "
                "second reads what the first wrote",
            ),
            _Fixed("attention_bias", (True,), True, "the attention's linears have biases here"),
        ),
        epsilon=("layer_norm_eps", 1e-5),
    ),
}  # fmt: skip
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def architecture_of(config: ModelConfig) -> str:
    """The class of Transformers that computes what a model of ours computes.

    Raises:
        CheckpointError: there is none.
    """
    if config.export_refusal is not None:
        raise CheckpointError(f"no model of Transformers: {config.export_refusal}")
    if config.family == "neox":
        return "GPTNeoXForCausalLM"
    moe = config.moe
    shared = moe is not None and moe.shared_expert is not None
    if config.qk_norm and (config.qkv_bias or shared):
        raise CheckpointError(
            "a model with qk_norm and qkv_bias, or with qk_norm and a shared expert, is none of Transformers' known here"
        )
    if moe is None:
        return "Qwen2ForCausalLM" if config.qkv_bias else "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    if config.qk_norm:
        return "Qwen3MoeForCausalLM"
    is_mixtral = moe.every == 1 and moe.top_k > 1 and not (config.qkv_bias or shared)
    return "MixtralForCausalLM" if is_mixtral else "Qwen2MoeForCausalLM"


def rotary_scaling(config: ModelConfig) -> dict[str, Any]:
    """`rope_type` of Transformers, with the settings of that type."""
    if config.rotary_scaling is None:
        return {"rope_type": "default"}
    return {"rope_type": "llama3", "factor": float(config.rotary_scaling), **_LLAMA3}


def refuse_given(path: Path, given: Model | None) -> None:
    """Refuse a config that a user names for a checkpoint which has its own.

    Raises:
        CheckpointError: there is one.
    """
    if given is not None:
        raise CheckpointError(f"{path}: describes its model itself: leave out --config")


def read_config(path: Path) -> Model:
    """The model that a config.json of Transformers describes.

    Raises:
        ArtifactError: it is missing or damaged, or a setting is of a wrong type.
        CheckpointError: its architecture or one of its settings is none that we have.
    """
    theirs = read_json(path, dict[str, Any], remedy=_REMEDY)
    with reading(path, form="a config of Transformers", remedy=_REMEDY):
        return _read(path, theirs)


def _read(path: Path, theirs: dict[str, Any]) -> Model:
    if not (names := theirs.get("architectures")):
        raise CheckpointError(
            f"{path}: does not name its class of Transformers: set `architectures` to one of {', '.join(_ARCHITECTURES)}"
        )
    if len(names) != 1 or names[0] not in _ARCHITECTURES:
        near = difflib.get_close_matches(str(names[0]), _ARCHITECTURES, n=1, cutoff=0)[0]
        raise CheckpointError(
            f"{path}: architecture {', '.join(map(str, names))} is not known; the nearest is {near} (known: "
            f"{', '.join(_ARCHITECTURES)})"
        )
    known = _ARCHITECTURES[names[0]]
    for setting, values, missing, reason in known.fixed:
        if (value := theirs.get(setting, missing)) not in values:
            raise CheckpointError(f"{path}: {setting} is {value!r}, which cannot be converted: {reason}")
    if theirs.get("quantization_config"):
        raise CheckpointError(f"{path}: the weights are quantized: convert the checkpoint that they were made from")
    if any(kind != "full_attention" for kind in theirs.get("layer_types") or ()):
        raise CheckpointError(f"{path}: layer_types has layers of other attention than full_attention")
    try:
        settings = {
            "family": known.family,
            "layers": theirs["num_hidden_layers"],
            "hidden_size": theirs["hidden_size"],
            "ffn_hidden_size": theirs["intermediate_size"],
            "attention_heads": theirs["num_attention_heads"],
            "tie_embeddings": theirs.get("tie_word_embeddings", known.tied),
            "norm_epsilon": _number(theirs, *known.epsilon),
            "init_std": _number(theirs, "initializer_range", 0.02),
            **_rotary(path, theirs, known),
        }
        if known.family == "neox":
            settings["activation"] = _ACTIVATIONS.get(theirs.get("hidden_act", "gelu"), theirs.get("hidden_act"))
        else:
            settings |= _llama(theirs, known)
        if known.experts is not None:
            settings |= _moe(path, theirs, known.experts)
        return Model(
            ModelConfig(**settings), theirs["vocab_size"], theirs["max_position_embeddings"],
            {name: theirs[name] for name in SPECIAL_IDS if theirs.get(name) is not None},
        )  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error.args[0]}: it is no config of {names[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc'])) or names[0]}: {first['msg']}") from None


def _number(theirs: Mapping[str, Any], name: str, missing: Any = None) -> Any:
    """A setting that is a number, as it is; `missing` where it is not set."""
    value = theirs[name] if missing is None else theirs.get(name, missing)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, not a number")
    return value


def _llama(theirs: Mapping[str, Any], known: _Architecture) -> dict[str, Any]:
    heads, hidden = _number(theirs, "num_attention_heads"), _number(theirs, "hidden_size")
    groups = theirs.get("num_key_value_heads") or heads
    size = theirs.get("head_dim") or known.head_dim
    return {
        "query_groups": None if groups == heads else groups,
        "kv_channels": None if size is None or size * heads == hidden else size,
        "qkv_bias": known.qkv_bias,
        "qk_norm": known.qk_norm,
    }


def _moe(path: Path, theirs: Mapping[str, Any], names: _Experts) -> dict[str, Any]:
    """The settings of a mixture of experts."""
    top_k = _number(theirs, "num_experts_per_tok")
    normalized = names.normalized is None or bool(theirs.get(names.normalized, False))
    if normalized != (top_k > 1):
        raise CheckpointError(
            f"{path}: num_experts_per_tok is {top_k}, and the weights of a token's experts are "
            f"{'divided by their sum' if normalized else 'softmax probabilities'}; here they are divided by their sum if there "
            "are several experts, and the probability of a single one: no other router can be converted"
        )
    moe = {
        "experts": theirs["num_local_experts" if "num_local_experts" in theirs else "num_experts"],
        "top_k": top_k,
        "every": 1 if names.every is None else theirs.get(names.every, 1),
        "ffn_hidden_size": theirs[names.size],
        "shared_expert": (theirs[names.shared] or None) if names.shared is not None else None,
        "aux_loss": theirs.get("router_aux_loss_coef", 0.001),
    }
    return {"moe": moe, **({"qkv_bias": theirs.get("qkv_bias", True)} if names.qkv_bias else {})}


def _rotary(path: Path, theirs: Mapping[str, Any], known: _Architecture) -> dict[str, Any]:
    """Base and scaling of rotary positions, as Transformers 5 or 4 writes them."""
    rotary = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    base = rotary.pop("rope_theta", theirs.get("rope_theta", theirs.get("rotary_emb_base", known.rotary_base)))
    part = rotary.pop("partial_rotary_factor", theirs.get("partial_rotary_factor", theirs.get("rotary_pct")))
    kind = rotary.pop("rope_type", rotary.pop("type", "default"))
    rotary.pop("type", None)
    if part is None:
        part = 0.25 if known.family == "neox" else 1.0
    if part != 1.0:
        raise CheckpointError(f"{path}: rotary positions turn {part} of each head; here they turn all of it")
    if _number({"rope_theta": base}, "rope_theta") != int(base):
        raise CheckpointError(f"{path}: rope_theta {base} is no whole number, which Megatron-Core wants")
    if kind == "default":
        return {"rotary_base": int(base)}
    factor = rotary.pop("factor", None)
    if kind != "llama3" or rotary != _LLAMA3:
        raise CheckpointError(
            f"{path}: rotary scaling of type {kind}{_listed(rotary)} cannot be converted: Megatron-Core has type llama3"
            f"{_listed(_LLAMA3)} only"
        )
    return {"rotary_base": int(base), "rotary_scaling": float(_number({"factor": factor}, "factor"))}


def _listed(settings: Mapping[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in settings.items())
