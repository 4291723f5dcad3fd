"""Stage kinds, the graph of tasks, their digests, and the plan: which tasks are done. Imports no torch."""
