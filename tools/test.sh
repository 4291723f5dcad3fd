#!/usr/bin/env bash
# Linters, types and all tests, from a fresh clone.
#
# usage: tools/test.sh [--quick] [OPTIONS OF pytest ...]
#   --quick   only tests/unit and tests/distributed, without those marked slow: no Slurm cluster, no whole pipelines
# Needs Python 3.11 or 3.12 and a package index. Tests run on all cores (pytest-xdist); `-n 0` runs them one after the other.
set -euo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit
fi
cd "$(dirname "$0")/.."
if [ "${1:-}" = --quick ]; then
  shift
  set -- tests/distributed tests/unit -m "not slow" "$@" # the longest files first
fi
. tools/environment.sh static,dev
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy megatron_specialm
unset PYTHONDONTWRITEBYTECODE # tests start hundreds of processes: each would compile the package
echo "== pytest"
exec python -m pytest -n "$(($(nproc) + 1))" "$@" # one more than cores: tests wait for Slurm, and for processes to meet
