"""Execution of tasks on this machine or under a launcher: checks, runner, workers, reuse, clean-up. Imports no torch."""
