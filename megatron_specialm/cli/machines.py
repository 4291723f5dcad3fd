"""Commands that test layouts and machines."""

import contextlib
import sys
from typing import Annotated

import typer

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.printing import say
from megatron_specialm.cli.app import Config, Overrides, app, load

INSTEAD = typer.Option(help="Instead of the config's.", show_default=False)


@app.command()
def parity(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Only this train stage.", show_default=False)] = None,
    engine: Annotated[str | None, INSTEAD] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Compare with this engine in a like layout, not with one process.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[int | None, INSTEAD] = None,
    pipeline_parallel: Annotated[int | None, INSTEAD] = None,
    virtual_pipeline: Annotated[int | None, INSTEAD] = None,
    context_parallel: Annotated[int | None, INSTEAD] = None,
    data_parallel: Annotated[int | None, INSTEAD] = None,
    sequence_parallel: Annotated[bool | None, INSTEAD] = None,
    distributed_optimizer: Annotated[bool | None, INSTEAD] = None,
    zero_stage: Annotated[int | None, INSTEAD] = None,
    precision: Annotated[str | None, INSTEAD] = None,
) -> None:
    """Prove that a layout computes what one process computes: run both, small, and compare every parameter.

    Without --stage, for every setup of the config that can be in the layout; the others are listed with the reason. Writes a
    certificate per train stage into the run folder; training copies it into its checkpoints.
    """
    from megatron_specialm.base.terminal import console
    from megatron_specialm.parity.compare import table
    from megatron_specialm.parity.prove import NotRun, prove

    changes = {
        "parallel.engine": engine, "parallel.tensor_parallel": tensor_parallel, "parallel.pipeline_parallel": pipeline_parallel,
        "parallel.virtual_pipeline": virtual_pipeline, "parallel.context_parallel": context_parallel,
        "parallel.data_parallel": data_parallel, "parallel.sequence_parallel": sequence_parallel,
        "parallel.distributed_optimizer": distributed_optimizer, "parallel.zero_stage": zero_stage, "precision": precision,
    }  # fmt: skip
    given = {field: value for field, value in changes.items() if value is not None}
    passed: list[bool] = []
    refused: list[NotRun] = []
    for proof in prove(lambda more: load(config, [*(overrides or []), *more]), given, stage=stage, against=against):
        if isinstance(proof, NotRun):
            refused.append(proof)
            continue
        console().print(table(proof.stage, proof.certificate))
        verdict = "equals" if proof.passed else "DIFFERS FROM"
        say(f"{proof.stage}: {proof.layout} {verdict} {proof.reference}; {proof.path}")
        passed.append(proof.passed)
    for one in refused:
        say(f"{one.stage}: not run: {one.reason}")
    if not passed:
        raise ConfigError(f"{config}: none of its {len(refused)} setups can be trained so; the reasons stand above")
    if not all(passed):
        raise typer.Exit(1)


@app.command()
def tune_precision(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Only this train stage.", show_default=False)] = None,
) -> None:
    """Time each linear of a config's models in bf16 and FP8 on this GPU, and recommend settings."""
    from megatron_specialm.base.terminal import console
    from megatron_specialm.graph.lineage import distinct_setups
    from megatron_specialm.run.preflight import refuse_what_the_machine_lacks

    for name in distinct_setups(load(config, overrides), stage):
        pipeline = load(config, [*(overrides or []), f"stages.{name}.precision=fp8"])
        refuse_what_the_machine_lacks(pipeline, stages=[name])

        from megatron_specialm.model import tune_precision as tuning  # imports torch, which a refusal does not need

        timings = tuning.measure(distinct_setups(pipeline, name)[name])
        console().print(tuning.timings_table(timings, title=name))
        say(f"stages.{name}: {tuning.advice(timings)}")


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="No matrix products and no all-reduce.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what this machine can do, and how to install what is missing. The exit code is 1 if it cannot train."""
    from megatron_specialm.base.terminal import console
    from megatron_specialm.doctor.finding import can_train
    from megatron_specialm.doctor.report import as_json, examine, render

    with console(stderr=True).status("Looking at this machine") if sys.stderr.isatty() else contextlib.nullcontext():
        findings = examine(quick=quick)
    if json:
        say(as_json(findings))
    else:
        console().print(render(findings))
    if not can_train(findings):
        raise typer.Exit(1)
