"""Which tasks are missing, where they run, and what came out."""
