"""What a page would train, by arithmetic."""

from rich.table import Table

from megatron_specialm.config import capabilities
from megatron_specialm.config.graph import setup_of, train_keys
from megatron_specialm.config.schema import Pipeline, TrainStage


def training_table(pipeline: Pipeline) -> Table:
    """A row per train stage: for whom, its model, windows and tokens per run, and FLOPs of all its runs.

    Tokens are at most these: windows shorter than the context hold fewer. Parameters are for the vocabulary asked for,
    which an existing tokenizer decides itself.
    """
    table = Table("train stage", "runs", "parameters", "steps", "tokens per run, at most", "FLOPs per token", "FLOPs")
    for name, stage in pipeline.stages.items():
        if not isinstance(stage, TrainStage):
            continue
        setup, runs = setup_of(pipeline, name), len(train_keys(pipeline, name))
        tokens = stage.steps * setup.global_batch_size * setup.context_length
        per_token = setup.model.training_flops(setup.vocabulary_size, setup.context_length)
        parameters = setup.model.parameters(setup.vocabulary_size)
        table.add_row(
            name, str(runs), f"{parameters / 1e6:.1f}M", f"{stage.steps:,}", f"{tokens / 1e6:,.2f}M",
            f"{per_token:.2e}", f"{runs * tokens * per_token:.2e}",
        )  # fmt: skip
    return table


def capabilities_table() -> Table:
    """What can be trained in which layout: `config/capabilities.py` for a reader."""
    rows = capabilities.rows()
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    return table
