"""A train stage of a pipeline's config: what is trained on what, how, and from which weights."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision

# How pydantic calls the two forms of a learning rate: parts of an error's location that are no keys of the config.
ONE_RATE, SEVERAL_RATES = "one rate", "several rates"


def _form(value: Any) -> str:
    return SEVERAL_RATES if isinstance(value, list) else ONE_RATE


Rates = Annotated[
    Annotated[PositiveFloat, Tag(ONE_RATE)] | Annotated[list[PositiveFloat], Tag(SEVERAL_RATES)], Discriminator(_form)
]


class Adam(Settings):
    """Adam with the paper's settings as defaults (Table 7: clip 5.0), but for its learning rate."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(
        default=0.0,
        description="AdamW's, of the weights of linears, embeddings, projected bases and LoRA's adapters; norms, biases, "
        "codes and projections do not decay",
    )
    clip_grad: PositiveFloat = Field(default=5.0, description="global gradient norm")


class Optimizer(Adam):
    """Adam at one learning rate (the paper's Table 7: 1e-4)."""

    learning_rate: PositiveFloat = 1e-4


class TrainOptimizer(Adam):
    """Adam at one learning rate, or at several, of which the best is taken."""

    learning_rate: Rates = Field(
        default=1e-4,
        description="a list is tried, with `early_stopping`: each rate by a training of its own, of which the one with the "
        "lowest validation loss is kept, the first of equal ones (`trial_steps`)",
    )

    @field_validator("learning_rate")
    @classmethod
    def _different(cls, value: float | list[float]) -> float | list[float]:
        rates = value if isinstance(value, list) else [value]
        if not rates or len(set(rates)) < len(rates):
            raise ValueError("give one number, or different ones to try, as in [5.0e-4, 1.7e-3]")
        return _one_or_several(rates)

    @property
    def rates(self) -> list[float]:
        """The rates to try; one where there is no choice."""
        return self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]

    @property
    def peak(self) -> float:
        """The one rate of a training that has no choice, or has made it (`graph/rates.py`)."""
        assert not isinstance(self.learning_rate, list), "no rate has been chosen yet"
        return self.learning_rate

    def scaled(self, factor: float) -> Self:
        """With every rate times a factor."""
        return self.model_copy(update={"learning_rate": _one_or_several([rate * factor for rate in self.rates])})


def _one_or_several(rates: list[float]) -> float | list[float]:
    return rates if len(rates) > 1 else rates[0]


class Schedule(Settings):
    """Learning rate over steps: linear warm-up, then constant, cosine, or WSD (warm-up, stable, linear decay)."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegativeInt = 1_000
    final_fraction: float = Field(default=0.1, ge=0, le=1, description="of the peak rate, at the last step")
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd only: share of the steps that decay")


class CheckpointPolicy(Settings):
    """When to save and how many `step_N` folders to keep: the newest. Beside them the best is kept, and of `wsd` the one before
    the decay, from which a longer training can go on."""

    every: PositiveInt = 500
    keep: PositiveInt = 2


class EarlyStopping(Settings):
    """Stop when the validation loss has not improved for `patience` evaluations in a row; the best checkpoint counts. It is
    of held-out text like the training's: data/validation.py says which."""

    evaluate_every: PositiveInt
    patience: PositiveInt = 3


class Soup(Settings):
    """Groups of a projected network's training that are drawn from a histogram over several clusters and computed by the
    mixture of their experts' codes, instead of from one cluster by its own (Soup-of-Experts, arXiv 2502.01804)."""

    fraction: float = Field(default=0.5, gt=0, le=1, description="of the groups")
    clusters: PositiveInt = Field(default=4, description="per histogram, drawn by their size; weights are Dirichlet(1)")


class Distillation(Settings):
    """SLM-d: `(1 - alpha) * cross-entropy + alpha * temperature^2 * KL(teacher || student)` (Grangier et al.,
    arXiv 2402.01093, section 2)."""

    teacher: str = Field(description="the train stage whose model teaches")
    alpha: float = Field(default=0.5, ge=0, le=1, description="the teacher's weight; 0 is plain training")
    temperature: PositiveFloat = 1.0
    cache: str | None = Field(
        default=None,
        description="the teach stage that holds its distributions; default: it computes beside the student",
    )


class TrainStage(Settings):
    """Pretraining and specialization: the same stage with other data and other first weights.

    `data` decides for whom: `generic` trains once for all domains, `cluster` (SLM-mix) once per cluster of the generic
    set, `importance` (SLM-is: the generic set resampled to the domain's cluster histogram) and `domain` (the domain's own
    text) once per domain. With a `projection`, `generic` training is of an SLM-pn: each window's own cluster's expert.
    """

    kind: Literal["train"]
    tokens: str
    data: Literal["generic", "cluster", "importance", "domain"]
    model: ModelConfig | None = Field(default=None, description="a preset's name (configs/models) or a shape")
    init: str | None = Field(default=None, description="the stage whose final weights are the first ones here")
    method: str | None = Field(default=None, description="the name in tables; default: that of `init`, or the stage's")
    steps: PositiveInt

    # What changes with the method.
    assignment: str | None = Field(
        default=None, description="the assign stage; for `importance`, `cluster` and projected networks"
    )
    clusters: list[NonNegativeInt] | None = Field(
        default=None, min_length=1, description="`cluster` only: train these experts; default: one per cluster"
    )
    budget: Literal["equal", "proportional"] = Field(
        default="equal",
        description="`cluster` only: an expert's `steps`, or scaled by its cluster's share (mean: `steps`)",
    )
    projection: Projection | None = Field(default=None, description="SLM-pn: one large model of many experts")
    windows_per_expert: PositiveInt | None = Field(
        default=None,
        description="SLM-pn: windows in a row of a batch that one expert computes, a multiple of micro_batch_size. Few, so "
        "that a batch has many experts",
    )
    soup: Soup | None = Field(default=None, description="SLM-pn: train mixtures of experts too")
    lora: LowRank | None = Field(default=None, description="train adapters of the linears only; merged when served")
    distill: Distillation | None = Field(default=None, description="SLM-d: learn from a teacher too")
    replay_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="`domain` only: the generic set's share of each batch (arXiv 2502.06042)"
    )
    domain_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="`generic` and `importance`: the domain's share of each batch, repeated from the start (arXiv "
        "2603.16177); the training is then per domain",
    )
    recipe: Literal["paper"] | None = Field(
        default=None,
        description="`domain` only: the paper's fine-tuning by the size of the set: up to 1M tokens a third of the "
        "learning rate and at most 2,000 steps, up to 8M 4,000 steps, beyond 30,000",
    )

    global_batch_size: PositiveInt = Field(description="windows per step")
    micro_batch_size: PositiveInt = Field(default=8, description="windows per forward pass of one process")
    optimizer: TrainOptimizer = TrainOptimizer()
    schedule: Schedule = Schedule()
    precision: Precision = "fp32"
    fp8: Fp8Config | None = Field(default=None, description="with `precision: fp8` only; default: its defaults")
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    early_stopping: EarlyStopping | None = None
    trial_steps: PositiveInt | None = Field(
        default=None,
        description="with several learning rates: compare them after so many steps, at the next validation, and go on with "
        "the best alone; default: train each to the end",
    )
    log_every: PositiveInt = 10
    max_skipped_steps: NonNegativeInt = Field(
        default=5, description="steps in a row with a loss or gradient norm that is not finite, before training stops"
    )
    spike_factor: PositiveFloat = Field(
        default=5.0, description="a gradient norm above this many times its recent median is counted as a spike"
    )
    tensorboard: bool = False
    wandb_project: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _fp8_defaults(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("precision") == "fp8" and value.get("fp8") is None:
            return {**value, "fp8": {}}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.init is None):
            raise ValueError(
                "give either `model` (start from random weights) or `init` (start from another stage's), not both"
            )
        needed = self.data in ("importance", "cluster") or self.projection is not None
        if needed != (self.assignment is not None):
            raise ValueError(
                "`assignment` goes with `data: importance`, `data: cluster` and `projection`, which need it: "
                + ("name an assign stage" if needed else "drop it")
            )
        for wrong, reason in self._misplaced():
            if wrong:
                raise ValueError(reason)
        if self.fp8 is not None and self.precision != "fp8":
            raise ValueError(f"`fp8` goes with `precision: fp8` (it is {self.precision}): set that, or drop `fp8`")
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} is more than steps {self.steps}")
        return self

    def _misplaced(self) -> Iterator[tuple[bool, str]]:
        """Settings beside others that they mean nothing with."""
        of_clusters = self.clusters is not None or self.budget != "equal"
        yield of_clusters and self.data != "cluster", "`clusters` and `budget` go with `data: cluster`"
        projected = self.projection is not None
        yield (
            projected and (self.data != "generic" or self.model is None),
            (
                "`projection` goes with `data: generic` and a `model`: all experts are trained together, once for all domains"
            ),
        )
        yield (
            projected and self.domain_fraction > 0,
            "`domain_fraction` does not go with `projection`: drop one of them",
        )
        yield (
            (self.windows_per_expert is not None) != projected,
            (
                "`windows_per_expert` goes with `projection`, which needs it: how many windows in a row one expert computes"
            ),
        )
        repeated = self.clusters is not None and len(set(self.clusters)) < len(self.clusters)
        yield repeated, f"`clusters` {self.clusters}: one stands twice"
        yield self.soup is not None and not projected, "`soup` goes with `projection`"
        yield (
            self.lora is not None and self.init is None,
            ("`lora` adapts weights that were trained before: give `init` instead of `model`"),
        )
        yield (
            self.replay_fraction > 0 and self.data != "domain",
            ("`replay_fraction` goes with `data: domain`: other trainings read the generic set anyway"),
        )
        yield (
            self.domain_fraction > 0 and self.data not in ("generic", "importance"),
            ("`domain_fraction` goes with `data: generic` or `data: importance`"),
        )
        yield self.recipe is not None and self.data != "domain", "`recipe: paper` is for `data: domain`"
        rates = self.optimizer.rates
        yield (
            len(rates) > 1 and self.early_stopping is None,
            (
                f"`optimizer.learning_rate` {rates}: the best is taken by validation loss: give `early_stopping`, or one number"
            ),
        )
        yield (
            self.trial_steps is not None and len(rates) == 1,
            (
                f"`trial_steps` {self.trial_steps} goes with several rates in `optimizer.learning_rate` (it is {rates[0]}): "
                "give a list, or drop `trial_steps`"
            ),
        )
        yield (
            self.distill is not None and projected,
            ("`distill` does not go with `projection`: distill into an expert after it was selected"),
        )
        yield (
            self.distill is not None
            and self.distill.cache is not None
            and (self.replay_fraction > 0 or self.data != "domain"),
            "`distill.cache` holds the domain's windows only: use `data: domain` without `replay_fraction`, or drop "
            "`cache` and let the teacher compute beside the student",
        )
