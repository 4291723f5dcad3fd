"""Benchmark drawing one global batch at the size of a real run: `python tools/bench_stream.py`.

For several distributions of weights and for streams with experts, prints milliseconds per global batch and the growth of the
process: anonymous memory, and mapped pages of the order file, which the kernel may drop. Steps are far apart, so that caches do
not help. The file is sparse, so that no disk is measured.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from megatron_specialm.config.training import Soup
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.experts import ExpertStream
from megatron_specialm.data.sampling import ImportanceStream


def resident_mib() -> tuple[float, float]:
    """Resident memory of this process in MiB: anonymous, file-backed."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))


def weight_shapes(k: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "uniform": np.ones(k),
        "Dirichlet 0.05": random.dirichlet(np.full(k, 0.05)),
        "Zipf 1.2": random.permutation(1.0 / np.arange(1, k + 1) ** 1.2),
        "geometric": 0.5 ** np.arange(k),
        "one cluster": np.eye(k)[0],
    }


def streams(k: int, *, global_batch_size: int) -> dict[str, Callable[[ClusterIndex], ImportanceStream | ExpertStream]]:
    """Constructors of streams from an index, by name."""
    weighted = {
        name: partial(ImportanceStream, weights=weights, global_batch_size=global_batch_size, seed=0)
        for name, weights in weight_shapes(k).items()
    }
    experts = {
        name: partial(ExpertStream, global_batch_size=global_batch_size, windows_per_expert=4, soup=soup, seed=0)
        for name, soup in {"experts": None, "half soups": Soup(fraction=0.5)}.items()
    }
    return {**weighted, **experts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=300_000_000)
    parser.add_argument("--clusters", type=int, default=1024)
    parser.add_argument("--global-batch-size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=1000)
    args = parser.parse_args()

    random = np.random.default_rng(1)
    sizes = 1 + random.multinomial(args.windows - args.clusters, random.dirichlet(np.ones(args.clusters)))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    steps = random.integers(0, 1_000_000, size=args.batches)
    print(f"{args.windows:,} windows, {args.clusters:,} clusters, batches of {args.global_batch_size}")
    print(f"{'stream':16s}{'setup ms':>10s}{'median ms':>11s}{'95% ms':>9s}{'own MiB':>9s}{'mapped MiB':>12s}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "order.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(args.windows,)).flush()
        for name, make in streams(args.clusters, global_batch_size=args.global_batch_size).items():
            index = ClusterIndex(order=np.load(path, mmap_mode="r"), offsets=offsets)
            own, mapped = resident_mib()
            start = time.perf_counter()
            stream = make(index)
            setup = time.perf_counter() - start
            times = []
            for step in steps:
                start = time.perf_counter()
                stream.draw(int(step))
                times.append(time.perf_counter() - start)
            median, tail = 1e3 * np.quantile(times, [0.5, 0.95])
            own, mapped = (after - before for after, before in zip(resident_mib(), (own, mapped), strict=True))
            print(f"{name:16s}{1e3 * setup:10.1f}{median:11.3f}{tail:9.3f}{own:9.1f}{mapped:12.1f}", flush=True)


if __name__ == "__main__":
    main()
