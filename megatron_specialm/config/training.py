"""The settings that all train stages have: what is trained, how, and from which weights."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

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
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.packing import IN_TRAINING, Packing
from megatron_specialm.config.parallel import Layout, ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision
from megatron_specialm.config.text import GENERIC


class Runtime(Settings):
    """What the training loop does beside its steps. It changes nothing that is computed, so it is in no digest."""

    profile_steps: list[PositiveInt] = Field(
        default=[],
        description="steps, counted from 1, of which each rank writes a `torch.profiler` trace, profile/step_N-rank_R.json.gz "
        "in the task's folder, for ui.perfetto.dev",
    )
    memory_snapshot_steps: list[PositiveInt] = Field(
        default=[],
        description="steps, counted from 1, of which each rank writes its GPU's allocations, profile/step_N-rank_R.pickle, for "
        "pytorch.org/memory_viz",
    )
    collect_garbage_every: PositiveInt = Field(
        default=100,
        description="steps between two runs of Python's garbage collector, which does not run by itself in between",
    )
    collective_timeout_seconds: PositiveFloat = Field(
        default=300, description="how long a collective may take after the first step; up to then it is 600"
    )


# pydantic's tags for the two forms of a learning rate: parts of an error's location that are not keys of the config.
ONE_RATE, SEVERAL_RATES = "one rate", "several rates"


Rates = Annotated[
    Annotated[PositiveFloat, Tag(ONE_RATE)] | Annotated[list[PositiveFloat], Tag(SEVERAL_RATES)],
    Discriminator(lambda value: SEVERAL_RATES if isinstance(value, list) else ONE_RATE),
]


class Adam(Settings):
    """Adam without its learning rate. Defaults are the paper's (Table 7: clip 5.0)."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(
        default=0.0,
        description="decoupled (AdamW), for the weights of linears, embeddings, projected bases and LoRA adapters; not for "
        "norms, biases, codes and projections",
    )
    clip_grad: PositiveFloat = Field(default=5.0, description="global gradient norm")


class Optimizer(Adam):
    """Adam at one learning rate (the paper's Table 7: 1e-4)."""

    learning_rate: PositiveFloat = 1e-4


class TrainOptimizer(Adam):
    """Adam at one learning rate, or at several, of which the best is kept."""

    learning_rate: Rates = Field(
        default=1e-4,
        description="of a list (with `early_stopping`) each rate is tried by a training of its own, and the one with the "
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
        """The learning rates to try; a list of one where one is given."""
        return self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]

    @property
    def peak(self) -> float:
        """The learning rate, where one is given or has been chosen (`graph/rates.py`)."""
        assert not isinstance(self.learning_rate, list), "no rate has been chosen yet"
        return self.learning_rate

    def scaled(self, factor: float) -> Self:
        """With every learning rate multiplied by a factor."""
        return self.model_copy(update={"learning_rate": _one_or_several([rate * factor for rate in self.rates])})


def _one_or_several(rates: list[float]) -> float | list[float]:
    return rates if len(rates) > 1 else rates[0]


class Schedule(Settings):
    """Learning rate over steps: linear warm-up, then constant, cosine, or WSD (warm-up, stable, linear decay)."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegativeInt = 1_000
    final_fraction: float = Field(default=0.1, ge=0, le=1, description="of the peak rate, at the last step")
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd only: fraction of the steps that decay")


class CheckpointPolicy(Settings):
    """How often to save, and how many of the newest `step_N` folders to keep. The best checkpoint is kept too, and with
    `wsd` the one before the decay, from which a longer training can continue."""

    every: PositiveInt = 500
    keep: PositiveInt = 2


class EarlyStopping(Settings):
    """Stop when the validation loss has not improved for `patience` evaluations in a row; the best checkpoint is the
    result. The loss is on held-out text like that of the training (data/validation.py)."""

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


class ExpertNetwork(NamedTuple):
    """The settings of a training of one large model with an expert per cluster: a projected network (SLM-pn), or an MoE that
    routes by cluster.

    experts: how many, by the setting `field`.
    """

    assignment: str
    experts: int
    field: str
    projection: Projection | None = None
    windows_per_expert: int = 1
    soup: Soup | None = None


class TrainStage(Settings):
    """Pretraining and specialization: the same stage with other data and other first weights. These settings go with every
    `data`; `config/trainings.py` has a class for each value of it, with the others."""

    kind: Literal["train"]
    tokens: str
    data: Literal["generic", "cluster", "importance", "domain"]
    model: ModelConfig | None = Field(default=None, description="a preset's name (configs/models) or a shape")
    init: str | None = Field(default=None, description="the stage whose final weights are the first ones here")
    continues: str | None = Field(
        default=None,
        description="a train stage that differs in `steps` and `schedule` only: start from its last step that is also a step "
        "of this training, with its optimizer state, instead of from the first step. Changes no weight",
    )
    upcycle: MixtureOfExperts | None = Field(
        default=None,
        description="with `init`: make an MoE of its dense model, each expert a copy of the feed-forward part (arXiv "
        "2212.05055); or of the models of a mixture (`data: cluster`), whose feed-forward parts become the experts and whose "
        "other weights are averaged (arXiv 2403.07816)",
    )
    method: str | None = Field(default=None, description="the name in tables; default: that of `init`, or the stage's")
    steps: PositiveInt
    lora: LowRank | None = Field(default=None, description="train adapters of the linears only; merged for export")
    distill: Distillation | None = Field(default=None, description="SLM-d: learn from a teacher in addition")

    global_batch_size: PositiveInt = Field(description="windows per step")
    micro_batch_size: PositiveInt = Field(
        default=8,
        description="windows per forward pass of one process; of packed ones as many as have no more tokens than these could",
    )
    packing: Packing | None = Field(default=None, description=IN_TRAINING)
    optimizer: TrainOptimizer = TrainOptimizer()
    schedule: Schedule = Schedule()
    precision: Precision = "fp32"
    fp8: Fp8Config | None = Field(default=None, description="with `precision: fp8` only; default: its defaults")
    parallel: Layout = ParallelConfig()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    early_stopping: EarlyStopping | None = None
    trial_steps: PositiveInt | None = Field(
        default=None,
        description="with several learning rates: compare them at the first validation after this many steps, and continue "
        "with the best only; default: train each to the end",
    )
    log_every: PositiveInt = 10
    max_skipped_steps: NonNegativeInt = Field(
        default=5,
        description="consecutive steps with a loss or gradient norm that is not finite, before training stops",
    )
    spike_factor: PositiveFloat = Field(
        default=5.0, description="a gradient norm above this multiple of its recent median is counted as a spike"
    )
    tensorboard: bool = False
    wandb_project: str | None = None
    runtime: Runtime = Runtime()

    @model_validator(mode="before")
    @classmethod
    def _fp8_defaults(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("precision") == "fp8" and value.get("fp8") is None:
            return {**value, "fp8": {}}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for wrong, reason in self._contradictions():
            if wrong:
                raise ValueError(reason)
        return self

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """Combinations of settings that contradict each other, with the message."""
        yield (
            (self.model is None) == (self.init is None),
            "give either `model` (start from random weights) or `init` (start from another stage's), not both",
        )
        yield (
            self.model is not None
            and self.model.moe is not None
            and self.model.moe.by_cluster
            and self.network is None,
            f"`moe.route: cluster` goes with `data: generic`, and this is `data: {self.data}`: change one of them",
        )
        yield (
            self.lora is not None and self.init is None,
            "`lora` adapts weights that were trained before: give `init` instead of `model`",
        )
        yield from self._contradictions_of_upcycling()
        rates = self.optimizer.rates
        yield (
            len(rates) > 1 and self.early_stopping is None,
            f"`optimizer.learning_rate` {rates}: the best is taken by validation loss: give `early_stopping`, or one number",
        )
        yield (
            self.trial_steps is not None and len(rates) == 1,
            f"`trial_steps` {self.trial_steps} goes with several rates in `optimizer.learning_rate` (it is {rates[0]}): "
            "give a list, or drop `trial_steps`",
        )
        yield (
            self.continues is not None and len(rates) > 1,
            f"`continues` goes with one learning rate, and `optimizer.learning_rate` is {rates}: give one, or drop `continues`",
        )
        yield (
            self.distill is not None
            and self.distill.cache is not None
            and (self.data != "domain" or self.mixed_fraction > 0),
            "`distill.cache` holds the domain's windows only: use `data: domain` without `replay_fraction`, or drop "
            "`cache` and let the teacher compute beside the student",
        )
        yield (
            self.fp8 is not None and self.precision != "fp8",
            f"`fp8` goes with `precision: fp8` (it is {self.precision}): set that, or drop `fp8`",
        )
        yield (
            self.schedule.warmup_steps > self.steps,
            f"schedule.warmup_steps {self.schedule.warmup_steps} is more than steps {self.steps}",
        )

    def _contradictions_of_upcycling(self) -> Iterator[tuple[bool, str]]:
        moe = self.upcycle
        if moe is None:
            return
        yield self.init is None, "`upcycle` makes an MoE of trained models: give `init`, or a `model` with `moe`"
        yield self.lora is not None, "`lora` trains adapters only, and routers start at random: drop it, or `upcycle`"
        yield (
            self.method is None,
            "`upcycle` makes another model than that of `init`: give `method`, its name in tables",
        )
        yield moe.by_cluster, "upcycle.route: cluster has no router to train: drop it, or give a `model` with `moe`"
        yield (
            moe.top_k == 1 and max(moe.counts) > 1,
            "upcycle.top_k 1 scales an expert's output by its probability, so the MoE would not start as the model that it is "
            "made of: set top_k to 2 or more",
        )
        yield (
            moe.shared_expert is not None or moe.residual,
            "upcycle.shared_expert and upcycle.residual have no weights to start from: drop them",
        )

    @property
    def clustering(self) -> str | None:
        """The assign stage whose clusters it reads."""
        return None

    @property
    def network(self) -> ExpertNetwork | None:
        """Its settings as a model with an expert per cluster; None for other models."""
        return None

    @property
    def mixed_fraction(self) -> float:
        """The fraction of each batch that comes from a second set of text: the domain's, or with `data: domain` the generic
        one."""
        return 0.0

    @property
    def mixes_in_domain(self) -> bool:
        """Whether the domain's text is mixed into the generic one."""
        return self.mixed_fraction > 0 and self.data != "domain"

    @property
    def size_recipe(self) -> Literal["paper"] | None:
        """The recipe by which steps and learning rates follow from the size of the domain's set."""
        return None

    @property
    def steps_follow_data(self) -> bool:
        """Whether the number of steps depends on the size of the text, and not on `steps` alone (early stopping aside)."""
        return self.size_recipe is not None

    def text_read(self, key: str) -> list[str]:
        """The sets of text that the training of the model `key` reads, the main one first."""
        own, mixed = (key, GENERIC) if self.data == "domain" else (GENERIC, key)
        return [own, mixed] if self.mixed_fraction > 0 else [own]

    def text_validated(self, key: str) -> str:
        """The set on whose held-out text early stopping validates: the domain's wherever its text is read."""
        return self.text_read(key)[-1 if self.mixes_in_domain else 0]
