"""The results as typed rows: one dataclass per part of `results.json`, rendered as JSON and CSV.

A field is a column. Its type defines how it is read from files; its `Rule` defines how several entries become one. To add a
column, add a field here, and its value where rows are made (`report/results.py`). Files, averages over domains and means over
seeds need no change.

    Row             a model on a set of text: perplexity, and the model's cost
    Average         a stage of a method, over all domains of one size
    Concentration   an assign stage and a set: how concentrated the set is in clusters
    Selection       a select stage, a domain and a criterion: the expert chosen, and the cost of the choice
    LearningRate    a training with several learning rates, and one of them: its best validation loss

`finetuned`: the model has read its domain's text; `domain_text`: how, mixed into pretraining or by fine-tuning. Stages of one
method are its budgets. A domain with `sizes` is one set per size; `base_domain` is the domain without its size. `capped`: the
cap on steps, not early stopping, ended the model's own fine-tuning; None for a training without early stopping.
`bits_per_byte` compares models of different tokenizers; None where an earlier version scored the model or tokenized the text.
`bytes_estimated`: only some windows were scored, and `bytes_evaluated` is in proportion to their tokens.
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
DOMAIN_COUNTS = (1, 7, 50)  # the numbers of domains that share the generic cost in the paper's total costs
SEEDS = ("seed", "training_seed")  # the columns that identify a run of a config
Seeds = tuple[tuple[str, int], ...]
Number = int | float


def mean(values: Sequence[Number]) -> float:
    return sum(values) / len(values)


def any_known(values: Sequence[bool | None]) -> bool | None:
    """Whether any is true, of those that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return any(known) if known else None


def listed(values: Sequence[float | str | None]) -> float | str | None:
    """The value if all are equal; otherwise the different ones as text. A value may be such text already."""
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return different[0]
    return ", ".join(dict.fromkeys(part for value in different for part in str(value).split(", ")))


@dataclass(frozen=True)
class Rule:
    """How a column of several entries becomes one value. Over seeds a score also gets its standard deviation."""

    combine: Callable[[Sequence[Any]], Any] = lambda values: values[0]
    is_score: bool = False


Cost = Annotated[Number, Rule(mean)]
Score = Annotated[float, Rule(mean, is_score=True)]
KnownScore = Annotated[float | None, Rule(mean, is_score=True)]
Flag = Annotated[bool | None, Rule(any_known)]
Rate = Annotated[float | str | None, Rule(listed)]
TO_COMPUTE: Any = None


@dataclass(frozen=True)
class Spread:
    """What an entry over several seeds has in addition.

    Attributes:
        deviation: the sample standard deviation of each score; None for a single seed.
        seeds: the values of each of `SEEDS` that the entries have.
        capped_seeds: the seeds at which the entry was capped; None without such a column.
    """

    deviation: Mapping[str, float | None]
    seeds: Mapping[str, list[int]]
    capped_seeds: list[int] | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of any part. `spread` is not a column: it is None in an entry of one seed."""

    spread: Spread | None = None

    def __post_init__(self) -> None:
        if getattr(self, "training_seed", 0) is None:  # in earlier versions the two seeds were one
            object.__setattr__(self, "training_seed", vars(self)["seed"])

    @property
    def seeds(self) -> Seeds:
        """The seeds that identify the entry's run."""
        return tuple((name, getattr(self, name)) for name in SEEDS if hasattr(self, name))

    def columns(self) -> dict[str, Any]:
        """The entry as in files: values by column. An entry over seeds also has deviations and lists of seeds, at the end."""
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
    """The rule of each column that is not computed from others."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        each.name: next((rule for rule in get_args(hints[each.name]) if isinstance(rule, Rule)), Rule())
        for each in fields(kind)
        if each.init and each.name != "spread"
    }


def combine(
    kind: type[E], entries: Sequence[Entry], *, average: Callable[[Sequence[Any]], float] = mean, **given: Any
) -> E:
    """One entry from several: each column by its rule (a mean: by `average`, and None if a value is), except the `given`
    columns."""
    own: dict[str, Any] = {}
    for name, rule in rules(kind).items():  # type: ignore[arg-type]
        if name not in given:
            values = [getattr(entry, name) for entry in entries]
            if rule.combine is not mean:
                own[name] = rule.combine(values)
            else:
                own[name] = None if None in values else average(values)
    return kind(**own, **given)


@dataclass(frozen=True, kw_only=True)
class Costs(Entry):
    """A model's cost (`report/costs.py`), and its seeds.

    `total_WHAT_N` is the cost for N domains, computed if it is not given. `fill` is the fraction of real tokens in the slots of
    all trainings; None without slots. Of a mixture of experts `inference_active_parameters` compute a token; of other models
    that is all, and None where an earlier version evaluated it.
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
    inference_active_parameters: int | None = None
    seed: int
    training_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, domains in itertools.product(("flops", "device_seconds"), DOMAIN_COUNTS):
            if getattr(self, name := f"total_{what}_{domains}") is None:
                object.__setattr__(self, name, self.total(what, domains=domains))
        slots = self.generic_slots + self.specialization_slots
        tokens = self.generic_tokens + self.specialization_tokens
        object.__setattr__(self, "fill", tokens / slots if slots else None)

    def cost(self, phase: str, what: str) -> Number:
        """The tokens, slots, flops or device_seconds of the `generic` or `specialization` phase."""
        value: Number = getattr(self, f"{phase}_{what}")
        return value

    def total(self, what: str, *, domains: int) -> Number:
        """C_total(N) = C_generic + N * C_specialization (Grangier et al., arXiv 2402.01093), N being the number of domains
        that are specialized to."""
        return self.cost(GENERIC, what) + domains * self.cost(SPECIALIZATION, what)


@dataclass(frozen=True, kw_only=True)
class _OfModel(Entry):
    method: str
    stage: str
    domain: str
    base_domain: str
    size: int | None


@dataclass(frozen=True, kw_only=True)
class _Model(_OfModel):
    finetuned: bool
    domain_text: str
    capped: Flag = None
    nll: Score
    perplexity: Score
    bits_per_byte: KnownScore = None
    tokens_evaluated: int | None = None
    bytes_evaluated: int | None = None
    bytes_estimated: Flag = None
    learning_rate: Rate = None


@dataclass(frozen=True, kw_only=True)
class Row(Costs, _Model):  # the columns' order: those of the last base come first
    """A model on a set of text. `imported`: the import stages behind it."""

    model: str | None = None
    imported: str = ""


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
    bits_per_byte: KnownScore = None
    learning_rate: Rate = None


@dataclass(frozen=True, kw_only=True)
class Average(Costs, _Method):
    """A stage over all domains of one size: exp of the mean nll per token, mean bits per byte, and mean costs."""


@dataclass(frozen=True, kw_only=True)
class Concentration(Entry):
    """How concentrated a set is in clusters. `relative_distance`: how far a domain is from the generic text of its clusters
    (`report/coverage.py`)."""

    stage: str
    domain: str
    base_domain: str
    size: int | None
    k: int
    windows: int
    top_share: Score
    entropy: Score
    effective_clusters: Score
    relative_distance: float | None = None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Selection(_OfModel):
    """A criterion's choice of an expert (`criterion_choice`), and by it the rank of the expert taken (`choice`)."""

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
class LearningRate(_OfModel):
    """A rate that a training tried. `choice` is the rate taken; `untried`: on which side of it no rate was tried."""

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
    """The seeds that differ between entries; `training_seed` only if it differs from `seed`."""
    every = [dict(entry.seeds) for entry in entries]
    own = [name for name in SEEDS if len({seeds.get(name) for seeds in every}) > 1]
    return own[:1] if all(seeds.get("training_seed") == seeds["seed"] for seeds in every) else own


# --- CSV ----------------------------------------------------------------------------------------------------------------


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line per row, with every column that any row has; empty cells where a row lacks one."""
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_csv(path: Path, kind: type[E]) -> list[E]:
    """The entries of a CSV file that `to_csv` has made; unknown columns are ignored.

    Raises:
        ArtifactError: the file is missing, lacks a required column, has a line with too few or too many columns, or a value
            that is not of its column's type.
    """
    remedy = "make it again from `results.json`"
    try:
        header, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except (csv.Error, ValueError) as error:  # no line, or not text
        raise ArtifactError(f"{path}: not the CSV file of some results ({error})") from None
    needed = [each.name for each in fields(kind) if each.init and each.default is MISSING]
    if missing := [name for name in needed if name not in header]:
        raise ArtifactError(f"{path}: its first line lacks {', '.join(missing)}: {remedy}")
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise ArtifactError(f"{path}: line {number} has {len(line)} columns, and the first one {len(header)}")
    types = get_type_hints(kind)
    rows = [{name: _value(cell, types.get(name)) for name, cell in zip(header, line, strict=True)} for line in lines]
    own: list[E] = parse_json(json.dumps(rows).encode(), list[kind], path=path, remedy=remedy)  # type: ignore[valid-type]
    return own


def _value(cell: str, kind: Any) -> Any:
    """The value of a cell. Text may look like a number: a domain may be named `1984`."""
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
