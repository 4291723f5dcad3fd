"""Benchmark saving a checkpoint: seconds, memory and bytes sent, of this tree and another one, alternating.

    git worktree add ../before COMMIT
    python tools/bench_checkpoint.py --before ../before [--layers 12 --hidden 768 --vocabulary 50304 ...] [--rounds 5]

Each turn starts the processes of a data-parallel layout on gloo, makes one step, so that Adam has moments, and saves. Tensors
are copied on the CPU while the passes of the next step run; before its update training waits for the rest of the copy
("blocked"). The passes may be slower beside it ("passes beside the copy", and "passes alone"). In trees whose engines have no
`begin_copy` training waits for all of the copy. Writing, fsync, hashing and publishing run in the background. A plain write is
that of the same tensors to one file per process, with fsync, and without names, hashes and publishing. What the passes take
alone is subtracted from seconds, CPU time and bytes of the whole. Memory is the peak resident memory during the passes and the
save, minus that before, of the process with the largest difference. Bytes sent are the kernel's counts for all TCP
connections. CPU time is the sum over all processes, so other load on the machine matters little. Prints medians over rounds
and ratios. Needs Linux.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

TCP_BYTES_SENT = slice(200, 208)  # of `struct tcp_info` of Linux
# Per turn: the unit, and the function that combines the processes' numbers.
NUMBERS: dict[str, tuple[str, Callable[[Iterable[float]], float]]] = {
    "seconds blocked": ("s", max),
    "seconds of passes beside the copy": ("s", max),
    "seconds of passes alone": ("s", max),
    "seconds in all": ("s", max),
    "CPU time in all": ("s", sum),
    "peak memory": ("MB", max),
    "bytes sent": ("MB", sum),
    "bytes written": ("MB", sum),
    "seconds of a plain write": ("s", max),
    "CPU time of a plain write": ("s", sum),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checked-out tree to compare with")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--out", type=Path, help="of one turn's process group; used by the tool itself")
    for name, value in {
        "layers": 12,
        "hidden": 768,
        "heads": 12,
        "vocabulary": 50304,
        "windows": 4,
        "context": 64,
        "processes": 4,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.out is not None:
        _save_once(args)
        return
    trees = {"before": args.before, "now": Path(__file__).resolve().parents[1]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name, tree in trees.items() if tree is not None}
    for turn in range(args.rounds):
        for name in found if turn % 2 == 0 else reversed(found):
            found[name].append(_turn(trees[name]))
            print(turn, name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)
    for number, (unit, _) in NUMBERS.items():
        medians = {name: statistics.median(turn[number] for turn in turns) for name, turns in found.items()}
        ratios = [
            one[number] / other[number]
            for one, other in zip(found["now"], found.get("before", ()), strict=False)
            if other[number]
        ]
        text = ", ".join(f"{name} {median:,.2f} {unit}" for name, median in medians.items())
        print(f"{number}: {text}" + (f", ratio {statistics.median(ratios):.3f}" if ratios else ""))


def _turn(tree: Path) -> dict[str, float]:
    """One save with the code of a tree and this tool's own arguments."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--out", folder]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tree)})
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
    return {number: how(rank[number] for rank in ranks) for number, (_, how) in NUMBERS.items()}


def _save_once(args: argparse.Namespace) -> None:
    import megatron_specialm.engine.megatron.engine  # noqa: F401 (imported once, before the processes are forked)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, args)) for rank in range(args.processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process of the benchmark failed")


def _rank(rank: int, args: argparse.Namespace) -> None:
    import numpy as np
    import torch.distributed as dist

    from megatron_specialm.base.control_group import ControlGroup
    from megatron_specialm.base.environment import World
    from megatron_specialm.checkpoint.saving import save_checkpoint
    from megatron_specialm.config.model import ModelConfig
    from megatron_specialm.config.parallel import ParallelConfig
    from megatron_specialm.config.training import Optimizer
    from megatron_specialm.data.store import Batch
    from megatron_specialm.engine.megatron.engine import MegatronEngine
    from megatron_specialm.engine.process_groups import process_group
    from megatron_specialm.model.gpt import Gpt

    shape = ModelConfig(
        layers=args.layers, hidden_size=args.hidden, ffn_hidden_size=4 * args.hidden, attention_heads=args.heads
    )
    parallel = ParallelConfig(data_parallel=args.processes, distributed_optimizer=args.distributed_optimizer)
    tokens = np.random.default_rng(rank).integers(0, args.vocabulary, (args.windows, args.context))
    world = World(rank, args.processes, rank, f"file://{args.out}/meeting", "benchmark")
    with process_group(world, parallel=parallel):
        model = Gpt(shape, vocabulary_size=args.vocabulary, context_length=args.context, parallel=parallel)
        for weight in model.weights():  # drawing first values takes long, and they do not matter
            weight.parameter.data.fill_(0.01)
        engine = MegatronEngine(
            model, parallel=parallel, optimizer=Optimizer(learning_rate=1e-4), micro_batch_size=args.windows
        )
        batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))
        engine.train_step(batch, learning_rate=1e-4)
        control = ControlGroup.open()
        dist.barrier()
        ctypes.CDLL(None).malloc_trim(0)  # the allocator keeps freed blocks, which would hide the save's memory
        engine.accumulate_gradients(batch)  # it gets back what passes need
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        began, worked, sent = time.perf_counter(), time.process_time(), _bytes_sent()
        engine.accumulate_gradients(batch)
        passes, of_passes, in_passes = time.perf_counter() - began, time.process_time() - worked, _bytes_sent() - sent
        began, worked, sent = time.perf_counter(), time.process_time(), _bytes_sent()
        if hasattr(engine, "begin_copy"):
            copying = engine.begin_copy()
        else:
            weights, state = engine.weights(), engine.optimizer_state()
        begun = time.perf_counter()
        engine.accumulate_gradients(batch)
        accumulated = time.perf_counter()
        if hasattr(engine, "begin_copy"):
            weights, state = copying.result()
        beside, blocked = accumulated - begun, begun - began + time.perf_counter() - accumulated
        folder = save_checkpoint(
            args.out / "saved", step=1, weights=weights, optimizer_state=state, state={}, control=control
        )
        seconds, work = time.perf_counter() - began - passes, time.process_time() - worked - of_passes
        peak, sent = _memory("VmHWM") - before, _bytes_sent() - sent - in_passes
        dist.barrier()
        began, worked = time.perf_counter(), time.process_time()
        with (args.out / f"plain-{rank}").open("wb") as file:
            for tensor in (*weights.values(), *state.values()):
                file.write(tensor.contiguous().numpy().data)
            os.fsync(file.fileno())
        plain, plain_work = time.perf_counter() - began, time.process_time() - worked
        dist.barrier()
    written = sum(path.stat().st_size for path in folder.glob(f"*-{rank:05d}.safetensors"))
    found = (blocked, beside, passes, seconds, work, peak / 1e6, sent / 1e6, written / 1e6, plain, plain_work)
    numbers = dict(zip(NUMBERS, found, strict=True))
    (args.out / f"rank-{rank}.json").write_text(json.dumps(numbers))


def _memory(field: str) -> int:
    """A field of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _bytes_sent() -> int:
    """Bytes sent over all TCP connections of this process."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    total += int.from_bytes(
                        copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[TCP_BYTES_SENT], "little"
                    )
        except OSError:  # closed in the meantime
            continue
    return total


if __name__ == "__main__":
    main()
