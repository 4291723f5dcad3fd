"""Training: pretraining and specialization, for everybody or for one domain. What differs is data and first weights."""

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_specialm
from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import DataError
from megatron_specialm.base.files import read_json
from megatron_specialm.config.graph import model_of, train_keys
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import GENERIC, TokenizeStage, TrainStage
from megatron_specialm.data.batches import TrainingBatches, evaluation_batches
from megatron_specialm.data.sampling import ClusterIndex, ImportanceStream, importance_weights
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.stages.context import Context
from megatron_specialm.train.checkpoint import Saver, find_final, read_model
from megatron_specialm.train.distributed import data_rank, device_name, process_group
from megatron_specialm.train.loop import Run, train
from megatron_specialm.train.megatron_engine import MegatronEngine
from megatron_specialm.train.metrics import read_metrics, seconds_of_all_attempts
from megatron_specialm.train.peers import Peers

logger = logging.getLogger(__name__)


def run(stage: TrainStage, context: Context) -> Report:
    """Train one model; the outcome is the step that `result.json` in the task's folder names."""
    pipeline, world = context.pipeline, context.world
    tokens = _tokens_folder(stage, context)
    tokenizer = _tokenizer(stage, context)
    store = TokenStore.open(tokens, "train", tokenizer=tokenizer.fingerprint)
    stream = _stream(stage, context, store)
    shape = model_of(pipeline, context.task.id.stage)
    flops_per_step = (
        stage.global_batch_size
        * store.context_length
        * shape.training_flops(store.vocabulary_size, store.context_length)
    )
    with process_group(world, parallel=stage.parallel, threads=context.threads):
        rank, copies = data_rank()
        engine = _engine(stage, context, shape, store)
        logger.info(engine.kernels())
        progress = train(
            engine,
            Run(
                folder=context.folder,
                settings=stage,
                batches=TrainingBatches(store, stream, rank=rank, processes=copies),
                validation=lambda: evaluation_batches(
                    TokenStore.open(tokens, "validation"),
                    batch_size=stage.micro_batch_size,
                    rank=rank,
                    processes=copies,
                ),
                description={
                    "model": shape.model_dump(mode="json"),
                    "vocabulary_size": store.vocabulary_size,
                    "context_length": store.context_length,
                    "tokenizer": tokenizer.fingerprint,
                    "seed": pipeline.seed,
                    "layout": stage.parallel.model_dump(mode="json"),
                    "parity": _certificate(stage, context),
                    "versions": {"megatron_specialm": megatron_specialm.__version__, "torch": torch.__version__},
                },
                flops_per_step=flops_per_step,
                device_name=device_name(world),
                processes=world.world_size,
                peers=Peers.meet(),
                saver=Saver(context.folder, Peers.meet()),
            ),
        )
    records = read_metrics(context.folder) if world.is_first else []
    return Report(
        tokens=progress.tokens,
        flops=flops_per_step * progress.step,
        wall_seconds=seconds_of_all_attempts(records) if records else None,
        values={
            "steps": progress.step,
            "best_step": progress.best_step,
            "validation_loss": progress.best_loss,
            "skipped_steps": progress.skipped_steps,
            "spikes": progress.spikes,
            "parameters": shape.parameters(store.vocabulary_size),
            "effective_sample_size": float(stream.report(progress.step).effective_sample_size),
            "max_repeats": float(stream.report(progress.step).max_repeats),
        },
    )


def _certificate(stage: TrainStage, context: Context) -> dict[str, Any] | None:
    """What `specialm parity` has found of this layout, if it was asked, with this code's versions."""
    path = context.root / "parity" / f"{context.task.id.stage}.json"
    if not path.exists():
        return None
    found = read_json(path)
    same = found["layout"] == stage.parallel.model_dump(mode="json") and found["precision"] == stage.precision
    current = found["versions"]["torch"] == importlib.metadata.version("torch")
    if not (same and current):
        logger.warning("%s is of another layout or version: run `specialm parity` again", path)
        return None
    return found


def _tokens_folder(stage: TrainStage, context: Context) -> Path:
    return context.artifact(stage.tokens, context.key if stage.data == "domain" else GENERIC)


def _tokenizer(stage: TrainStage, context: Context) -> Tokenizer:
    tokenize = context.pipeline.stages[stage.tokens]
    assert isinstance(tokenize, TokenizeStage)
    return Tokenizer.load(context.artifact(tokenize.tokenizer, GENERIC))


def _stream(stage: TrainStage, context: Context, store: TokenStore) -> ImportanceStream:
    """The order of reading the corpus: plain, or its clusters weighted by the domain's histogram (SLM-is)."""
    if len(store) < stage.global_batch_size:
        raise DataError(
            f"{store.folder}: {len(store)} training windows are fewer than one batch: lower "
            f"stages.{context.task.id.stage}.global_batch_size (now {stage.global_batch_size}) or add text"
        )
    index, weights = ClusterIndex.single(len(store)), np.ones(1)
    if stage.assignment is not None:
        generic = context.artifact(stage.assignment, GENERIC)
        target = np.load(context.artifact(stage.assignment, context.key) / "histogram.npy", allow_pickle=False)
        index = ClusterIndex(
            np.load(generic / "order.npy", mmap_mode="r", allow_pickle=False),
            np.load(generic / "offsets.npy", allow_pickle=False),
        )
        weights, lost = importance_weights(target, index.sizes)
        if lost:
            logger.warning("%.2f%% of %s lies in clusters that the generic set does not have", 100 * lost, context.key)
    stream = ImportanceStream(index, weights, global_batch_size=stage.global_batch_size, seed=context.pipeline.seed)
    for warning in stream.report(stage.steps).warnings:
        logger.warning("%s", warning)
    return stream


def _engine(stage: TrainStage, context: Context, shape: ModelConfig, store: TokenStore) -> MegatronEngine:
    model = Gpt(
        shape,
        vocabulary_size=store.vocabulary_size,
        context_length=store.context_length,
        precision=stage.precision,
        fp8=stage.fp8,
        parallel=stage.parallel,
    )
    model.initialize(seed=context.pipeline.seed)
    engine = MegatronEngine(
        model, parallel=stage.parallel, optimizer=stage.optimizer, micro_batch_size=stage.micro_batch_size
    )
    if stage.init is not None:
        key = context.key if context.key in train_keys(context.pipeline, stage.init) else GENERIC
        engine.load(read_model(find_final(context.artifact(stage.init, key))), None)
    return engine
