"""One process's part of a parity run: train the case, and write down what is compared.

tensors-RANK.safetensors    gradients/WEIGHT (first step), weights/WEIGHT (after the last)
numbers-RANK.json           loss and gradient_norm per step; per weight, the squares that entered the norm
"""

from pathlib import Path

import numpy as np
import torch

from megatron_specialm.base.environment import World
from megatron_specialm.base.files import write_json
from megatron_specialm.base.tensors import save_tensors
from megatron_specialm.config.training import Adam
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.open import open_engine
from megatron_specialm.engine.protocol import Engine
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.initial import first_weight
from megatron_specialm.parity.case import ParityCase


def measure(case: ParityCase, world: World, folder: Path) -> None:
    """Train `case` with the other processes of `world`."""
    optimizer = Adam(clip_grad=case.clip_grad, epsilon=case.epsilon, weight_decay=0.1)
    with open_engine(case.setup, world, optimizer=optimizer, initialize=_initialize) as engine:
        losses, norms, tensors, squares = [], [], {}, {}
        for step in range(case.steps):
            loss = engine.accumulate_gradients(_own_rows(engine, _batch(case, step)))
            if step == 0:
                tensors = {f"gradients/{name}": tensor for name, tensor in engine.gradients().items()}
            stats = engine.apply_gradients(loss, learning_rate=case.learning_rate)
            if step == 0:
                squares = engine.norm_squares()
            losses.append(loss.mean)
            norms.append(stats.gradient_norm)
        gates = {
            f"layer {layer.layer}": [layer.aux_loss, layer.z_loss, *layer.load] for layer in engine.gate_statistics()
        }
        held_out = engine.evaluate([_own_rows(engine, _batch(case, case.steps))]).mean
        tensors |= {f"weights/{name}": tensor for name, tensor in engine.weights().items()}
    save_tensors(tensors, folder / f"tensors-{world.rank}.safetensors")
    numbers = {"loss": losses, "gradient_norm": norms, "validation_loss": held_out, "squares": squares, "gates": gates}
    write_json(folder / f"numbers-{world.rank}.json", numbers)


def _initialize(model: Gpt) -> None:
    """First weights as of a training, but random ones instead of zeros: where a bias or LoRA's B is zero, the gradient of what
    it is multiplied with is zero too, and an error in it would not show."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, spec in model.specs.items():
        first = first_weight(name, spec, model.config, seed=0)[...]
        weights[name] = first if first.any() else 0.02 * torch.randn(spec.shape, generator=generator)
    model.load(weights)


def _batch(case: ParityCase, step: int) -> Batch:
    """Random windows of uneven length: copies and micro-batches hold different numbers of tokens."""
    generator = np.random.default_rng(step)
    rows, positions = case.global_batch_size, case.context_length
    windows = generator.integers(0, case.vocabulary_size, (rows, positions + 1))
    lengths = generator.integers(1, positions + 1, rows)
    mask = (np.arange(positions) < lengths[:, None]).astype(np.float32)
    extra_inputs = {} if case.model.window_experts is None else {MIXTURE: _mixtures(case, generator)}
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), mask, extra_inputs)


def _mixtures(case: ParityCase, generator: np.random.Generator) -> np.ndarray:
    """Groups of windows of single experts and of mixtures in turns, some of them used twice. For an MoE that routes by cluster,
    windows of single experts."""
    experts = case.model.window_experts
    assert experts is not None
    if case.model.projection is None:
        return np.eye(experts, dtype=np.float32)[generator.integers(0, experts, case.global_batch_size)]
    groups = case.global_batch_size // case.windows_per_expert
    one_hot = np.eye(experts)[generator.integers(0, experts, groups)]
    mixed = generator.dirichlet(np.ones(experts), groups)
    chosen = np.where(np.arange(groups)[:, None] % 2, mixed, one_hot)
    return np.repeat(chosen, case.windows_per_expert, axis=0).astype(np.float32)


def _own_rows(engine: Engine, batch: Batch) -> Batch:
    """The rows of a global batch that this process's copy of the model trains on."""
    count = len(batch.tokens) // engine.data_parallel
    return batch.rows(slice(engine.data_rank * count, (engine.data_rank + 1) * count))
