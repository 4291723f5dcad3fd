"""The training engine, its loop, and checkpoints that verify themselves."""
