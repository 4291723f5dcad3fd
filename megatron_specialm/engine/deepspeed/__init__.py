"""The DeepSpeed engine: ZeRO over the data-parallel copies of a model that Megatron-Core's tensor parallelism splits."""
