import math
import os
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import Stopped, TrainingError
from megatron_specialm.base.files import publish_folder, read_json, verify_folder, write_json
from megatron_specialm.base.integrity import list_files
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.checkpoint.opening import newest_checkpoint, read_checkpoint
from megatron_specialm.checkpoint.steps import find_final, saved_steps, step_folder
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import TrainStage
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.objective import DeviceBatch, cross_entropy
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model import attention
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.loop import is_capped
from megatron_specialm.train.metrics import Metrics
from megatron_specialm.train.progress import TrainingState
from megatron_specialm.train.work import Work
from tests.training import CONTEXT, SHAPE, read_metrics, run_training, stage


def _final(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(find_final(folder)).weights


def test_training_learns_and_records(tmp_path: Path) -> None:
    progress = run_training(tmp_path, ALONE, stage(steps=40))
    losses = [record["loss"] for record in read_metrics(tmp_path) if "loss" in record]
    assert progress.step == 40 and len(losses) == 40
    assert losses[-1] < 0.85 * losses[0]
    assert newest_checkpoint(tmp_path) == (step_folder(tmp_path, 40), [])


@pytest.mark.parametrize(("packing", "losses"), [("none", (4, 8, 12)), ("packed", (8,))])
def test_resumed_from_any_checkpoint_it_ends_with_the_same_bits(
    tmp_path: Path, packing: str, losses: tuple[int, ...]
) -> None:
    run_training(tmp_path / "straight", ALONE, stage(packing=packing, checkpoint={"every": 4, "keep": 10}))
    for lost in losses:
        broken = tmp_path / f"broken{lost}"
        shutil.copytree(tmp_path / "straight", broken)
        (broken / "result.json").unlink()
        for step in range(lost, 13, 4):
            shutil.rmtree(broken / f"step_{step:07d}")
        run_training(broken, ALONE, stage(packing=packing))
        straight, resumed = _final(tmp_path / "straight"), _final(broken)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    settings = stage(steps=400, optimizer={"learning_rate": 3e-2}, early_stopping={"evaluate_every": 4, "patience": 2})
    progress = run_training(tmp_path, ALONE, settings, windows=8)
    losses = {r["step"]: r["validation_loss"] for r in read_metrics(tmp_path) if "validation_loss" in r}
    assert progress.step < 400, "eight windows must be learnt by heart long before"
    assert progress.best_step == min(losses, key=losses.get)
    assert progress.step == progress.best_step + 2 * 4
    assert find_final(tmp_path).name == f"step_{progress.best_step:07d}"


def test_a_poisoned_run_stops_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    calls = iter(range(10_000))

    def poisoned(logits: torch.Tensor, batch: DeviceBatch, **shard: Any) -> torch.Tensor:
        return cross_entropy(logits, batch, **shard) * (float("nan") if next(calls) >= 12 else 1.0)

    with pytest.raises(TrainingError, match=r"not finite for 3 steps.*step_0000008.*learning_rate"):
        run_training(tmp_path, ALONE, stage(max_skipped_steps=2), objective=poisoned)
    skipped = [record for record in read_metrics(tmp_path) if record.get("skipped_steps")]
    assert [record["loss"] for record in skipped] == [None] * 3


def test_wsd_keeps_the_step_before_its_decay_beside_the_last_ones(tmp_path: Path) -> None:
    settings = stage(steps=20, schedule={"kind": "wsd", "warmup_steps": 0}, checkpoint={"every": 7, "keep": 1})
    run_training(tmp_path, ALONE, settings)
    assert saved_steps(tmp_path) == [16, 20]


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_best_step_that_is_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    def trained() -> TrainingState:
        _with_validations(monkeypatch, [3.0, 1.0, 2.0, 2.0, 2.0])
        return run_training(tmp_path, ALONE, stage(steps=100, **EARLY))

    progress, best = trained(), step_folder(tmp_path, 4)
    assert (progress.best_step, progress.step, find_final(tmp_path)) == (4, 16, best)
    files, weights = list_files(tmp_path), {name: tensor.clone() for name, tensor in _final(tmp_path).items()}
    if is_gone:
        shutil.rmtree(best)
    else:
        _flip(best / "model-00000.safetensors")
    assert newest_checkpoint(tmp_path)[0] is None, "every later step would end with the damaged one"
    assert trained() == progress and find_final(tmp_path) == best
    assert all(torch.equal(weights[name], tensor) for name, tensor in _final(tmp_path).items())
    assert list_files(tmp_path).keys() == files.keys()
    verify_folder(best)


def test_a_finished_training_holds_no_damaged_step(tmp_path: Path) -> None:
    settings = stage(checkpoint={"every": 4, "keep": 2})
    run_training(tmp_path, ALONE, settings)
    _flip(step_folder(tmp_path, 8) / "model-00000.safetensors")
    run_training(tmp_path, ALONE, settings)
    assert saved_steps(tmp_path) == [12]
    for step in (14, 16):  # as where a training that reads other numbers on other devices has ended later
        shutil.copytree(step_folder(tmp_path, 12), step_folder(tmp_path, step))
    run_training(tmp_path, ALONE, settings)
    assert saved_steps(tmp_path) == [12]


def test_damage_to_the_newest_steps_costs_no_step_that_is_saved_then(tmp_path: Path) -> None:
    def checkpoints(steps: int) -> TrainStage:
        return stage(steps=steps, checkpoint={"every": 4, "keep": 2})

    run_training(tmp_path, ALONE, checkpoints(24))
    for step in (20, 24):
        _flip(step_folder(tmp_path, step) / "state.json")
    run_training(tmp_path, ALONE, checkpoints(12))
    assert newest_checkpoint(tmp_path) == (step_folder(tmp_path, 12), [])


EARLY: dict[str, Any] = {"early_stopping": {"evaluate_every": 4, "patience": 3}}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path: Path, bad: float) -> None:
    progress = TrainingState().evaluated(bad)
    assert (progress.best_step, progress.evaluations_without_gain) == (None, 1)
    progress = replace(progress, step=4).evaluated(2.0)
    assert (progress.best_step, progress.best_loss, progress.evaluations_without_gain) == (4, 2.0, 0)
    assert replace(progress, step=8).evaluated(bad).best_step == 4


def _with_validations(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """The first validations' losses, given; those behind them as they are."""
    real, given = MegatronEngine.evaluate, iter(losses)

    def evaluate(engine: MegatronEngine, batches: Iterable[Batch]) -> LossSum:
        found = real(engine, batches)
        return LossSum(next(given, found.mean) * found.tokens, found.tokens)

    monkeypatch.setattr(MegatronEngine, "evaluate", evaluate)


def test_a_first_validation_of_nan_is_no_candidate_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_validations(monkeypatch, [math.nan])
    progress = run_training(tmp_path, ALONE, stage(**EARLY))
    assert progress.best_step in (4, 8, 12) and progress.evaluations == 4
    assert find_final(tmp_path).name == f"step_{progress.best_step:07d}"
    records = [r for r in read_metrics(tmp_path) if r.get("event") == "validation"]
    assert [r["step"] for r in records] == [0, 4, 8, 12] and records[0]["validation_loss"] is None
    broken = tmp_path / "broken"
    _with_validations(monkeypatch, [math.nan])
    _stopped_at(broken, 2, **EARLY)
    assert run_training(broken, ALONE, stage(**EARLY)) == progress


def test_without_a_finite_validation_a_training_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_validations(monkeypatch, [math.nan] * 9)
    for _ in range(2):  # and again, where it is started again
        with pytest.raises(
            TrainingError, match=r"none of 3 validations up to step 8 .*finite.*learning_rate \(now 0.01\)"
        ):
            run_training(tmp_path, ALONE, stage(**EARLY))
    assert not (tmp_path / "result.json").exists()


# --- what ended it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "without_gain", "settings", "capped"),
    [
        (12, 0, {"data": "domain", **EARLY}, True),  # the last is the best
        (12, 2, {"data": "domain", **EARLY}, True),  # the best came before, and another might still come
        (12, 3, {"data": "domain", **EARLY}, False),  # patience ran out at the cap's own step
        (8, 3, {"data": "domain", **EARLY}, False),
        (12, 0, {"data": "domain"}, None),  # a fixed number of steps is what was wanted
        (12, 0, {"data": "generic", **EARLY}, None),
        (8, 0, {"data": "domain", **EARLY}, None),  # a trial, ended before
    ],
)
def test_what_ended_a_fine_tuning(step: int, without_gain: int, settings: dict[str, Any], capped: bool | None) -> None:
    progress = TrainingState(step=step, best_step=step - 4 * without_gain, evaluations_without_gain=without_gain)
    assert is_capped(progress, stage(steps=12, **settings)) is capped


def test_a_trial_that_came_to_nothing_at_its_cap_is_not_capped() -> None:
    assert is_capped(TrainingState(step=12, evaluations=1), stage(steps=12, data="domain", **EARLY)) is None


def test_whether_the_cap_ended_it_is_known_after_an_interruption(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": "domain", "optimizer": {"learning_rate": 3e-2}, "early_stopping": {"evaluate_every": 4, "patience": 2},
    }  # fmt: skip

    def trained(name: str, steps: int) -> TrainingState:
        return run_training(tmp_path / name, ALONE, stage(steps=steps, **settings), windows=8)

    stopped = trained("stopped", 400)
    assert stopped.step < 400 and is_capped(stopped, stage(steps=400, **settings)) is False
    at_cap = trained("at-cap", stopped.step)
    assert at_cap == stopped and is_capped(at_cap, stage(steps=stopped.step, **settings)) is False
    cap = stopped.step - 4
    capped = trained("capped", cap)
    assert capped.step == cap and is_capped(capped, stage(steps=cap, **settings)) is True
    (tmp_path / "capped" / "result.json").unlink()  # killed before it was declared done
    assert trained("capped", cap) == capped
    shutil.rmtree(step_folder(tmp_path / "capped", cap))  # and before its last step was saved
    assert trained("capped", cap) == capped


TIMES = {"time", "tokens_per_second", "eta_seconds", "mfu"}  # what no two trainings have in common


def _told(folder: Path) -> list[dict[str, Any]]:
    """The last record of each step and event, without times."""
    records = {(record["step"], record.get("event", "")): record for record in read_metrics(folder)}
    told = [records[place] for place in sorted(records) if place[1] not in ("start", "stop")]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in told]


@pytest.mark.parametrize("lost", [4, 24, 32])
def test_a_resumed_training_reports_what_an_uninterrupted_one_does(tmp_path: Path, lost: int) -> None:
    """Spikes too, for which the window of norms must be the same; one of them, and a skipped step, before the interruption."""

    def upset(first: int) -> Any:
        calls = iter(range(2 * first, 10_000))  # two micro-batches a step
        factors = {22: 1e3, 23: math.nan, 29: 1e3, 33: 1e3}
        return lambda logits, batch, **shard: cross_entropy(logits, batch, **shard) * factors.get(next(calls) // 2, 1.0)

    settings = stage(steps=36, checkpoint={"every": 4, "keep": 20}, log_every=5, early_stopping=None)
    straight = run_training(tmp_path / "straight", ALONE, settings, objective=upset(0))
    assert (straight.spikes, straight.skipped_steps, len(straight.norms)) == (3, 1, 35)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "straight", broken)
    (broken / "result.json").unlink()
    for step in range(lost, 37, 4):
        shutil.rmtree(step_folder(broken, step))
    assert run_training(broken, ALONE, settings, objective=upset(lost - 4)) == straight
    assert _told(broken) == _told(tmp_path / "straight")


def test_a_checkpoint_of_an_earlier_version_has_neither_norms_nor_slots(tmp_path: Path) -> None:
    settings = stage(steps=4, checkpoint={"every": 2}, early_stopping=None)
    straight = run_training(tmp_path / "straight", ALONE, settings)
    run_training(tmp_path / "old", ALONE, settings.model_copy(update={"steps": 2}))
    step = step_folder(tmp_path / "old", 2)
    state = read_json(step / "state.json")
    del state["progress"]["norms"], state["progress"]["slots"]
    write_json(step / "state.json", state)
    publish_folder(step, step_folder(tmp_path / "old", 3))
    (tmp_path / "old/step_0000003").rename(step)
    (tmp_path / "old/result.json").unlink()
    resumed = run_training(tmp_path / "old", ALONE, settings)
    assert (resumed.step, resumed.tokens) == (straight.step, straight.tokens) and len(resumed.norms) == 2
    assert resumed.slots == straight.slots == 4 * 8 * CONTEXT


# --- what a training costs -----------------------------------------------------------------------------------------------


class Counted:
    """What every pass of any model puts through its output layer, counted by a hook: slots forward, and backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        real = MegatronEngine.__init__

        def hooked(engine: MegatronEngine, model: Gpt, **settings: Any) -> None:
            real(engine, model, **settings)
            model.chunks[0].output_layer.register_forward_hook(self._count)

        monkeypatch.setattr(MegatronEngine, "__init__", hooked)

    def _count(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        logits = output[0]
        slots = logits.shape[0] * logits.shape[1]
        self.forward += slots
        if logits.requires_grad:
            logits.register_hook(lambda _: setattr(self, "backward", self.backward + slots))


def test_every_pass_is_counted_also_those_that_an_interruption_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    calls = iter(range(10_000))

    def interrupted(logits: torch.Tensor, batch: DeviceBatch, **shard: Any) -> torch.Tensor:
        if next(calls) == 2 * 7 and not (tmp_path / "interrupted").exists():  # two micro-batches a step
            (tmp_path / "interrupted").touch()
            while not step_folder(tmp_path, 4).exists():  # a thread saves it, and may be behind
                time.sleep(0.01)
            raise KeyboardInterrupt
        return cross_entropy(logits, batch, **shard)

    settings = stage(log_every=5, **EARLY)  # the record knows of step 5, the checkpoint of step 4
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, ALONE, settings, objective=interrupted)
    lost = Work.read(tmp_path)
    assert lost.passes.trained == 7 * 8 * 16 and lost.seconds > 0
    counted.forward -= 4 * 16  # the micro-batch in which it was interrupted
    progress = run_training(tmp_path, ALONE, settings, objective=interrupted)
    work = Work.read(tmp_path)
    assert work.passes.trained == counted.backward == (7 + progress.step - 4) * 8 * 16
    assert work.passes.trained + work.passes.evaluated == counted.forward
    assert work.passes.evaluated == (progress.evaluations) * 16 * 16
    assert work.seconds > lost.seconds


def test_the_flops_of_passes_are_those_of_their_matrix_products(tmp_path: Path) -> None:
    """A whole training with early stopping under torch's own counter, which on a CPU knows matrix products only: without
    attention our formula gives their number. Megatron-Core pads the vocabulary of 100 to 128 columns."""
    with FlopCounterMode(display=False) as counter:
        run_training(tmp_path, ALONE, stage(**EARLY))
    passes = Work.read(tmp_path).passes
    attention = (3 * passes.trained + passes.evaluated) * 2 * SHAPE.layers * SHAPE.hidden_size * CONTEXT
    computed = Setup(SHAPE, ParallelConfig(), "fp32", 128, CONTEXT, 8, 4).flops(passes) - attention
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == computed


@pytest.mark.parametrize("packing", ["none", "sorted", "packed"])
def test_slots_and_fill_stand_beside_tokens_and_attention_costs_what_it_computes(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, real = [], attention.causal_attention

    def counted(query_TBAD: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        pairs.append(query_TBAD.shape[1] * query_TBAD.shape[0] ** 2)
        return real(query_TBAD, *others)

    monkeypatch.setattr(attention, "causal_attention", counted)
    progress = run_training(tmp_path, ALONE, stage(packing=packing))
    passes = Work.read(tmp_path).passes
    computed = SHAPE.layers * (
        (passes.trained + passes.evaluated) * CONTEXT - passes.trained_saved - passes.evaluated_saved
    )
    assert sum(pairs) == computed and (passes.trained_saved > 0) == (packing != "none")
    setup = Setup(SHAPE, ParallelConfig(), "fp32", 128, CONTEXT, 8, 4)
    whole = passes._replace(trained_saved=0, evaluated_saved=0)
    read = 3 * passes.trained_saved + passes.evaluated_saved
    assert setup.flops(whole) - setup.flops(passes) == 2 * SHAPE.layers * SHAPE.hidden_size * read
    last = [record for record in read_metrics(tmp_path) if "loss" in record][-1]
    padded = 12 * 8 * CONTEXT
    assert last["tokens"] == progress.tokens < padded and last["fill"] == progress.tokens / last["slots"]
    assert last["slots"] == progress.slots == passes.trained
    assert {"none": last["slots"] == padded, "sorted": progress.tokens < last["slots"] < padded,
            "packed": last["slots"] == progress.tokens}[packing]  # fmt: skip


def test_a_torn_record_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "event": "start"}\n{"time": 2.0, "st')
    Metrics(tmp_path, step=3).close()
    assert [record.get("step") for record in read_metrics(tmp_path)] == [None, 3]


def _stopped_at(folder: Path, step: int, **settings: Any) -> str:
    """Train, with a signal while the step after `step` is computed; what is said of it."""
    process_status, calls = ProcessStatus(), iter(range(10_000))

    def signalled(logits: torch.Tensor, batch: DeviceBatch, **shard: Any) -> torch.Tensor:
        if next(calls) == 2 * (step - 1):  # two micro-batches a step
            os.kill(os.getpid(), signal.SIGUSR1)
        return cross_entropy(logits, batch, **shard)

    with process_status.stop_on_signals(), process_status.at_step_boundaries(), pytest.raises(Stopped) as stopped:
        run_training(folder, ALONE, stage(**settings), objective=signalled, process_status=process_status)
    return str(stopped.value)


@pytest.mark.parametrize("every", [3, 4, 100])  # the step at which it stops is saved before, or not, or nothing is
def test_asked_to_stop_it_saves_its_step_and_goes_on_to_the_same_bits(tmp_path: Path, every: int) -> None:
    run_training(tmp_path / "straight", ALONE, stage())
    broken = tmp_path / "broken"
    said = _stopped_at(broken, 5, checkpoint={"every": every})
    stop = read_metrics(broken)[-1]
    assert stop["event"] == "stop" and stop["step"] in (5, 6)
    assert f"stopped at step {stop['step']}, saved in {broken}/step_000000{stop['step']}" in said
    assert newest_checkpoint(broken) == (step_folder(broken, stop["step"]), [])
    assert not (broken / "result.json").exists()
    run_training(broken, ALONE, stage())
    straight, resumed = _final(tmp_path / "straight"), _final(broken)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    losses = [[r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in (tmp_path / "straight", broken)]
    assert losses[0] == losses[1]


def test_asked_before_the_first_step_it_saves_nothing(tmp_path: Path) -> None:
    asked = ProcessStatus()
    asked.stop_asked_by = "SIGTERM"
    with pytest.raises(Stopped, match="before the first step"):
        run_training(tmp_path, ALONE, stage(), process_status=asked)
    assert not list(tmp_path.glob("*step_*"))
    run_training(tmp_path, ALONE, stage(steps=4))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("step_*"))
    with pytest.raises(Stopped, match="at step 4, saved in"):
        run_training(tmp_path, ALONE, stage(), process_status=asked)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("step_*")) == before


def test_asked_in_the_last_step_it_ends(tmp_path: Path) -> None:
    process_status = ProcessStatus()
    with process_status.at_step_boundaries():
        calls = iter(range(10_000))

        def asking(logits: torch.Tensor, batch: DeviceBatch, **shard: Any) -> torch.Tensor:
            if next(calls) == 2 * 11:
                process_status.ask_to_stop("a test")
            return cross_entropy(logits, batch, **shard)

        assert run_training(tmp_path, ALONE, stage(), objective=asking, process_status=process_status).step == 12
