"""The schema of a pipeline's YAML file. Each class is one mapping of the config; descriptions of fields are the reference
manual.

A stage names the stages that it reads in its own fields (`tokens: tokens`, `init: slm`); the graph follows from these
(`graph/build.py`). Train stages are in `config/training.py` and `config/trainings.py`.
"""

import re
from pathlib import Path
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

from megatron_specialm.base.hub import is_hub_name
from megatron_specialm.config.base import PathText, Settings
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import IN_READING, IN_TRAINING, Packing, WholePacking
from megatron_specialm.config.text import Text
from megatron_specialm.config.training import Optimizer
from megatron_specialm.config.trainings import AnyTrainStage

# Names of other folders of a run folder, and of a file in `jobs/0001`.
RESERVED = ("artifacts", "figures", "jobs", "parity", "submission")


# --- preparing text ---------------------------------------------------------------------------------------------------


class TokenizerStage(Settings):
    """Train a SentencePiece model on the generic set, or take an existing tokenizer."""

    kind: Literal["tokenizer"]
    path: PathText | None = Field(default=None, description="a SentencePiece .model or a Hugging Face tokenizer folder")
    vocabulary_size: PositiveInt = 32_000
    algorithm: Literal["unigram", "bpe"] = "bpe"
    sample_characters: PositiveInt = Field(
        default=20_000_000, description="characters to train on, spread over the set or over its files"
    )


class ImportStage(Settings):
    """Take an existing model and its tokenizer: a checkpoint of any format that `specialm convert` reads. Stages name it where
    they may name a training that serves all domains; a tokenize stage names it as its `tokenizer`."""

    kind: Literal["import"]
    path: PathText = Field(description="the folder of a checkpoint; else a name on the Hugging Face hub")
    revision: str | None = Field(default=None, description="of a hub name: a commit, tag or branch; default: main")
    config: PathText | None = Field(
        default=None, description="a config.json, or its folder, for a checkpoint that does not describe its model"
    )
    tokenizer: PathText | None = Field(
        default=None,
        description="a Hugging Face tokenizer folder or a SentencePiece .model; default: beside the weights",
    )
    model: ModelConfig = Field(description="default: as `config`, or the checkpoint itself, describes it")
    vocabulary_size: PositiveInt = Field(description="rows of the embedding; default: as `model`")
    method: str | None = Field(default=None, description="the name in tables; default: the stage's")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.revision is not None and (not is_hub_name(self.path) or Path(self.path).is_dir()):
            raise ValueError(
                f"revision {self.revision!r} goes with a name on the hub, and path {self.path!r} is a folder's: drop it"
            )
        return self

    @property
    def source(self) -> str:
        """The path, or the hub name with its revision."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


class TokenizeStage(Settings):
    """For each set of text: documents -> windows of at most `context_length` tokens -> token store."""

    kind: Literal["tokenize"]
    tokenizer: str = Field(description="a tokenizer stage, or an import stage for the tokenizer of its model")
    context_length: PositiveInt = 1024
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5, description="of the training documents is held out")
    workers: PositiveInt | None = Field(default=None, description="threads; default: the cores of the task")


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
    model: PathText = Field(
        description="`package:NAME`, an installed package that carries one; else a folder; else a hub name"
    )
    batch_size: PositiveInt = 64
    chunk_words: PositiveInt = Field(
        default=180,
        description="windows are split into chunks of this many words, and further where the model would truncate them; their "
        "embeddings are averaged",
    )
    precision: Literal["fp32", "bf16"] = "fp32"


Encoder = Annotated[TfidfEncoder | StaticEncoder | SentenceBertEncoder, Field(discriminator="kind")]


class EmbedStage(Settings):
    """For each set of text: windows -> one vector each."""

    kind: Literal["embed"]
    tokens: str
    encoder: Encoder


class ClusterStage(Settings):
    """k-means on the generic set's vectors."""

    kind: Literal["cluster"]
    vectors: str
    k: PositiveInt = Field(le=1_000_000)
    iterations: PositiveInt = 20
    sample: PositiveInt = Field(default=1_000_000, description="vectors to fit on, drawn without replacement")
    processes: PositiveInt = Field(
        default=1, description="MPI ranks to fit on, in a Slurm job; the result does not depend on it"
    )


class AssignStage(Settings):
    """For each set of text: the nearest centroid of each window, and the cluster histogram of the set."""

    kind: Literal["assign"]
    clusters: str
    vectors: str


# --- choosing and teaching -----------------------------------------------------------------------------------------------


class Trial(Settings):
    """The fine-tuning by which experts are compared: on one process, at a constant learning rate."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 8
    packing: Packing | None = Field(default=None, description=IN_TRAINING)
    optimizer: Optimizer = Optimizer()
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluate_every: PositiveInt = Field(default=10, description="steps between validations; the best loss counts")


class SelectStage(Settings):
    """For each domain one expert of a mixture, or of a model with an expert per cluster, as an ordinary model.

    `by`: `frequency`, the domain's most frequent cluster; `loss`, the lowest loss on a sample of its training windows;
    `finetuned`, the lowest validation loss after all were fine-tuned; `halving`, fine-tune all briefly, keep the better
    half, and again (Grangier et al., arXiv 2402.01093; halving is ours). `histogram`, of a projected network only: not one
    expert but the mixture of all by the domain's cluster histogram (arXiv 2502.01804).
    """

    kind: Literal["select"]
    experts: str = Field(description="a train stage with `data: cluster`, `projection` or `moe.route: cluster`")
    tokens: str
    by: Literal["frequency", "loss", "finetuned", "halving", "histogram"] = "loss"
    sample_windows: PositiveInt = Field(default=64, description="of the domain's training set, for `loss`")
    batch_size: PositiveInt = 32
    trial: Trial | None = Field(default=None, description="for `finetuned` and `halving`: how each expert is tried")
    compare: list[Literal["loss", "finetuned", "halving"]] = Field(
        default=[],
        description="criteria to rank by in addition, for the table only; their cost is reported apart",
    )
    method: str | None = Field(default=None, description="the name in tables; default: that of `experts`")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tries_experts and self.trial is None:
            raise ValueError("`finetuned` and `halving` need a `trial`: say how each expert is tried")
        return self

    @property
    def tries_experts(self) -> bool:
        """Whether experts are fine-tuned and compared by their validation losses."""
        return not {self.by, *self.compare}.isdisjoint(("finetuned", "halving"))


class TeachStage(Settings):
    """For each domain a teacher's next-token distributions on every training window, for students to read.

    `exact`: all log-probabilities. `top-k`: the `count` largest, and the remaining mass as one event; biased. `sampled`:
    `count` draws per token, unbiased (arXiv 2503.16870), and the same in every epoch: the marker's `gradient_noise`, which
    falls as 1 / `count`, does not average out.
    """

    kind: Literal["teach"]
    teacher: str = Field(description="a train stage")
    tokens: str
    keep: Literal["exact", "top-k", "sampled"] = "sampled"
    count: PositiveInt | None = Field(default=None, description="of `top-k` and `sampled`: entries kept per token")
    temperature: PositiveFloat = 1.0
    batch_size: PositiveInt = 32
    packing: WholePacking = Field(default="packed", description=IN_READING)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.keep == "exact") != (self.count is None):
            raise ValueError("`count` goes with `keep: top-k` and `keep: sampled`, which need it")
        return self


# --- results ----------------------------------------------------------------------------------------------------------


class EvaluateStage(Settings):
    """Perplexity on held-out documents: of models for all domains on every set, of a domain's models on that domain."""

    kind: Literal["evaluate"]
    tokens: str
    models: list[str] = Field(min_length=1)
    batch_size: PositiveInt = 32
    packing: WholePacking = Field(default="packed", description=IN_READING)
    max_windows: PositiveInt | None = Field(default=None, description="per set, evenly spread; default: all")


class ExportStage(Settings):
    """A Hugging Face folder per model. It counts as done when Transformers computes our logits from it."""

    kind: Literal["export"]
    tokens: str
    models: list[str] = Field(min_length=1)
    tolerance: PositiveFloat = Field(default=1e-3, description="largest absolute difference of logits, fp32")
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="of the weights in the folder")


Stage = Annotated[
    TokenizerStage
    | ImportStage
    | TokenizeStage
    | EmbedStage
    | ClusterStage
    | AssignStage
    | AnyTrainStage
    | SelectStage
    | TeachStage
    | EvaluateStage
    | ExportStage,
    Field(discriminator="kind"),
]


class Local(Settings):
    """How `specialm run` uses this machine. Not part of any digest."""

    parallel_tasks: PositiveInt | None = Field(
        default=None, description="tasks at the same time; default: number of GPUs, else cores / threads"
    )
    threads: PositiveInt = Field(default=1, description="CPU threads per process")


class Pipeline(Settings):
    """One pipeline: its text, its stages, its run folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")
    root: PathText = Field(description="the run folder, relative to the working directory")
    seed: NonNegativeInt = Field(default=0, le=2**32 - 1)
    training_seed: NonNegativeInt | None = Field(
        default=None,
        le=2**32 - 1,
        description="of initial weights, the order of training data and a teacher's samples only; text, vectors and clusters "
        "follow `seed`, which is the default",
    )
    reuse: list[PathText] = Field(
        default=[],
        description="other run folders: an artifact that is complete there with the same digest is copied, not made again",
    )
    ask_above_device_hours: NonNegativeFloat = Field(
        default=1.0,
        description="`run` and `submit` ask, or require `--yes`, before they redo finished work that takes more (wall time "
        "times processes). Not part of any digest",
    )
    text: Text
    stages: dict[str, Stage] = Field(min_length=1)
    local: Local = Local()

    @field_validator("reuse", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stages")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", name) or name in RESERVED:
                raise ValueError(
                    f"stage name {name!r}: use small letters, digits, '_' and '-', at most 80 ({', '.join(RESERVED)} are taken)"
                )
        return value

    @property
    def seed_of_training(self) -> int:
        """The seed of everything that trains or is drawn for trainings; `seed` is for text, vectors and clusters."""
        return self.seed if self.training_seed is None else self.training_seed
