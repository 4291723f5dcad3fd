"""One expert of a mixture or a projected network, as an ordinary model for a domain.

step_0000000/    result.json     the model, as a training would leave it
selection.json   the choice, and for each criterion its own choice, the rank it gives ours, and what it cost or would have
"""

import shutil
from typing import Any

import numpy as np
import torch

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.files import write_json
from megatron_specialm.config.lineage import expert_key, model_of, train_stage, trained_clusters
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import SelectStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.batches import evaluation_batches
from megatron_specialm.data.store import TokenStore
from megatron_specialm.stages.context import Context
from megatron_specialm.stages.reading import open_store
from megatron_specialm.train.checkpoint import find_final
from megatron_specialm.train.distributed import process_group
from megatron_specialm.train.selection import (
    Load,
    Ranking,
    Spent,
    by_finetuning,
    by_frequency,
    by_halving,
    by_loss,
    halving_steps,
)
from megatron_specialm.train.served import one_hot, read_served, read_trained, write_served
from megatron_specialm.train.trials import Trials


def run(stage: SelectStage, context: Context) -> Report:
    """Rank the experts, and write the first as a model. The report has what all criteria that were run have cost.

    Raises:
        DataError: no window of the domain is in a cluster that has an expert.
    """
    experts = train_stage(context.pipeline, stage.experts)
    keys = [expert_key(cluster) for cluster in trained_clusters(context.pipeline, stage.experts)]
    histogram_K = np.load(context.artifact(experts.assignment or "", context.key) / "histogram.npy", allow_pickle=False)
    store = open_store(stage.tokens, context, context.key)
    load = _loader(stage, context, torch.from_numpy(histogram_K).float())
    costs = _costs(stage, model_of(context.pipeline, stage.experts).plain, store, experts=len(keys))
    rankings = {"frequency": by_frequency(keys, histogram_K, domain=context.key)}
    trials = context.folder / "trials"
    with process_group(ALONE, threads=context.threads):  # the first rank's work, however many there are
        for name in dict.fromkeys([stage.by, *stage.compare]):
            if name == "loss":
                sample = list(evaluation_batches(store, batch_size=stage.batch_size, max_windows=stage.sample_windows))
                rankings[name] = by_loss(keys, load, sample, costs[name])
            elif name in _TRIED:
                assert stage.trial is not None
                tried = Trials(stage.trial, store, load, folder=trials / name, seed=context.pipeline.seed)
                rankings[name] = _TRIED[name](keys, tried.tune, stage.trial.steps, costs[name])
    choice = rankings[stage.by].order[0] if stage.by in rankings else stage.by
    model = load(choice)
    write_served(model, context.folder)
    summaries = {name: _summary(rankings.get(name), choice, cost) for name, cost in costs.items()}
    values: dict[str, Any] = {"choice": choice, "by": stage.by, "experts": len(keys), "criteria": summaries}
    write_json(context.folder / "selection.json", values)
    shutil.rmtree(trials, ignore_errors=True)
    parameters = model.shape.parameters(model.vocabulary_size)
    untrained = {"steps": 0, "best_step": None, "validation_loss": None, "parameters": parameters}
    return Report(
        tokens=sum(ranking.spent.tokens for ranking in rankings.values()),
        flops=sum(ranking.spent.flops for ranking in rankings.values()),
        values={**values, **untrained},
    )


_TRIED = {"finetuned": by_finetuning, "halving": by_halving}


def _loader(stage: SelectStage, context: Context, histogram_K: torch.Tensor) -> Load:
    """An expert by its key: a checkpoint of a mixture, or projected from a network that is read once; of that, under
    `histogram`, the mixture of all too."""
    experts = train_stage(context.pipeline, stage.experts)
    if experts.projection is None:
        return lambda key: read_served(find_final(context.artifact(stage.experts, key)))
    network = read_trained(find_final(context.artifact(stage.experts, GENERIC)))
    mixtures = {expert_key(cluster): one_hot(cluster, experts=len(histogram_K)) for cluster in range(len(histogram_K))}
    mixtures["histogram"] = histogram_K
    return lambda key: network.served(mixtures[key])


def _costs(stage: SelectStage, model: ModelConfig, store: TokenStore, *, experts: int) -> dict[str, Spent]:
    """What each criterion costs, run or not; of trials where the page says how an expert is tried."""
    sizes = store.vocabulary_size, store.context_length
    sample = experts * min(stage.sample_windows, len(store)) * store.context_length
    costs = {"frequency": Spent(), "loss": Spent(sample, sample * model.forward_flops(*sizes))}
    if stage.trial is not None:
        steps = {"finetuned": experts * stage.trial.steps, "halving": halving_steps(experts, stage.trial.steps)}
        for name, count in steps.items():
            tokens = count * stage.trial.global_batch_size * store.context_length
            costs[name] = Spent(tokens, tokens * model.training_flops(*sizes))
    return costs


def _summary(ranking: Ranking | None, choice: str, cost: Spent) -> dict[str, Any]:
    order = list(ranking.order) if ranking else []
    rank = order.index(choice) + 1 if choice in order else None
    return {"choice": order[0] if order else None, "rank": rank, "order": order, **cost._asdict()}
