"""Slurm: submission, supervision inside jobs, requeueing, status, cancellation. Imports no torch."""
