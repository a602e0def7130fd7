"""How near each product comes to the machine's peak: forward, dW with db, and dx alone, at the grid's layers.

    forward  y = relu(x Wᵀ + b)     dW  dzᵀ x, and db = Σ dz     dx  dz W     x [M, K]   W [N, K]   dz [M, N]

float32, 2 M N K floating-point operations each. The peak is that of multiply-adds in registers on all
threads, measured in every round. Beside it stand torch.mm, which computes the bare product into memory that
is there already, and torch's own operations for the whole of what the kernel does.
"""

import argparse
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import timing
from command import Parser, benchmark_parser, execute, measured, start, table_output
from fastmlp import _C
from shapes import GRID, ODD

NAME = "kernels"
CPU = torch.device("cpu")
PEAK_STEPS = 1 << 20  # 2 to 4 ms: long against the start of the threads

PRODUCTS = ("forward", "dW", "dx")

Call = Callable[[], object]
Peak = Callable[[int, int], float]


class Shape(NamedTuple):
    """One layer of a network at one of its batches."""

    M: int  # batch
    K: int  # in_features
    N: int  # out_features

    def __str__(self) -> str:
        """As M x K x N."""
        return "x".join(map(str, self))

    @property
    def operations(self) -> int:
        """Multiplications and additions of each of the three products."""
        return 2 * self.M * self.N * self.K


def products(shape: Shape) -> dict[str, dict[str, Call]]:
    """What is timed of each product: ours, the bare library product, and torch's operations for the whole."""
    M, K, N = shape
    x, weight, bias, dz = torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(M, N)
    y, grad_weight, grad_x = torch.empty(M, N), torch.empty(N, K), torch.empty(M, K)
    linear, backward = torch.ops.fastmlp.linear, torch.ops.fastmlp.linear_backward
    return {
        "forward": {
            "fastmlp": lambda: linear(x, weight, bias, "relu"),
            "library": lambda: torch.mm(x, weight.t(), out=y),
            "stock": lambda: torch.addmm(bias, x, weight.t()).relu_(),
        },
        "dW": {
            "fastmlp": lambda: backward(dz, x, weight, None, "identity", [False, True, True]),
            "library": lambda: torch.mm(dz.t(), x, out=grad_weight),
            "stock": lambda: (torch.mm(dz.t(), x), dz.sum(0)),
        },
        "dx": {
            "fastmlp": lambda: backward(dz, x, weight, None, "identity", [True, False, False]),
            "library": lambda: torch.mm(dz, weight, out=grad_x),
            "stock": lambda: torch.mm(dz, weight),
        },
    }


class Result(NamedTuple):
    """What was measured of one product at one shape."""

    product: str
    shape: Shape
    gflops: timing.Quantiles  # 1e9 floating-point operations a second
    peak_gflops: timing.Quantiles
    peak_share: timing.Quantiles
    over_library: timing.Quantiles  # times as fast as torch.mm
    over_stock: timing.Quantiles  # times as fast as torch's own operations


def layers() -> list[Shape]:
    """The distinct layers of the grid, and the odd ones."""
    grid = ((batch, *pair) for net in (*GRID, ODD) for batch in net.batches for pair in pairwise(net.sizes))
    return [Shape(*layer) for layer in dict.fromkeys(grid)]


def compiled_peak() -> Peak:
    """multiply_add(threads, steps) of peak.cpp, compiled for this machine."""
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "peak.so")
        subprocess.run(
            ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", path], check=True
        )
        library = ctypes.CDLL(str(path))
    multiply_add = library.multiply_add
    multiply_add.argtypes, multiply_add.restype = [ctypes.c_int, ctypes.c_long], ctypes.c_double
    return multiply_add


def measure(product: str, shape: Shape, sides: dict[str, Call], peak: Peak, rounds: int) -> Result:
    """Times the sides of one product and the peak in turns."""
    threads = torch.get_num_threads()
    sides = {**sides, "peak": lambda: peak(threads, PEAK_STEPS)}
    samples = timing.sample(sides, CPU, rounds)

    def over(other: str) -> timing.Quantiles:
        return timing.summarise({name: samples[name] for name in (other, "fastmlp")})["fastmlp"].speedup

    def gflops(side: str, operations: float) -> timing.Quantiles:
        return timing.Quantiles.of([operations / seconds / 1e9 for (seconds,) in samples[side]])

    peak_operations = peak(threads, 1) * PEAK_STEPS
    return Result(
        product,
        shape,
        gflops("fastmlp", shape.operations),
        gflops("peak", peak_operations),
        over("peak").times(shape.operations / peak_operations),
        over("library"),
        over("stock"),
    )


def table(results: Sequence[Result]) -> Table:
    """Medians, a product and shape a row."""
    table = Table(
        "", "MxKxN", "MFLOP", "GFLOP/s", "of the peak", "over mm", "over stock", box=box.SIMPLE_HEAD
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for result in results:
        table.add_row(
            result.product,
            str(result.shape),
            f"{result.shape.operations / 1e6:.2f}",
            f"{result.gflops.p50:.1f}",
            f"{result.peak_share.p50:.0%}",
            f"{result.over_library.p50:.2f}",
            f"{result.over_stock.p50:.2f}",
        )
    return table


def row(result: Result, job: dict[str, str | int]) -> dict[str, object]:
    """One line of the CSV file."""
    return {
        "product": result.product,
        **result.shape._asdict(),
        **result.gflops.columns("gflops", 3),
        **result.peak_gflops.columns("peak_gflops", 3),
        **result.peak_share.columns("peak_share", 4),
        **result.over_library.columns("over_library", 4),
        **result.over_stock.columns("over_stock", 4),
        **job,
    }


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression."""
    with suppress(re.error):
        return re.compile(text)
    raise argparse.ArgumentTypeError(f"expected a regular expression, not '{text}'")


def parser() -> Parser:
    """The command line."""
    parser = benchmark_parser((__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", type=pattern, metavar="REGEX", help="products and shapes, as in 'dW 64x784' (all)"
    )
    return parser


@torch.inference_mode()
def run(parser: Parser, options: argparse.Namespace) -> None:
    """All products at all shapes, from the peak's compilation to table and file."""
    job = {**start(options), "instruction_set": _C.instruction_set()}
    cells = [(product, shape) for shape in layers() for product in PRODUCTS]
    if options.only:
        cells = [cell for cell in cells if options.only.search("{} {}".format(*cell))]
        if not cells:
            parser.error(f"argument --only: no product and shape match '{options.only.pattern}'")
    if shutil.which("g++") is None:
        parser.error("the peak is measured by a program that g++ compiles, and there is no g++")
    peak = compiled_peak()
    output = table_output()
    with timing.all_or_none(options.output) as folder:
        output.print(f"{timing.in_words(job)}, {job['instruction_set']}")
        results = [
            measure(product, shape, products(shape)[product], peak, options.rounds)
            for product, shape in measured(cells, Console(stderr=True))
        ]
        timing.write_rows(folder / f"{NAME}.csv", [row(result, job) for result in results])
    output.print(table(results))
    output.print(f"{options.output / NAME}.csv is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
