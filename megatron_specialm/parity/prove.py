"""Proofs of layouts for the setups of a config: a certificate per train stage, in the run folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ConfigError, MachineError
from megatron_specialm.base.files import write_json
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import distinct_setups, setup_of
from megatron_specialm.parity.case import parity_case
from megatron_specialm.parity.compare import certificate, certificate_path, compare
from megatron_specialm.run.preflight import refuse_what_the_machine_lacks


@dataclass(frozen=True)
class Proof:
    """The outcome for a stage's setup: its layout, the certificate, and the file that this was written to."""

    stage: str
    layout: str
    certificate: Mapping[str, Any]
    path: Path

    @property
    def passed(self) -> bool:
        """Whether the layout computes what one process computes."""
        return bool(self.certificate["passed"])


@dataclass(frozen=True)
class NotRun:
    """A setup that cannot be in the layout, or not on this machine."""

    stage: str
    reason: str


def prove(
    load: Callable[[Sequence[str]], Pipeline], changes: Mapping[str, Any], *, stage: str | None
) -> Iterator[Proof | NotRun]:
    """Compare each distinct setup of a config in its layout with one process.

    Args:
        load: the config with overrides.
        changes: settings of the stages to replace, by their names in a stage.
        stage: this train stage alone.

    Raises:
        ConfigError, MachineError: the one stage that is asked for cannot be in the layout.
    """
    pipeline = load(())
    build_graph(pipeline)
    for name in distinct_setups(pipeline, stage):
        try:
            changed = load([f"stages.{name}.{field}={value}" for field, value in changes.items()])
            build_graph(changed)  # refuses a layout that the model itself cannot take
            refuse_what_the_machine_lacks(changed, stages=[name])
        except (ConfigError, MachineError) as error:
            if stage is not None:
                raise
            yield NotRun(name, str(error))
            continue
        case = parity_case(setup_of(changed, name))
        outcome = certificate(case, compare(case))
        path = certificate_path(Path(changed.root), name)
        write_json(path, outcome)
        yield Proof(name, case.parallel.describe(), outcome, path)
