"""One class per stage kind, registered when its module is imported.

To add a kind: its settings in `config/schema.py`, its class in a module here, its work in `stages/`.
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
