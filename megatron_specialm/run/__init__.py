"""The plan on this machine: local runner, workers, process control. Imports no torch."""
