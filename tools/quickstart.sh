#!/usr/bin/env bash
# Everything from a fresh clone to the paper's table and figures: an environment, real text, models, results.
#
# usage: tools/quickstart.sh [OPTIONS OF specialm run ...]
# Needs Python 3.11 or 3.12 and a package index. About 15 minutes on 2 cores; stop it at any time, it goes on where it was.
set -euo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit
fi
cd "$(dirname "$0")/.."
. tools/environment.sh static
echo "== fetching text"
python tools/quickstart_corpus.py
config=configs/pipelines/quickstart.yaml
echo "== specialm run $config $*"
specialm run "$config" "$@"
overrides=()
for word in "$@"; do
  case $word in -*) ;; *=*) overrides+=("$word") ;; esac
done
echo "== specialm figures $config"
specialm figures "$config" ${overrides[@]+"${overrides[@]}"}
echo "== specialm samples $config"
specialm samples "$config" ${overrides[@]+"${overrides[@]}"}
