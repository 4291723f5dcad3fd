"""The training loop: steps, records, validation, checkpoints, and when to stop.

All that the loop knows beside the weights is in `Progress`, which every checkpoint carries; the data stream is a pure
function of the step. So a run that is killed at any moment and started again ends with the same bits on CPU. Where one
process is asked to stop (`base/process_status.py`), all of them stop at the same step and save it.
"""

import contextlib
import gc
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
from megatron_specialm.checkpoint.opening import REMEDY, newest_checkpoint, open_checkpoint
from megatron_specialm.checkpoint.pruning import remove_unusable
from megatron_specialm.checkpoint.saving import Saver
from megatron_specialm.checkpoint.steps import STATE, declare_final, saved_steps, step_folder
from megatron_specialm.config.schedule import learning_rate, step_to_keep
from megatron_specialm.config.training import TrainStage
from megatron_specialm.data.batches import TrainingBatches
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.protocol import Engine, StepStats
from megatron_specialm.graph.length import last_step, validates_after
from megatron_specialm.train.metrics import Metrics
from megatron_specialm.train.progress import Progress
from megatron_specialm.train.runtime import manual_garbage_collection, observed
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
class Training:
    """What one training needs beside its engine.

    validation: this process's batches, anew at every call.
    description: written into every checkpoint: the model's shape, tokenizer, seed, versions.
    account: what a checkpoint records of the cost, from the progress and the work so far.
    watch: runs since this attempt at the task began.
    """

    folder: Path
    settings: TrainStage
    batches: TrainingBatches
    validation: Callable[[], Iterable[Batch]]
    description: dict[str, Any]
    flops_per_step: int
    processes: int
    control: ControlGroup
    saver: Saver
    account: Callable[[Progress, Work], Mapping[str, Any]] = lambda *_: {}
    process_status: ProcessStatus = field(default_factory=ProcessStatus)
    watch: Stopwatch = field(default_factory=Stopwatch)


def train(engine: Engine, training: Training) -> Progress:
    """Train to the end, from the newest checkpoint that verifies or else from the engine's present weights.

    With `trial_steps` in the settings it ends there, and can be gone on with.

    Raises:
        Diverged: too many steps in a row whose loss or gradient is not finite, or no validation whose loss is.
        TrainingError: another process has died.
        Stopped: some process was asked to stop; the step at which all of them did is saved.
    """
    training.process_status.begin("training")
    with _lost_peers(training), _work_record(engine, training) as record_work:
        found = saved_steps(training.folder)
        progress = _resume(engine, training)
        with _open_metrics(training, progress) as metrics, manual_garbage_collection():
            loop = _Loop(engine, training, progress, metrics, record_work)
            loop.run()
            loop.finish(found)
        return loop.progress


class _Loop:
    """The steps of one attempt at a training. `progress` is how far it is."""

    def __init__(
        self,
        engine: Engine,
        training: Training,
        progress: Progress,
        metrics: Metrics | None,
        record_work: Callable[[], Work],
    ) -> None:
        self.progress = progress
        self._engine, self._training, self._settings = engine, training, training.settings
        self._metrics, self._record_work = metrics, record_work
        self._saved = progress.step
        self._clock = _Clock()
        self._stop_group = ControlGroup.open()  # of its own: others wait for long work of rank 0
        self._stop_flag = StopFlag(self._stop_group)

    def run(self) -> None:
        """All steps that are left."""
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
        """Name the step that is the outcome.

        Args:
            found: the steps that were there when this attempt began.
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
        """One optimizer step. Its loss, norm and tokens come to the host every time: they decide whether it is skipped, a spike
        or a divergence, and checkpoints count them."""
        training, settings, step = self._training, self._settings, self.progress.step
        rate = learning_rate(step, peak=settings.optimizer.peak, steps=settings.steps, schedule=settings.schedule)
        batch = training.batches.local(step)
        with observed(step + 1, settings.runtime, training.folder, rank=training.control.rank):
            stats = self._engine.train_step(batch, learning_rate=rate)
        self._record_work()
        spike = self.progress.is_spike(stats.gradient_norm, factor=settings.spike_factor)
        self.progress = self.progress.after(stats, spike=spike)
        slots = batch.tokens.size * training.batches.processes
        self._record_step(stats, rate, slots=slots, spike=spike)
        self._raise_if_diverged(stats)

    def _evaluate(self) -> None:
        step = self.progress.step
        if not validates_after(step, self._settings):
            return
        loss = self._engine.evaluate(self._with_heartbeat()).mean
        self._record_work()
        if not math.isfinite(loss):
            logger.warning("step %d: the validation loss is %s: it counts as no gain", step, loss)
        self._write(event="validation", step=step, validation_loss=_finite(loss))
        self.progress = self.progress.evaluated(loss)

    def _with_heartbeat(self) -> Iterator[Batch]:
        """The validation's batches: each is progress, and work, too."""
        for batch in self._training.validation():
            self._training.process_status.beat()
            self._record_work()
            yield batch

    def _save(self) -> None:
        training, progress = self._training, self.progress
        training.saver.save(
            keep=self._settings.checkpoint.keep,
            beside=(progress.best_step, step_to_keep(self._settings)),
            step=progress.step,
            weights=self._engine.weights(),
            optimizer_state=self._engine.optimizer_state(),
            state={
                **training.description,
                **training.account(progress, self._record_work()),
                "progress": asdict(progress),
            },
        )
        self._saved = progress.step

    def _stop(self) -> NoReturn:
        """End all processes at this step, when its checkpoint has been read back and verified."""
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
            f"Lower optimizer.learning_rate (now {settings.optimizer.peak}) or look at the data of these steps",
            progress,
        )

    def _record_step(self, stats: StepStats, rate: float, *, slots: int, spike: bool) -> None:
        """A record every `log_every` steps, and at once where a step was skipped or spiked. `slots` are those of a step: token
        positions, of which padding fills some."""
        self._clock.count()
        progress, training, last = self.progress, self._training, last_step(self._settings)
        if stats.skipped or spike:
            what = "skipped: loss or gradient not finite" if stats.skipped else "gradient norm spike"
            logger.warning("step %d: %s (loss %s, norm %s)", progress.step, what, stats.loss.mean, stats.gradient_norm)
        elif progress.step % self._settings.log_every and progress.step < last:
            return
        if self._metrics is None:
            return
        per_step = self._clock.per_step()
        slots_so_far = (progress.step - progress.skipped_steps) * slots
        self._write(
            step=progress.step,
            steps=last,
            loss=_finite(stats.loss.mean),
            gradient_norm=_finite(stats.gradient_norm),
            learning_rate=rate,
            tokens=progress.tokens,
            slots=slots_so_far,
            fill=progress.tokens / slots_so_far if slots_so_far else None,
            tokens_per_second=stats.loss.tokens / per_step,
            mfu=utilisation(
                flops=training.flops_per_step,
                seconds=per_step,
                devices=training.processes,
                device_name=self._engine.device_name,
            )
            or None,
            eta_seconds=per_step * (last - progress.step),
            skipped_steps=progress.skipped_steps,
            spikes=progress.spikes,
        )

    def _write(self, **record: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(**record)


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


def _finite(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _work_record(engine: Engine, training: Training) -> Iterator[Callable[[], Work]]:
    """A function that records the work done so far, and returns it. Only the first process keeps a record."""
    if not training.control.is_first:
        yield Work
        return
    with WorkRecord(training.folder, copies=training.batches.processes, watch=training.watch) as record:
        yield lambda: record.write(engine.passes)


@contextlib.contextmanager
def _lost_peers(training: Training) -> Iterator[None]:
    """On every process that outlives another one, replace torch.distributed's error by one that names the remedy."""
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


def _resume(engine: Engine, training: Training) -> Progress:
    folder, passed_over = training.control.broadcast(lambda: newest_checkpoint(training.folder))
    for reason in passed_over:
        logger.warning("resuming: passed over %s", reason)
    if folder is None:
        return Progress()
    checkpoint = open_checkpoint(folder)
    progress = read_json(folder / STATE, _Resumed).progress
    if progress.step > progress.skipped_steps and not checkpoint.optimizer_state:
        raise CheckpointError(f"{folder / MANIFEST}: lists no optimizer's state to go on with: {REMEDY}")
    engine.load(checkpoint.weights.stored, checkpoint.optimizer_state.stored)
    logger.info("resuming from %s", checkpoint.folder)
    return progress


def _open_metrics(training: Training, progress: Progress) -> contextlib.AbstractContextManager[Metrics | None]:
    """Only the first process writes the record."""
    settings = training.settings
    if not training.control.is_first:
        return contextlib.nullcontext()
    return Metrics(
        training.folder, step=progress.step, tensorboard=settings.tensorboard, wandb_project=settings.wandb_project
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


def _no_best(training: Training, progress: Progress) -> str:
    return (
        f"{training.folder}: none of {progress.evaluations} validations up to step {progress.step} had a finite loss, so no "
        "checkpoint can be called the best. If the weights that it starts from are sound, lower optimizer.learning_rate "
        f"(now {training.settings.optimizer.peak}) and run it again"
    )
