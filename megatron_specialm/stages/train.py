"""Train a model: pretraining and specialization, generic, per cluster or per domain. These differ in their data
(`data/training_data.py`), first weights, trained parameters and objective."""

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import megatron_specialm
from megatron_specialm.base.accelerator import name_of_device
from megatron_specialm.base.arrays import write_array
from megatron_specialm.base.artifacts import Cost, Report, Spent
from megatron_specialm.base.control_group import ControlGroup
from megatron_specialm.base.files import read_json
from megatron_specialm.checkpoint.adopting import adopt_checkpoints
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.checkpoint.saving import Saver
from megatron_specialm.checkpoint.steps import find_final, remove_unusable, saved_steps
from megatron_specialm.config.finetuning import Capped, capped_warning
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.schema import TeachStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.config.training import TrainStage
from megatron_specialm.data.batches import TrainingBatches
from megatron_specialm.data.clusters import CENTROID, read_centroids
from megatron_specialm.data.store import Batch, TokenStore
from megatron_specialm.data.training_data import open_training_data
from megatron_specialm.engine.objective import Objective, cross_entropy
from megatron_specialm.engine.open import open_engine
from megatron_specialm.estimate.parameters import count_parameters, count_trained_parameters
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import (
    assign_stage,
    cluster_count,
    cluster_of,
    first_models,
    key_for,
    model_of,
    setup_of,
    stage_of,
)
from megatron_specialm.graph.rates import at_rate, trial_key, trial_of
from megatron_specialm.model.initial import first_adapters
from megatron_specialm.model.upcycling import upcycled
from megatron_specialm.model.weights import Sliceable
from megatron_specialm.stages.continuing import go_on_from_earlier
from megatron_specialm.stages.rates import choose_rate
from megatron_specialm.train.distillation import Distillation, Teacher
from megatron_specialm.train.loop import Diverged, Training, is_capped, train
from megatron_specialm.train.progress import TrainingState
from megatron_specialm.train.work import Work

logger = logging.getLogger(__name__)


def run(stage: TrainStage, context: Context) -> Report:
    """Train one model; the result is the step that `result.json` in the task's folder names. With several learning rates,
    continue the best of their trials."""
    context.process_status.begin("starting")
    world, trial, choice = context.world, context.task.rate, None
    if trial is not None:
        stage = trial_of(stage, trial)
    elif len(stage.optimizer.rates) > 1:
        choice = choose_rate(stage, context)
        stage = at_rate(stage, choice.rate)
    reading = open_training_data(stage, context)
    settings, store = reading.settings, reading.store
    shape = model_of(context.pipeline, context.task.id.stage)
    setup = setup_of(context.pipeline, context.task.id.stage)
    # The tokenizer's vocabulary size: an imported tokenizer may differ from the config.
    setup = replace(setup, vocabulary_size=store.vocabulary_size, context_length=store.context_length)
    lost = Work.read(context.folder)
    if stage.data == "cluster" and trial is None and world.is_first:
        _write_centroid(stage, context)
    seed = context.pipeline.seed_of_training
    opened = open_engine(
        setup,
        world,
        optimizer=settings.optimizer,
        initialize=lambda model: model.initialize(seed=seed),
        objective=_objective(stage, context),
        teacher_weights=_teacher_weights(stage, context) if setup.teacher is not None else None,
        threads=context.threads,
    )
    with context.process_status.at_step_boundaries(), opened as engine:
        if stage.init is not None:
            engine.load(_first_weights(stage, context, shape, vocabulary_size=store.vocabulary_size), None)
        rank, copies = engine.data_rank, engine.data_parallel
        control = ControlGroup.open()
        if choice is not None:
            tried = context.artifact(context.task.id.stage, trial_key(context.key, choice.rate))
            control.broadcast(lambda: adopt_checkpoints(tried, context.folder))
        earlier = control.broadcast(lambda: go_on_from_earlier(stage, reading, context))
        before = earlier.counted if earlier else choice.counted if choice else Spent()

        def validation() -> Iterator[Batch]:
            assert reading.held_out is not None, "only early stopping validates"
            return reading.held_out.batches(batch_size=stage.micro_batch_size, rank=rank, processes=copies)

        def account(progress: TrainingState, work: Work) -> dict[str, Any]:
            own, processes = _own(progress, before), world.world_size
            cost = Cost(
                own.tokens, setup.flops(work.passes), work.seconds, work.seconds * processes, name_of_device(), processes,
                own.slots,
            )  # fmt: skip
            return {"spent": asdict(cost.plus(earlier.cost) if earlier else cost)}

        logger.info(engine.kernels())
        training = Training(
            folder=context.folder,
            settings=settings,
            batches=TrainingBatches(
                reading.windows, reading.stream, rank=rank, processes=copies, extra_inputs=reading.extra_inputs
            ),
            validation=validation,
            description=_description(stage, context, shape, store),
            step_flops=setup.step_flops_of,
            processes=world.world_size,
            control=control,
            saver=Saver(context.folder, ControlGroup.open()),
            account=account,
            process_status=context.process_status,
            watch=context.watch,
        )
        try:
            progress = train(engine, training)
        except Diverged as diverged:
            if trial is None:
                raise
            logger.warning("learning rate %r is excluded from the selection: %s", trial, diverged)
            progress = replace(diverged.progress, best_step=None, best_loss=None)
            if control.is_first:
                remove_unusable(context.folder, saved_steps(context.folder), last=progress.step)
    capped = is_capped(progress, settings)
    if capped and world.is_first and progress.best_step is not None:
        ended = Capped(context.key, progress.step, progress.best_step)
        logger.warning("%s", capped_warning(context.task.id.stage, stage, [ended]))
    # Not from the record: a fenced attempt at this task, with an older fencing token, may still write there.
    passes = lost.passes.plus(engine.passes)
    read = reading.stream.report(max(progress.step, 1))
    own = _own(progress, before)
    return Report(
        tokens=own.tokens,
        slots=own.slots,
        flops=setup.flops(passes),
        lost_seconds=lost.seconds,
        earlier=earlier.cost if earlier else None,
        values={
            "steps": progress.step,
            "best_step": progress.best_step,
            "validation_loss": progress.best_loss,
            "capped": capped,
            "learning_rate": settings.optimizer.peak,
            **(choice.values if choice else {}),
            **({"earlier": {"artifact": earlier.artifact, "step": earlier.step}} if earlier else {}),
            "skipped_steps": progress.skipped_steps,
            "spikes": progress.spikes,
            "passes": passes._asdict(),
            "parameters": count_parameters(shape.base_config, store.vocabulary_size),
            "trained_parameters": count_trained_parameters(shape, store.vocabulary_size),
            "effective_sample_size": float(read.effective_sample_size),
            "max_repeats": float(read.max_repeats),
        },
    )


def _own(progress: TrainingState, before: Spent) -> Spent:
    """The tokens and slots of this task's own steps. `before`: those of adopted steps, which the cost of a trial or of an
    earlier training includes."""
    return Spent(progress.tokens - before.tokens, progress.slots - before.slots)


def _description(stage: TrainStage, context: Context, shape: ModelConfig, store: TokenStore) -> dict[str, Any]:
    """The description that is written into every checkpoint."""
    return {
        "model": shape.model_dump(mode="json"),
        "vocabulary_size": store.vocabulary_size,
        "context_length": store.context_length,
        "tokenizer": store.tokenizer,
        "learning_rate": stage.optimizer.peak,
        "seed": context.pipeline.seed,
        "training_seed": context.pipeline.seed_of_training,
        "layout": stage.parallel.model_dump(mode="json"),
        "parity": _certificate(stage, context),
        "versions": {"megatron_specialm": megatron_specialm.__version__, "torch": torch.__version__},
    }


@dataclass(frozen=True)
class _Certificate:
    """The values that are compared of a certificate; see `parity/compare.py`."""

    layout: dict[str, Any]
    precision: str
    versions: dict[str, str | None]
    packing: Packing = "none"  # of certificates of earlier versions


def _certificate(stage: TrainStage, context: Context) -> dict[str, Any] | None:
    """The certificate that `specialm parity` wrote for this layout with the installed versions, if there is one."""
    path = context.root / "parity" / f"{context.task.id.stage}.json"
    if not path.exists():
        return None
    remedy = "remove it, or run `specialm parity` again"
    found, certificate = read_json(path, dict[str, Any], remedy=remedy), read_json(path, _Certificate, remedy=remedy)
    layout = {"engine": "megatron", **certificate.layout}  # certificates of earlier versions have no engine
    packing = setup_of(context.pipeline, context.task.id.stage).packing
    same = layout == stage.parallel.model_dump(mode="json") and certificate.precision == stage.precision
    same &= certificate.packing == packing
    current = certificate.versions.get("torch") == importlib.metadata.version("torch")
    if not (same and current):
        logger.warning("%s is of another layout, precision, packing or version: run `specialm parity` again", path)
        return None
    return found


def _write_centroid(stage: TrainStage, context: Context) -> None:
    """Write the cluster's centroid (E,) beside its expert: a mixture is a folder of experts with their centroids."""
    assign = assign_stage(context.pipeline, stage.clustering or "")
    k = cluster_count(context.pipeline, stage.clustering or "")
    centroids = read_centroids(context.artifact(assign.clusters, GENERIC), k=k)
    write_array(context.folder / CENTROID, centroids[cluster_of(context.model_key)])


def _objective(stage: TrainStage, context: Context) -> Objective:
    if (distill := stage.distill) is None:
        return cross_entropy
    kind: Teacher = "online"
    if distill.cache is not None:
        kind = stage_of(context.pipeline, distill.cache, TeachStage).keep
    return Distillation(alpha=distill.alpha, temperature=distill.temperature, teacher=kind)


def _first_weights(
    stage: TrainStage, context: Context, shape: ModelConfig, *, vocabulary_size: int
) -> Mapping[str, Sliceable]:
    """The weights of the model of `init`, with first values of what it lacks; or those of an MoE made of its models."""
    models = first_models(context.pipeline, stage, context.model_key)
    start = [read_merged(find_final(context.artifact(*model))).weights for model in models]
    seed = context.pipeline.seed_of_training
    if stage.upcycle is not None:
        return upcycled(start, shape, vocabulary_size=vocabulary_size, seed=seed)
    return {**first_adapters(shape, vocabulary_size=vocabulary_size, seed=seed), **start[0]}


def _teacher_weights(stage: TrainStage, context: Context) -> Mapping[str, torch.Tensor]:
    """The weights of a teacher that runs beside the student."""
    assert stage.distill is not None
    return read_merged(find_final(_model_folder(stage.distill.teacher, context))).weights


def _model_folder(stage: str, context: Context) -> Path:
    return context.artifact(stage, key_for(context.pipeline, stage, context.model_key))
