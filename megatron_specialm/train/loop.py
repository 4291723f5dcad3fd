"""The training loop: steps, records, validation, checkpoints and stopping.

The state of the loop is `TrainingState`, which is in every checkpoint; the data stream is a function of the step. So a run that
is killed at any moment and started again ends with the same bits on CPU. If one process is asked to stop
(`base/process_status.py`), all processes stop at the same step and save it.
"""

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_specialm.base.control_group import ControlGroup, StopFlag, is_lost_peer
from megatron_specialm.base.errors import CheckpointError, Stopped, TrainingError
from megatron_specialm.base.files import MANIFEST, read_json, verify_folder
from megatron_specialm.base.gpus import utilisation
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.checkpoint.opening import REMEDY, newest_checkpoint, open_checkpoint
from megatron_specialm.checkpoint.saving import Saver
from megatron_specialm.checkpoint.steps import STATE, declare_final, remove_unusable, saved_steps, step_folder
from megatron_specialm.config.schedule import learning_rate, step_to_keep
from megatron_specialm.config.training import TrainStage
from megatron_specialm.data.batches import TrainingBatches
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.protocol import Engine, LossSum, StepStats
from megatron_specialm.graph.length import last_step, validates_after
from megatron_specialm.train.gates import GateRecords
from megatron_specialm.train.metrics import Metrics
from megatron_specialm.train.progress import TrainingState
from megatron_specialm.train.runtime import manual_garbage_collection, observed
from megatron_specialm.train.work import Work, WorkRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Resumed:
    """The part of a checkpoint's state that the loop resumes from."""

    progress: TrainingState


class Diverged(TrainingError):
    """Training has diverged: losses were not finite. `progress` is the state at that step."""

    def __init__(self, message: str, progress: TrainingState) -> None:
        super().__init__(message)
        self.progress = progress


@dataclass(frozen=True)
class Training:
    """Everything that a training needs besides its engine.

    validation: returns a new iterator over this process's batches.
    description: is written into every checkpoint: the model's shape, tokenizer, seed, versions.
    account: computes the cost that a checkpoint records, from the progress and the work so far.
    step_flops: the FLOPs of a step of so many slots and keys saved (`LossSum`).
    watch: runs since this attempt at the task began.
    """

    folder: Path
    settings: TrainStage
    batches: TrainingBatches
    validation: Callable[[], Iterable[Batch]]
    description: dict[str, Any]
    step_flops: Callable[[int, int], int]
    processes: int
    control: ControlGroup
    saver: Saver
    account: Callable[[TrainingState, Work], Mapping[str, Any]] = lambda *_: {}
    process_status: ProcessStatus = field(default_factory=ProcessStatus)
    watch: Stopwatch = field(default_factory=Stopwatch)


def train(engine: Engine, training: Training) -> TrainingState:
    """Train to the end, from the newest valid checkpoint, or from the engine's current weights if there is none.

    If the settings have `trial_steps`, training ends there and can be resumed later.

    Raises:
        Diverged: loss or gradient were not finite for too many steps in a row, or in every validation.
        TrainingError: another process has died.
        Stopped: a process was asked to stop. All processes have saved the same step.
    """
    training.process_status.begin("training")
    with _name_lost_process(training), _work_record(engine, training) as record_work:
        found = saved_steps(training.folder)
        progress = _resume(engine, training)
        with _open_metrics(training, progress) as metrics, manual_garbage_collection():
            loop = _Loop(engine, training, progress, metrics, record_work)
            loop.run()
            loop.finish(found)
        return loop.progress


class _Loop:
    """The steps of one attempt at a training."""

    def __init__(
        self,
        engine: Engine,
        training: Training,
        progress: TrainingState,
        metrics: Metrics | None,
        record_work: Callable[[], Work],
    ) -> None:
        self.progress = progress
        self._engine, self._training, self._settings = engine, training, training.settings
        self._metrics, self._record_work = metrics, record_work
        self._gates = GateRecords()
        self._saved = progress.step
        # Since the last record: time, and losses of steps; and its step.
        self._watch, self._losses, self._recorded = Stopwatch(), list[LossSum](), progress.step
        self._stop_group = ControlGroup.open()  # of its own: others wait for long work of rank 0
        self._stop_flag = StopFlag(self._stop_group)

    def run(self) -> None:
        """Run all remaining steps."""
        settings, first_step = self._settings, self.progress.step + 1
        if settings.early_stopping is not None and not self.progress.evaluations:
            # The first weights are a candidate too: a domain set may be too small to gain anything from it.
            self._evaluate()
            self._save()
        while not _is_over(self.progress, settings):
            self._training.process_status.beat(step=self.progress.step)
            if self._stop_flag.poll(self._training.process_status.stop_asked_by is not None):
                self._stop()
            self._step()
            if self.progress.step == first_step:  # it connects processes and compiles kernels, and may take longer
                for groups in (self._engine, self._stop_group):
                    groups.limit_collectives(settings.runtime.collective_timeout_seconds)
            if self.progress.step % settings.runtime.collect_garbage_every == 0:
                gc.collect()
            self._evaluate()
            if _is_time_to_save(self.progress, settings):
                self._save()

    def finish(self, found: list[int]) -> None:
        """Record which step is the result.

        Args:
            found: the steps that existed when this attempt began.
        """
        training, progress = self._training, self.progress
        training.saver.wait()
        if self._settings.early_stopping is not None and progress.best_step is None:
            raise Diverged(_no_best(training, progress), progress)
        final = progress.step if progress.best_step is None else progress.best_step
        if training.control.is_first:
            remove_unusable(training.folder, [step for step in found if step != final], last=progress.step)
            declare_final(training.folder, step=final)
        self._write(event="end", step=progress.step, final_step=final)

    def _step(self) -> None:
        """One optimizer step. Loss, norm and tokens are read by the host at every step: they decide about skipped steps, spikes
        and divergence, and checkpoints count them."""
        training, settings, step = self._training, self._settings, self.progress.step
        rate = learning_rate(step, peak=settings.optimizer.peak, steps=settings.steps, schedule=settings.schedule)
        batch = training.batches.local(step)
        with observed(step + 1, settings.runtime, training.folder, rank=training.control.rank):
            stats = self._engine.train_step(batch, learning_rate=rate)
        self._record_work()
        spike = self.progress.is_spike(stats.gradient_norm, factor=settings.spike_factor)
        self.progress = self.progress.after(stats, spike=spike)
        self._record_step(stats, rate, spike=spike)
        self._raise_if_diverged(stats)

    def _evaluate(self) -> None:
        step = self.progress.step
        if not validates_after(step, self._settings):
            return
        loss = self._engine.evaluate(self._with_heartbeat()).mean
        self._record_work()
        if not math.isfinite(loss):
            logger.warning("step %d: the validation loss is %s: it does not count as an improvement", step, loss)
        self._write(event="validation", step=step, validation_loss=_finite(loss))
        self.progress = self.progress.evaluated(loss)

    def _with_heartbeat(self) -> Iterator[Batch]:
        """The validation batches. Each one counts as progress for the heartbeat, and as work."""
        for batch in self._training.validation():
            self._training.process_status.beat()
            self._record_work()
            yield batch

    def _save(self) -> None:
        training, progress = self._training, self.progress
        training.saver.wait()  # there is one copy in memory at a time
        training.saver.save(
            self._engine.begin_copy(),
            step=progress.step,
            state={
                **training.description,
                **training.account(progress, self._record_work()),
                "progress": asdict(progress),
            },
            keep=self._settings.checkpoint.keep,
            beside=(progress.best_step, step_to_keep(self._settings)),
        )
        self._saved = progress.step

    def _stop(self) -> NoReturn:
        """End all processes at this step, after its checkpoint was read back and verified."""
        training, step = self._training, self.progress.step
        if step != self._saved:
            self._save()
        training.saver.wait()
        saved = step_folder(training.folder, step)
        if step:
            training.control.broadcast(lambda: verify_folder(saved))
        self._write(event="stop", step=step)
        where = f"at step {step}, saved in {saved}" if step else "before the first step"
        raise Stopped(f"stopped {where}: the same command goes on from there")

    def _raise_if_diverged(self, stats: StepStats) -> None:
        training, progress, settings = self._training, self.progress, self._settings
        if progress.skipped_in_a_row <= settings.max_skipped_steps:
            return
        training.saver.wait()
        raise Diverged(
            f"step {progress.step}: loss {stats.loss.mean} and gradient norm {stats.gradient_norm} were not finite for "
            f"{progress.skipped_in_a_row} steps in a row (max_skipped_steps {settings.max_skipped_steps}); "
            f"{_last_good(training.folder)}. "
            f"Lower optimizer.learning_rate (now {settings.optimizer.peak}) or check the data of these steps",
            progress,
        )

    def _record_step(self, stats: StepStats, rate: float, *, spike: bool) -> None:
        """Write a record every `log_every` steps, and whenever a step was skipped or spiked."""
        progress, training, last = self.progress, self._training, last_step(self._settings)
        self._losses.append(stats.loss)
        if stats.skipped or spike:
            what = "skipped: loss or gradient not finite" if stats.skipped else "gradient norm spike"
            logger.warning("step %d: %s (loss %s, norm %s)", progress.step, what, stats.loss.mean, stats.gradient_norm)
        elif progress.step % self._settings.log_every and progress.step < last:
            return
        gates = self._engine.gate_statistics()  # of all processes
        losses, self._losses = self._losses, []
        if self._metrics is None:
            return
        seconds = max(self._watch.lap(), 1e-6)  # a lap may be 0
        per_step = seconds / (progress.step - self._recorded)
        self._recorded = progress.step
        self._write(
            step=progress.step,
            steps=last,
            loss=_finite(stats.loss.mean),
            gradient_norm=_finite(stats.gradient_norm),
            learning_rate=rate,
            tokens=progress.tokens,
            slots=progress.slots,
            fill=progress.tokens / progress.slots if progress.slots else None,
            tokens_per_second=sum(loss.tokens for loss in losses) / seconds,
            mfu=utilisation(
                flops=sum(training.step_flops(loss.slots, loss.saved) for loss in losses),
                seconds=seconds,
                devices=training.processes,
                device_name=self._engine.device_name,
            )
            or None,
            eta_seconds=per_step * (last - progress.step),
            skipped_steps=progress.skipped_steps,
            spikes=progress.spikes,
            **self._gates.record(gates, step=progress.step),
        )

    def _write(self, **record: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(**record)


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _work_record(engine: Engine, training: Training) -> Iterator[Callable[[], Work]]:
    """A function that records and returns the work so far. Only rank 0 keeps a record."""
    if not training.control.is_first:
        yield Work
        return
    with WorkRecord(training.folder, watch=training.watch) as record:
        yield lambda: record.write(engine.passes)


@contextlib.contextmanager
def _name_lost_process(training: Training) -> Iterator[None]:
    """If another process has died, replace torch.distributed's error with one that names the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{training.folder}: another process of this training has died or does not answer ({reason}); "
            f"{_last_good(training.folder)}. Its own log says why; the same command goes on from there"
        ) from None


def _last_good(folder: Path) -> str:
    checkpoint, _ = newest_checkpoint(folder)
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"


def _resume(engine: Engine, training: Training) -> TrainingState:
    folder, passed_over = training.control.broadcast(lambda: newest_checkpoint(training.folder))
    for reason in passed_over:
        logger.warning("resuming: skipped unusable %s", reason)
    if folder is None:
        return TrainingState()
    checkpoint = open_checkpoint(folder)
    progress = read_json(folder / STATE, _Resumed).progress
    if progress.step > progress.skipped_steps and not checkpoint.optimizer_state:
        raise CheckpointError(f"{folder / MANIFEST}: lists no optimizer's state to go on with: {REMEDY}")
    if not progress.slots:  # of an earlier version, in which all windows were padded
        padded = training.batches.local(0).tokens.size * training.batches.processes
        progress = replace(progress, slots=(progress.step - progress.skipped_steps) * padded)
    engine.load(checkpoint.weights.stored, checkpoint.optimizer_state.stored)
    logger.info("resuming from %s", checkpoint.folder)
    return progress


def _open_metrics(training: Training, progress: TrainingState) -> contextlib.AbstractContextManager[Metrics | None]:
    """Only rank 0 writes records."""
    settings = training.settings
    if not training.control.is_first:
        return contextlib.nullcontext()
    return Metrics(
        training.folder, step=progress.step, tensorboard=settings.tensorboard, wandb_project=settings.wandb_project
    )


def _is_over(progress: TrainingState, settings: TrainStage) -> bool:
    return _has_stalled(progress, settings) or progress.step >= last_step(settings)


def _has_stalled(progress: TrainingState, settings: TrainStage) -> bool:
    """Whether early stopping's patience has run out."""
    stopping = settings.early_stopping
    return stopping is not None and progress.evaluations_without_gain >= stopping.patience


def is_capped(progress: TrainingState, settings: TrainStage) -> bool | None:
    """Whether a finished fine-tuning ended because of its `steps`, before early stopping could end it. None where this does
    not apply: pretraining, a fixed number of steps, and a trial that diverged or was ended before."""
    if settings.data != "domain" or settings.early_stopping is None or progress.best_step is None:
        return None
    if _has_stalled(progress, settings):
        return False
    return True if progress.step >= settings.steps else None


def _is_time_to_save(progress: TrainingState, settings: TrainStage) -> bool:
    return (
        progress.step % settings.checkpoint.every == 0
        or progress.step in (progress.best_step, step_to_keep(settings))
        or _is_over(progress, settings)
    )


def _no_best(training: Training, progress: TrainingState) -> str:
    return (
        f"{training.folder}: none of {progress.evaluations} validations up to step {progress.step} had a finite loss, so no "
        "checkpoint can be called the best. If the weights that it starts from are sound, lower optimizer.learning_rate "
        f"(now {training.settings.optimizer.peak}) and run it again"
    )
