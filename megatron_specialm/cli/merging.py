"""Commands that write an ordinary model of a training that has adapters, or an expert per cluster."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.cli.app import app
from megatron_specialm.cli.convert import Dtype, To, say_converted, stopping_cleanly, torch_dtype

Target = Annotated[Path, typer.Argument(help="The folder to create.", show_default=False)]
Format = Annotated[To, typer.Option(help="The target's format.")]
Type = Annotated[Dtype | None, typer.Option(help="Default: the source's; fp32 for canonical.", show_default=False)]


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(help="A training with LoRA: RUN/STAGE/KEY.", show_default=False)],
    target: Target,
    to: Format = To.canonical,
    dtype: Type = None,
) -> None:
    """Merge LoRA adapters into their base, as an ordinary model of any format.

    The target is read back and compared by its fingerprint, as by `specialm convert`.
    """
    from megatron_specialm.base.stopwatch import Stopwatch
    from megatron_specialm.convert.experts import open_adapted
    from megatron_specialm.convert.run import write_target

    watch = Stopwatch()
    with stopping_cleanly():
        done = write_target(open_adapted(source), target, to=to, dtype=torch_dtype(dtype))
    say_converted(done, target, seconds=watch.seconds)


@app.command()
def project(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A trained SLM-pn or MoE by cluster: RUN/STAGE/generic; or a mixture: RUN/STAGE.", show_default=False
        ),
    ],
    output: Target,
    expert: Annotated[
        int | None, typer.Option(help="The expert's number, from 0: that of its cluster.", show_default=False)
    ] = None,
    histogram: Annotated[
        Path | None,
        typer.Option(
            help="Average the experts of an SLM-pn by the cluster histogram of a set: RUN/STAGE/SET of an assign stage.",
            show_default=False,
        ),
    ] = None,
    mixture: Annotated[bool, typer.Option("--mixture", help="Every expert, in folders c0, c1, ...")] = False,
    to: Format = To.canonical,
    dtype: Type = None,
) -> None:
    """Write an expert of a model that has one per cluster, an average of them, or each, as ordinary models of any format.

    Every target is read back and compared by its fingerprint, as by `specialm convert`.
    """
    from megatron_specialm.base.stopwatch import Stopwatch
    from megatron_specialm.convert.experts import convert_experts, open_expert, open_histogram
    from megatron_specialm.convert.run import write_target

    watch, kind = Stopwatch(), torch_dtype(dtype)
    if (expert is not None) + (histogram is not None) + mixture != 1:
        raise ConfigError("name one of --expert NUMBER, --histogram RUN/STAGE/SET and --mixture")
    with stopping_cleanly():
        if expert is not None:
            made = {output: write_target(open_expert(folder, expert), output, to=to, dtype=kind)}
        elif histogram is not None:
            made = {output: write_target(open_histogram(folder, histogram), output, to=to, dtype=kind)}
        else:
            made = {output / key: done for key, done in convert_experts(folder, output, to=to, dtype=kind).items()}
    for target, done in made.items():
        say_converted(done, target, seconds=watch.seconds)
