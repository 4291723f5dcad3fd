"""The interface of a stage kind: what the graph, the plan, the runners, Slurm and the report ask about a stage.

`graph/kinds/` has the class of each kind, `stages/KIND.py` the function that does its tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.tasks import Task

Product = Literal[
    "tokenizer", "tokens", "vectors", "clusters", "assignment", "model", "distributions", "perplexity", "export"
]
References = Mapping[str, Product]
Placement = Mapping[str, Any]
DomainText = Literal["none", "mixed in", "fine-tuned"]
S = TypeVar("S", bound=Settings)


class StageKind(ABC, Generic[S]):
    """A stage kind; `S` is the class of its settings.

    kind: its name in the config.
    makes: what its artifacts hold; `also_makes`: and what else.
    references: the fields that name other stages, dotted, and what those stages must make.
    placement: settings that are no part of a digest, because they decide where, in what portions or how talkatively a task
        runs, or because the digest has them under another name. True, or for settings inside a mapping of the same form.
    ranks_by: which launcher's ranks do a task together: any launcher's, MPI's only, or none (one process does it).
    saves_steps: whether a task saves checkpoints, so that a request to stop can wait for the end of its step.
    uses_training_seed: whether it draws weights, an order of training data or samples for trainings, by `training_seed`.
    """

    kind: ClassVar[str]
    makes: ClassVar[Product]
    also_makes: ClassVar[Product | None] = None
    references: ClassVar[References] = {}
    placement: ClassVar[Placement] = {}
    ranks_by: ClassVar[Literal["any", "mpi"] | None] = None
    saves_steps: ClassVar[bool] = False
    uses_training_seed: ClassVar[bool] = False

    @abstractmethod
    def tasks(self, pipeline: Pipeline, name: str, stage: S) -> Iterator[Task]:
        """The tasks of a stage: their keys, inputs and files, each behind those of the stage that it reads."""

    def check(self, pipeline: Pipeline, name: str, stage: S) -> None:
        """Check a stage against those it names, which exist and make what `references` wants.

        Raises:
            ConfigError: naming the key, both values and the fix.
        """

    def processes(self, stage: S) -> int:
        """The ranks that a task takes where they work together."""
        return 1

    def digested(self, stage: S, task: Task) -> Settings:
        """The settings that decide a task's result."""
        return stage

    def validated_sets(self, pipeline: Pipeline, name: str, stage: S) -> set[str]:
        """The sets of text on whose held-out part the stage validates."""
        return set()

    def works_together(self, *, mpi: bool) -> bool:
        """Whether all ranks do a task together; otherwise it is the first rank's work.

        Args:
            mpi: whether MPI has started them, or would.
        """
        return self.ranks_by == "any" or (self.ranks_by == "mpi" and mpi)

    def provides(self, wanted: Product) -> bool:
        """Whether a stage that reads this can name it."""
        return wanted in (self.makes, self.also_makes)

    def ranks(self, stage: S, *, mpi: bool) -> int:
        """The ranks to start for a task; `mpi` as of `works_together`."""
        return self.processes(stage) if self.works_together(mpi=mpi) else 1

    def named_stages(self, stage: S) -> Iterator[tuple[str, str]]:
        """The (field, stage) pairs by which a stage names others."""
        for field in self.references:
            value: Any = stage
            for part in field.split("."):
                value = getattr(value, part, None)
            for other in value if isinstance(value, list) else [value] if value is not None else []:
                yield field, other


class ModelKind(StageKind[S]):
    """A kind that makes models. Each key of a stage without a dot is the key of a model."""

    makes = "model"

    @abstractmethod
    def keys(self, pipeline: Pipeline, name: str, stage: S) -> list[str]:
        """The keys of its models: one for all domains, one per cluster, or one per domain."""

    @abstractmethod
    def shape(self, pipeline: Pipeline, stage: S) -> ModelConfig:
        """The shape of its models, as they are trained or handed out."""

    @abstractmethod
    def start(self, stage: S) -> str | None:
        """The stage whose weights are its first ones; None where they are random."""

    def domain_text(self, stage: S) -> DomainText:
        """How its models read the domain's own text here, whatever they start from."""
        return "none"

    @abstractmethod
    def origin(self, stage: S) -> str:
        """What made them here, for model cards: the data that they were trained on, with what is mixed in behind a plus, or how
        they were selected. Words, or a key of `READS` in `convert/model_card.py`."""


KINDS: dict[str, StageKind[Any]] = {}
K = TypeVar("K", bound=StageKind[Any])


def register(cls: type[K]) -> type[K]:
    """Make a kind known by its name."""
    KINDS[cls.kind] = cls()
    return cls


def kind_of(stage: Any) -> StageKind[Any]:
    return KINDS[stage.kind]
