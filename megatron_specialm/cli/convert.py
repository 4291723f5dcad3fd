"""Commands that convert, inspect and compare checkpoints of any format."""

import contextlib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_specialm.base.printing import say
from megatron_specialm.cli.app import app

if TYPE_CHECKING:
    import torch

    from megatron_specialm.convert.lazy import LazyTensor
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
    typer.Option(
        "--config",
        help="A config.json of Transformers, for a source without a description of its model.",
        show_default=False,
    ),
]


@app.command()
def convert(
    source: SourceFolder,
    target: Annotated[Path, typer.Argument(help="The folder to create.", show_default=False)],
    to: Annotated[To, typer.Option(help="The target's format.", show_default=False)],
    tensor_parallel: Annotated[int, typer.Option(help="Ranks of a Megatron target.", min=1)] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Stages of a Megatron target.", min=1)] = 1,
    expert_parallel: Annotated[
        int, typer.Option(help="Ranks of experts, of a Megatron target or of DeepSpeed's ZeRO stage 1.", min=1)
    ] = 1,
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
    with stopping_cleanly():
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


@contextlib.contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise an error, so that an unfinished target is removed."""
    from megatron_specialm.base.process_status import ProcessStatus

    status = ProcessStatus()
    status.begin("converting")
    with status.stop_on_signals():
        yield


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
    rounded = f" (rounded from {_type(opened.dtype)})" if done.is_rounded else ""
    say(
        f"{target}: {done.to}, {len(done.fingerprint.weights)} weights in {_type(done.dtype)}{rounded}, "
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
    """Print what a checkpoint is: format, model, layout, step and size, and with --tensors its tensors.

    Of a checkpoint that cannot be converted: format, size and tensors, and then the reason as an error.
    """
    from megatron_specialm.base.errors import ArtifactError
    from megatron_specialm.convert.fingerprint import compare_settings, unequal_settings
    from megatron_specialm.convert.formats import format_of, open_source
    from megatron_specialm.convert.run import convertible, hash_moments, stream

    try:
        opened = open_source(path, config=config)
    except ArtifactError:
        found = format_of(path)
        stored = found.tensors(path)
        say(f"{path}: {found.name}; it cannot be converted")
        _say_stored(stored, each=tensors)
        raise
    say(f"{opened.path}: {_described(opened)}")
    _say_stored(opened.stored, each=tensors)
    settings = opened.model.shape.model_dump(mode="json", exclude_defaults=True)
    model = ", ".join(f"{name} {value}" for name, value, _ in unequal_settings(settings, {}))
    say(f"{len(opened.weights)} canonical weights; model: {model}")
    for name, reason in opened.dropped.items():
        say(f"is left out in a conversion: {name}: {reason}")
    if opened.optimizer is not None:
        say(f"optimizer: Adam's state after {opened.optimizer.step} updates")
    say(f"tokenizer: {opened.tokenizer or 'none'}")
    if opened.fingerprint is None:
        say("fingerprint: none is recorded")
    elif verify:
        stream(convertible(opened))
        hash_moments(opened)
        say("fingerprint: every weight and the logits are as recorded")
    else:
        compare_settings(opened.fingerprint, opened.model.computes, where=opened.path)
        weights = len(opened.fingerprint.weights)
        say(f"fingerprint: its settings are the model's; recorded for {weights} weights, which --verify compares")


def _say_stored(stored: "Mapping[str, LazyTensor]", *, each: bool) -> None:
    """Print number and size of the tensors in files; `each`: also every tensor."""
    import math

    from megatron_specialm.base.terminal import Table, console

    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in stored.items()}
    types = ", ".join(sorted({_type(tensor.dtype) for tensor in stored.values()}))
    say(f"{len(stored)} tensors, {sum(sizes.values()) / 2**20:,.1f} MiB, of type {types}")
    if each:
        lines = [
            [name, " x ".join(map(str, tensor.shape)), _type(tensor.dtype), f"{sizes[name]:,}"]
            for name, tensor in stored.items()
        ]
        console().print(Table("", ["tensor", "shape", "type", "bytes"], lines, 3))


def _type(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


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
        f"{model.vocabulary_size:,}, context {model.context_length:,}, {_type(opened.dtype)}, "
        f"{opened.layout}, step {opened.step}"
    )
