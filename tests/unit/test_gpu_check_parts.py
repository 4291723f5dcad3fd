"""What tools/gpu_check.sh rests on: figures, tests that end their process, batches that the memory does not hold."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.errors import MachineError
from tests.conftest import ROOT

TOOLS = str(ROOT / "tools")


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{TOOLS}")


def test_a_measurement_that_fails_becomes_a_figure() -> None:
    from gpu_check.figures import Figure, attempt

    def fails():
        yield Figure("first", 1.0)
        raise RuntimeError("the kernel\nand a stack")

    def lacks():
        yield Figure("first", 1.0)
        raise MachineError("no GPU")

    first, failure = attempt("second", fails())
    assert first == Figure("first", 1.0)
    assert failure == Figure("second", "failed: RuntimeError: the kernel", good=False)
    with pytest.raises(MachineError):
        list(attempt("second", lacks()))


def test_what_is_not_a_number_is_not_as_expected() -> None:
    from gpu_check.figures import at_most, between

    assert at_most("x", 1.0, 1.0).good is True
    assert at_most("x", float("nan"), 1.0).good is False
    assert between("x", float("nan"), 0.0, 1.0).good is False
    assert at_most("x", 2.0, 1.0, judged=False).good is None


def test_batches_are_halved_until_the_memory_holds_them() -> None:
    from gpu_check.training import with_smaller_batches

    tried = []

    def measure(size: int) -> str:
        tried.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "fits"

    assert with_smaller_batches(measure, 16) == ("fits", 4)
    assert tried == [16, 8, 4]
    with pytest.raises(torch.OutOfMemoryError):
        with_smaller_batches(lambda size: measure(size + 4), 2)


def test_a_test_that_ends_its_process_costs_only_itself(tmp_path: Path) -> None:
    from gpu_check.suite import run

    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_first(): pass\n"
        "def test_dies(): os._exit(7)\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_is_skipped(): pytest.skip('no tensor cores')\n"
        "def test_last(): pass\n"
    )
    figures = {figure.name: figure for figure in run(tiny=True, tests=tmp_path)}
    assert {name: figure.good for name, figure in figures.items()} == {
        "test_first": True, "test_dies": False, "test_fails": False, "test_is_skipped": None, "test_last": True,
    }  # fmt: skip
    assert figures["test_dies"].value == "failed: ended the process (7)"
    assert "assert 1 == 2" in figures["test_fails"].value
    assert figures["test_is_skipped"].value == "skipped: no tensor cores"


def test_a_test_that_hangs_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_check import suite

    monkeypatch.setattr(suite, "TEST_SECONDS", 2.0)
    (tmp_path / "test_some.py").write_text(
        "import pytest, signal, time\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_hangs():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(1000)\n"
        "def test_last(): pass\n"
    )
    hanging, last = suite.run(tiny=True, tests=tmp_path)
    assert hanging.value == "failed: hung for 2 s"
    assert last.value == "passed"
    assert sys.modules["gpu_check.suite"] is suite
