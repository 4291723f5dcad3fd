"""Which fused kernels a model uses on this machine, found from the classes of its modules."""

from torch import nn

from megatron_specialm.model.gpt import Gpt

_FUSED = {"transformer_engine": "Transformer Engine's", "megatron.core": "Megatron-Core's", "apex": "apex's"}


def live_kernels(model: Gpt, optimizer: object) -> str:
    """One line: the implementation of linears, norms, attention and Adam on this process."""
    layer = model.chunks[0].decoder.layers[0]
    linear, attention = layer.self_attention.linear_qkv, layer.self_attention.core_attention
    norm = layer.input_layernorm
    if isinstance(norm, nn.Identity) or not list(norm.parameters()):
        norm = linear  # Transformer Engine fuses the norm into this linear
    parts = {"linears": linear, "norms": norm, "attention": attention, "Adam": optimizer}
    return "kernels: " + ", ".join(f"{name} {_implementation(part)}" for name, part in parts.items())


def _implementation(part: object) -> str:
    # Megatron-Core's wrappers inherit from Transformer Engine's modules, so all base classes are checked.
    modules = [ancestor.__module__ for ancestor in type(part).__mro__]
    for package, owner in _FUSED.items():
        if any(module.startswith(package) for module in modules):
            return f"{owner} {type(part).__name__}"
    return f"PyTorch's {type(part).__name__}"
