# ruff: noqa: E501
"""Plants faults in the sources, one after the other, and tells which ones the quick tests do not find.

    python tests/mutants.py             all of them
    python tests/mutants.py cuda optim  those whose file has such a word in its path

Each fault is a replacement in one file, in a copy of the tree, and the tests named for it must fail there.
Kernels are compiled by tests/test_kernels.py itself, for one instruction set; the extension is built only for
faults in csrc/torch, the first time as a whole, then the one file. The status is 1 if a fault was not found.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

PORTABLE = "tests/test_kernels.py -k portable"
CUDA = "tests/test_kernels.py -k cuda"
GPU = "tests/test_kernels.py -k gpu"
BANK = "tests/test_kernels.py -k bank"
STEP = "tests/test_whole_step.py"


class Fault(NamedTuple):
    """What stands in a file, what is to stand there, and what finds it: arguments of pytest."""

    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # What the backends share: activations, optimizers.
    Fault("csrc/activation.h", "return y <= 0.0f ? V{} : dy;", "return y < 0.0f ? V{} : dy;", PORTABLE),
    Fault("csrc/activation.h", "dy * fused(-y, y, 1.0f)", "dy * fused(-y, y, 1.001f)", PORTABLE),
    Fault("csrc/activation.h", "(y > low) & (y < high)", "(y > low) & (y <= high)", PORTABLE),
    Fault("csrc/activation.h", "x > threshold ? z :", "x > 2.0f * threshold ? z :", PORTABLE),
    Fault("csrc/activation.h", "return size < 1.25f ?", "return size < 1.75f ?", PORTABLE),
    Fault("csrc/optimizer.h", "if (maximize) g = -g;\n    if (weight_decay != 0) g = fused(V{} + weight_decay, w, g);  //", "if (weight_decay != 0) g = fused(V{} + weight_decay, w, g);  //", PORTABLE),
    Fault("csrc/optimizer.h", "if (weight_decay != 0) g = fused(V{} + weight_decay, w, g);  //", "g = fused(V{} + weight_decay, w, g);  //", PORTABLE),
    Fault("csrc/optimizer.h", "return (a != a) | (a > b) ? a : b;", "return (a != a) | (a < b) ? a : b;", PORTABLE),
    Fault("csrc/optimizer.h", "c.max_norm / (norm + 1e-6)", "c.max_norm / (norm + 1e-2)", PORTABLE),
    # When the CPU's threads are woken.
    Fault("csrc/cpu/threads.h", "barrier = 0.6 + 0.3 * n", "barrier = 0.6", "tests/test_kernels.py -k more_threads"),
    Fault("csrc/cpu/threads.h", "region = 0.9 + 0.3 * n", "region = 0.9", "tests/test_kernels.py -k more_threads"),
    Fault("csrc/cpu/plan.cpp", "stride > 0 : between", "stride > 0 : 2 * between", PORTABLE),
    # The CPU's kernels.
    Fault("csrc/cpu/isa/inner.inc", "if (k < K) inner_step", "if (k + 1 < K) inner_step", PORTABLE),
    Fault("csrc/cpu/isa/inner.inc", "if (z) activate(Identity{}, sums", "if (z) activate(activation, sums", PORTABLE),
    Fault("csrc/cpu/isa/outer.inc", "p.accumulate || chunk > 0, sums", "p.accumulate, sums", PORTABLE),
    Fault("csrc/cpu/isa/outer.inc", "if (t.adds) add_tile", "if (t.adds && last == width) add_tile", PORTABLE),
    Fault("csrc/cpu/isa/outer.inc", "return is_relu || p.bias ||", "return is_relu ||", PORTABLE),
    Fault("csrc/cpu/isa/packing.inc", "sums, bool accumulate) {", "sums, bool) {\n  constexpr bool accumulate = false;", PORTABLE),
    Fault("csrc/cpu/isa/update.inc", "s < Row::states; ++s) store(", "s + 1 < Row::states; ++s) store(", PORTABLE),
    Fault("csrc/cpu/isa/update.inc", "grad(r, i, n - i), states, r * ld + i, n - i);", "grad(r, i, n - i), states, r * ld + i, n - i - 1);", PORTABLE),
    Fault("csrc/cpu/isa/clip.inc", "i < n; i += width) even.add(load(g + i, n - i))", "i + width <= n; i += width) even.add(load(g + i, n - i))", PORTABLE),
    Fault("csrc/cpu/isa/softmax.inc", "exponential(load(z + c) - top)", "exponential(load(z + c))", PORTABLE),
    Fault("csrc/cpu/isa/softmax.inc", "if (counts) grad[t] -=", "grad[t < 0 ? 0 : t] -=", PORTABLE),
    Fault("csrc/cpu/isa/registers.inc", "if (n & half) __builtin_memcpy", "if (n >= half) __builtin_memcpy", PORTABLE),
    Fault("csrc/cpu/network.cpp", "first > rows.begin, nullptr, 0, 1)", "false, nullptr, 0, 1)", PORTABLE),
    Fault("csrc/cpu/ensemble.cpp", "for (int64_t n = alone; n < networks; ++n)", "for (int64_t n = alone + 1; n < networks; ++n)", PORTABLE),
    Fault("csrc/cpu/loss.cpp", "if (t < 0 || t >= p.C)", "if (t < 0 || t > p.C)", PORTABLE),
    Fault("csrc/cpu/loss.cpp", "if (sums.wrong < 0) sums.wrong = b->wrong;", "sums.wrong = b->wrong;", PORTABLE),
    # CUDA's kernels, on the emulator.
    Fault("csrc/cuda/product.cuh", "start(step + stages - 1);\n    math", "math", CUDA),
    Fault("csrc/cuda/product.cuh", "split == 0 ? result.bias_of(n0 + column)", "true ? result.bias_of(n0 + column)", CUDA),
    Fault("csrc/cuda/product.cuh", "lost = (next - row_sum) - sum;", "lost = sum;", CUDA),
    Fault("csrc/cuda/product.cuh", "store(beside + at, saved_pack, left, aligned);", "store(beside + at, pack, left, aligned);", CUDA),
    Fault("csrc/cuda/product.cuh", "(m0 + row0) * result.columns + n0 + column;", "(m0 + row0) * result.columns + n0;", CUDA),
    Fault("csrc/cuda/product.cuh", "row0 + i * apart < result.rows", "row0 + i * apart <= result.rows", CUDA),
    Fault("csrc/cuda/product.cuh", "std::max(width, 4)", "std::max(width, 2)", CUDA),
    Fault("csrc/cuda/product.cuh", "line() + i * apart < lines", "line() + i * apart <= lines", CUDA),
    Fault("csrc/cuda/product.cuh", "left > 1 ? to_float(own[1])", "left > 0 ? to_float(own[1])", CUDA),
    Fault("csrc/cuda/product.cuh", "part = 1; part < parts", "part = 1; part + 1 < parts", CUDA),
    Fault("csrc/cuda/product.cuh", "result.row_sums && n0 == 0", "result.row_sums", CUDA),
    Fault("csrc/cuda/product.cuh", "row / apart % 4 * 2 + row / apart / 4 % 2", "row / apart % 8", BANK),
    Fault("csrc/cuda/simt.cuh", "rows_apart = A::transposed ? pack : 1;", "rows_apart = 1;", BANK),
    Fault("csrc/cuda/elementwise.cuh", "(i ^ i / 32 % 2 * 4)", "i", BANK),
    Fault("csrc/cuda/splits.cuh", "last ? none : next);", "next);", "tests/test_kernels.py -k counted_anew"),
    Fault("csrc/cuda/splits.cuh", "own = nodes + member * node_size;", "own = nodes + (member == first ? node : member == node ? first : member) * node_size;", CUDA),
    Fault("csrc/cuda/splits.cuh", "    __threadfence();\n    __syncthreads();  //", "    __syncthreads();  //", CUDA),
    Fault("csrc/cuda/splits.cuh", "nodes += count * node_size, counts", "counts", CUDA),
    Fault("csrc/cuda/chain.cuh", "const bool last = i + 1 == links.count;", "const bool last = i == links.count;", CUDA),
    Fault("csrc/cuda/tensor_core.cuh", "lower[] = {own[2],", "lower[] = {own[0],", CUDA),
    Fault("csrc/cuda/simt.cuh", "sum(i, j) += left[i][k] * right", "sum(i, j) += left[i][0] * right", CUDA),
    Fault("csrc/cuda/launch.cuh", "most_shared_memory() - static_cast<int64_t>(own.sharedSizeBytes)", "most_shared_memory()", GPU),
    Fault("csrc/cuda/launch.cuh", "  if (error != cudaSuccess) cudaGetLastError();", "", GPU),
    Fault("csrc/cuda/launch.cuh", "own.ptxVersion >= 90", "own.ptxVersion >= 80", GPU),
    Fault("csrc/cuda/launch.cuh", "driver >= 12030", "driver >= 12000", GPU),
    Fault("csrc/cuda/launch.cuh", "  cudaGridDependencySynchronize();", "", CUDA),
    Fault("csrc/cuda/product.cuh", "  wait_for_previous();\n", "", CUDA),
    Fault("csrc/cuda/chain.cuh", "  wait_for_previous();\n  start_weight(0);", "  start_weight(0);\n  wait_for_previous();", CUDA),
    Fault("csrc/cuda/update.cuh", "Table<Update, 60>", "Table<Update, 64>", CUDA),
    Fault("csrc/cuda/launch.cuh", "  cudaSetDevice(current);", "", GPU),
    Fault("csrc/cuda/softmax.cuh", "if (counts && smooths) dz -=", "if (smooths) dz -=", CUDA),
    Fault("csrc/cuda/softmax.cuh", "if (t == p.ignore_index) return 0.0f;", "", CUDA),
    Fault("csrc/cuda/update.cuh", "const bool aligned = is_aligned<T>(u, Row::states);", "const bool aligned = true;", CUDA),
    Fault("csrc/cuda/clip.cuh", "own += blocks;", "", CUDA),
    Fault("csrc/cuda/pack.cuh", "rotate(saved, activates ? activated(g, own) : 0.0f);", "rotate(saved, 0.0f);", CUDA),
    Fault("csrc/cuda/elementwise.cuh", "sums[e] += to_float(pack.elements[e]);", "sums[e] = to_float(pack.elements[e]);", CUDA),
    Fault("csrc/cuda/elementwise.cuh", "row0 = int64_t{split} * splits.steps", "row0 = 0 * splits.steps", CUDA),
    Fault("csrc/cuda/backend.cu", "if (p.forms_dz) b.grad_y = dz;", "", CUDA),
    Fault("csrc/cuda/backend.cu", "if (x[p.layer]) b.x = x[p.layer], b.ldx = b.K;", "", CUDA),
    Fault("csrc/cuda/backend.cu", "Places{layer % 2 * widest_dz,", "Places{0,", CUDA),
    Fault("csrc/cuda/plan.h", "return operations < 1e8 ?", "return operations < 1e7 ?", "tests/test_kernels.py -k a_table_tells"),
    Fault("csrc/cuda/step.cuh", "below.z ? below.z : y_of(l - 1)", "y_of(l - 1)", STEP),
    Fault("csrc/cuda/step.cuh", "!is_last || blockIdx.x == 0", "true", STEP),
    Fault("csrc/cuda/step.cuh", "o.first = false;", "", STEP),
    Fault("csrc/cuda/lanes.cuh", "upper ? own[e] : own[count / 2 + e], step", "own[count / 2 + e], step", STEP),
    Fault("csrc/cuda/step_plan.h", "padded(ceil_div(N[l], share))", "ceil_div(N[l], share)", STEP),
    Fault("csrc/cuda/backend.cu", "result.activation = below->activation;", "result.activation = b.activation;", CUDA),
    Fault("csrc/cuda/plan.h", "const bool sums = b.grad_bias &&", "const bool sums = !is_there &&", "tests/test_kernels.py -k librarys"),
    Fault("csrc/cuda/chain.cuh", "if (column + e >= link.result.columns)", "if (column + e > link.result.columns)", CUDA),
    Fault("csrc/cuda/product.cuh", "line % Pack<T>::size * 8", "0", BANK),
    Fault("csrc/cuda/product.cuh", "(line & 2 | line / 4 % 2)", "(line / 2 % 4)", BANK),
    Fault("csrc/cuda/splits.cuh", "sum = 0.0f;", "", CUDA),
    Fault("csrc/cuda/splits.cuh", "left < fan ? left : fan", "fan", CUDA),
    Fault("csrc/cuda/plan.h", "return whole && time(large) < time(small) ? large : small;", "return small;", "tests/test_kernels.py -k sooner"),
    # Python.
    Fault("fastmlp/layers.py", 'or own["_forward_pre_hooks"]\n                or own["_backward_hooks"]', 'or own["_backward_hooks"]', "tests/test_fuse.py tests/test_mlp.py"),
    Fault("fastmlp/layers.py", 'elif name == "identity" or (name == "dropout" and _drops(own) is False):', 'elif name in ("identity", "dropout"):', "tests/test_fuse.py"),
    Fault("fastmlp/layers.py", "        layers[2][count - len(last) :] = last\n", "", "tests/test_fuse.py tests/test_rewrite.py"),
    Fault("fastmlp/functional.py", "all(type(mode) is DeviceContext for mode in modes)", "True", "tests/test_autograd.py -k function_mode"),
    Fault("fastmlp/fuse.py", "run_by_others.update(module.children())", "pass", "tests/test_fuse.py"),
    Fault("fastmlp/fuse.py", "model = copy.deepcopy(model)", "model = copy.copy(model)", "tests/test_fuse.py"),
    Fault("fastmlp/fuse.py", "return original_class(self)\n", "return type(self)\n", "tests/test_fuse.py tests/test_rewrite.py"),
    Fault("fastmlp/rewrite.py", "            and len(self.ending.statements) == count\n", "", "tests/test_fuse.py tests/test_rewrite.py"),
    Fault("fastmlp/rewrite.py", 'raise Refused("is a generator")', "pass", "tests/test_fuse.py tests/test_rewrite.py"),
    Fault("fastmlp/rewrite.py", "        if _saved_tensors_are_watched():\n            raise\n        output", "        output", "tests/test_autograd.py -k checkpoint_may"),
    Fault("fastmlp/rewrite.py", "            if _saved_tensors_are_watched():\n                raise\n            break", "            break", "tests/test_autograd.py -k checkpoint_may"),
    Fault("fastmlp/optim.py", "if len(new) < len(params):", "if False:", "tests/test_optim.py"),
    Fault("fastmlp/optim.py", '            or group["fused"] is False\n', "", "tests/test_optim.py"),
    Fault("fastmlp/optim.py", 'or getattr(self, "found_inf", None) is not None', "or False", "tests/test_optim.py"),
    Fault("fastmlp/optim.py", "if norm_type == 2 and", "if", "tests/test_clip.py"),
    Fault("fastmlp/step.py", "value / self.accumulate if self.accumulate > 1 else value", "value", "tests/test_step.py -k accumulat"),
    Fault("fastmlp/step.py", "parameter.grad /= size", "pass", "tests/test_step.py -k processes"),
    Fault("fastmlp/step.py", "own + other\n", "own\n", "tests/test_step.py -k any_loss"),
    Fault("fastmlp/step.py", "first = result if first is None else first", "first = result", "tests/test_step.py -k lbfgs"),
    Fault("fastmlp/step.py", "                if value is not NotImplemented:\n                    self._way", "                if True:\n                    self._way", "tests/test_graph.py"),
    Fault("fastmlp/step.py", "steps = 1 if callback else", "steps =", "tests/test_run.py -k callback"),
    Fault("fastmlp/step.py", "        if not 0 <= row < rows:\n", "        if row >= rows:\n", "tests/test_run.py -k does_not_fit"),
    Fault("fastmlp/graph.py", "graph = self._graphs.pop(batch, None)", "graph = self._graphs.get(batch)", "tests/test_graph.py"),
    Fault("fastmlp/graph.py", "pools[0] if pools else torch.cuda.graph_pool_handle()", "(0, 1)", "tests/test_graph.py"),
    Fault("fastmlp/graph.py", "if counts or options != self._options:", "if self._options is None:", "tests/test_graph.py"),
    Fault("fastmlp/graph.py", "with torch.cuda.stream(stream):", "if True:", "tests/test_graph.py"),
    Fault("fastmlp/nn.py", "label_smoothing=self.label_smoothing", "label_smoothing=0.0", "tests/test_cross_entropy.py"),
    # The ops; these build the extension.
    Fault("csrc/torch/clip.cpp", "if (error_if_nonfinite && !std::isfinite", "if (!std::isfinite", "tests/test_clip.py"),
    Fault("csrc/torch/clip.cpp", "  return !overlap(std::move(memories));", "  return true;", "tests/test_clip.py"),
    Fault("csrc/torch/ensemble_step.cpp", "const size_t first = trainings.size() == 1 ? n * P : 0", "const size_t first = 0", "tests/test_ensemble.py"),
    Fault("csrc/torch/ensemble_step.cpp", "for (CheckedStep& step : steps) step.finish();", "", "tests/test_ensemble.py"),
    Fault("csrc/torch/together.h", "if (size != count) run();", "", "tests/test_ensemble.py -k frozen"),
    Fault("csrc/torch/autograd.cpp", "if (together) together->run();", "", "tests/test_ensemble.py"),
    Fault("csrc/torch/chain.cpp", "if (input.dim() == 2) layers.front().ldx = input.stride(0);", "", "tests/test_fuse.py -k nobody_sees"),
    Fault("csrc/torch/chain.cpp", "return !is_differentiated && ", "return ", "tests/test_fuse.py -k values_and_gradients"),
    Fault("csrc/torch/chain.cpp", "keys = (keys | local.included_) - local.excluded_;", "keys = keys - local.excluded_;", "tests/test_fuse.py -k nobody_sees"),
    Fault("csrc/torch/chain.cpp", "return is_plainly_called && !get(own, forward) ?", "return !get(own, forward) ?", "tests/test_fuse.py -k changes_after_fusing"),
    Fault("csrc/torch/chain.cpp", "return name && !is_exchanged && named", "return name && named", "tests/test_fuse.py -k method_that_has_been_exchanged"),
    Fault("csrc/torch/chain.cpp", "return chain.weights.empty() && push_view(o);", "return push_view(o);", "tests/test_fuse.py -k flatten"),
    Fault("csrc/torch/chain.cpp", "own.type == type && own.version == type->tp_version_tag && own.version", "own.type == type", "tests/test_fuse.py -k another_forward"),
    Fault("csrc/torch/arguments.h", "&found, &value) && found == key.name", "&found, &value)", "tests/test_fuse.py"),
    Fault("csrc/torch/module_call.cpp", "PyTuple_GET_SIZE(args) == 1 && (!kwargs", "(!kwargs", "tests/test_fuse.py -k other_kinds"),
    Fault("csrc/torch/module_call.cpp", "thread->c_profilefunc || thread->c_tracefunc", "thread->c_profilefunc", "tests/test_fuse.py -k somebody_watches"),
    Fault("csrc/torch/module_call.cpp", "thread->c_profilefunc || thread->c_tracefunc", "thread->c_tracefunc", "tests/test_fuse.py -k somebody_watches"),
    Fault("csrc/torch/module_call.cpp", "      at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION))", "      false)", "tests/test_fuse.py -k somebody_watches"),
    Fault("csrc/torch/module_call.cpp", "c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer)", "false", "tests/test_fuse.py -k call_that_is_traced"),
    Fault("csrc/torch/module_call.cpp", "_PyType_Lookup(Py_TYPE(module), name) == PyTuple_GET_ITEM(row, 1) && ", "", "tests/test_fuse.py -k somebody_watches"),
    Fault("csrc/torch/module_call.cpp", "PyTuple_GET_ITEM(row, 1) && !get(own, name)", "PyTuple_GET_ITEM(row, 1)", "tests/test_fuse.py -k somebody_watches"),
    Fault("csrc/torch/training.cpp", '"momentum", "dampening"', '"dampening", "momentum"', "tests/test_optim.py"),
    Fault("csrc/torch/training.cpp", "if (has(variable->backward_hooks) ||", "if (", "tests/test_step.py -k kernels_do_not_know"),
    Fault("csrc/torch/training.cpp", "t.requires_grad() ? search(p) : -1", "search(p)", "tests/test_step.py -k frozen"),
    Fault("csrc/torch/training.cpp", "tried <= groups.size()", "tried < groups.size()", "tests/test_step.py -k another_order"),
    Fault("csrc/torch/step.cpp", "i > 0 && count == last &&", "i > 0 &&", "tests/test_step.py -k counts_of_their_own"),
    Fault("csrc/torch/step.cpp", "run.begin + done * rows", "run.begin", "tests/test_run.py -k as_its_steps_do"),
    Fault("csrc/torch/step.cpp", "      training.set_rates(run.rates_of(done));\n", "", "tests/test_run.py -k rates"),
    Fault("csrc/torch/step.cpp", " && !training.begins()", "", "tests/test_run.py -k as_its_steps_do"),
    Fault("csrc/torch/step.cpp", "    if (done) training.finish();\n", "", "tests/test_run.py -k as_its_steps_do"),
    Fault("csrc/torch/predictor.cpp", "own.front().ldx = ldx", "own.front().ldx = K", "tests/test_predictor.py"),
    Fault("csrc/torch/predictor.cpp", "else if (strides[i] != expected) return false;", "", "tests/test_predictor.py"),
    Fault("csrc/torch/cross_entropy.cpp", "const Tensor z = input.contiguous()", "const Tensor z = input", "tests/test_cross_entropy.py"),
    Fault("csrc/torch/cross_entropy.cpp", "q = w * (q * (1 - label_smoothing)", "q = w * (q", "tests/test_autograd.py -k derivatives"),
    Fault("csrc/torch/autograd.cpp", "ctx->needs_input_grad(i)) wanted.push_back", "true) wanted.push_back", "tests/test_linear.py"),
    Fault("csrc/torch/cross_entropy.cpp", "return at::empty_symint(reduces ?", "return at::empty_symint(!reduces ?", "tests/test_autograd.py -k opcheck"),
]  # fmt: skip


def copied(folder: Path) -> None:
    """The files that git knows or would add, and the built extension."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    extensions = [str(path.relative_to(ROOT)) for path in ROOT.glob("fastmlp/_C*.so")]
    for name in [*filter(None, listed), *extensions]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build(folder: Path) -> None:
    result = run(folder, "setup.py", "--quiet", "build_ext", "--inplace")
    if result.returncode:
        sys.exit(result.stdout + result.stderr)


def outcome(folder: Path, fault: Fault) -> str:
    """What becomes of the fault: "found", "NOT FOUND", or why it is none."""
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1 or fault.old == fault.new:
        return f"STALE: its text is there {text.count(fault.old)} times"
    is_built = fault.file.startswith("csrc/torch")
    path.write_text(text.replace(fault.old, fault.new))
    try:
        if is_built:
            build(folder)
        result = run(folder, "-m", "pytest", "-x", "-p", "no:cacheprovider", *fault.tests.split(" ", 3))
    finally:
        path.write_text(text)
    if "CalledProcessError" in result.stdout:
        return "STALE: it does not compile"
    if result.returncode == 1 or result.returncode < 0:  # a test has failed, or crashed
        return "found"
    return f"STALE: pytest exits with {result.returncode}" if result.returncode else "NOT FOUND"


def main() -> None:
    chosen = [f for f in FAULTS if not sys.argv[1:] or any(word in f.file for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        if any(fault.file.startswith("csrc/torch") for fault in chosen):
            build(folder)
        outcomes = []
        for number, fault in enumerate(chosen, 1):
            begin = time.monotonic()
            outcomes.append(outcome(folder, fault))
            spent = time.monotonic() - begin
            first = fault.old.strip().splitlines()[0]
            print(f"{number:3d} {spent:4.0f} s  {outcomes[-1]}  {fault.file}: {first}", flush=True)
    print(f"{outcomes.count('found')} of {len(chosen)} faults found")
    sys.exit(outcomes.count("found") < len(chosen))


if __name__ == "__main__":
    main()
