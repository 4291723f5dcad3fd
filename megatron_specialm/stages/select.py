"""Select one expert of a mixture, or of a model with an expert per cluster, for a domain, as an ordinary model.

step_0000000/    result.json     the model, in the layout of a training's result
selection.json   the choice; for each criterion its own choice, the rank of the chosen expert in its order, and its cost
trials/          while fine-tuning trials run: a folder per criterion and expert
"""

import shutil
from dataclasses import asdict
from functools import reduce
from typing import Any

import torch

from megatron_specialm.base.artifacts import Report, Spent
from megatron_specialm.base.files import write_json
from megatron_specialm.checkpoint.merged import MergedModel, read_merged, read_trained, write_merged
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.schema import SelectStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.batches import evaluation_batches
from megatron_specialm.data.clusters import read_histogram
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.training_data import open_held_out, open_store
from megatron_specialm.engine.open import single_process
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.estimate.flops import projection_flops, reading_flops
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import (
    cluster_count,
    expert_key,
    model_of,
    train_stage,
    trained_clusters,
    trial_setup_of,
)
from megatron_specialm.model.merge import one_hot
from megatron_specialm.train.selection import (
    Order,
    by_finetuning,
    by_frequency,
    by_halving,
    by_loss,
    halving_plan,
    trial_validations,
)
from megatron_specialm.train.trials import Trials
from megatron_specialm.train.work import Work


def run(stage: SelectStage, context: Context) -> Report:
    """Order the experts by each criterion, and write the deciding criterion's first one as a model. The report has the cost of
    that criterion and, as `apart`, the cost of the criteria that were run for comparison.

    Raises:
        DataError: no window of the domain is in a cluster that has an expert, or the domain has fewer held-out windows than a
            criterion that uses them requires.
        TrainingError: no expert has a finite loss.
    """
    assignment = train_stage(context.pipeline, stage.experts).clustering or ""
    keys = [expert_key(cluster) for cluster in trained_clusters(context.pipeline, stage.experts)]
    folder = context.artifact(assignment, context.key)
    histogram_K = read_histogram(folder, k=cluster_count(context.pipeline, assignment))
    store = open_store(stage.tokens, context, context.key)
    if stage.tries_experts:
        open_held_out(stage.tokens, context, context.key)
    experts = _Experts(stage, context, torch.from_numpy(histogram_K).float())
    trial_setup = None if stage.trial is None else trial_setup_of(context.pipeline, stage)
    orders: dict[str, Order] = {"frequency": by_frequency(keys, histogram_K, domain=context.key)}
    spent: dict[str, Spent] = {"frequency": Spent()}
    trials = context.folder / "trials"
    lost = {name: sum(Work.read(path).seconds for path in (trials / name).glob("*")) for name in _TRIED}
    for name in dict.fromkeys([stage.by, *stage.compare]):
        if name in ("frequency", "histogram"):
            continue
        began, projected = context.watch.seconds, experts.flops
        if name == "loss":
            sample = list(evaluation_batches(store, batch_size=stage.batch_size, max_windows=stage.sample_windows))
            with single_process(threads=context.threads):  # runs on rank 0 only
                orders[name], losses = by_loss(keys, experts.load, sample)
            passes = reduce(Spent.plus, (_reading(loss, experts.shape, store) for loss in losses), Spent())
        else:
            assert stage.trial is not None and trial_setup is not None
            tried = Trials(
                stage.trial, trial_setup, store, experts.load,
                folder=trials / name, seed=context.pipeline.seed_of_training,
            )  # fmt: skip
            with single_process(threads=context.threads):
                orders[name] = _TRIED[name](keys, tried.tune, stage.trial.steps)
            passes = tried.spent
        seconds = lost.get(name, 0.0) + context.watch.seconds - began
        spent[name] = Spent(passes.tokens, passes.slots, passes.flops + experts.flops - projected, seconds)
    choice = orders[stage.by][0] if stage.by in orders else stage.by
    projected = experts.flops
    model = experts.load(choice)
    write_merged(model, context.folder)
    planned = _planned(stage, trial_setup, experts.shape, store, len(keys))
    summaries = {name: _summary(orders.get(name), choice, spent.get(name, planned[name])) for name in planned}
    values: dict[str, Any] = {"choice": choice, "by": stage.by, "experts": len(keys), "criteria": summaries}
    write_json(context.folder / "selection.json", values)
    shutil.rmtree(trials, ignore_errors=True)
    parameters = count_parameters(model.shape, model.vocabulary_size)
    untrained = {"steps": 0, "best_step": None, "validation_loss": None, "parameters": parameters}
    decided = spent.get(stage.by, Spent())
    return Report(
        tokens=decided.tokens,
        slots=decided.slots,
        flops=decided.flops + experts.flops - projected,
        lost_seconds=sum(lost.values()),
        apart=reduce(Spent.plus, (cost for name, cost in spent.items() if name != stage.by), Spent()),
        values={**values, **untrained},
    )


_TRIED = {"finetuned": by_finetuning, "halving": by_halving}


class _Experts:
    """Experts as ordinary models, by key: checkpoints of a mixture, or parts of one model, which is opened once. For a
    projected network, the key `histogram` is all experts mixed by the domain's histogram. `flops`: of projections so far."""

    def __init__(self, stage: SelectStage, context: Context, histogram_K: torch.Tensor) -> None:
        model = model_of(context.pipeline, stage.experts)
        self.shape, self.flops = model.base_config, 0
        self._folder = lambda key: find_final(context.artifact(stage.experts, key))
        self._network = None if model.window_experts is None else read_trained(self._folder(GENERIC))
        self._price = 0 if model.projection is None else projection_flops(model, 1, forward_only=True)
        count = len(histogram_K)
        self._mixtures = {expert_key(cluster): one_hot(cluster, experts=count) for cluster in range(count)}
        self._mixtures["histogram"] = histogram_K

    def load(self, key: str) -> MergedModel:
        """The model of an expert."""
        if self._network is None:
            return read_merged(self._folder(key))
        self.flops += self._price
        return self._network.merged(self._mixtures[key])


def _reading(loss: LossSum, shape: ModelConfig, store: TokenStore) -> Spent:
    """The cost of the passes that made a loss."""
    sizes = store.vocabulary_size, store.context_length
    return Spent(loss.tokens, loss.slots, reading_flops(shape, *sizes, slots=loss.slots, saved=loss.saved))


def _planned(
    stage: SelectStage, trials: Setup | None, shape: ModelConfig, store: TokenStore, experts: int
) -> dict[str, Spent]:
    """The cost of each criterion, without projections; of trials only if the config has `trial`."""
    sizes = store.vocabulary_size, store.context_length
    windows = experts * min(stage.sample_windows, len(store))
    slots, saved = _mean_slots(store, windows, "packed")
    costs = {"frequency": Spent(), "loss": Spent(slots, slots, reading_flops(shape, *sizes, slots=slots, saved=saved))}
    if trials is not None and (trial := stage.trial) is not None:
        held_out, size = TokenStore.open(store.folder, "validation"), trial.micro_batch_size
        filled_up = len(held_out) if trials.packing == "packed" else -(-len(held_out) // size) * size
        plans = {"finetuned": [(experts, 0, trial.steps)], "halving": halving_plan(experts, trial.steps)}
        for name, plan in plans.items():
            windows = trial.global_batch_size * sum(left * (until - before) for left, before, until in plan)
            slots, saved = _mean_slots(store, windows, trials.packing)
            times = trial_validations(plan, every=trial.evaluate_every)
            read, unread = _mean_slots(held_out, times * filled_up, trials.packing)
            flops = 3 * reading_flops(shape, *sizes, slots=slots, saved=saved)
            flops += reading_flops(shape, *sizes, slots=read, saved=unread)
            costs[name] = Spent(round(windows * store.tokens / len(store)), slots, flops)
    return costs


def _mean_slots(store: TokenStore, windows: int, packing: Packing) -> tuple[int, int]:
    """Slots of so many windows, and the keys saved: of packed ones by the set's means, otherwise of padded ones, which is an
    upper bound for sorted ones."""
    if packing != "packed" or not windows:
        return windows * store.context_length, 0
    return round(windows * store.tokens / len(store)), round(windows * store.keys_saved / len(store))


def _summary(order: Order | None, choice: str, cost: Spent) -> dict[str, Any]:
    keys = list(order or ())
    rank = keys.index(choice) + 1 if choice in keys else None
    return {"choice": keys[0] if keys else None, "rank": rank, "order": keys, **asdict(cost)}
