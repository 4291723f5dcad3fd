"""A fine-tuning of an expert goes on where it stood, from its pretrained weights and nothing else of its pretraining."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_specialm.checkpoint.merged import MergedModel, read_merged, read_trained, write_merged
from megatron_specialm.checkpoint.opening import open_checkpoint
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.config.model import ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.schema import Trial
from megatron_specialm.data.store import StoreWriter, TokenStore, describe_store
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.flops import forward_flops, training_flops
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.merge import one_hot
from megatron_specialm.train.selection import by_halving, halving_plan, trial_validations
from megatron_specialm.train.trials import Trials

SHAPE = ModelConfig(layers=1, hidden_size=16, ffn_hidden_size=32, attention_heads=2)
TRIAL = Trial.model_validate(
    {
        "steps": 6,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "evaluate_every": 2,
        "optimizer": {"learning_rate": 1e-2},
    }
)
SETUP = Setup(SHAPE, ParallelConfig(), "fp32", 40, 8, TRIAL.global_batch_size, TRIAL.micro_batch_size, packing="packed")
# As a checkpoint of its pretraining says: far on, and with a validation loss of its own.
PRETRAINED = {"progress": {"step": 500, "tokens": 1, "best_step": 400, "best_loss": 0.001}, "tokenizer": "t"}


def _store(folder: Path) -> TokenStore:
    folder.mkdir()
    splits = {}
    for split in ("train", "validation"):
        writer = StoreWriter(folder, split, context_length=8, vocabulary_size=40)
        for number in range(6):
            writer.add_document((np.arange(16) * (number + 1)) % 40)
        splits[split] = writer.finish()
    describe_store(folder, splits=splits, tokenizer="t", context_length=8, vocabulary_size=40, eod=0)
    return TokenStore.open(folder, "train")


def _expert(folder: Path, seed: int) -> MergedModel:
    """As it is read from the checkpoint of a training."""
    model = Gpt(SHAPE, vocabulary_size=40, context_length=8)
    model.initialize(seed=seed)
    state = {
        "model": SHAPE.model_dump(mode="json"),
        "vocabulary_size": 40,
        "context_length": 8,
        "tokenizer": "x",
        **PRETRAINED,
    }
    weights = {weight.name: weight.parameter.detach()[: weight.spec.shape[0]] for weight in model.weights()}
    step = save_checkpoint(folder, step=500, weights=weights, optimizer_state={}, state=state)
    return read_merged(step)


def _experts(folder: Path) -> dict[str, MergedModel]:
    with single_process():
        return {f"c{number}": _expert(folder / f"expert-{number}", number) for number in range(3)}


@pytest.fixture
def trials(tmp_path: Path) -> Iterator[dict[str, Trials]]:
    store, experts = _store(tmp_path / "tokens"), _experts(tmp_path)
    with single_process():
        yield {
            name: Trials(TRIAL, SETUP, store, experts.__getitem__, folder=tmp_path / name, seed=0)
            for name in ("at-once", "in-parts")
        }


def _weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder / f"step_{step:07d}").weights)


def test_steps_in_parts_are_the_same_steps(trials: dict[str, Trials], tmp_path: Path) -> None:
    loss = trials["at-once"].tune("c1", 6)
    first = trials["in-parts"].tune("c1", 2)
    assert trials["in-parts"].tune("c1", 6) == loss < first
    assert trials["in-parts"].tune("c1", 6) == loss  # and what is done is not done again
    once, parts = (_weights(tmp_path / name / "c1", 6) for name in ("at-once", "in-parts"))
    assert all(torch.equal(once[name], parts[name]) for name in once)


def test_halving_trains_in_every_round(trials: dict[str, Trials], tmp_path: Path) -> None:
    order = by_halving(["c0", "c1", "c2"], trials["in-parts"].tune, 6)
    steps = {
        key: max(int(path.name.removeprefix("step_")) for path in (tmp_path / "in-parts" / key).glob("step_*"))
        for key in ("c0", "c1", "c2")
    }
    assert steps[order[0]] == steps[order[1]] == 6 and steps[order[2]] == 3


def test_what_trials_cost_is_what_was_computed(trials: dict[str, Trials]) -> None:
    tried = trials["in-parts"]
    order = by_halving(["c0", "c1", "c2"], tried.tune, 6)
    # Three have 3 steps, two of them 3 more, of 4 windows; 12 validation windows before the first step, and at the steps
    # 2, 3, 4, 6 as far as an expert comes.
    trained, evaluated = (3 * 3 + 2 * 3) * 4 * 8, (3 * 3 + 2 * 2) * 12 * 8
    expected = trained * training_flops(SHAPE, 40, 8) + evaluated * forward_flops(SHAPE, 40, 8)
    assert tried.spent.flops == expected and tried.spent.slots == tried.spent.tokens == trained
    tried.tune(order[0], 6)  # what is done is not paid again
    assert tried.spent.flops == expected


def test_planned_validations_are_those_that_are_made(trials: dict[str, Trials]) -> None:
    by_halving(["c0", "c1", "c2"], trials["in-parts"].tune, 6)
    assert halving_plan(3, 6) == [(3, 0, 3), (2, 3, 6)]
    assert trial_validations(halving_plan(3, 6), every=2) == 3 * 3 + 2 * 2
    assert trial_validations([(3, 0, 6)], every=10) == 3 * 2


def test_an_expert_that_comes_to_nothing_is_out_of_the_choice(tmp_path: Path) -> None:
    store, experts = _store(tmp_path / "tokens"), _experts(tmp_path)
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in experts["c0"].weights.items()}
    experts["c0"] = MergedModel(experts["c0"].shape, broken, experts["c0"].state)
    tried = Trials(TRIAL, SETUP, store, experts.__getitem__, folder=tmp_path / "t", seed=0)
    with single_process():
        order = by_halving(["c0", "c1", "c2"], tried.tune, 6)
    assert order[-1] == "c0"


def test_a_served_model_is_written_and_read_as_it_is(tmp_path: Path, alone: None) -> None:
    model = _expert(tmp_path / "expert", 0)
    assert "progress" not in model.state
    write_merged(model, tmp_path / "out")
    again = read_merged(find_final(tmp_path / "out"))
    assert again.shape == model.shape and again.state == model.state
    assert all(torch.equal(again.weights[name], model.weights[name]) for name in model.weights)


def test_an_expert_of_a_network_is_served_with_its_own_weights_only(tmp_path: Path, alone: None) -> None:
    shape = SHAPE.model_copy(update={"projection": Projection(experts=3, capacity=2, code_size=4)})
    network = Gpt(shape, vocabulary_size=40, context_length=8)
    network.initialize(seed=0)
    weights = {weight.name: weight.parameter.detach()[: weight.spec.shape[0]] for weight in network.weights()}
    state = {"model": shape.model_dump(mode="json"), "vocabulary_size": 40, "context_length": 8, "tokenizer": "x"}
    step = save_checkpoint(tmp_path / "network", step=1, weights=weights, optimizer_state={}, state=state)
    served = read_trained(step).merged(one_hot(1, experts=3))
    assert served.shape == SHAPE
    served.build()  # every weight of the plain model, and no other
