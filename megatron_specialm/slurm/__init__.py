"""All that knows of Slurm. Imports no torch."""
