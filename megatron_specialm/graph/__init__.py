"""Stage kinds, the graph of tasks, their digests, and the plan: which tasks are done. Imports no torch."""

from megatron_specialm.graph import kinds as kinds  # every import of the graph has all kinds registered
