#!/usr/bin/env bash
# The whole story on embedded real digits: train, sample, evaluate with and without guidance.
#   bash scripts/demo.sh [run folder]        (make demo sets everything up first)
set -euo pipefail
cd "$(dirname "$0")/.."
# threads that wait for each other spin for some microseconds only: a busy neighbour then costs its
# share, not a factor
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-20000}
run=${1:-outputs/demo}

if [ -e "$run" ]; then
    old="$run.$(date +%Y-%m-%d_%H-%M-%S)"
    echo "keeping the earlier demo in $old"
    mv "$run" "$old"
fi

echo "== 1/3 train DiMR on 16 x 16 digits =="
python train.py model=dimr data=digits run_dir="$run"

echo "== 2/3 sample 500 digits, 50 of each class =="
python sample.py run="$run" num_samples=500 guidance.scale=2 format=npz out_dir="$run/samples/guided"

echo "== 3/3 evaluate, without guidance and at guidance scale 2 =="
python evaluate.py run="$run" num_samples=500 out_dir="$run/evaluations/1-unguided"
python evaluate.py run="$run" num_samples=500 guidance.scale=2 out_dir="$run/evaluations/2-guidance-2"

echo
echo "report: $run/report.html"
