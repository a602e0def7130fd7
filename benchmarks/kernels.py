"""How near each product comes to the machine's peak: forward, dW with db, and dx alone, at the grid's layers.

    forward  y = relu(x Wᵀ + b)     dW  dzᵀ x, and db = Σ dz     dx  dz W     x [M, K]   W [N, K]   dz [M, N]

2 M N K floating-point operations each. The peak is measured in every round: of a CPU that of multiply-adds in
registers on all threads, of a GPU the library's product of two large square matrices. Beside it stand
torch.mm, which computes the bare product into memory that is there already, and torch's operations for the
whole of what the kernel does.
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
from command import (
    DTYPES,
    Parser,
    benchmark_parser,
    execute,
    measured,
    result_name,
    start,
    table_output,
)
from fastmlp import _C
from shapes import GRID, ODD

NAME = "kernels"
PEAK_STEPS = 1 << 20  # 2 to 4 ms: long against the start of the threads
PEAK_SIZE = 4096  # of the square matrices: 137 GFLOP, of which a GPU of 2020 does 20 a millisecond
FLUSHED_OPERATIONS = 1e9  # the products of a GPU from which on the L2 cache is emptied before each

PRODUCTS = ("forward", "dW", "dx")

Call = Callable[[], object]


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


class Peak(NamedTuple):
    """What the machine can do at best."""

    call: Call
    operations: float


def products(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """What is timed of each product: ours, the bare library product, and torch's operations for the whole."""
    M, K, N = shape
    like = torch.empty(0, device=device, dtype=dtype)
    x, weight, bias, dz = (torch.randn_like(like.new_empty(size)) for size in ((M, K), (N, K), (N,), (M, N)))
    y, grad_weight, grad_x = like.new_empty(M, N), like.new_empty(N, K), like.new_empty(M, K)
    forward, backward = torch.ops.fastmlp.network, torch.ops.fastmlp.network_backward
    return {
        "forward": {
            "fastmlp": lambda: forward(x, [weight], [bias], ["relu"], []),
            "library": lambda: torch.mm(x, weight.t(), out=y),
            "stock": lambda: torch.addmm(bias, x, weight.t()).relu_(),
        },
        "dW": {
            "fastmlp": lambda: backward(dz, x, [weight], [None], ["identity"], [], [1, 2]),
            "library": lambda: torch.mm(dz.t(), x, out=grad_weight),
            "stock": lambda: (torch.mm(dz.t(), x), dz.sum(0)),
        },
        "dx": {
            "fastmlp": lambda: backward(dz, x, [weight], [None], ["identity"], [], [0]),
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


def library_peak(dtype: torch.dtype) -> Peak:
    """The GPU library's product of large matrices."""
    a, b, c = (torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda").to(dtype) for _ in range(3))
    return Peak(lambda: torch.mm(a, b, out=c), 2.0 * PEAK_SIZE**3)


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
    threads = torch.get_num_threads()
    return Peak(lambda: multiply_add(threads, PEAK_STEPS), multiply_add(threads, 1) * PEAK_STEPS)


def measure(
    product: str, shape: Shape, device: torch.device, dtype: torch.dtype, peak: Peak, rounds: int
) -> Result:
    """Times the sides of one product and the peak in turns."""
    sides = {**products(shape, device, dtype)[product], "peak": peak.call}
    flushed = device.type == "cuda" and shape.operations >= FLUSHED_OPERATIONS
    samples = timing.sample(sides, device, rounds, flushed)

    def over(other: str) -> timing.Quantiles:
        return timing.summarise({name: samples[name] for name in (other, "fastmlp")})["fastmlp"].speedup

    def gflops(side: str, operations: float) -> timing.Quantiles:
        return timing.Quantiles.of([operations / seconds / 1e9 for (seconds,) in samples[side]])

    return Result(
        product,
        shape,
        gflops("fastmlp", shape.operations),
        gflops("peak", peak.operations),
        over("peak").times(shape.operations / peak.operations),
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
    parser = benchmark_parser((__doc__ or "").split("\n")[0], gpu=True)
    parser.add_argument(
        "--only", type=pattern, metavar="REGEX", help="products and shapes, as in 'dW 64x784' (all)"
    )
    return parser


@torch.inference_mode()
def run(parser: Parser, options: argparse.Namespace) -> None:
    """All products at all shapes, from the peak's compilation to table and file."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    job = {**start(parser, options), "dtype": options.dtype, "instruction_set": _C.instruction_set()}
    name = result_name(NAME, options)
    cells = [(product, shape) for shape in layers() for product in PRODUCTS]
    if options.only:
        cells = [cell for cell in cells if options.only.search("{} {}".format(*cell))]
        if not cells:
            parser.error(f"argument --only: no product and shape match '{options.only.pattern}'")
    if device.type == "cpu" and shutil.which("g++") is None:
        parser.error("the peak is measured by a program that g++ compiles, and there is no g++")
    peak = compiled_peak() if device.type == "cpu" else library_peak(dtype)
    output = table_output()
    with timing.all_or_none(options.output) as folder:
        output.print(f"{timing.in_words(job)}, {job['dtype' if job['gpu'] else 'instruction_set']}")
        results = [
            measure(product, shape, device, dtype, peak, options.rounds)
            for product, shape in measured(cells, Console(stderr=True))
        ]
        timing.write_rows(folder / f"{name}.csv", [row(result, job) for result in results])
    output.print(table(results))
    output.print(f"{options.output / name}.csv is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
