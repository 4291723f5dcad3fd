"""The model definition: Megatron-Core's GPTModel through a layer spec, on CPU and GPU."""
