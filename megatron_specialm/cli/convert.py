"""Commands that convert, inspect and compare checkpoints of any format."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_specialm.base.printing import say
from megatron_specialm.cli.app import app

if TYPE_CHECKING:
    import torch

    from megatron_specialm.convert.run import Conversion
    from megatron_specialm.convert.source import Source


class To(StrEnum):
    huggingface = "huggingface"
    megatron = "megatron"
    megatron_legacy = "megatron-legacy"
    deepspeed = "deepspeed"
    canonical = "canonical"


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


SourceFolder = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A folder with a checkpoint of any format.", show_default=False)
]
ModelConfig = Annotated[
    Path | None,
    typer.Option("--config", help="A config.json, for a source that does not say its model.", show_default=False),
]
Degree = typer.Option(help="Of a Megatron or DeepSpeed target.", min=1)


@app.command()
def convert(
    source: SourceFolder,
    target: Annotated[Path, typer.Argument(help="The folder to create.", show_default=False)],
    to: Annotated[To, typer.Option(help="The target's format.", show_default=False)],
    tensor_parallel: Annotated[int, Degree] = 1,
    pipeline_parallel: Annotated[int, Degree] = 1,
    expert_parallel: Annotated[int, Degree] = 1,
    zero_stage: Annotated[
        int, typer.Option(help="Of a DeepSpeed target: 1, or 0 for a universal checkpoint.", min=0, max=1)
    ] = 0,
    data_parallel: Annotated[int, typer.Option(help="Ranks of a DeepSpeed target of ZeRO stage 1.", min=1)] = 1,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer's state out.")] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: the source's; fp32 for canonical.", show_default=False)
    ] = None,
    config: ModelConfig = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with the tokenizer, instead of the source's.", show_default=False)
    ] = None,
) -> None:
    """Convert a checkpoint to another format, and prove that every tensor arrived.

    The source's format is recognized by its content. The target is read back and compared by its fingerprint before it gets
    its name; without that it is removed.
    """
    from megatron_specialm.base.stopwatch import Stopwatch
    from megatron_specialm.convert.run import convert as run
    from megatron_specialm.convert.source import Layout

    watch = Stopwatch()
    layout = Layout(tensor_parallel, pipeline_parallel, expert_parallel, zero_stage, data_parallel)
    done = run(
        source,
        target,
        to=to,
        layout=layout,
        dtype=torch_dtype(dtype),
        config=config,
        tokenizer=tokenizer,
        weights_only=weights_only,
    )
    say_converted(done, target, seconds=watch.seconds)


def torch_dtype(dtype: Dtype | None) -> "torch.dtype | None":
    """The type of weights; None: the target's default."""
    import torch

    return {None: None, Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}[dtype]


def say_converted(done: "Conversion", target: Path, *, seconds: float) -> None:
    """Print what was converted to where, and what was left out."""
    opened = done.source
    say(f"{opened.path}: {_described(opened)}")
    for name, reason in opened.dropped.items():
        say(f"left out: {name}: {reason}")
    if (moe := opened.model.shape.moe) is not None and moe.capacity_factor is not None:
        say(f"capacity_factor {moe.capacity_factor}: the fingerprint's logits are without it: no token is dropped")
    say(
        f"{target}: {done.to}, {len(done.fingerprint.weights)} weights in {str(done.dtype).removeprefix('torch.')}, "
        f"{done.bytes / 2**20:,.1f} MiB, in {seconds:.1f} s; read back, and every weight is equal"
    )
    if opened.optimizer is not None:
        say(f"{target}: has Adam's state after {opened.optimizer.step} updates; read back, and every moment is equal")
    if opened.tokenizer is None:
        say(f"{target}: has no tokenizer: the source has none, and none was given (--tokenizer)")


@app.command()
def inspect(
    path: SourceFolder,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors in the files.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights and compare them with the recorded fingerprint.")
    ] = False,
    config: ModelConfig = None,
) -> None:
    """Print what a checkpoint is: format, model, layout, step and size, and with --tensors its tensors."""
    import math

    from megatron_specialm.base.terminal import Table, console
    from megatron_specialm.convert.formats import open_source
    from megatron_specialm.convert.run import hash_moments, stream

    opened = open_source(path, config=config)
    stored = opened.stored
    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in stored.items()}
    say(f"{opened.path}: {_described(opened)}")
    say(f"{len(stored)} tensors, {sum(sizes.values()) / 2**20:,.1f} MiB; {len(opened.weights)} canonical weights")
    settings = opened.model.shape.model_dump(mode="json", exclude_defaults=True)
    say("model: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    for name, reason in opened.dropped.items():
        say(f"is left out in a conversion: {name}: {reason}")
    if opened.optimizer is not None:
        say(f"optimizer: Adam's state after {opened.optimizer.step} updates")
    say(f"tokenizer: {opened.tokenizer or 'none'}")
    if tensors:
        lines = [
            [name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."), f"{sizes[name]:,}"]
            for name, tensor in stored.items()
        ]
        console().print(Table("", ["tensor", "shape", "type", "bytes"], lines, 3))
    if opened.fingerprint is None:
        say("fingerprint: none is recorded")
    elif verify:
        stream(opened)
        hash_moments(opened)
        say("fingerprint: every weight and the logits are as recorded")
    else:
        say(f"fingerprint: recorded for {len(opened.fingerprint.weights)} weights; --verify compares them")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A checkpoint of any format.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another, of the same or another format.", show_default=False)],
) -> None:
    """Compare two checkpoints under canonical names: settings, shapes and the largest difference of each weight. The exit code
    is 1 if they differ."""
    from megatron_specialm.base.terminal import Table, console
    from megatron_specialm.convert.comparing import differences, settings_that_differ
    from megatron_specialm.convert.formats import open_source

    pair = open_source(first), open_source(second)
    for opened in pair:
        say(f"{opened.path}: {_described(opened)}")
    settings = list(settings_that_differ(*pair))
    found = list(differences(*pair))
    for setting in settings:
        say(f"differs: {setting}")
    unequal = [one for one in found if not one.is_equal]
    lines = [
        [
            one.name,
            *("none" if shape is None else " x ".join(map(str, shape)) for shape in one.shapes),
            "" if one.largest is None else f"{one.largest:.3g}",
            "" if one.scale is None else f"{one.scale:.3g}",
        ]
        for one in unequal
    ]
    if lines:
        console().print(Table("", ["weight", "first", "second", "largest difference", "largest element"], lines, 3))
    say(f"{len(found) - len(unequal)} of {len(found)} weights are equal")
    if unequal or settings:
        raise typer.Exit(1)


def _described(opened: "Source") -> str:
    """In one line: `huggingface, family llama, 1,235.8M parameters, bfloat16, one file, step 0`."""
    from megatron_specialm.estimate.parameters import count_parameters

    model = opened.model
    parameters = count_parameters(model.shape, model.vocabulary_size)
    return (
        f"{opened.format}, family {model.shape.family}, {parameters / 1e6:,.1f}M parameters, vocabulary "
        f"{model.vocabulary_size:,}, context {model.context_length:,}, {str(opened.dtype).removeprefix('torch.')}, "
        f"{opened.layout}, step {opened.step}"
    )
