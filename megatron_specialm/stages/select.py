"""One expert of a mixture or a projected network, as an ordinary model for a domain.

step_0000000/    result.json     the model, as a training would leave it
selection.json   the choice, and for each criterion its own choice, the rank it gives ours, and what it cost
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.files import write_json
from megatron_specialm.config.lineage import cluster_count, cluster_of, expert_key, train_stage, trained_clusters
from megatron_specialm.config.schema import GENERIC, SelectStage, TrainStage
from megatron_specialm.data.batches import TrainingBatches, evaluation_batches
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.sampling import ImportanceStream
from megatron_specialm.data.store import TokenStore
from megatron_specialm.stages.context import Context
from megatron_specialm.stages.reading import open_store
from megatron_specialm.train.checkpoint import Saver, find_final
from megatron_specialm.train.distributed import process_group
from megatron_specialm.train.loop import Run, train
from megatron_specialm.train.megatron_engine import MegatronEngine
from megatron_specialm.train.peers import Peers
from megatron_specialm.train.selection import (
    Ranking,
    Spent,
    by_finetuning,
    by_frequency,
    by_halving,
    by_loss,
    halving_steps,
)
from megatron_specialm.train.served import ServedModel, one_hot, read_served, write_served


def run(stage: SelectStage, context: Context) -> Report:
    """Rank the experts, and write the first as a model. The report has what all criteria that were run have cost.

    Raises:
        DataError: no window of the domain is in a cluster that has an expert.
    """
    experts = train_stage(context.pipeline, stage.experts)
    keys = [expert_key(cluster) for cluster in trained_clusters(context.pipeline, stage.experts)]
    histogram_K = np.load(context.artifact(experts.assignment or "", context.key) / "histogram.npy", allow_pickle=False)
    store = open_store(stage.tokens, context, context.key)
    rankings = {"frequency": by_frequency(keys, histogram_K, domain=context.key)}
    with process_group(ALONE, threads=context.threads):  # the first rank's work, however many there are
        rankings["loss"] = by_loss(
            keys,
            lambda key: _expert(stage, context, key),
            lambda: evaluation_batches(store, batch_size=stage.batch_size, max_windows=stage.sample_windows),
        )
        trials = _Trials(stage, context, store)
        for criterion in dict.fromkeys([stage.by, *stage.compare]):
            if criterion in _TRIED:
                rankings[criterion] = trials.rank(criterion, keys)
    choice: str = stage.by if stage.by == "histogram" else rankings[stage.by].order[0]
    if stage.by == "histogram":
        model = _mixed(stage, context, torch.from_numpy(histogram_K).float())
    else:
        model = _expert(stage, context, choice)
    write_served(model, context.folder)
    criteria = {name: _summary(ranking, choice) for name, ranking in rankings.items()}
    criteria |= trials.not_run(len(keys), rankings)
    values: dict[str, Any] = {"choice": choice, "by": stage.by, "experts": len(keys), "criteria": criteria}
    write_json(context.folder / "selection.json", values)
    shutil.rmtree(trials.folder, ignore_errors=True)
    spent = sum((ranking.spent for ranking in rankings.values()), Spent())
    parameters = model.shape.parameters(model.vocabulary_size)
    unfinished = {"steps": 0, "best_step": None, "validation_loss": None, "parameters": parameters}
    return Report(tokens=spent.tokens, flops=spent.flops, values={**values, **unfinished})


def _expert(stage: SelectStage, context: Context, key: str) -> ServedModel:
    """An expert by its key: a checkpoint of a mixture, or projected from the one of a projected network."""
    experts = train_stage(context.pipeline, stage.experts)
    if experts.projection is None:
        return read_served(find_final(context.artifact(stage.experts, key)))
    k = cluster_count(context.pipeline, experts.assignment or "")
    return _mixed(stage, context, one_hot(cluster_of(key), experts=k))


def _mixed(stage: SelectStage, context: Context, mixture_K: torch.Tensor) -> ServedModel:
    return read_served(find_final(context.artifact(stage.experts, GENERIC)), mixture_K=mixture_K)


def _summary(ranking: Ranking, choice: str) -> dict[str, Any]:
    rank = ranking.order.index(choice) + 1 if choice in ranking.order else None
    return {"choice": ranking.order[0], "rank": rank, "order": list(ranking.order), **ranking.spent._asdict()}


_TRIED = {"finetuned": by_finetuning, "halving": by_halving}


class _Trials:
    """Fine-tunings of experts on the domain, each in a folder of its own, where it goes on after an interruption."""

    def __init__(self, stage: SelectStage, context: Context, store: TokenStore) -> None:
        self._stage, self._context, self._store = stage, context, store
        self.folder = context.folder / "trials"

    def rank(self, criterion: str, keys: list[str]) -> Ranking:
        """Try the experts."""
        assert self._stage.trial is not None
        return _TRIED[criterion](
            keys,
            lambda key, steps: self._tune(self.folder / criterion / key, key, steps),
            self._stage.trial,
            self._cost,
        )

    def not_run(self, experts: int, run: dict[str, Ranking]) -> dict[str, dict[str, Any]]:
        """What criteria that were not run would have cost."""
        if (trial := self._stage.trial) is None:
            return {}
        steps = {"finetuned": experts * trial.steps, "halving": halving_steps(experts, trial.steps)}
        return {
            name: {"choice": None, "rank": None, "order": [], **self._cost(count)._asdict()}
            for name, count in steps.items()
            if name not in run
        }

    def _cost(self, steps: int) -> Spent:
        """Of so many steps of one expert; tokens at most, as windows may be shorter than the context."""
        assert self._stage.trial is not None
        experts, store = train_stage(self._context.pipeline, self._stage.experts), self._store
        assert experts.model is not None
        tokens = steps * self._stage.trial.global_batch_size * store.context_length
        return Spent(tokens, tokens * experts.model.training_flops(store.vocabulary_size, store.context_length))

    def _tune(self, folder: Path, key: str, steps: int) -> float:
        """Fine-tune an expert to `steps` steps in all: its best validation loss in nats per token."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._settings(steps)
        start = _expert(self._stage, self._context, key)
        engine = MegatronEngine(
            start.build(),
            parallel=settings.parallel,
            optimizer=settings.optimizer,
            micro_batch_size=settings.micro_batch_size,
        )
        stream = ImportanceStream(
            ClusterIndex.single(len(self._store)),
            np.ones(1),
            global_batch_size=settings.global_batch_size,
            seed=self._context.pipeline.seed,
        )
        validation = TokenStore.open(self._store.folder, "validation")
        progress = train(
            engine,
            Run(
                folder=folder,
                settings=settings,
                batches=TrainingBatches(self._store, stream, rank=0, processes=1),
                validation=lambda: evaluation_batches(validation, batch_size=settings.micro_batch_size),
                description=start.state,
                flops_per_step=self._cost(1).flops,
                device_name="",
                processes=1,
                peers=Peers(),
                saver=Saver(folder, Peers()),
            ),
        )
        assert progress.best_loss is not None
        return progress.best_loss

    def _settings(self, steps: int) -> TrainStage:
        trial = self._stage.trial
        assert trial is not None
        return TrainStage.model_validate(
            {
                "kind": "train", "tokens": self._stage.tokens, "data": "domain", "init": self._stage.experts,
                "steps": steps, "schedule": {"warmup_steps": 0}, "checkpoint": {"every": steps, "keep": 1},
                "early_stopping": {"evaluate_every": steps, "patience": steps},
                **trial.model_dump(include={"global_batch_size", "micro_batch_size", "optimizer"}),
            }
        )  # fmt: skip
