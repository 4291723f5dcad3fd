"""The training loop: steps, records, validation, checkpoints, and when to stop.

All that the loop knows beside the weights is in `Progress`, which every checkpoint carries; the data stream is a pure
function of the step. So a run that is killed at any moment and started again ends with the same bits on CPU. Where one
process is asked to stop (`base/process_status.py`), all of them stop at the same step and save it.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_specialm.base.control_group import ControlGroup, StopFlag, is_lost_peer
from megatron_specialm.base.errors import CheckpointError, Stopped, TrainingError
from megatron_specialm.base.files import MANIFEST, read_json, verify_folder
from megatron_specialm.base.gpus import utilisation
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.checkpoint.checkpoint import (
    REMEDY,
    STATE,
    Saver,
    declare_final,
    newest_checkpoint,
    open_checkpoint,
    remove_unusable,
    saved_steps,
    step_folder,
)
from megatron_specialm.config.schedule import learning_rate, step_to_keep
from megatron_specialm.config.training import TrainStage
from megatron_specialm.data.batches import TrainingBatches
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.protocol import Engine, StepStats
from megatron_specialm.graph.length import last_step, validates_after
from megatron_specialm.train.metrics import Metrics
from megatron_specialm.train.progress import Progress
from megatron_specialm.train.work import Work, WorkRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Resumed:
    """What a checkpoint's state has beside what describes the model."""

    progress: Progress


class Diverged(TrainingError):
    """A training that came to nothing by itself: its losses were not finite. `progress` is how far it was."""

    def __init__(self, message: str, progress: Progress) -> None:
        super().__init__(message)
        self.progress = progress


@dataclass(frozen=True)
class Run:
    """What one training needs beside its engine. `validation` gives this process's batches anew at every call; `account` is
    what a checkpoint says of what it cost, from how far it is and the work so far; `watch` runs since this attempt at the task
    began."""

    folder: Path
    settings: TrainStage
    batches: TrainingBatches
    validation: Callable[[], Iterable[Batch]]
    description: dict[str, Any]  # written into every checkpoint: the model's shape, tokenizer, seed, versions
    flops_per_step: int
    device_name: str
    processes: int
    peers: ControlGroup
    saver: Saver
    account: Callable[[Progress, Work], Mapping[str, Any]] = lambda *_: {}
    process_status: ProcessStatus = field(default_factory=ProcessStatus)
    watch: Stopwatch = field(default_factory=Stopwatch)


def train(engine: Engine, run: Run) -> Progress:
    """Train to the end, from the newest checkpoint that verifies or else from the engine's present weights.

    With `trial_steps` in the settings it ends there, and can be gone on with.

    Raises:
        Diverged: too many steps in a row whose loss or gradient is not finite, or no validation whose loss is.
        TrainingError: another process has died.
        Stopped: some process was asked to stop; the step at which all of them did is saved.
    """
    run.process_status.begin("training")
    with _lost_peers(run), _work_record(engine, run) as note_work:
        return _train(engine, run, note_work)


def _train(engine: Engine, run: Run, note_work: Callable[[], Work]) -> Progress:
    found = saved_steps(run.folder)
    progress = _resume(engine, run)
    saved = progress.step
    metrics = _open_metrics(run, progress)
    clock = _Clock()
    stop = StopFlag(run.peers)
    if run.settings.early_stopping is not None and not progress.evaluations:
        # The first weights are a candidate too: a domain set may be too small to gain anything from it.
        progress = _evaluate(engine, run, progress, metrics, note_work)
        _save(engine, run, progress, note_work)
    while not _is_over(progress, run.settings):
        run.process_status.beat(step=progress.step)
        if stop.poll(run.process_status.stop_asked_by is not None):
            if progress.step != saved:
                _save(engine, run, progress, note_work)
            _stop(run, progress, metrics)
        rate = learning_rate(
            progress.step,
            peak=run.settings.optimizer.peak,
            steps=run.settings.steps,
            schedule=run.settings.schedule,
        )
        batch = run.batches.local(progress.step)
        stats = engine.train_step(batch, learning_rate=rate)
        note_work()
        spike = progress.is_spike(stats.gradient_norm, factor=run.settings.spike_factor)
        progress = progress.after(stats, spike=spike)
        slots = batch.tokens.size * run.batches.processes
        _record_step(metrics, run, progress, stats, rate, slots=slots, spike=spike, clock=clock)
        _raise_if_diverged(progress, run, stats)
        progress = _evaluate(engine, run, progress, metrics, note_work)
        if _is_time_to_save(progress, run.settings):
            _save(engine, run, progress, note_work)
            saved = progress.step
    run.saver.wait()
    if run.settings.early_stopping is not None and progress.best_step is None:
        raise Diverged(_no_best(run, progress), progress)
    final = progress.step if progress.best_step is None else progress.best_step
    if run.peers.is_first:
        remove_unusable(run.folder, [step for step in found if step != final], last=progress.step)
        declare_final(run.folder, step=final)
    if metrics:
        metrics.write(event="end", step=progress.step, final_step=final)
        metrics.close()
    return progress


def _stop(run: Run, progress: Progress, metrics: Metrics | None) -> NoReturn:
    """End all processes at this step, when its checkpoint has been read back and verified."""
    run.saver.wait()
    saved = step_folder(run.folder, progress.step)
    if progress.step:
        run.peers.from_first(lambda: verify_folder(saved))
    if metrics:
        metrics.write(event="stop", step=progress.step)
        metrics.close()
    where = f"at step {progress.step}, saved in {saved}" if progress.step else "before the first step"
    raise Stopped(f"stopped {where}: the same command goes on from there")


class _Clock:
    """Seconds per step since the last record."""

    def __init__(self) -> None:
        self._watch, self._steps = Stopwatch(), 0

    def count(self) -> None:
        """One more step."""
        self._steps += 1

    def per_step(self) -> float:
        steps, self._steps = self._steps, 0
        return max(self._watch.lap(), 1e-6) / steps  # a lap may be nothing, but no speed is infinite


@contextlib.contextmanager
def _work_record(engine: Engine, run: Run) -> Iterator[Callable[[], Work]]:
    """What notes the work done by now, and says it. Only the first process keeps it."""
    if not run.peers.is_first:
        yield Work
        return
    before = engine.passes  # an engine may have worked for another run
    with WorkRecord(run.folder, copies=run.batches.processes, watch=run.watch) as record:
        yield lambda: record.write(engine.passes.plus(before, times=-1))


@contextlib.contextmanager
def _lost_peers(run: Run) -> Iterator[None]:
    """Say what torch.distributed's complaint about a dead process means, on every process that outlives it."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{run.folder}: another process of this training has died or does not answer ({reason}); "
            f"{_last_good(run.folder)}. Its own log says why; the same command goes on from there"
        ) from None


def _last_good(folder: Path) -> str:
    checkpoint, _ = newest_checkpoint(folder)
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"


def _resume(engine: Engine, run: Run) -> Progress:
    folder, passed_over = run.peers.from_first(lambda: newest_checkpoint(run.folder))
    for reason in passed_over:
        logger.warning("resuming: passed over %s", reason)
    if folder is None:
        return Progress()
    checkpoint = open_checkpoint(folder)
    progress = read_json(folder / STATE, _Resumed).progress
    if progress.step > progress.skipped_steps and not checkpoint.optimizer_state:
        raise CheckpointError(f"{folder / MANIFEST}: lists no optimizer's state to go on with: {REMEDY}")
    engine.load(checkpoint.weights, checkpoint.optimizer_state)
    logger.info("resuming from %s", checkpoint.folder)
    return progress


def _open_metrics(run: Run, progress: Progress) -> Metrics | None:
    """Only the first process writes the record."""
    settings = run.settings
    if not run.peers.is_first:
        return None
    return Metrics(
        run.folder, step=progress.step, tensorboard=settings.tensorboard, wandb_project=settings.wandb_project
    )


def _is_over(progress: Progress, settings: TrainStage) -> bool:
    return _has_stalled(progress, settings) or progress.step >= last_step(settings)


def _has_stalled(progress: Progress, settings: TrainStage) -> bool:
    """Whether early stopping's patience has run out."""
    stopping = settings.early_stopping
    return stopping is not None and progress.evaluations_without_gain >= stopping.patience


def is_capped(progress: Progress, settings: TrainStage) -> bool | None:
    """Whether a fine-tuning that is over was ended by its `steps`, and early stopping might have found a better one. None
    where this is not asked: of pretraining, of a fixed number of steps, which is what was wanted, and of a trial that came to
    nothing or was ended before."""
    if settings.data != "domain" or settings.early_stopping is None or progress.best_step is None:
        return None
    if _has_stalled(progress, settings):
        return False
    return True if progress.step >= settings.steps else None


def _is_time_to_save(progress: Progress, settings: TrainStage) -> bool:
    return (
        progress.step % settings.checkpoint.every == 0
        or progress.step in (progress.best_step, step_to_keep(settings))
        or _is_over(progress, settings)
    )


def _save(engine: Engine, run: Run, progress: Progress, note_work: Callable[[], Work]) -> None:
    run.saver.save(
        keep=run.settings.checkpoint.keep,
        beside=(progress.best_step, step_to_keep(run.settings)),
        step=progress.step,
        weights=engine.weights(),
        optimizer_state=engine.optimizer_state(),
        state={**run.description, **run.account(progress, note_work()), "progress": asdict(progress)},
    )


def _evaluate(
    engine: Engine, run: Run, progress: Progress, metrics: Metrics | None, note_work: Callable[[], Work]
) -> Progress:
    if not validates_after(progress.step, run.settings):
        return progress
    loss = engine.evaluate(_with_heartbeat(run, note_work)).mean
    note_work()
    if not math.isfinite(loss):
        logger.warning("step %d: the validation loss is %s: it counts as no gain", progress.step, loss)
    if metrics:
        metrics.write(event="validation", step=progress.step, validation_loss=loss if math.isfinite(loss) else None)
    return progress.evaluated(loss)


def _with_heartbeat(run: Run, note_work: Callable[[], Work]) -> Iterator[Batch]:
    """The validation's batches: it is progress, and work, too."""
    for batch in run.validation():
        run.process_status.beat()
        note_work()
        yield batch


def _no_best(run: Run, progress: Progress) -> str:
    return (
        f"{run.folder}: none of {progress.evaluations} validations up to step {progress.step} had a finite loss, so no "
        "checkpoint can be called the best. If the weights that it starts from are sound, lower optimizer.learning_rate "
        f"(now {run.settings.optimizer.peak}) and run it again"
    )


def _raise_if_diverged(progress: Progress, run: Run, stats: StepStats) -> None:
    if progress.skipped_in_a_row <= run.settings.max_skipped_steps:
        return
    run.saver.wait()
    raise Diverged(
        f"step {progress.step}: loss {stats.loss.mean} and gradient norm {stats.gradient_norm} were not finite for "
        f"{progress.skipped_in_a_row} steps in a row (max_skipped_steps {run.settings.max_skipped_steps}); "
        f"{_last_good(run.folder)}. "
        f"Lower optimizer.learning_rate (now {run.settings.optimizer.peak}) or look at the data of these steps",
        progress,
    )


def _record_step(
    metrics: Metrics | None,
    run: Run,
    progress: Progress,
    stats: StepStats,
    rate: float,
    *,
    slots: int,
    spike: bool,
    clock: _Clock,
) -> None:
    """A record every `log_every` steps, and at once where a step was skipped or spiked. `slots` are those of a step: token
    positions, of which padding fills some."""
    clock.count()
    settings, last = run.settings, last_step(run.settings)
    if stats.skipped or spike:
        what = "skipped: loss or gradient not finite" if stats.skipped else "gradient norm spike"
        logger.warning("step %d: %s (loss %s, norm %s)", progress.step, what, stats.loss.mean, stats.gradient_norm)
    elif progress.step % settings.log_every and progress.step < last:
        return
    if metrics is None:
        return
    per_step = clock.per_step()
    slots_so_far = (progress.step - progress.skipped_steps) * slots
    metrics.write(
        step=progress.step,
        steps=last,
        loss=stats.loss.mean if math.isfinite(stats.loss.mean) else None,
        gradient_norm=stats.gradient_norm if math.isfinite(stats.gradient_norm) else None,
        learning_rate=rate,
        tokens=progress.tokens,
        slots=slots_so_far,
        fill=progress.tokens / slots_so_far if slots_so_far else None,
        tokens_per_second=stats.loss.tokens / per_step,
        mfu=utilisation(flops=run.flops_per_step, seconds=per_step, devices=run.processes, device_name=run.device_name),
        eta_seconds=per_step * (last - progress.step),
        skipped_steps=progress.skipped_steps,
        spikes=progress.spikes,
    )
