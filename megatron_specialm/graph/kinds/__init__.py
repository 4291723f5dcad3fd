"""One class per stage kind, registered when its module is imported.

To add a kind: its settings in `config/schema.py` (a class, and a line in the union `Stage`), its class in a module here, which
is imported below, its work in a module of `stages/` with the kind's name.
"""

from megatron_specialm.graph.kinds import models, outputs, text  # noqa: F401
