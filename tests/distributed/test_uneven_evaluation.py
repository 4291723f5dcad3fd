"""Copies with unequal numbers of validation windows, none among them: nobody waits for a pass that another does not make."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.base.environment import World
from megatron_specialm.config.model import LowRank
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.model.gpt import Gpt
from tests.processes import rank_context
from tests.training import CONTEXT, EPSILON, SHAPE, VOCABULARY, MemoryStore, Ranks

PLAIN = SHAPE.model_copy(update={"layers": 4})
LORA = PLAIN.model_copy(update={"lora": LowRank(rank=4)})
MOE = PLAIN.model_copy(update={"moe": MixtureOfExperts(experts=4)})
BALANCED = PLAIN.model_copy(update={"moe": MixtureOfExperts(experts=4, bias_update_rate=0.01)})
WINDOWS = (1, 0, 3, 21)  # of a set, after a step each: on two copies 1 and 0, none, 2 and 1, 11 and 10
DP2, SHARED = {"data_parallel": 2}, {"distributed_optimizer": True, "overlap_communication": True}
LAYOUTS: list[tuple] = [  # with packing, if windows are not padded
    (PLAIN, {**DP2, **SHARED}),
    (LORA, {**DP2, **SHARED}),
    (PLAIN, {**DP2, "distributed_optimizer": True}),
    (PLAIN, {**DP2, "pipeline_parallel": 2, **SHARED}),
    (LORA, {**DP2, "pipeline_parallel": 2, "virtual_pipeline": 2, **SHARED}),
    (PLAIN, {**DP2, "tensor_parallel": 2, "sequence_parallel": True, **SHARED}),
    (MOE, {**DP2, "expert_parallel": 2, **SHARED}),
    (MOE, {**DP2, "expert_parallel": 2, "pipeline_parallel": 2}),
    (PLAIN, {**DP2, "pipeline_parallel": 2, **SHARED}, "packed"),
    (BALANCED, {**DP2, "expert_parallel": 2, **SHARED}, "packed"),
]


def _losses(case: int | None, world: World, file: Path) -> None:
    """Train and evaluate in turns, in a layout or on one process."""
    with file.with_suffix(".log").open("wb") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    shape, layout, *packing = (PLAIN, {}) if case is None else LAYOUTS[case]
    parallel = ParallelConfig(**layout)
    with process_group(world, parallel=parallel, timeout_seconds=30):
        model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, parallel=parallel)
        model.initialize(seed=0)
        settings = Optimizer(epsilon=EPSILON)
        engine = MegatronEngine(
            model, parallel=parallel, optimizer=settings, micro_batch_size=1, packing=packing[0] if packing else "none"
        )
        rank, copies = engine.data_rank, engine.data_parallel
        share = 8 // copies
        batch = MemoryStore(8).batch(np.arange(rank * share, (rank + 1) * share))
        losses = []
        for windows in WINDOWS:
            engine.train_step(batch, learning_rate=1e-2)
            held_out = MemoryStore(windows, seed=1)
            own = (held_out.batch(np.array([number])) for number in range(rank, windows, copies))
            losses.append(engine.evaluate(own)[:2])
    file.write_text(json.dumps(losses))


def _run(case: int | None, folder: Path, size: int) -> list[list]:
    context = rank_context()
    worlds = [World(rank, size, rank, f"file://{folder}/meeting-{size}", "test") for rank in range(size)]
    files = [folder / f"{size}-{world.rank}.json" for world in worlds]
    processes = [context.Process(target=_losses, args=(case, *of)) for of in zip(worlds, files, strict=True)]
    for process in processes:
        process.start()
    said = [file.with_suffix(".log") for file in files]
    assert Ranks(processes).join(120) == [0] * size, "\n".join(log.read_text() for log in said if log.exists())
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list:
    return _run(None, tmp_path_factory.mktemp("one"), 1)[0]


@pytest.mark.parametrize(
    "case",
    range(len(LAYOUTS)),
    ids=lambda case: "-".join(
        ["lora"] * (LAYOUTS[case][0] is LORA) + [ParallelConfig(**LAYOUTS[case][1]).describe(), *LAYOUTS[case][2:]]
    ),
)
def test_copies_evaluate_what_they_have(case: int, one_process: list, tmp_path: Path) -> None:
    shape, layout, *_ = LAYOUTS[case]
    found = _run(case, tmp_path, ParallelConfig(**layout).world_size)
    assert all(losses == found[0] for losses in found), "one loss for all processes"
    for (total, tokens), (expected, counted) in zip(found[0], one_process, strict=True):
        assert tokens == counted
        if shape is PLAIN:
            assert total == pytest.approx(expected, rel=1e-5)
