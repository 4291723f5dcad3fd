"""Proofs of layouts for the setups of a config: a certificate per train stage, in the run folder."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ConfigError, MachineError
from megatron_specialm.base.files import write_json
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import distinct_setups, setup_of, train_stages
from megatron_specialm.parity.case import parity_case
from megatron_specialm.parity.compare import certificate, certificate_path, compare
from megatron_specialm.run.preflight import refuse_what_the_machine_lacks


@dataclass(frozen=True)
class Proof:
    """The outcome for a stage's setup: its layout, what it was compared with, the certificate, and the file that this was
    written to."""

    stage: str
    layout: str
    reference: str
    certificate: Mapping[str, Any]
    path: Path

    @property
    def passed(self) -> bool:
        """Whether the layout computes what the reference computes."""
        return bool(self.certificate["passed"])


@dataclass(frozen=True)
class NotRun:
    """A setup that cannot be in the layout, or not on this machine."""

    stage: str
    reason: str


def prove(
    load: Callable[[Sequence[str]], Pipeline],
    changes: Mapping[str, Any],
    *,
    stage: str | None,
    against: str | None = None,
) -> Iterator[Proof | NotRun]:
    """Compare each distinct setup of a config in its layout with one process, or with a like layout of another engine.

    Args:
        load: the config with overrides.
        changes: settings of the stages to replace, by their names in a stage.
        stage: this train stage alone.
        against: the other engine; None for one process.

    Raises:
        ConfigError, MachineError: the one stage that is asked for cannot be in the layout; an engine is unknown.
    """
    pipeline = load(())
    build_graph(pipeline)
    for name in distinct_setups(pipeline, stage):
        try:
            changed = load(list(_overrides(pipeline, name, changes)))
            build_graph(changed)  # refuses a layout that the model itself cannot take
            refuse_what_the_machine_lacks(changed, stages=[name])
        except (ConfigError, MachineError) as error:
            if stage is not None:
                raise
            yield NotRun(name, str(error))
            continue
        case = parity_case(setup_of(changed, name))
        reference = None if against is None else case.by_engine(against)
        outcome = certificate(case, compare(case, reference=reference), reference=reference)
        path = certificate_path(Path(changed.root), name)
        write_json(path, outcome)
        beside = "one process" if reference is None else f"{reference.parallel.describe()} (engine {against})"
        yield Proof(name, case.parallel.describe(), beside, outcome, path)


def _overrides(pipeline: Pipeline, stage: str, changes: Mapping[str, Any]) -> Iterator[str]:
    """For a config. With another engine than the stage's, its layout is first made one of that engine."""
    engine = changes.get("parallel.engine")
    parallel = train_stages(pipeline)[stage].parallel
    if engine is not None and engine != parallel.engine:
        yield f"stages.{stage}.parallel={json.dumps(parallel.for_engine(engine))}"
    yield from (f"stages.{stage}.{field}={value}" for field, value in changes.items())
