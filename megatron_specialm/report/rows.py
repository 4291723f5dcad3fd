"""The results as typed rows: one dataclass per part of `results.json`, and their form in JSON and CSV.

A field is a column: its type says how it is read from files, and by its `Rule` what it is of several entries. A new column is a
field here, and its value where rows are made (`report/results.py`): files, averages over domains and means over seeds follow.

    Row             a model on a set of text: perplexity, and what the model cost
    Average         a method's stage over all domains of one size
    Concentration   an assign stage on a set: in how few clusters it is
    Selection       a select stage, domain and criterion: which expert, and what choosing it cost
    LearningRate    a training that had a choice of them, and a rate: its best validation loss, and which was taken

`finetuned` says that a model has read its domain's own text, `domain_text` how: mixed into its pretraining, or fine-tuned on
it. Stages of one method are its budgets. A domain with `sizes` is one set per size; `base_domain` is what it is a size of.
`capped` says whether the cap on steps, not early stopping, ended the model's own fine-tuning; None where that is not asked.
"""

import csv
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import parse_json, write_json
from megatron_specialm.config.text import GENERIC

SPECIALIZATION = "specialization"
TASKS = (1, 7, 50)  # the numbers of domains that share the generic cost in the paper's total costs
SEEDS = ("seed", "training_seed")  # the columns by which runs of one config are told apart
Seeds = tuple[tuple[str, int], ...]
Number = int | float


def mean(values: Sequence[Number]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def any_known(values: Sequence[bool | None]) -> bool | None:
    """Whether any is true, of those that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return any(known) if known else None


def listed(values: Sequence[float | str | None]) -> float | str | None:
    """The one value, or those that differ as text. A value may be such text already."""
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return different[0]
    return ", ".join(dict.fromkeys(part for value in different for part in str(value).split(", ")))


@dataclass(frozen=True)
class Rule:
    """What a column is of several entries, from their values. Over seeds a score's standard deviation is told too."""

    combine: Callable[[Sequence[Any]], Any] = lambda values: values[0]
    is_score: bool = False


Cost = Annotated[Number, Rule(mean)]
Score = Annotated[Number, Rule(mean, is_score=True)]
Flag = Annotated[bool | None, Rule(any_known)]
Rate = Annotated[float | str | None, Rule(listed)]
TO_COMPUTE: Any = None


@dataclass(frozen=True)
class Spread:
    """Of an entry over several seeds.

    Attributes:
        deviation: of each score, its sample standard deviation; None for a single seed.
        seeds: per name of `SEEDS` that the entries have, its values.
        capped_seeds: those at which the entry was capped; None where that is no column.
    """

    deviation: Mapping[str, float | None]
    seeds: Mapping[str, list[int]]
    capped_seeds: list[int] | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What all parts have. `spread` is no column: it is None in an entry of one seed."""

    spread: Spread | None = None

    def __post_init__(self) -> None:
        if getattr(self, "training_seed", 0) is None:  # in earlier versions the two seeds were one
            object.__setattr__(self, "training_seed", vars(self)["seed"])

    @property
    def seeds(self) -> Seeds:
        """What tells an entry from those of other runs."""
        return tuple((name, getattr(self, name)) for name in SEEDS if hasattr(self, name))

    def columns(self) -> dict[str, Any]:
        """The entry as it stands in files: values by column. Over seeds, deviations and lists of seeds stand behind."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "spread"}
        if self.spread is None:
            return values
        values = {name: value for name, value in values.items() if name not in SEEDS}
        values |= {f"{name}_sd": value for name, value in self.spread.deviation.items()}
        if self.spread.capped_seeds is not None:
            values["capped_seeds"] = self.spread.capped_seeds
        return values | {f"{name}s": own for name, own in self.spread.seeds.items()}


E = TypeVar("E", bound=Entry)


@functools.cache
def rules(kind: type[Entry]) -> dict[str, Rule]:
    """The rule of each column of a kind that is not computed from others."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        each.name: next((rule for rule in get_args(hints[each.name]) if isinstance(rule, Rule)), Rule())
        for each in fields(kind)
        if each.init and each.name != "spread"
    }


def combine(
    kind: type[E], entries: Sequence[Entry], *, average: Callable[[Sequence[Any]], float] = mean, **given: Any
) -> E:
    """One entry of a kind from several: each column by its rule, where that is a mean by `average`; `given` columns as they
    are given."""
    own: dict[str, Any] = {}
    for name, rule in rules(kind).items():  # type: ignore[arg-type]
        if name not in given:
            values = [getattr(entry, name) for entry in entries]
            own[name] = average(values) if rule.combine is mean else rule.combine(values)
    return kind(**own, **given)


@dataclass(frozen=True, kw_only=True)
class Costs(Entry):
    """What a model cost (`report/costs.py`), and the seeds that it is of.

    `total_WHAT_N` is the cost for N domains. `fill` is the share of real tokens in the slots of all trainings; None where
    there are none.
    """

    generic_tokens: Cost
    generic_flops: Cost
    generic_device_seconds: Cost
    generic_slots: Cost
    specialization_tokens: Cost
    specialization_flops: Cost
    specialization_device_seconds: Cost
    specialization_slots: Cost
    total_flops_1: Cost = TO_COMPUTE
    total_flops_7: Cost = TO_COMPUTE
    total_flops_50: Cost = TO_COMPUTE
    total_device_seconds_1: Cost = TO_COMPUTE
    total_device_seconds_7: Cost = TO_COMPUTE
    total_device_seconds_50: Cost = TO_COMPUTE
    fill: float | None = field(init=False)
    devices: str
    inference_parameters: int
    seed: int
    training_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, tasks in itertools.product(("flops", "device_seconds"), TASKS):
            if getattr(self, name := f"total_{what}_{tasks}") is None:
                object.__setattr__(self, name, self.total(what, tasks=tasks))
        slots = self.generic_slots + self.specialization_slots
        tokens = self.generic_tokens + self.specialization_tokens
        object.__setattr__(self, "fill", tokens / slots if slots else None)

    def cost(self, phase: str, what: str) -> Number:
        """Of `generic` or `specialization`: tokens, slots, flops or device_seconds."""
        value: Number = getattr(self, f"{phase}_{what}")
        return value

    def total(self, what: str, *, tasks: int) -> Number:
        """C_total(N) = C_generic + N * C_specialization (Grangier et al., arXiv 2402.01093), N being the number of domains
        that are specialized to."""
        return self.cost(GENERIC, what) + tasks * self.cost(SPECIALIZATION, what)


@dataclass(frozen=True, kw_only=True)
class _Model(Entry):
    method: str
    stage: str
    domain: str
    base_domain: str
    size: int | None
    finetuned: bool
    domain_text: str
    capped: Flag = None
    nll: Score
    perplexity: Score
    tokens_evaluated: int | None = None
    learning_rate: Rate = None


@dataclass(frozen=True, kw_only=True)
class Row(Costs, _Model):  # columns stand in the order of bases from right to left
    """A model on a set of text."""

    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Method(Entry):
    method: str
    finetuned: bool
    domain_text: str
    stage: str
    size: int | None
    domains: int
    capped: Flag = None
    perplexity: Score
    learning_rate: Rate = None


@dataclass(frozen=True, kw_only=True)
class Average(Costs, _Method):
    """A stage over all the domains of one size: exp of the mean nll per token, and mean costs."""


@dataclass(frozen=True, kw_only=True)
class Concentration(Entry):
    """In how few clusters a set is."""

    stage: str
    domain: str
    base_domain: str
    size: int | None
    k: int
    windows: int
    top_share: Score
    entropy: Score
    effective_clusters: Score
    seed: int


@dataclass(frozen=True, kw_only=True)
class Selection(Entry):
    """A criterion's choice of an expert: `criterion_choice`, and the rank that the expert taken, `choice`, has by it."""

    method: str
    stage: str
    domain: str
    base_domain: str
    size: int | None
    choice: str
    by: str
    criterion: str
    criterion_choice: str | None
    rank: Number | None = None
    tokens: Number | None = None
    slots: Number | None = None
    flops: Number | None = None
    seconds: Number | None = None
    seed: int
    training_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class LearningRate(Entry):
    """A rate that a training tried; `choice` is the one taken, and `untried` says on which side of it none was tried."""

    method: str
    stage: str
    domain: str
    base_domain: str
    size: int | None
    choice: float
    untried: str | None
    learning_rate: float
    validation_loss: Number | None
    seed: int
    training_seed: int | None = None


@dataclass(frozen=True)
class Results:
    """The content of `results.json`, of one run, or of several seeds: side by side, or merged (`report/seeds.py`)."""

    pipeline: str
    rows: list[Row]
    macro: list[Average]
    concentration: list[Concentration]
    selection: list[Selection]
    learning_rates: list[LearningRate]

    def write(self, path: Path) -> None:
        """As JSON."""
        parts = {name: [entry.columns() for entry in own] for name, own in vars(self).items() if name != "pipeline"}
        write_json(path, {"pipeline": self.pipeline, **parts})


def varying(entries: Sequence[Entry]) -> list[str]:
    """The seeds that entries differ in; that of trainings only where it is not the other one."""
    every = [dict(entry.seeds) for entry in entries]
    own = [name for name in SEEDS if len({seeds.get(name) for seeds in every}) > 1]
    return own[:1] if all(seeds.get("training_seed") == seeds["seed"] for seeds in every) else own


# --- CSV ----------------------------------------------------------------------------------------------------------------


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line per row, with every column that any row has; nothing where a row lacks it."""
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file that `to_csv` has made; columns of later versions are passed over.

    Raises:
        ArtifactError: the file is missing, lacks a column that a row must have, a line has too few or too many, or a value is
            not of its column's type.
    """
    remedy = "make it again from `results.json`"
    try:
        header, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except (csv.Error, ValueError) as error:  # no line at all, or no text
        raise ArtifactError(f"{path}: not the CSV file of some results ({error})") from None
    needed = [each.name for each in fields(Row) if each.init and each.default is MISSING]
    if missing := [name for name in needed if name not in header]:
        raise ArtifactError(f"{path}: its first line lacks {', '.join(missing)}: {remedy}")
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise ArtifactError(f"{path}: line {number} has {len(line)} columns, and the first one {len(header)}")
    types = get_type_hints(Row)
    rows = [{name: _value(cell, types.get(name)) for name, cell in zip(header, line, strict=True)} for line in lines]
    return parse_json(json.dumps(rows).encode(), list[Row], path=path, remedy=remedy)


def _value(cell: str, kind: Any) -> Any:
    """What a cell stands for. A text may look like a number: a domain may be named `1984`."""
    if kind is str:
        return cell
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    for convert in (int, float):
        try:
            return convert(cell)
        except ValueError:
            pass
    return cell
