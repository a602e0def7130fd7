#!/usr/bin/env bash
# Everything that only a GPU can tell, in under 8 minutes, for an extension that is built:
#
#   benchmarks/gpu_check.sh             with the Python of PYTHON, or python3
#   benchmarks/gpu_check.sh --dry-run   prints the commands
#
# The self-check, the tests, the four tools of compute-sanitizer on small shapes, each product against the library's,
# and the grid of steps against stock, with tables in benchmarks/results/. A part that fails or takes too long does
# not stop the others; the last lines tell which did, and the status is theirs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD
dry_run=$([ "${1:-}" = --dry-run ] && echo yes)
failed=()

# part NAME SECONDS COMMAND...
part() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name: $*"
  [ -n "$dry_run" ] && return
  timeout "$seconds" "$@" || failed+=("$name ($?)")
}

if [ -z "$dry_run" ] && ! nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; then
  echo "there is no GPU here" >&2
  exit 2
fi

part "self-check" 40 "$python" -m fastmlp
part "tests" 90 "$python" -m pytest -m "" tests/test_cuda.py
for tool in memcheck racecheck initcheck synccheck; do
  part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m fastmlp
done
for dtype in bfloat16 float32; do
  part "kernels, $dtype" 50 "$python" benchmarks/kernels.py --device cuda --dtype "$dtype" --rounds 3
  part "steps, $dtype" 40 "$python" benchmarks/steps.py --device cuda --dtype "$dtype" --rounds 3 --no-compile
done

part "summary" 10 "$python" - <<'PYTHON'
import csv, math
from itertools import groupby
from pathlib import Path

print(f"{'':32s}{'mean':>8s}{'worst':>8s}   at")
for path in sorted(Path("benchmarks/results").glob("*_cuda_*.csv")):
    rows = list(csv.DictReader(path.open()))
    kind, figures = ("product", ("over_library", "peak_share")) if "product" in rows[0] else ("column", ("speedup",))
    for name, group in groupby(sorted(rows, key=lambda row: row[kind]), key=lambda row: row[kind]):
        group = list(group)
        for figure in figures:
            values = [float(row[f"{figure}_p50"]) for row in group]
            worst = group[values.index(min(values))]
            place = " ".join(worst[key] for key in ("M", "K", "N", "network", "batch") if key in worst)
            mean = math.exp(sum(map(math.log, values)) / len(values))
            print(f"{rows[0]['dtype']:9s}{name:13s}{figure:13s}{mean:5.2f}{min(values):8.2f}   {place}")
    print("  ", *(f"{rows[0][key]}" for key in ("gpu", "driver", "cuda", "torch", "fastmlp", "commit")))
PYTHON

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
