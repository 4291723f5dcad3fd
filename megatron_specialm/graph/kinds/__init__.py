"""One class per stage kind. To add one: its settings in `config/schema.py`, its class here, its work in `stages/`."""

from megatron_specialm.graph.kinds import (
    assign as assign,
)
from megatron_specialm.graph.kinds import (
    cluster as cluster,
)
from megatron_specialm.graph.kinds import (
    embed as embed,
)
from megatron_specialm.graph.kinds import (
    evaluate as evaluate,
)
from megatron_specialm.graph.kinds import (
    export as export,
)
from megatron_specialm.graph.kinds import (
    select as select,
)
from megatron_specialm.graph.kinds import (
    teach as teach,
)
from megatron_specialm.graph.kinds import (
    tokenize as tokenize,
)
from megatron_specialm.graph.kinds import (
    tokenizer as tokenizer,
)
from megatron_specialm.graph.kinds import (
    train as train,
)
