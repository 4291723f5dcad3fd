"""Runs that are killed, stopped, hung up on and run twice at random, until they end: do they come to the same, to the bit?

    python tools/chaos.py [--kills 50] [--seed 0] [--steps 60] [--until STAGE] [--folder FOLDER] [--slurm]

A small config with every kind of stage runs undisturbed; then again and again, disturbed at random moments and started anew,
until it ends by itself, and with another folder and the next seed until there were `--kills` disturbances. Each time weights,
exports, tables and digests are compared, and looked for what is left over, of files and of processes. The first run that
does not hold is kept, with how to repeat it, and the exit code is 1.

With --slurm the config is submitted as jobs to the Slurm cluster of the tests, which is started on this machine (as root): jobs
are cancelled and queued again, their processes killed, nodes lost.
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
    """Run until there were enough disturbances; the exit code."""
    options = _options()
    with contextlib.ExitStack() as stack:
        disturbed = disturbed_run
        if options.slurm:
            sys.path.append(str(PROJECT))  # the cluster is that of the tests
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
    parser.add_argument("--kills", type=int, default=50, help="disturbances, all together")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count on")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--until", help="end with this stage; default: the whole config")
    parser.add_argument(
        "--slurm", action="store_true", help="as jobs on the Slurm cluster of the tests, started here (root)"
    )
    parser.add_argument("--folder", help="where the runs stand; default: a new one among temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
