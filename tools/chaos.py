"""Disturb runs at random (kill, stop, hang up, run twice) until they end, and check that the results are equal bit for bit.

    python tools/chaos.py [--kills 50] [--seed 0] [--steps 60] [--until STAGE] [--folder FOLDER] [--slurm]

A small config with every kind of stage runs once undisturbed. Then it is disturbed at random moments and started again until it
ends by itself. This repeats in new folders, with the next seed, until there were `--kills` disturbances. Each time weights,
exports, tables and digests are compared, and the tool looks for leftover files and processes. The first failing run is kept,
the command that repeats it is printed, and the exit code is 1.

With --slurm the config is submitted as jobs to the tests' Slurm cluster, which is started on this machine (as root). Jobs are
cancelled and requeued, their processes killed, nodes lost.
"""

import argparse
import contextlib
import functools
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disturbed.local import disturbed_run, straight_run
from disturbed.processes import PROJECT


def main() -> int:
    """Run until there were enough disturbances; returns the exit code."""
    options = _options()
    with contextlib.ExitStack() as stack:
        disturbed = disturbed_run
        if options.slurm:
            sys.path.append(str(PROJECT))  # for the tests' cluster
            from disturbed.jobs import disturbed_jobs

            from tests.cluster.testbed import running_cluster

            disturbed = functools.partial(disturbed_jobs, stack.enter_context(running_cluster()))
        return _disturb(disturbed, options)


def _disturb(disturbed: Callable[..., Any], options: argparse.Namespace) -> int:
    base = Path(options.folder or tempfile.mkdtemp(prefix="chaos-"))
    began, happened, seed = time.monotonic(), Counter[str](), options.seed
    sizes = {"steps": options.steps, "every": 5, "until": options.until}
    straight_run(base / "straight", **sizes)
    print(f"undisturbed: {time.monotonic() - began:.0f} s, in {base}", flush=True)
    while (left := options.kills - happened.total()) > 0:
        folder = base / f"seed-{seed}"
        run = disturbed(folder, base / "straight", seed=seed, at_most=left, **sizes)
        happened += run.happened
        print(f"seed {seed}: {run.happened.total()} disturbances, {run.launches} starts", flush=True)
        if run.faults:
            print("\n".join(run.faults))
            again = ["--slurm"] * options.slurm + (["--until", options.until] if options.until else [])
            again += ["--seed", str(seed), "--kills", str(left), "--steps", str(options.steps)]
            print(f"kept: {folder}; to repeat: python tools/chaos.py {' '.join(again)}")
            return 1
        shutil.rmtree(folder)
        seed += 1
    shutil.rmtree(base / "straight")
    for kind, count in sorted(happened.items()):
        print(f"{count:5}  {kind}")
    print(f"{happened.total():5}  in {time.monotonic() - began:.0f} s: all runs have come to the same bits")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of disturbances in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each following run adds 1")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--until", help="end with this stage; default: the whole config")
    parser.add_argument(
        "--slurm", action="store_true", help="as jobs on the Slurm cluster of the tests, started here (root)"
    )
    parser.add_argument("--folder", help="the folder for the runs; default: a new temporary folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
