import itertools

import pytest

from megatron_specialm.base.gpus import GPUS, dense_peak, utilisation
from megatron_specialm.config.schedule import decay_start, learning_rate, step_to_keep, steps_at_same_rates
from megatron_specialm.config.training import Schedule
from tests.training import stage


def _rates(steps: int = 100, **settings) -> list[float]:
    schedule = Schedule(**settings)
    return [learning_rate(step, peak=1.0, steps=steps, schedule=schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    rates = _rates(kind=kind, warmup_steps=10)
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_constant_stays() -> None:
    assert set(_rates(warmup_steps=0)) == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_decay_is_monotone_and_ends_at_the_final_fraction(kind: str) -> None:
    rates = _rates(kind=kind, warmup_steps=10, final_fraction=0.1)
    assert rates[-1] == pytest.approx(0.1)
    assert all(after <= before for before, after in itertools.pairwise(rates[10:]))


def test_wsd_is_stable_until_its_decay() -> None:
    rates = _rates(kind="wsd", warmup_steps=10, decay_fraction=0.2)
    assert set(rates[10:80]) == {1.0} and rates[80] < 1.0


@pytest.mark.parametrize(
    ("short", "long", "same"),
    [
        ({}, {}, 40),  # a constant rate: all steps of the shorter one
        ({"kind": "wsd"}, {"kind": "wsd"}, 32),  # until the shorter one's decay
        ({"kind": "wsd", "warmup_steps": 36}, {"kind": "wsd", "warmup_steps": 36}, 36),
        ({"kind": "wsd", "decay_fraction": 1.0}, {"kind": "wsd", "decay_fraction": 1.0}, 0),
        ({"kind": "wsd", "final_fraction": 1.0}, {"kind": "wsd"}, 40),  # the longer one's decay begins at 48
        ({"kind": "cosine", "warmup_steps": 5}, {"kind": "cosine", "warmup_steps": 5}, 5),
        ({"kind": "cosine", "final_fraction": 1.0}, {"kind": "cosine", "final_fraction": 1.0}, 40),
        ({}, {"kind": "wsd"}, 40),  # what was constant so far may decay
        ({"warmup_steps": 3}, {"warmup_steps": 4}, 0),
    ],
)
def test_how_far_the_rates_of_two_lengths_are_the_same(short: dict, long: dict, same: int) -> None:
    one, other = (
        stage(steps=steps, schedule={"warmup_steps": 0, **schedule}) for steps, schedule in ((40, short), (60, long))
    )
    assert steps_at_same_rates(one, other, most=40) == steps_at_same_rates(other, one, most=40) == same
    assert steps_at_same_rates(one, other, most=10) == min(same, 10)


@pytest.mark.parametrize(("kind", "kept"), [("constant", None), ("cosine", None), ("wsd", 80)])
def test_the_checkpoint_before_a_decay_is_kept(kind: str, kept: int | None) -> None:
    settings = stage(steps=100, schedule={"kind": kind, "warmup_steps": 10})
    assert step_to_keep(settings) == kept
    assert kept is None or settings.optimizer.peak > learning_rate(
        kept, peak=settings.optimizer.peak, steps=100, schedule=settings.schedule
    )
    whole = Schedule(kind="wsd", warmup_steps=0, decay_fraction=1.0)
    assert decay_start(steps=100, schedule=whole) == 0
    assert step_to_keep(stage(schedule=whole)) is None, "the first weights need no checkpoint"


def test_utilisation_is_against_the_dense_peak_and_unknown_devices_say_unknown() -> None:
    assert dense_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert utilisation(flops=989e12, seconds=2.0, devices=1, device_name="NVIDIA H200") == pytest.approx(0.5)
    assert utilisation(flops=1.0, seconds=1.0, devices=1, device_name="cpu") is None


def test_a_device_is_of_one_model_of_the_table() -> None:
    for gpu in GPUS:
        assert dense_peak(f"NVIDIA {gpu.name}") == gpu.dense_peak
    for first, later in itertools.combinations(GPUS, 2):
        assert first.name not in later.name, "the first one would be taken for the later"
    assert dense_peak("NVIDIA H100 PCIe") == 756e12 and dense_peak("NVIDIA GB200") == 2.5e15
