"""Whether a layout computes what one process computes: both are run, and every quantity compared by parameter."""

import importlib
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import TrainingError
from megatron_specialm.base.files import read_json
from megatron_specialm.base.packages import installed_version
from megatron_specialm.base.process_status import ending_as_by_ctrl_c
from megatron_specialm.base.temporary import short_place
from megatron_specialm.base.terminal import plain
from megatron_specialm.checkpoint.tensor_files import TensorFiles
from megatron_specialm.parity.case import ParityCase
from megatron_specialm.run.processes import Workers, end_workers, worker_context

CERTIFICATE_FORMAT = 2
WORST = 5  # steps or weights that a certificate names per quantity
TIMEOUT_SECONDS = 300.0
MODULES = ["megatron_specialm.parity.rank", "megatron_specialm.engine.megatron.open"]  # that processes need
# Largest differences: of losses, norms and each weight's gradients relative to the value on one process; of weights
# relative to the way that Adam can go in the steps made; of norm counts, from one. Rounding alone reaches a tenth of it.
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {
        "loss": 1e-6, "validation_loss": 1e-6, "gradient_norm": 1e-5, "gradients": 1e-5, "norm_counts": 1e-5,
        "weights": 1e-4, "gates": 1e-4,
    },
    "bf16": {
        "loss": 1e-3, "validation_loss": 1e-3, "gradient_norm": 1e-2, "gradients": 1e-1, "norm_counts": 1e-3,
        "weights": 1e-1, "gates": 1e-1,
    },
    "fp8": {  # wider than bf16's by what FP8 has fewer bits; not measured, for want of a GPU
        "loss": 1e-2, "validation_loss": 1e-2, "gradient_norm": 1e-1, "gradients": 5e-1, "norm_counts": 1e-3,
        "weights": 5e-1, "gates": 5e-1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """How far one quantity differs: by step or by weight."""

    quantity: str
    tolerance: float
    by_place: Mapping[str, float]

    @property
    def places(self) -> list[str]:
        """Steps or weights, the worst first. What is as good as equal stands in the order of names, so that rounding, which
        depends on the processor, decides nothing."""
        return sorted(self.by_place, key=lambda place: (-_two_digits(self.by_place[place]), place))

    @property
    def largest(self) -> float:
        """The largest difference; a NaN counts as infinite."""
        return max(map(_infinite_if_nan, self.by_place.values()))

    @property
    def failed(self) -> list[str]:
        """The steps or weights over the tolerance, the worst first; a NaN is over it."""
        return [place for place in self.places if not self.by_place[place] <= self.tolerance]

    @property
    def passed(self) -> bool:
        """Whether all are within the tolerance."""
        return not self.failed

    def __str__(self) -> str:
        if self.passed:
            return f"{self.quantity}: {self.largest:.1e}, within {self.tolerance:.0e}"
        worst = ", ".join(f"{place} {self.by_place[place]:.1e}" for place in self.failed[:WORST])
        return f"{self.quantity}: {len(self.failed)} of {len(self.by_place)} over {self.tolerance:.0e}: {worst}"


@dataclass(frozen=True)
class _Numbers:
    """The content of a `numbers-RANK.json`: see `parity/rank.py`."""

    loss: list[float]
    gradient_norm: list[float]
    validation_loss: float
    squares: dict[str, float]
    gates: dict[str, list[float]]


@dataclass(frozen=True)
class Outcome:
    """What the processes of one run wrote, put together."""

    numbers: _Numbers
    squares: dict[str, float]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def compare(case: ParityCase, *, reference: ParityCase | None = None) -> list[Difference]:
    """Run a case in its layout and in another, and compare all quantities.

    Args:
        reference: the case in the other layout; None for one process.

    Raises:
        TrainingError: a process failed, with the last line it said.
    """
    return differences_of(case, outcome_of(reference or case.on_one_process()), outcome_of(case))


def outcome_of(case: ParityCase, measure: str = "megatron_specialm.parity.rank:measure") -> Outcome:
    """Run a case in its layout.

    Args:
        measure: what each process of the layout runs, as `MODULE:FUNCTION`.

    Raises:
        TrainingError: as of `compare`.
    """
    context = worker_context(MODULES, threads=1)
    with ending_as_by_ctrl_c(), tempfile.TemporaryDirectory(dir=short_place()) as folder:
        _run(context, case, Path(folder), measure)
        return read_outcome(Path(folder))


def certificate_path(root: Path, stage: str) -> Path:
    """Where the certificate of a train stage stands in a run folder."""
    return root / "parity" / f"{stage}.json"


def certificate(
    case: ParityCase, differences: Iterable[Difference], *, reference: ParityCase | None = None
) -> dict[str, Any]:
    """The outcome for a file: the two layouts, versions, pass or fail; of each quantity the largest difference, how many steps
    or weights are over the tolerance, and the worst of all by name."""
    found = list(differences)
    packages = ("megatron_specialm", "torch", "megatron-core", "transformer-engine", "deepspeed")
    return {
        "format": CERTIFICATE_FORMAT,
        "layout": case.parallel.model_dump(mode="json"),
        "reference": (reference or case.on_one_process()).parallel.model_dump(mode="json"),
        "precision": case.precision,
        "packing": case.packing,
        "model": case.model.model_dump(mode="json"),
        "vocabulary_size": case.vocabulary_size,
        "steps": case.steps,
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in packages}},
        "differences": [_entry(difference) for difference in found],
        "passed": all(entry.passed for entry in found),
    }


def _entry(difference: Difference) -> dict[str, Any]:
    worst = difference.places[:WORST]
    return {
        "quantity": difference.quantity,
        "tolerance": difference.tolerance,
        "passed": difference.passed,
        "largest": _json(difference.largest),
        "compared": len(difference.by_place),
        "failed": len(difference.failed),
        "worst": [{"where": place, "difference": _json(difference.by_place[place])} for place in worst],
    }


def table(name: str, outcome: Mapping[str, Any]) -> Table:
    """A certificate for a reader."""
    headings = ("quantity", "tolerance", "over it", "largest differences, and where")
    columns = (Column(heading, overflow="fold") for heading in headings)
    found = Table(*columns, title=plain(f"{name}: {outcome['steps']} steps"))
    for entry in outcome["differences"]:
        style = None if entry["passed"] else "bold red"
        over = f"{entry['failed']} of {entry['compared']}"
        named = entry["worst"][: max(1, entry["failed"])]  # where all is well, the largest only
        largest = "\n".join(f"{_shown(place['difference'])} {place['where']}" for place in named)
        found.add_row(plain(entry["quantity"]), f"{entry['tolerance']:.0e}", over, plain(largest), style=style)
    return found


def _shown(difference: float | None) -> str:
    return "not finite" if difference is None else f"{difference:.1e}"


def _infinite_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _two_digits(value: float) -> float:
    return float(f"{_infinite_if_nan(value):.1e}")


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _run(context: BaseContext, case: ParityCase, folder: Path, measure: str) -> None:
    ranks = range(case.parallel.world_size)
    worlds = [World(rank, len(ranks), rank, f"file://{folder}/meeting", "parity") for rank in ranks]
    workers = Workers(
        context, _measure, [(measure, case, world, folder) for world in worlds],
        logs=[folder / f"log-{rank}" for rank in ranks], name="parity",
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not (ended := workers.have_ended()) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        end_workers([workers], within=0)
    if not ended:
        raise TrainingError(f"parity, {case.parallel.describe()}: it did not end within {TIMEOUT_SECONDS:.0f} s")
    if failure := workers.failure():
        raise TrainingError(f"parity, {case.parallel.describe()}: rank {failure[0]}: {failure[1]}")


def _measure(measure: str, case: ParityCase, world: World, folder: Path) -> None:
    module, _, function = measure.partition(":")
    getattr(importlib.import_module(module), function)(case, world, folder)


def read_outcome(folder: Path) -> Outcome:
    """What the processes of a run wrote into a folder (`parity/rank.py`)."""
    tensors = TensorFiles(sorted(folder.glob("tensors-*.safetensors")), framework="np")
    squares: dict[str, float] = {}
    for path in sorted(folder.glob("numbers-*.json")):
        for name, value in read_json(path, _Numbers).squares.items():
            squares[name] = squares.get(name, 0.0) + value
    return Outcome(
        read_json(folder / "numbers-0.json", _Numbers),
        squares,
        {name.removeprefix("gradients/"): tensor for name, tensor in tensors.items() if name.startswith("gradients/")},
        {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")},
    )


def differences_of(case: ParityCase, one: Outcome, many: Outcome) -> list[Difference]:
    """Every quantity of a case's run (`many`), compared with that of its reference."""
    way = case.learning_rate * case.steps
    first = 0 if case.packing == "none" else 1  # aux_loss is a mean over micro-batches, which are then of other windows
    by_quantity = {
        "loss": _of_steps(one.numbers.loss, many.numbers.loss),
        "gradient_norm": _of_steps(one.numbers.gradient_norm, many.numbers.gradient_norm),
        "validation_loss": _of_steps([one.numbers.validation_loss], [many.numbers.validation_loss]),
        "gradients": _of_weights(one.gradients, many.gradients, lambda tensor: float(np.abs(tensor).max()) or 1.0),
        "norm_counts": {name: abs(count - 1) for name, count in _norm_counts(case, many).items()},
        "weights": _of_weights(one.weights, many.weights, lambda _: way),
        "gates": {
            layer: _of_gates(own[first:], many.numbers.gates[layer][first:]) for layer, own in one.numbers.gates.items()
        },
    }
    tolerances = TOLERANCES[case.precision]
    return [Difference(quantity, tolerances[quantity], found) for quantity, found in by_quantity.items() if found]


def _of_steps(one: list[float], many: list[float]) -> dict[str, float]:
    return {f"step {step + 1}": abs(b - a) / abs(a) for step, (a, b) in enumerate(zip(one, many, strict=True))}


def _of_gates(one: list[float], many: list[float]) -> float:
    """Of an MoE layer's auxiliary losses and its experts' shares of the tokens, of which some may be zero."""
    return max(abs(b - a) / max(1.0, abs(a)) for a, b in zip(one, many, strict=True))


def _of_weights(
    one: Mapping[str, np.ndarray], many: Mapping[str, np.ndarray], scale: Callable[[np.ndarray], float]
) -> dict[str, float]:
    missing = {name: math.inf for name in set(one) ^ set(many)}
    return missing | {
        name: float(np.abs(many[name] - one[name]).max()) / scale(one[name]) for name in one if name in many
    }


def _norm_counts(case: ParityCase, run: Outcome) -> dict[str, float]:
    """How often each weight's gradient is in the norm. The squares are of clipped gradients, the tensors are not yet."""
    factor = min(1.0, case.clip_grad / (run.numbers.gradient_norm[0] + 1e-6))
    counts = {}
    for name, gradient in run.gradients.items():
        whole = float(np.square(gradient.astype(np.float64)).sum()) * factor**2
        counts[name] = run.squares.get(name, 0.0) / whole if whole else 1.0
    return counts
