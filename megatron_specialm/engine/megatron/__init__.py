"""The Megatron engine: Megatron-Core's parallelism, schedules and mixed-precision optimizer."""
