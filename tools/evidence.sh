#!/usr/bin/env bash
# One seed of the experiment of docs/evidence.md: text, trainings, and the CSV files and tables of all seeds that are finished.
#
# usage: tools/evidence.sh SEED [OPTIONS OF specialm run ...]
# Needs Python 3.11 or 3.12 and a package index. Begin with seed 0, whose tokens and clusters the other seeds take over. You may
# stop it at any time; the same command goes on where it was. The CSV files keep the seeds that they have.
set -euo pipefail
if [ $# = 0 ] || [ "$1" = --help ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit
fi
seed=$1
shift
cd "$(dirname "$0")/.."
. tools/environment.sh static
python tools/evidence_corpus.py

run_folders() { # of a config: those that are begun, or with $2 = results.json those that are finished
  local found
  for found in "runs/$1-"[0-9]*; do
    [ ! -e "$found/$2" ] || echo "$found"
  done
}

for config in evidence evidence-sizes; do
  reuse=$(run_folders evidence pipeline.yaml; run_folders evidence-sizes pipeline.yaml)
  echo "== specialm run configs/pipelines/$config.yaml, seed $seed"
  specialm run "configs/pipelines/$config.yaml" "root=runs/$config-$seed" "training_seed=$seed" "reuse=[${reuse//$'\n'/, }]" "$@"
done
# shellcheck disable=SC2046  # one word per folder
python tools/results_tables.py write-csv $(run_folders evidence results.json) --keep docs/evidence/results.csv \
  --output docs/evidence/results.csv --concentration docs/evidence/concentration.csv
# shellcheck disable=SC2046
python tools/results_tables.py write-csv $(run_folders evidence-sizes results.json) --keep docs/evidence/sizes.csv \
  --output docs/evidence/sizes.csv
python tools/results_tables.py draw docs/evidence/results.csv generic-cost-flops specialization-cost-flops total-cost-flops \
  --domains legal,speeches,documentation,recipes --output docs/evidence/concentrated
python tools/results_tables.py draw docs/evidence/results.csv domains --output docs/evidence
python tools/results_tables.py draw docs/evidence/sizes.csv set-size domains-by-size --output docs/evidence
python tools/results_tables.py fill docs/evidence.md
