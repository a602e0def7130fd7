"""How many blocks of each CUDA kernel a multiprocessor holds, by architecture, and what limits them.

Nothing is run: registers are what nvcc says, threads and shared memory what the kernels' own formulas do.
Writes results/occupancy.csv, of each family of kernels the instantiation that takes most. Needs nvcc and g++.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rows import write_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/occupancy.csv"


class Multiprocessor(NamedTuple):
    """What the CUDA C++ programming guide says of a compute capability."""

    shared_bytes: int
    threads: int
    blocks: int
    registers: int = 1 << 16


ARCHITECTURES = {
    "sm_80": Multiprocessor(164 << 10, 2048, 32),
    "sm_90": Multiprocessor(228 << 10, 2048, 32),
    "sm_100": Multiprocessor(228 << 10, 2048, 32),
    "sm_120": Multiprocessor(100 << 10, 1536, 24),
}
PARTS = 4  # of a multiprocessor, each of which has a quarter of its registers
RESERVED = 1 << 10  # bytes of shared memory that each block takes besides

ENTRY = re.compile(
    r"Compiling entry function '(\w+)'(?s:.*?)"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers.*?(?:(\d+) bytes smem|$)",
    re.M,
)


class Kernel(NamedTuple):
    """An instantiation, as it is compiled and launched."""

    name: str  # product<TensorCore, Tiling<...>, ...>
    symbol: str
    memory: int  # bytes of the stack and of spilled registers
    registers: int  # of a thread
    static_bytes: int  # of shared memory, of a block
    dynamic_bytes: int
    threads: int
    least_blocks: int  # of a multiprocessor, that it is compiled for


class Occupancy(NamedTuple):
    """The blocks that a multiprocessor holds at once, and what there is no more of."""

    blocks: int
    limit: str


def occupancy(kernel: Kernel, on: Multiprocessor) -> Occupancy:
    """Registers are given out to warps, 256 at a time; shared memory to blocks, 128 bytes at a time."""
    warps = -(-kernel.threads // 32)
    registers = -(-kernel.registers * 32 // 256) * 256
    shared_bytes = -(-(kernel.static_bytes + kernel.dynamic_bytes + RESERVED) // 128) * 128
    limits = {
        "threads": on.threads // (32 * warps),
        "blocks": on.blocks,
        "registers": PARTS * (on.registers // PARTS // registers) // warps,
        "shared memory": on.shared_bytes // shared_bytes,
    }
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limit)


def compile_for(architecture: str, folder: Path) -> tuple[Path, str]:
    """The kernels' object file for an architecture, with the PTX beside it, and what ptxas tells of them."""
    own = folder / architecture
    own.mkdir()
    output = own / "backend.o"
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v"]
    command += ["-c", str(ROOT / "csrc/cuda/backend.cu"), "-o", str(output)]
    command += ["--keep", "--keep-dir", str(own)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return output, result.stderr


def demangled(symbols: Iterable[str]) -> list[str]:
    """The kernels' names with their template's arguments, but without namespaces' and parameters."""
    result = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = []
    for line in result.stdout.splitlines():
        name = re.sub(r"\bfastmlp::(cuda::)?|^void |\(int\)", "", line)
        names.append(re.split(r"(?<!\w)\(|(?<=\w)\(", name)[0].strip())
    return names


# The program that asks the kernels' sources, on the host, how each is launched. A chain is taken with two
# weights, which is the least, and a step in one launch as that of the reference network on an H100.
LAUNCHES = """
#include <cstdio>
#include "chain.cuh"
#include "clip.cuh"
#include "elementwise.cuh"
#include "simt.cuh"
#include "step.cuh"
#include "tensor_core.cuh"
namespace fastmlp::cuda {
template <template <class, class, class, class> class Math, class Tiling, int width, class A, class B>
void tell_product() {
  std::printf("%d %d %d\\n", Tiling::threads, int(product_bytes<Tiling, typename A::T>),
              MathOf<Math, Tiling, A, B>::blocks);
}
template <template <class, class, class, class> class Math, class Tiling, int width, class T, bool transposed>
void tell_chain() {
  std::printf("%d %d 1\\n", Tiling::threads, int(Shared<T, transposed, Tiling>::bytes(2)));
}
void tell_train() {
  const auto plan = whole_step::plan({64, 2, {784, 500, 10}, false}, {132, 227 << 10});
  std::printf("%d %d 1\\n", whole_step::threads, int(4 * plan.shared_floats));
}
void tell(int threads) { std::printf("%d 0 1\\n", threads); }
}  // namespace fastmlp::cuda
int main() {
  using namespace fastmlp;
  using namespace fastmlp::cuda;
"""


def launches(names: Iterable[str], folder: Path) -> list[tuple[int, ...]]:
    """Of each kernel its threads, its bytes of dynamic shared memory, and the blocks it is compiled for."""
    calls = []
    for name in names:
        base = name.split("<")[0]
        if base in ("product", "chain"):
            calls.append(f"tell_{name}();")
        elif base == "whole_step::train":
            calls.append("tell_train();")
        else:
            namespace = base.split("::")[0]
            calls.append(f"tell({namespace}::{'many' if namespace == 'softmax' else 'threads'});")
    source, program = folder / "launches.cpp", folder / "launches"
    source.write_text(LAUNCHES + "\n".join(calls) + "\n}\n")
    command = ["g++", "-std=c++17", "-DFASTMLP_EMULATE", f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return [tuple(map(int, line.split())) for line in said.splitlines()]


def kernels_of(report: str, folder: Path) -> list[Kernel]:
    """The kernels of which ptxas tells."""
    entries = ENTRY.findall(report)
    names = demangled(symbol for symbol, *_ in entries)
    kernels = []
    for entry, name, launch in zip(entries, names, launches(names, folder), strict=True):
        symbol, *memory, registers, static_bytes = entry
        threads, dynamic_bytes, least = launch
        numbers = int(registers), int(static_bytes or 0), dynamic_bytes, threads, least
        kernels.append(Kernel(name, symbol, sum(map(int, memory)), *numbers))
    return kernels


MATH = {"Simt": "multiply-adds", "TensorCore": "tensor cores"}


def family(kernel: Kernel) -> str:
    """What the kernel is called together with those that differ in dtypes, passes and alignment alone."""
    parts = re.match(r"(\w+)<(\w+), Tiling<(\d+), (\d+).*?>, \d+, (?:Operand<)?(\w+)", kernel.name)
    if not parts:
        return kernel.name.split("<")[0]
    what, math, rows, columns, dtype = parts.groups()
    multiplied = "" if math == "Simt" else ", TF32" if dtype == "float" else ", 16 bits"
    return f"{what} {rows} x {columns}, {MATH[math]}{multiplied}"


def most_demanding(kernels: Iterable[Kernel], on: Multiprocessor) -> dict[str, Kernel]:
    """Of each family the kernel of which the fewest threads are there at once."""
    chosen: dict[str, Kernel] = {}

    def rank(kernel: Kernel) -> tuple[int, int]:
        return occupancy(kernel, on).blocks * kernel.threads, -kernel.registers

    for kernel in kernels:
        other = chosen.setdefault(family(kernel), kernel)
        chosen[family(kernel)] = min(kernel, other, key=rank)
    return dict(sorted(chosen.items()))


def main() -> None:
    """Writes the CSV file."""
    toolkit = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", toolkit)
    rows = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        reports = pool.map(lambda architecture: compile_for(architecture, folder)[1], ARCHITECTURES)
        for (architecture, on), report in zip(ARCHITECTURES.items(), reports, strict=True):
            for kind, kernel in most_demanding(kernels_of(report, folder), on).items():
                blocks, limit = occupancy(kernel, on)
                row = {"kernels": kind, "architecture": architecture, "threads": kernel.threads}
                row |= {"registers": kernel.registers, "static_bytes": kernel.static_bytes}
                row |= {"dynamic_bytes": kernel.dynamic_bytes, "blocks": blocks, "limit": limit}
                rows.append(row | {"cuda": release[1] if release else ""})
                print(", ".join(map(str, row.values())))
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
