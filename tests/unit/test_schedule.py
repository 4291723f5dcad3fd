import itertools

import pytest

from megatron_specialm.base.throughput import dense_peak, utilisation
from megatron_specialm.config.training import Schedule
from megatron_specialm.train.schedule import learning_rate


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


def test_utilisation_is_against_the_dense_peak_and_unknown_devices_say_unknown() -> None:
    assert dense_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert utilisation(flops=989e12, seconds=2.0, devices=1, device_name="NVIDIA H200") == pytest.approx(0.5)
    assert utilisation(flops=1.0, seconds=1.0, devices=1, device_name="cpu") is None
