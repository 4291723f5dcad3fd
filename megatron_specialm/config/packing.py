"""How windows of uneven length become the forward passes of a step."""

from typing import Literal

Packing = Literal["none", "sorted", "packed"]
PACKING = (
    "`none`: every window is padded to the context length. `sorted`: the windows of a step are sorted by length, and each "
    "micro-batch is as long as its longest window. `packed`: the windows of a micro-batch stand behind each other in one "
    "sequence without padding; each is attended to alone, from position 0"
)
