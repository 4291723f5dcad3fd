"""One class per stage kind, registered when its module is imported.

To add a kind: its settings in `config/schema.py` (a class, and a line in the union `Stage`), its class in a module here, a line
below, its work in a module of `stages/` with the same name.
"""

from megatron_specialm.graph.kinds import (  # noqa: F401
    assign,
    cluster,
    embed,
    evaluate,
    export,
    select,
    teach,
    tokenize,
    tokenizer,
    train,
)
