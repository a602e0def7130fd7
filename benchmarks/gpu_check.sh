#!/usr/bin/env bash
# What only a GPU can tell, in at most 8 minutes, on a machine with nvcc and a CUDA torch; nothing is installed:
#
#   benchmarks/gpu_check.sh [DIR]   with the Python of PYTHON, or python3; results go to DIR, $OUT or benchmarks/results
#
#   sight           10 s  which GPU, driver and compute mode
#   build          240 s  the extension for this GPU, where none that is built for CUDA is there
#   self-check      45 s  `python -m fastmlp`: what is built, and whether every kernel's result is right
#   tests           90 s  tests/test_cuda.py, all of it
#   memcheck, racecheck, initcheck, synccheck
#                  100 s  accesses out of bounds, races in shared memory, reads of what nothing wrote, barriers: by
#                         compute-sanitizer, in the tests that are small. All at once, where processes may share the
#                         GPU
#   kernels     4 x 35 s  each product by our kernels against torch's, in four dtypes
#   products        10 s  fastmlp/products.csv of it: which products are ours, and which the library's
#   steps       2 x 50 s  whole steps and inference against eager stock, and against a CUDA graph of it
#   compiled    2 x 75 s  a few of them against torch.compile too
#   summary         10 s  all that in at most 40 lines
#
# The limits are 655 s without a build; 400 s are likely. So the order is that of worth, and a part has its limit or
# what is left of 8 minutes. None stops the others. What a part has measured by its end is kept, and what it said is in
# gpu_check.log. Where git cannot tell the commit, COMMIT does. The exit status is 0 where all parts have ended well,
# and 2 where there is no GPU.
set -uo pipefail
case ${1:-} in -*)
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit
  ;;
esac
out=$(realpath -m "${1:-${OUT:-$(dirname "$0")/results}}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
end=$((SECONDS + 480))
failed=0

mkdir -p "$out"
log=$out/gpu_check.log
: >"$log"
said=$(mktemp -d) # of the parts that have not ended
trap 'cat "$said"/*.txt >>"$log" 2>/dev/null; rm -rf "$said"' EXIT

# run NAME SECONDS COMMAND...: with 15 seconds left for the summary
run() {
  local name=$1 limit=$2 start=$SECONDS left=$((end - SECONDS - 15)) status=124
  shift 2
  : >"$said/$name.txt"
  ((limit = limit < left ? limit : left))
  if ((limit > 0)); then
    timeout -k 5 "$limit" "$@" >>"$said/$name.txt" 2>&1
    status=$?
  fi
  echo "== $name ($status, $((SECONDS - start)) s): $*" >"$said/$name.head"
}

# report NAME: what `run` has left goes to the log; the part's status
report() {
  local head
  head=$(<"$said/$1.head")
  { echo "$head" && cat "$said/$1.txt" && echo; } >>"$log"
  rm "$said/$1".*
  echo "${head%%:*}"
  [[ $head == *" (0, "* ]] || { failed=1 && return 1; }
}

part() { run "$@" && report "$1"; }

summary() {
  timeout 10 "$python" benchmarks/gpu_summary.py "$out" 2>&1 | tee -a "$log" || failed=1
  exit "$failed"
}

# sanitize TOOL: with every tensor's memory its own, so that one past the end is not another tensor's. What torch's
# kernels write must be seen by initcheck; the others look at ours alone.
sanitize() {
  local ours=(--kernel-name kns=fastmlp)
  [ "$1" = initcheck ] && ours=()
  run "$1" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 86 ${ours[@]+"${ours[@]}"} \
    "$python" -m pytest -p no:cacheprovider -vv tests/test_cuda.py -m "not slow" \
    -k "not (graph or captur or a_step or stream or wait or out_of_bounds or grid_row or 2048 or 4096 or 65536)"
}

if ! part sight 10 nvidia-smi --query-gpu=name,driver_version,compute_mode,memory.total,power.limit --format=csv,noheader; then
  echo "there is no GPU here" >&2
  exit 2
fi
mode=$(nvidia-smi --query-gpu=compute_mode --format=csv,noheader)

is_built='import sys, fastmlp; sys.exit(fastmlp.build_info()["cuda"] is None)'
if ! timeout 60 "$python" -c "$is_built" >/dev/null 2>&1; then
  # Without a list of another's, setup.py builds for the GPU in sight.
  part build 240 env -u TORCH_CUDA_ARCH_LIST FASTMLP_CUDA=1 "$python" setup.py --quiet build_ext --inplace --force ||
    { tail -n 20 "$log" && summary; }
fi

part self-check 45 "$python" -m fastmlp
part tests 90 "$python" -m pytest -p no:cacheprovider -vv -m "" tests/test_cuda.py

tools=(memcheck racecheck initcheck synccheck)
for tool in "${tools[@]}"; do
  sanitize "$tool" &
  [[ $mode == Default* ]] || wait
done
wait
for tool in "${tools[@]}"; do report "$tool"; done

for dtype in bfloat16 float32 tf32 float16; do
  part "kernels, $dtype" 35 env FASTMLP_PRODUCTS=own \
    "$python" benchmarks/kernels.py --device cuda --dtype "$dtype" --rounds 3 --output "$out"
done
part products 10 "$python" benchmarks/products.py --results "$out"
[ ! -e fastmlp/products.csv ] || cp fastmlp/products.csv "$out"

for dtype in float32 bfloat16; do
  part "steps, $dtype" 50 "$python" benchmarks/steps.py --device cuda --dtype "$dtype" --rounds 3 \
    --no-compile --output "$out"
done
for dtype in float32 bfloat16; do
  part "compiled, $dtype" 75 "$python" benchmarks/steps.py --device cuda --dtype "$dtype" --rounds 3 \
    --only seed@64 rl@64 wide@2048 field --columns all step "graph of all" infer --output "$out"
done

summary
