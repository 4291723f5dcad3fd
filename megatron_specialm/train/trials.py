"""Fine-tunings of experts on a domain, by which they are told apart. Each has a folder of its own, where it goes on: after
an interruption, and when it is given more steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_specialm.config.schema import Trial
from megatron_specialm.config.training import TrainStage
from megatron_specialm.data.batches import TrainingBatches, evaluation_batches
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.sampling import ImportanceStream
from megatron_specialm.data.store import TokenStore
from megatron_specialm.train.checkpoint import Saver
from megatron_specialm.train.loop import Run, train
from megatron_specialm.train.megatron_engine import MegatronEngine
from megatron_specialm.train.peers import Peers
from megatron_specialm.train.served import ServedModel


class Trials:
    """The fine-tunings of one criterion, on this process."""

    def __init__(
        self, trial: Trial, store: TokenStore, load: Callable[[str], ServedModel], *, folder: Path, seed: int
    ) -> None:
        self._trial, self._store, self._load, self._folder = trial, store, load, folder
        self._stream = ImportanceStream(
            ClusterIndex.single(len(store)), np.ones(1), global_batch_size=trial.global_batch_size, seed=seed
        )
        self._validation = TokenStore.open(store.folder, "validation")

    def tune(self, key: str, steps: int) -> float:
        """Fine-tune an expert until it has had so many steps in all: its best validation loss, nats per token."""
        folder = self._folder / key
        folder.mkdir(parents=True, exist_ok=True)
        settings, start = self._settings(steps), self._load(key)
        engine = MegatronEngine(
            start.build(precision=settings.precision),
            parallel=settings.parallel,
            optimizer=settings.optimizer,
            micro_batch_size=settings.micro_batch_size,
        )
        progress = train(
            engine,
            Run(
                folder=folder,
                settings=settings,
                batches=TrainingBatches(self._store, self._stream, rank=0, processes=1),
                validation=lambda: evaluation_batches(self._validation, batch_size=settings.micro_batch_size),
                description=start.state,
                flops_per_step=0,  # the criterion counts them
                device_name="",
                processes=1,
                peers=Peers(),
                saver=Saver(folder, Peers()),
            ),
        )
        assert progress.best_loss is not None
        return progress.best_loss

    def _settings(self, steps: int) -> TrainStage:
        """Validated now and then and at the end of `steps`, and never stopped before."""
        return TrainStage.model_validate(
            {
                "kind": "train", "tokens": "", "data": "domain", "init": "", "steps": steps,
                "schedule": {"warmup_steps": 0}, "checkpoint": {"every": steps, "keep": 1},
                "early_stopping": {"evaluate_every": self._trial.evaluate_every, "patience": steps + 1},
                **self._trial.model_dump(include={"global_batch_size", "micro_batch_size", "optimizer", "precision"}),
            }
        )  # fmt: skip
