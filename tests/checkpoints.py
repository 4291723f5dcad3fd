"""Tiny random models of Transformers' own making, as sources of conversions."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY, CONTEXT = 99, 16_384
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_theta": 500_000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# No setting has the default of either side, so that one that is lost shows.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, rms_norm_eps=1e-3, tie_word_embeddings=False, rope_parameters={
        "rope_theta": 700.0, "rope_type": "default"}),
    "llama 3": LlamaConfig(**_SIZES, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3, tie_word_embeddings=True,
        rope_parameters=_LLAMA3),
    "qwen2": Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={
        "rope_theta": 900.0, "rope_type": "default"}),
    "qwen3": Qwen3Config(**_SIZES, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False, rope_parameters={
        "rope_theta": 900.0, "rope_type": "default"}),
    "neox": GPTNeoXConfig(**_SIZES, use_parallel_residual=False, hidden_act="gelu_new", layer_norm_eps=1e-3,
        tie_word_embeddings=False, rope_parameters={
            "rope_theta": 700.0, "rope_type": "default", "partial_rotary_factor": 1.0}),
}  # fmt: skip
_SMALLER: dict[str, Any] = {**_SIZES, "num_hidden_layers": 4, "initializer_range": 0.2}
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SMALLER, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=3, rms_norm_eps=1e-3,
        router_aux_loss_coef=0.03, tie_word_embeddings=False, rope_parameters={"rope_theta": 700.0, "rope_type": "default"}),
    "qwen2-moe": Qwen2MoeConfig(**_SMALLER, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=2, moe_intermediate_size=24, shared_expert_intermediate_size=16, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 900.0, "rope_type": "default"}),
    "qwen3-moe": Qwen3MoeConfig(**_SMALLER, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=1,
        norm_topk_prob=False, moe_intermediate_size=40, tie_word_embeddings=False,
        rope_parameters={"rope_theta": 900.0, "rope_type": "default"}),
}  # fmt: skip
CONFIGS |= MIXTURES


def random_model(name: str) -> PreTrainedModel:
    """A model whose biases and norms are random too: nothing hides behind a zero or a one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.3
    return model


def save_random_model(name: str, folder: Path, **settings: Any) -> Path:
    """A folder as Transformers writes it."""
    random_model(name).save_pretrained(folder, **settings)
    return folder


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor, of: object = None) -> None:
    """Up to rounding, which differs between processors: at most 0.7e-5 of the standard deviation was seen. A setting that is
    lost changes logits by a hundredth of it or more."""
    apart = float((found - expected).abs().max() / expected.std())
    assert apart < 2e-5, f"{of}: logits differ by {apart:.1e} of their standard deviation"
