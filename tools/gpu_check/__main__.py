"""The command line of tools/gpu_check.sh. It starts each part as a process with `--part NAME FILE`."""

import argparse
import os
import sys
from pathlib import Path

from gpu_check import part, run


def main() -> int:
    """Run all parts, or one part."""
    parser = argparse.ArgumentParser(prog="tools/gpu_check.sh")
    parser.add_argument("out", nargs="?", type=Path, default=Path(os.environ.get("OUT", "runs/gpu_check")))
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--parts", type=_names, default=tuple(run.PARTS), help=f"of {','.join(run.PARTS)}")
    parser.add_argument("--limit", action="append", default=[], type=_limit, metavar="NAME=SECONDS")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return part.be(args.part, args.out, tiny=args.tiny)
    return run.run(args.out, names=args.parts, budget=args.budget, limits=dict(args.limit), tiny=args.tiny)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(run.PARTS)):
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; parts are {', '.join(run.PARTS)}")
    return names


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    _names(name)
    try:
        return name, float(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SECONDS") from None


if __name__ == "__main__":
    sys.exit(main())
