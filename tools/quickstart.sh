#!/usr/bin/env bash
# Everything from a fresh clone to the paper's table: an environment, real text, models, results.
#
# usage: tools/quickstart.sh [OPTIONS OF specialm run ...]
# Needs Python 3.11 or 3.12 and a package index. About 20 minutes on 2 cores; stop it at any time, it goes on where it was.
set -euo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit
fi
cd "$(dirname "$0")/.."
. tools/environment.sh static
echo "== fetching text"
python tools/quickstart_corpus.py
echo "== specialm run configs/pipelines/quickstart.yaml $*"
exec specialm run configs/pipelines/quickstart.yaml "$@"
