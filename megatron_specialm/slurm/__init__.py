"""All that knows of Slurm: submitting, watching and cancelling jobs, and what runs inside one. Imports no torch."""
