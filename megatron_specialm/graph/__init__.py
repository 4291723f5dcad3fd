"""Stage kinds, the graph of tasks, their digests, and the plan: which tasks are done. Imports no torch."""

from megatron_specialm.graph import kinds  # noqa: F401  (whatever imports of the graph, all kinds are registered)
