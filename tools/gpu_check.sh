#!/usr/bin/env bash
# Everything that no machine without a GPU can know, in one command of nine minutes.
#
# usage: tools/gpu_check.sh [--tiny] [--budget SECONDS] [--parts NAME,NAME...] [--limit NAME=SECONDS]... [OUT]
#
# OUT (default: $OUT, else runs/gpu_check) receives gpu_check.json, gpu_check.txt and gpu_check.log. Each part is a process
# with a time limit; figures are written as they are measured, so a part that fails, hangs or is killed costs only itself.
# Needs torch, megatron-core and, for what is Transformer Engine's, Transformer Engine, in $PYTHON (default: python3).
# --tiny runs every part in small on any machine, also on a CPU. Exit code 0: all ran, and all figures are as expected.
set -euo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit
fi
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/tools${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1 # the checkout may be read-only
exec "${PYTHON:-python3}" -m gpu_check "$@"
