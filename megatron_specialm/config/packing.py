"""How windows of uneven length become forward passes (`data/packing.py`)."""

from typing import Literal

Packing = Literal["none", "sorted", "packed"]
WholePacking = Literal["none", "packed"]  # of a model on one process that only reads
IN_TRAINING = (
    "how windows become micro-batches: `none`, each padded to the context length; `sorted` by length and padded to the longest "
    "of a micro-batch; `packed` behind each other without padding, each attended to alone; default: packed where model and "
    "layout allow it, else none"
)
IN_READING = (
    "`packed`: the windows of a batch behind each other without padding; `none`: each padded to the context length"
)
