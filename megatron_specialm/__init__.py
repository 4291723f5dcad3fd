"""megatron_specialm: small specialized language models by the methods of Grangier et al. (arXiv 2402.01093)."""

__version__ = "0.1.0"
