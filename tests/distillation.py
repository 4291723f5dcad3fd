"""One process's part of a distillation that tests compare between layouts: parity's training, with a teacher.

The cache is beside the run's folder, whose processes all read it; the case's batches are windows of a store in their order.
"""

from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from megatron_specialm.base.environment import World
from megatron_specialm.base.files import write_json
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import StoreWriter, TokenStore, describe_store
from megatron_specialm.data.teacher import CacheFormat, CacheWriter, TeacherCache
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.weights import OUTPUT_LAYER
from megatron_specialm.parity.case import ParityCase
from megatron_specialm.train import distillation
from megatron_specialm.train.distillation import Distillation, Teacher
from megatron_specialm.train.teaching import teach

TEMPERATURE, COUNT, WINDOWS, HELD_OUT = 2.0, 6, 40, 16
# Another family, size and number of layers than the student's. Tied embeddings would say again what was read.
TEACHER = ModelConfig(
    family="llama",
    layers=3,
    hidden_size=96,
    ffn_hidden_size=128,
    attention_heads=8,
    query_groups=4,
    tie_embeddings=False,
)
TEACHER_OF_EXPERTS = TEACHER.model_copy(update={"moe": MixtureOfExperts(experts=4, every=2)})


def _model(shape: ModelConfig, case: ParityCase, *, seed: int, parallel: ParallelConfig) -> Gpt:
    model = Gpt(
        shape,
        vocabulary_size=case.vocabulary_size,
        context_length=case.context_length,
        precision=case.precision,
        parallel=parallel,
    )
    model.initialize(seed=seed)
    return model


def _teacher(case: ParityCase, parallel: ParallelConfig, shape: ModelConfig = TEACHER) -> Gpt:
    """First weights make distributions nearly uniform: these are sharper, with logits that differ by 4 or so."""
    model = _model(shape, case, seed=1, parallel=parallel)
    for weight in model.weights():
        if weight.name == OUTPUT_LAYER:
            weight.parameter.data *= 20
    return model


def prepare(case: ParityCase, folder: Path) -> None:
    """Windows of uneven length, and a cache of each kind; in a process group of one."""
    generator = np.random.default_rng(0)
    (folder / "tokens").mkdir()
    size, context = case.vocabulary_size, case.context_length
    writer = StoreWriter(folder / "tokens", "train", context_length=context, vocabulary_size=size)
    for length in generator.integers(1, context, WINDOWS):
        writer.add_document(np.append(generator.integers(1, size, length), 0))
    describe_store(
        folder / "tokens", splits={"train": writer.finish()}, tokenizer="a" * 64, context_length=context,
        vocabulary_size=size, eod=0,
    )  # fmt: skip
    store, teacher = TokenStore.open(folder / "tokens", "train"), _teacher(case, ParallelConfig())
    for kept in (
        CacheFormat("exact", size, TEMPERATURE),
        CacheFormat("top-k", size, TEMPERATURE, COUNT),
        CacheFormat("sampled", size, TEMPERATURE, COUNT),
    ):
        cache = CacheWriter(folder / kept.kind, kept, context_length=context, teacher="t", store="s")
        teach(teacher, store, cache, batch_size=7)


def _measure(kind: Teacher, case: ParityCase, world: World, folder: Path, *, teacher: ModelConfig = TEACHER) -> None:
    store = TokenStore.open(folder.parent / "tokens", "train")
    with process_group(world, parallel=case.parallel):
        engine = MegatronEngine(
            _model(case.model, case, seed=0, parallel=case.parallel),
            parallel=case.parallel,
            optimizer=Optimizer(learning_rate=case.learning_rate, clip_grad=case.clip_grad, epsilon=case.epsilon),
            micro_batch_size=case.micro_batch_size,
            packing=case.packing,
            objective=Distillation(alpha=0.6, temperature=TEMPERATURE, teacher=kind),
            teacher=_teacher(case, case.parallel, teacher) if kind == "online" else None,
        )
        rank, copies = engine.data_rank, engine.data_parallel
        losses, norms, tensors, squares = [], [], {}, {}
        for step in range(case.steps):
            ids = np.random.default_rng(step).choice(WINDOWS, case.global_batch_size, replace=False)
            ids = np.split(ids, copies)[rank]
            batch = store.batch(ids)
            if kind != "online":
                cache = TeacherCache.open(folder.parent / kind, teacher="t", store="s")
                batch = batch._replace(extra_inputs=cache.extra_inputs(ids))
            loss = engine.accumulate_gradients(batch)
            if step == 0:
                tensors = {f"gradients/{name}": tensor for name, tensor in engine.gradients().items()}
            stats = engine.apply_gradients(loss, learning_rate=case.learning_rate)
            if step == 0:
                squares = engine.norm_squares()
            losses.append(loss.mean)
            norms.append(stats.gradient_norm)
        held_out = engine.evaluate([store.batch(np.arange(HELD_OUT)[rank::copies])]).mean
        tensors |= {f"weights/{name}": tensor for name, tensor in engine.weights().items()}
    save_file(tensors, folder / f"tensors-{world.rank}.safetensors")
    numbers = {"loss": losses, "gradient_norm": norms, "validation_loss": held_out, "squares": squares, "gates": {}}
    write_json(folder / f"numbers-{world.rank}.json", numbers)


online = partial(_measure, "online")
online_of_experts = partial(_measure, "online", teacher=TEACHER_OF_EXPERTS)
exact = partial(_measure, "exact")
top_k = partial(_measure, "top-k")
sampled = partial(_measure, "sampled")


def online_with_own_columns_only(case: ParityCase, world: World, folder: Path) -> None:
    """A fault: each process takes its columns of the vocabulary for all of it."""
    distillation._reduce = lambda tensor, *_: tensor
    online(case, world, folder)
