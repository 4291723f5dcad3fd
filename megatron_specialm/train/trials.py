"""Trial fine-tunings of experts on a domain, to compare the experts. Each trial has its own folder, from which it resumes after
an interruption and when it gets more steps."""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_specialm.base.artifacts import Spent
from megatron_specialm.base.control_group import ControlGroup
from megatron_specialm.base.errors import TrainingError
from megatron_specialm.checkpoint.merged import MergedModel
from megatron_specialm.checkpoint.saving import Saver
from megatron_specialm.config.schema import Trial
from megatron_specialm.config.training import TrainStage
from megatron_specialm.config.trainings import DomainTraining
from megatron_specialm.data.batches import TrainingBatches, evaluation_batches
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.sampling import ImportanceStream
from megatron_specialm.data.store import TokenStore
from megatron_specialm.engine.open import build_engine
from megatron_specialm.estimate.flops import reading_flops
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.train.loop import Training, train
from megatron_specialm.train.progress import TrainingState
from megatron_specialm.train.work import Work

logger = logging.getLogger(__name__)


class Trials:
    """The trial fine-tunings of one selection criterion, on this process."""

    def __init__(
        self,
        trial: Trial,
        setup: Setup,
        store: TokenStore,
        load: Callable[[str], MergedModel],
        *,
        folder: Path,
        seed: int,
    ) -> None:
        self._trial, self._setup, self._store, self._load, self._folder = trial, setup, store, load, folder
        self._stream = ImportanceStream(
            ClusterIndex.single(len(store)), np.ones(1), global_batch_size=trial.global_batch_size, seed=seed
        )
        self._validation = TokenStore.open(store.folder, "validation")
        self._spent: dict[str, Spent] = {}

    @property
    def spent(self) -> Spent:
        """The cost of all trials, over all attempts."""
        return functools.reduce(Spent.plus, self._spent.values(), Spent())

    def tune(self, key: str, steps: int) -> float:
        """Fine-tune an expert up to `steps` steps in all. Returns its best validation loss in nats per token, NaN if none was
        finite."""
        start, progress = self._load(key), TrainingState()
        try:
            progress = self._train(key, start, steps)
        except TrainingError as error:
            logger.warning("%s is excluded from the selection: %s", key, error)
        self._spent[key] = self._work(key, start, progress)
        return math.nan if progress.best_loss is None else progress.best_loss

    def _train(self, key: str, start: MergedModel, steps: int) -> TrainingState:
        folder, settings = self._folder / key, self._settings(steps)
        folder.mkdir(parents=True, exist_ok=True)
        training = Training(
            folder=folder,
            settings=settings,
            batches=TrainingBatches(self._store, self._stream, rank=0, processes=1),
            validation=lambda: evaluation_batches(self._validation, batch_size=settings.micro_batch_size),
            description=start.state,
            step_flops=lambda *_: 0,  # a trial's utilisation is not reported
            processes=1,
            control=ControlGroup(),
            saver=Saver(folder, ControlGroup()),
        )
        engine = build_engine(
            self._setup, optimizer=settings.optimizer, initialize=lambda model: model.load(start.weights)
        )
        return train(engine, training)

    def _work(self, key: str, model: MergedModel, progress: TrainingState) -> Spent:
        work, sizes = Work.read(self._folder / key), (model.vocabulary_size, model.context_length)
        passes = work.passes
        flops = 3 * reading_flops(model.shape, *sizes, slots=passes.trained, saved=passes.trained_saved)
        flops += reading_flops(model.shape, *sizes, slots=passes.evaluated, saved=passes.evaluated_saved)
        return Spent(progress.tokens, progress.slots, flops, work.seconds)

    def _settings(self, steps: int) -> TrainStage:
        """Validate every `evaluate_every` steps and at the end of `steps`; never stop early."""
        return DomainTraining.model_validate(
            {
                "kind": "train", "tokens": "", "data": "domain", "init": "", "steps": steps,
                "schedule": {"warmup_steps": 0}, "checkpoint": {"every": steps, "keep": 1},
                "early_stopping": {"evaluate_every": self._trial.evaluate_every, "patience": steps + 1},
                **self._trial.model_dump(exclude={"steps", "evaluate_every"}),
            }
        )  # fmt: skip
