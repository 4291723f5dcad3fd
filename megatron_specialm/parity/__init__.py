"""Whether a layout computes what one process computes: the case, one rank of it, and the comparison."""
