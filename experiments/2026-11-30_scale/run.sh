#!/usr/bin/env bash
# What a rank holds and waits for at 1e7 to 1e9 windows; see README.md.
#   experiments/2026-11-30_scale/run.sh [folder for sparse files: 2 GB, 450,000 of them]    5 minutes on one core
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/out}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python "$here/measure.py" order
for windows in 10000000 100000000 1000000000; do
    [ -e "$out/$windows" ] || python "$here/measure.py" make "$out" "$windows"
    python "$here/measure.py" rank "$out/$windows" keyed
done
python "$here/measure.py" rank "$out/100000000" permutation
rm -rf "$out/runs"
python "$here/measure.py" report "$out/runs/few" 2000 10
python "$here/measure.py" report "$out/runs/many" 2000 1
