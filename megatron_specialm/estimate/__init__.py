"""Requirements of a training, computed from its settings: capabilities, memory, FLOPs. Imports no torch."""
