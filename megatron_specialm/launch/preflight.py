"""What a page asks of the machine that it is to run on, before anything runs."""

from collections.abc import Collection, Iterator

from megatron_specialm.base.accelerator import Accelerator, find_accelerator
from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.capabilities import lacking
from megatron_specialm.config.graph import setup_of
from megatron_specialm.config.schema import Pipeline, TrainStage


def refuse_what_the_machine_lacks(pipeline: Pipeline, *, stages: Collection[str]) -> None:
    """Check the train stages that are to run.

    Raises:
        MachineError: naming the stage, what it needs, what is here and what would do.
    """
    for name, reason in lacks(pipeline, find_accelerator()):
        if name in stages:
            raise MachineError(reason)


def lacks(pipeline: Pipeline, machine: Accelerator) -> Iterator[tuple[str, str]]:
    """The train stages that a machine cannot run, each with the reason in one line."""
    for name, stage in pipeline.stages.items():
        if isinstance(stage, TrainStage) and (reason := lacking(setup_of(pipeline, name), machine)):
            yield name, f"stages.{name}: {reason}"
