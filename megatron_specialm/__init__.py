"""megatron_specialm: small specialized language models, made in the ways of Grangier et al. (arXiv 2402.01093)."""

__version__ = "0.1.0"
