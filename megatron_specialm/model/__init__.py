"""The one model definition: Megatron-Core GPTModel by layer spec, on CPU and GPU."""
