"""A small training that tests share: random windows in memory, the real stream, engine and loop."""

import json
import os
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megatron_specialm.base.control_group import ControlGroup
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import Stopped
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.checkpoint.saving import Saver
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.training import TrainStage
from megatron_specialm.config.trainings import AnyTrainStage
from megatron_specialm.data.batches import TrainingBatches
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.sampling import ImportanceStream
from megatron_specialm.data.store import Batch
from megatron_specialm.data.validation import all_windows
from megatron_specialm.engine.objective import Objective, cross_entropy
from megatron_specialm.engine.open import open_engine
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.train.loop import Training, train
from megatron_specialm.train.progress import TrainingState
from tests.processes import rank_context

VOCABULARY, CONTEXT = 100, 16
# Of Adam, where two ways of adding up are compared: with the usual 1e-8, weights whose gradient is all rounding would be
# moved by its sign, and the outcome would hang on the processor.
EPSILON = 1e-3
SHAPE = ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=64, attention_heads=4)


class MemoryStore:
    """Windows of a learnable sequence (each token follows from the one before), of uneven length."""

    folder = Path("memory")

    def __init__(self, windows: int, *, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        first = generator.integers(0, VOCABULARY, (windows, 1))
        self._tokens = (first * 3 ** np.arange(CONTEXT + 1) + np.arange(CONTEXT + 1)) % VOCABULARY
        self._lengths = generator.integers(CONTEXT // 2, CONTEXT + 1, windows)

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, ids: np.ndarray) -> Batch:
        mask = (np.arange(CONTEXT) < self._lengths[ids][:, None]).astype(np.float32)
        return Batch(self._tokens[ids, :-1], self._tokens[ids, 1:], mask)


def stage(**settings) -> TrainStage:
    """A train stage's settings with the defaults of these tests."""
    defaults = {
        "kind": "train", "tokens": "tokens", "data": "generic", "model": SHAPE, "steps": 12, "global_batch_size": 8,
        "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-2}, "schedule": {"warmup_steps": 0},
        "checkpoint": {"every": 4}, "log_every": 1,
    }  # fmt: skip
    return TypeAdapter(AnyTrainStage).validate_python({**defaults, **settings})


def run_layout(folder: Path, **settings: Any) -> None:
    """Train on as many processes as the layout in `settings` is for, and expect all to end well."""
    assert start_ranks(folder, **settings).join() == [0] * stage(**settings).parallel.world_size


class Ranks:
    """The processes of a training."""

    def __init__(self, processes: list[BaseProcess]) -> None:
        self.processes = processes

    def join(self, timeout: float = 120) -> list[int | None]:
        """Wait for all; their exit codes, None for one that had to be ended."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes


def start_ranks(folder: Path, **settings: Any) -> Ranks:
    """Start them; what they say goes to `log-RANK` in the folder."""
    context = rank_context()
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    size = stage(**settings).parallel.world_size
    worlds = [World(rank, size, rank, f"file://{meeting}", "test") for rank in range(size)]
    processes = [context.Process(target=_rank, args=(folder, world, settings)) for world in worlds]
    for process in processes:
        process.start()
    return Ranks(processes)


def _rank(folder: Path, world: World, settings: dict) -> None:
    with (folder / f"log-{world.rank}").open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    process_status = ProcessStatus()
    try:
        with process_status.stop_on_signals(), process_status.at_step_boundaries():
            run_training(folder, world, stage(**settings), process_status=process_status)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.exit_code)


def run_training(
    folder: Path,
    world: World,
    settings: TrainStage,
    *,
    windows: int = 64,
    objective: Objective = cross_entropy,
    process_status: ProcessStatus | None = None,
) -> TrainingState:
    """Train in a process group of its own."""
    shape = settings.model
    assert shape is not None
    folder.mkdir(parents=True, exist_ok=True)
    store, held_out = MemoryStore(windows), MemoryStore(16, seed=1)
    stream = ImportanceStream(
        ClusterIndex.single(windows), np.ones(1), global_batch_size=settings.global_batch_size, seed=0
    )
    setup = Setup(
        shape, settings.parallel, settings.precision, VOCABULARY, CONTEXT, settings.global_batch_size,
        settings.micro_batch_size, packing=settings.packing or "none",
    )  # fmt: skip
    with open_engine(
        setup,
        world,
        optimizer=settings.optimizer,
        initialize=lambda model: model.initialize(seed=0),
        objective=objective,
    ) as engine:
        rank, copies = engine.data_rank, engine.data_parallel
        return train(
            engine,
            Training(
                folder=folder,
                settings=settings,
                batches=TrainingBatches(store, stream, rank=rank, processes=copies),
                validation=lambda: all_windows(held_out).batches(batch_size=4, rank=rank, processes=copies),
                description={},
                step_flops=lambda slots, _: slots,
                processes=world.world_size,
                control=ControlGroup.open(),
                saver=Saver(folder, ControlGroup.open()),
                process_status=process_status or ProcessStatus(),
            ),
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole records of a folder, in the order written; torn lines of killed attempts are passed over."""
    records = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
