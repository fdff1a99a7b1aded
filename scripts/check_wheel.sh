#!/usr/bin/env bash
# The wheel works where the repository is not: build it, install it into an empty environment,
# and train a few steps from another folder with the config tree that the wheel carries.
#   bash scripts/check_wheel.sh            PYTHON=python3.12 bash scripts/check_wheel.sh
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
folder=$(mktemp -d "${TMPDIR:-/tmp}/check-wheel.XXXXXX")
trap 'rm -rf "$folder"' EXIT

fail() {
    echo "check_wheel: $*" >&2
    exit 1
}

echo "== build =="
"$python" -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/python" -m pip install -q --disable-pip-version-check --upgrade pip
# pip builds in an isolated environment of its own, from a copy without untracked files
git -C "$repository" ls-files -z | (cd "$repository" && xargs -0 -r tar -c --ignore-failed-read) |
    (mkdir "$folder/source" && tar -x -C "$folder/source")
"$bin/python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$folder/dist" "$folder/source"
wheel=$(ls "$folder"/dist/genscale-*.whl)

echo "== contents =="
"$bin/python" -m zipfile -l "$wheel" > "$folder/contents.txt"
for name in genscale/conf/train.yaml genscale/conf/sample.yaml genscale/conf/evaluate.yaml \
    genscale/conf/model/dimr.yaml genscale/report/style.css genscale/cli/entry.py LICENSE; do
    grep -q "$name" "$folder/contents.txt" || fail "$(basename "$wheel") lacks $name"
done
if grep -qE '^(tests|scripts|docs|outputs)/' "$folder/contents.txt"; then
    fail "$(basename "$wheel") carries tests, scripts, docs or outputs"
fi

echo "== install =="
constraints="$repository/constraints.txt"
# torch first and by exact version: a range would take the newest GPU build
"$bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" torch
"$bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" "$wheel"
"$bin/python" -m pip check

echo "== run elsewhere =="
mkdir "$folder/elsewhere"
cd "$folder/elsewhere"
unset PYTHONPATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} CUDA_VISIBLE_DEVICES=
used=$("$bin/python" -c 'from genscale.cli.app import conf_directory; print(conf_directory())')
case $used in
    "$folder"/venv/*/genscale/conf) ;;
    *) fail "the config tree in use is $used, not the wheel's" ;;
esac
"$bin/genscale-train" --help > help.txt
grep -q '^usage: genscale-train ' help.txt || fail "genscale-train --help prints no usage"
"$bin/genscale-train" debug=smoke trainer.max_steps=5 run_dir=run
for name in config.yaml env.json metrics.jsonl summary.json report.html; do
    [ -s "run/$name" ] || fail "genscale-train left no run/$name"
done
ls run/checkpoints/step-*.ckpt > /dev/null 2>&1 || fail "genscale-train left no checkpoint"
"$bin/genscale-sample" run=run num_samples=10 out_dir=samples sampler.steps=2
[ -s samples/grid.png ] || fail "genscale-sample left no samples/grid.png"

# a mistake is one sentence and status 1
status=0
"$bin/genscale-train" modle=dimr 2> mistake.txt || status=$?
[ "$status" = 1 ] || fail "a misspelt key gave exit status $status, not 1"
grep -q "Did you mean 'model'?" mistake.txt || fail "a misspelt key was not explained"

# nothing but what was asked for
left=$(ls -A | sort | tr '\n' ' ')
case $left in
    "help.txt mistake.txt outputs run samples ") ;;  # outputs/latest points to the run
    *) fail "files left in the working folder: $left" ;;
esac
echo "check_wheel: $(basename "$wheel") works"
