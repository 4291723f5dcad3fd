"""The data of a training: its windows, their order, further inputs, and the windows that it is validated on.

Methods differ in the clusters and their weights (`_clusters`) and in the held-out windows (`data/validation.py`).
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.config.finetuning import finetuning_recipe, with_steps
from megatron_specialm.config.text import GENERIC
from megatron_specialm.config.training import ExpertNetwork, TrainStage
from megatron_specialm.config.trainings import ClusterTraining
from megatron_specialm.data.batches import ExtraInputs, Stream, Windows
from megatron_specialm.data.clusters import ClusterIndex, importance_weights, read_histogram, read_index
from megatron_specialm.data.experts import ExpertStream, check_enough, expert_steps
from megatron_specialm.data.sampling import ImportanceStream
from megatron_specialm.data.store import JoinedStore, TokenStore, read_counts
from megatron_specialm.data.teacher import TeacherCache
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.validation import HeldOut, all_windows, by_expert, like, of_cluster
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import (
    HELD_OUT,
    cluster_count,
    cluster_of,
    key_for,
    tokenize_stage,
    trained_clusters,
    validates_by_cluster,
)
from megatron_specialm.graph.validation import refuse_too_little

logger = logging.getLogger(__name__)


class TrainingData(NamedTuple):
    """What a training reads.

    settings: the stage's, with the number of steps that fits these data.
    store: the set that decides the number of steps; its windows are the first of `windows`.
    windows: all windows that the stream draws.
    stream: the windows of each step.
    extra_inputs: further inputs of windows, by their ids.
    held_out: what early stopping validates on; None without it.
    resolve_steps: gives other settings of this stage the number of steps that fits these data.
    """

    settings: TrainStage
    store: TokenStore
    windows: Windows
    stream: Stream
    extra_inputs: ExtraInputs
    held_out: HeldOut | None
    resolve_steps: Callable[[TrainStage], TrainStage]

    @property
    def slots_per_step(self) -> int:
        """Token positions of a step whose windows are all padded."""
        return self.settings.global_batch_size * self.store.context_length


def open_training_data(stage: TrainStage, context: Context) -> TrainingData:
    """Open the data of a train task.

    Raises:
        DataError: fewer windows than a batch, in the set or in an expert's cluster; no generic window in any cluster of the
            domain; or less held-out text than the validation floor.
    """
    stores = [open_store(stage.tokens, context, source) for source in stage.text_read(context.model_key)]
    store, windows = stores[0], JoinedStore(*stores) if len(stores) == 2 else stores[0]
    if len(windows) < stage.global_batch_size:
        raise DataError(
            f"{store.folder}: {len(windows)} training windows are fewer than one batch: lower "
            f"stages.{context.task.id.stage}.global_batch_size (now {stage.global_batch_size}) or add text"
        )
    index, weights = _clusters(stage, context, stores)
    seed = context.pipeline.seed_of_training
    stream: Stream
    if stage.network is None:
        stream = ImportanceStream(index, weights, global_batch_size=stage.global_batch_size, seed=seed)
    else:
        stream = _expert_stream(stage, stage.network, context, index, seed=seed)
    resolve_steps = functools.partial(_resolve_steps, context=context, store=store, index=index)
    settings, held_out = resolve_steps(stage), _held_out(stage, context, weights)
    data = TrainingData(settings, store, windows, stream, _extra_inputs(stage, context), held_out, resolve_steps)
    for warning in stream.report(settings.steps).warnings:
        logger.warning("%s", warning)
    return data


def open_store(tokens: str, context: Context, source: str, split: str = "train") -> TokenStore:
    """Open a split of a set.

    Raises:
        ArtifactError: it was made with another tokenizer than the pipeline's.
    """
    tokenizer = Tokenizer.load(context.artifact(tokenize_stage(context.pipeline, tokens).tokenizer, GENERIC))
    return TokenStore.open(context.artifact(tokens, source), split, tokenizer=tokenizer.fingerprint)


def open_held_out(tokens: str, context: Context, source: str) -> TokenStore:
    """Open the validation split of a set, on which this stage validates.

    Raises:
        DataError: it is below the set's floor. The tokenize stage refuses it too, where a stage of its config validates on it.
    """
    store = open_store(tokens, context, source, "validation")
    refuse_too_little(context.pipeline, tokens, source, read_counts(store.folder))
    return store


def _expert_stream(
    stage: TrainStage, network: ExpertNetwork, context: Context, index: ClusterIndex, *, seed: int
) -> ExpertStream:
    """Each window with the expert of its cluster, or with a mixture of experts.

    Raises:
        DataError: a cluster has fewer windows than an expert reads at a time.
    """
    for cluster in np.flatnonzero(index.sizes):
        check_enough(
            int(cluster), windows=int(index.sizes[cluster]), needed=network.windows_per_expert,
            field=f"stages.{context.task.id.stage}.windows_per_expert", otherwise="use fewer clusters (k)",
        )  # fmt: skip
    return ExpertStream(
        index,
        global_batch_size=stage.global_batch_size,
        windows_per_expert=network.windows_per_expert,
        soup=network.soup,
        seed=seed,
    )


def _extra_inputs(stage: TrainStage, context: Context) -> ExtraInputs:
    """The cached outputs of the teacher, with `distill.cache`."""
    if stage.distill is None or stage.distill.cache is None:
        return lambda _: {}
    teacher = (stage.distill.teacher, key_for(context.pipeline, stage.distill.teacher, context.model_key))
    cache = TeacherCache.open(
        context.artifact(stage.distill.cache, context.model_key),
        teacher=context.marker(*teacher).digest,
        store=context.marker(stage.tokens, context.model_key).digest,
    )
    return cache.extra_inputs


def _clusters(stage: TrainStage, context: Context, stores: list[TokenStore]) -> tuple[ClusterIndex, np.ndarray]:
    """The clusters, and the weight (K,) of each in the global batches. Without clusters all windows weigh the same; SLM-mix:
    one cluster; SLM-is: the domain's histogram; a model with an expert per cluster: each cluster by its size. A second set is
    one more cluster, which weighs `replay_fraction` or `domain_fraction`."""
    index, weights = ClusterIndex.single(len(stores[0])), np.ones(1)
    if stage.clustering is not None:
        index = _generic_index(stage, context, windows=len(stores[0]))
        if stage.network is not None:
            weights = index.sizes / len(stores[0])
        elif isinstance(stage, ClusterTraining):
            weights = np.eye(len(index.sizes))[cluster_of(context.model_key)]
        else:
            weights = _like_domain(stage, context, index)
    if len(stores) == 2:
        share = stage.mixed_fraction
        index = index.joined(ClusterIndex.single(len(stores[1])))
        weights = np.append((1 - share) * weights, share)
    return index, weights


def _held_out(stage: TrainStage, context: Context, weights: np.ndarray) -> HeldOut | None:
    """The windows of early stopping. `weights` (K,) are those of the clusters in training."""
    if stage.early_stopping is None:
        return None
    store = open_held_out(stage.tokens, context, stage.text_validated(context.model_key))
    if not validates_by_cluster(stage):
        return all_windows(store)
    index = _generic_index(stage, context, HELD_OUT, windows=len(store))
    if stage.network is not None:
        return by_expert(store, index)
    if stage.data == "cluster":
        for cluster in trained_clusters(context.pipeline, context.task.id.stage):  # refuse all if one is too small
            _check_floor(
                of_cluster(store, index, cluster), context,
                whose=f"cluster {cluster} has", otherwise="name others in `clusters`, ",
            )  # fmt: skip
        return of_cluster(store, index, cluster_of(context.model_key))
    try:
        held_out, lost = like(store, index, weights)
    except DataError as error:
        raise DataError(f"{context.task.id}: {error}: use fewer clusters (k), or {_MORE_HELD_OUT}") from None
    _check_floor(held_out, context, whose=f"the clusters of {context.model_key} have")
    if lost:
        logger.warning("%.2f%% of %s lies in clusters without a held-out generic window", 100 * lost, context.model_key)
    return held_out


_MORE_HELD_OUT = (
    "hold out more text (`validation` files, or the tokenize stage's `validation_fraction`), or drop `early_stopping`"
)


def _check_floor(held_out: HeldOut, context: Context, *, whose: str, otherwise: str = "") -> None:
    """Refuse a part of the generic set's held-out windows that is below the set's floor."""
    wanted, found = context.pipeline.text.generic.validation_floor.tokens, held_out.effective_tokens
    if found < wanted:
        raise DataError(
            f"{context.task.id}: {whose} {len(held_out.ids)} of the {len(held_out.store)} held-out generic windows, which "
            f"count as {found:,.0f} tokens; to validate on them takes at least {wanted:,} (text.generic"
            f".validation_floor): use fewer clusters (k), {otherwise}{_MORE_HELD_OUT}"
        )


def _generic_index(stage: TrainStage, context: Context, key: str = GENERIC, *, windows: int) -> ClusterIndex:
    assignment = stage.clustering or ""
    return read_index(context.artifact(assignment, key), windows=windows, k=cluster_count(context.pipeline, assignment))


def _like_domain(stage: TrainStage, context: Context, index: ClusterIndex) -> np.ndarray:
    folder = context.artifact(stage.clustering or "", context.model_key)
    weights, lost = importance_weights(read_histogram(folder, k=len(index.sizes)), index.sizes)
    if lost:
        logger.warning(
            "%.2f%% of %s lies in clusters that the generic set does not have", 100 * lost, context.model_key
        )
    return weights


def _resolve_steps(stage: TrainStage, *, context: Context, store: TokenStore, index: ClusterIndex) -> TrainStage:
    """The settings with the number of steps for this set or cluster."""
    if isinstance(stage, ClusterTraining):
        cluster = cluster_of(context.model_key)
        size = int(index.sizes[cluster])
        for other in trained_clusters(context.pipeline, context.task.id.stage):  # refuse all if one is too small
            check_enough(
                other, windows=int(index.sizes[other]), needed=stage.global_batch_size,
                field=f"stages.{context.task.id.stage}.global_batch_size",
                otherwise="use fewer clusters (k), or name those to train in `clusters`",
            )  # fmt: skip
        return with_steps(stage, expert_steps(stage.steps, budget=stage.budget, size=size, sizes=index.sizes))
    if stage.size_recipe is not None:
        return finetuning_recipe(stage, set_tokens=store.tokens)
    return stage
