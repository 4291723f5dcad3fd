#!/usr/bin/env bash
# Linters, types and all tests, from a fresh clone.
#
# usage: tools/test.sh [OPTIONS OF pytest ...]
# Needs Python 3.11 or 3.12 and a package index.
set -euo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit
fi
cd "$(dirname "$0")/.."
. tools/environment.sh static,dev
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy megatron_specialm
echo "== pytest"
exec python -m pytest "$@"
