"""Execution of tasks on this machine or under a launcher: runner, workers, reuse, clean-up. Imports no torch."""
