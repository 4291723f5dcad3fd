"""Which fused kernels a model runs on here, by what it is made of: the same config may be fast on one machine only."""

from torch import nn

from megatron_specialm.model.gpt import Gpt

_FUSED = {"transformer_engine": "Transformer Engine's", "megatron.core": "Megatron-Core's", "apex": "apex's"}


def live_kernels(model: Gpt, optimizer: object) -> str:
    """One line: whose linears, norms, attention and Adam this process really uses."""
    layer = model.chunks[0].decoder.layers[0]
    linear, attention = layer.self_attention.linear_qkv, layer.self_attention.core_attention
    norm = layer.input_layernorm
    if isinstance(norm, nn.Identity) or not list(norm.parameters()):
        norm = linear  # Transformer Engine's linear has the norm in it
    parts = {"linears": linear, "norms": norm, "attention": attention, "Adam": optimizer}
    return "kernels: " + ", ".join(f"{name} {_whose(part)}" for name, part in parts.items())


def _whose(part: object) -> str:
    # Megatron-Core's wrappers of Transformer Engine's modules inherit from them, so the whole ancestry is asked.
    modules = [ancestor.__module__ for ancestor in type(part).__mro__]
    for package, owner in _FUSED.items():
        if any(module.startswith(package) for module in modules):
            return f"{owner} {type(part).__name__}"
    return f"PyTorch's {type(part).__name__}"
