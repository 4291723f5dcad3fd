"""The schema of a pipeline's YAML page. Each class is one mapping of the page; the field's description is its manual.

A stage names the stages it reads in its own fields (`tokens: tokens`, `init: slm`), and the graph follows from them
(`config/graph.py`). What a stage is *for* (one run for everybody, or one per domain) follows from its `data`.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision

RESERVED = ("jobs", "parity")  # other folders of a run
GENERIC = "generic"  # the key of the generic set, and of tasks that serve every domain


# --- the text ---------------------------------------------------------------------------------------------------------


class TextSet(Settings):
    """The files of one set. Entries are paths, globs, or `hf:NAME[:CONFIG[:SPLIT]]` for a Hugging Face dataset."""

    train: list[str] = Field(min_length=1)
    test: list[str] = Field(min_length=1)
    validation: list[str] = Field(default=[], description="default: a share of the training documents is held out")
    text_field: str = Field(default="text", description="the key or column that holds a document's text")
    train_tokens: PositiveInt | None = Field(
        default=None, description="train on the first documents that hold at most so many tokens; default: on all"
    )
    domain: str | None = Field(
        default=None, description="the domain that this is a size of; set where the page says `sizes` of a domain"
    )

    @field_validator("train", "test", "validation", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Text(Settings):
    """The large generic set and the small domain sets.

    A domain with `sizes: [50_000, 1_000_000]` (training tokens) stands for one domain per size, `legal-50k` and
    `legal-1m`, with the same test set; without `validation` files, what is held out is of the same size's text.
    """

    generic: TextSet
    domains: dict[str, TextSet] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _one_domain_per_size(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("domains"), dict):
            return value
        domains: dict[str, Any] = {}
        for name, files in value["domains"].items():
            sized = _sizes(name, files) if isinstance(files, dict) and "sizes" in files else {name: files}
            for taken in sized.keys() & domains.keys():
                raise ValueError(f"domains.{name}: {taken!r} is there twice, as a size and by name: rename one")
            domains |= sized
        return {**value, "domains": domains}

    @field_validator("domains")
    @classmethod
    def _names(cls, value: dict[str, TextSet]) -> dict[str, TextSet]:
        for name in [*value, *(files.domain for files in value.values() if files.domain is not None)]:
            if name == GENERIC or re.fullmatch(r"c\d+", name) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                raise ValueError(
                    f"domain name {name!r}: use small letters, digits, '_' and '-'; '{GENERIC}' is taken by the generic "
                    "set, and c0, c1, ... by the experts of clusters"
                )
        return value


def _sizes(name: str, files: dict[str, Any]) -> dict[str, Any]:
    """The domains that a domain with `sizes` stands for, by their names."""
    sizes = files["sizes"]
    valid = isinstance(sizes, list) and sizes and all(type(size) is int and size > 0 for size in sizes)
    if not valid or len(set(sizes)) < len(sizes) or files.keys() & {"train_tokens", "domain"}:
        raise ValueError(
            f"domains.{name}.sizes: {sizes!r}: give different numbers of training tokens, as in [50_000, 1_000_000], and "
            "neither `train_tokens` nor `domain` beside them"
        )
    common = {key: value for key, value in files.items() if key != "sizes"}
    return {f"{name}-{size_name(size)}": {**common, "train_tokens": size, "domain": name} for size in sizes}


def size_name(tokens: int) -> str:
    """A number of tokens as in names and on axes, exact: 50k, 1m, or all its digits."""
    for unit, letter in ((1_000_000, "m"), (1_000, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


# --- preparing text ---------------------------------------------------------------------------------------------------


class TokenizerStage(Settings):
    """Train a SentencePiece model on the generic set, or take an existing tokenizer."""

    kind: Literal["tokenizer"]
    path: str | None = Field(default=None, description="a SentencePiece .model or a Hugging Face tokenizer folder")
    vocabulary_size: PositiveInt = 32_000
    algorithm: Literal["unigram", "bpe"] = "bpe"
    sample_characters: PositiveInt = Field(default=20_000_000, description="training text, spread over the set")


class TokenizeStage(Settings):
    """Documents -> windows of at most `context_length` tokens -> token store, per set."""

    kind: Literal["tokenize"]
    tokenizer: str
    context_length: PositiveInt = 1024
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5, description="of the training documents")
    workers: PositiveInt | None = Field(default=None, description="processes; default: this task's cores")


class TfidfEncoder(Settings):
    """TF-IDF of the window's words, projected to `dimensions` by truncated SVD. Fitted on the generic set."""

    kind: Literal["tfidf"]
    dimensions: PositiveInt = 64
    vocabulary_size: PositiveInt = 20_000
    sample: PositiveInt = Field(default=50_000, description="windows to fit on")


class StaticEncoder(Settings):
    """Mean of static word-piece embeddings (the package wordllama ships its weights)."""

    kind: Literal["static"]
    dimensions: PositiveInt = 256


class SentenceBertEncoder(Settings):
    """A Sentence-BERT model through sentence-transformers, as in the paper."""

    kind: Literal["sentence-bert"]
    model: str = Field(description="a folder, an installed package that carries one (`package:NAME`), or a hub name")
    batch_size: PositiveInt = 64
    chunk_words: PositiveInt = Field(
        default=180, description="the model truncates long text: windows are cut so and their embeddings averaged"
    )
    precision: Literal["fp32", "bf16"] = "fp32"


Encoder = Annotated[TfidfEncoder | StaticEncoder | SentenceBertEncoder, Field(discriminator="kind")]


class EmbedStage(Settings):
    """Windows -> one vector each, per set."""

    kind: Literal["embed"]
    tokens: str
    encoder: Encoder


class ClusterStage(Settings):
    """k-means on the generic set's vectors."""

    kind: Literal["cluster"]
    vectors: str
    k: PositiveInt
    iterations: PositiveInt = 20
    sample: PositiveInt = Field(default=1_000_000, description="vectors to fit on, drawn without replacement")


class AssignStage(Settings):
    """Each window's nearest centroid, and each set's cluster histogram."""

    kind: Literal["assign"]
    clusters: str
    vectors: str


# --- training ---------------------------------------------------------------------------------------------------------


class Optimizer(Settings):
    """Adam with the paper's settings as defaults (Table 7: lr 1e-4, clip 5.0)."""

    learning_rate: PositiveFloat = 1e-4
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: PositiveFloat = Field(default=5.0, description="global gradient norm")


class Schedule(Settings):
    """Learning rate over steps: linear warm-up, then constant, cosine, or WSD (warm-up, stable, linear decay)."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegativeInt = 1_000
    final_fraction: float = Field(default=0.1, ge=0, le=1, description="of the peak rate, at the last step")
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd only: share of the steps that decay")


class CheckpointPolicy(Settings):
    """When to save and how many `step_N` folders to keep (the newest; the best is kept beside them)."""

    every: PositiveInt = 500
    keep: PositiveInt = 2


class EarlyStopping(Settings):
    """Stop when the validation loss has not improved for `patience` evaluations in a row; the best checkpoint counts."""

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
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Precision = "fp32"
    fp8: Fp8Config | None = Field(default=None, description="with `precision: fp8` only; default: its defaults")
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    early_stopping: EarlyStopping | None = None
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
            projected and self.early_stopping is not None,
            ("`early_stopping` does not go with `projection`: held-out windows have no cluster; drop it"),
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


class Trial(Settings):
    """The fine-tuning by which experts are told apart: on one process, at a constant learning rate."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 8
    optimizer: Optimizer = Optimizer()
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluate_every: PositiveInt = Field(default=10, description="steps; the best validation loss counts")


class SelectStage(Settings):
    """One expert of a mixture or of a projected network, for each domain, as an ordinary model.

    `by`: `frequency`, the domain's most frequent cluster; `loss`, the lowest loss on a sample of its training windows;
    `finetuned`, the lowest validation loss after all were fine-tuned; `halving`, fine-tune all briefly, keep the better
    half, and again (Grangier et al., arXiv 2402.01093; halving is ours). `histogram`, of a projected network only: not one
    expert but the mixture of all by the domain's cluster histogram (arXiv 2502.01804).
    """

    kind: Literal["select"]
    experts: str = Field(description="a train stage with `data: cluster` or `projection`")
    tokens: str
    by: Literal["frequency", "loss", "finetuned", "halving", "histogram"] = "loss"
    sample_windows: PositiveInt = Field(default=64, description="of the domain's training set, for `loss`")
    batch_size: PositiveInt = 32
    trial: Trial | None = Field(default=None, description="for `finetuned` and `halving`: how each expert is tried")
    compare: list[Literal["loss", "finetuned", "halving"]] = Field(
        default=[], description="criteria to rank by as well, for the selection table; their cost counts"
    )
    method: str | None = Field(default=None, description="the name in tables; default: that of `experts`")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if {self.by, *self.compare} & {"finetuned", "halving"} and self.trial is None:
            raise ValueError("`finetuned` and `halving` need a `trial`: say how each expert is tried")
        return self


class TeachStage(Settings):
    """A teacher's next-token distributions on every training window of a domain, for its students to read.

    `exact`: all log-probabilities. `top-k`: the `count` largest and the rest's mass as one event; biased. `sampled`:
    `count` draws per token, unbiased (arXiv 2503.16870).
    """

    kind: Literal["teach"]
    teacher: str = Field(description="a train stage")
    tokens: str
    keep: Literal["exact", "top-k", "sampled"] = "sampled"
    count: PositiveInt | None = Field(default=None, description="of `top-k` and `sampled`: numbers kept per token")
    temperature: PositiveFloat = 1.0
    batch_size: PositiveInt = 32

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.keep == "exact") != (self.count is None):
            raise ValueError("`count` goes with `keep: top-k` and `keep: sampled`, which need it")
        return self


# --- results ----------------------------------------------------------------------------------------------------------


class EvaluateStage(Settings):
    """Perplexity on held-out documents: of shared models on every set, of a domain's models on that domain."""

    kind: Literal["evaluate"]
    tokens: str
    models: list[str] = Field(min_length=1)
    batch_size: PositiveInt = 32
    max_windows: PositiveInt | None = Field(default=None, description="per set, evenly spread; default: all")


class ExportStage(Settings):
    """A Hugging Face folder per model, its logits compared with ours before it counts."""

    kind: Literal["export"]
    tokens: str
    models: list[str] = Field(min_length=1)
    tolerance: PositiveFloat = Field(default=1e-3, description="largest absolute difference of logits, fp32")


Stage = Annotated[
    TokenizerStage
    | TokenizeStage
    | EmbedStage
    | ClusterStage
    | AssignStage
    | TrainStage
    | SelectStage
    | TeachStage
    | EvaluateStage
    | ExportStage,
    Field(discriminator="kind"),
]


class Local(Settings):
    """How `specialm run` uses this machine. No part of any digest."""

    parallel_tasks: PositiveInt | None = Field(default=None, description="tasks at a time; default: cores / threads")
    threads: PositiveInt = Field(default=1, description="CPU threads per process")


class Pipeline(Settings):
    """One YAML page: which text, which stages, in which folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    root: str = Field(description="the run folder, relative to the working directory")
    seed: NonNegativeInt = 0
    text: Text
    stages: dict[str, Stage] = Field(min_length=1)
    local: Local = Local()

    @field_validator("stages")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name in RESERVED:
                raise ValueError(
                    f"stage name {name!r}: use small letters, digits, '_' and '-' ({', '.join(RESERVED)} are taken)"
                )
        return value
