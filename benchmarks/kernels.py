"""How near each product comes to the machine's peak: forward, dW with db, and dx alone, at the grid's layers.

    forward  y = relu(x Wᵀ + b)     dW  dzᵀ x, and db = Σ dz     dx  dz W     x [M, K]   W [N, K]   dz [M, N]

2 M N K floating-point operations each. The peak is measured in every round: of a CPU that of multiply-adds in
registers on all threads, of a GPU the library's product of two large square matrices. Beside it stand
torch.mm, which computes the bare product into memory that is there already, and torch's operations for the
whole of what the kernel does.

On a GPU the time is its own, without what launches cost the host: the calls are a CUDA graph. There are
whole narrow networks too, which may be one kernel: "chain forward", of all layers with what backward reads,
and "chain backward", all their gradients. Ours are the products that FASTMLP_PRODUCTS names, as the file
notes: of the rows with "own", products.py makes the table of choices. Beside them stands what next to
nothing costs: the launch of a kernel, and the replay of a graph of one and of twenty.
"""

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import timing
from command import (
    DTYPES,
    Parser,
    benchmark_parser,
    execute,
    measured,
    results_file,
    start,
    table_output,
)
from fastmlp import _C
from shapes import GRID, NARROW, ODD
from timing import Call

NAME = "kernels"
PEAK_STEPS = 1 << 20  # 2 to 4 ms: long against the start of the threads
PEAK_SIZE = 4096  # of the square matrices: 137 GFLOP, of which a GPU of 2020 does 20 a millisecond
FLUSHED_OPERATIONS = 1e10  # the products of a GPU from which on the L2 cache is emptied before each
REPEATED_OPERATIONS, MOST_REPEATED = 4e9, 32  # of the others as many are one CUDA graph

PRODUCTS = ("forward", "dW", "dx")
CHAINS = ("chain forward", "chain backward")
SIDES = ("fastmlp", "library", "stock")


class Shape(NamedTuple):
    """One layer of a network at one of its batches, or with `hidden` a whole network."""

    M: int  # batch
    K: int  # in_features
    N: int  # out_features
    hidden: tuple[int, ...] = ()  # the widths between them

    def __str__(self) -> str:
        """As M x K x N."""
        return "x".join(map(str, (self.M, *self.widths)))

    @property
    def widths(self) -> tuple[int, ...]:
        """From input to output."""
        return self.K, *self.hidden, self.N

    @property
    def operations(self) -> int:
        """Multiplications and additions of each of the three products, in all layers."""
        return 2 * self.M * sum(k * n for k, n in pairwise(self.widths))

    def columns(self) -> dict[str, object]:
        """The columns of a CSV file that name it."""
        return {"M": self.M, "K": self.K, "N": self.N, "hidden": "-".join(map(str, self.hidden))}


class Peak(NamedTuple):
    """What the machine can do at best."""

    call: Call
    operations: float


def products(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """What is timed of each product: ours, the bare library product, and torch's operations for the whole."""
    if shape.hidden:
        return chain_products(shape, device, dtype)
    M, K, N, _ = shape
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


def chain_products(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """The same of a whole network, with relu between its layers: torch's are those of each layer in turn."""
    layers = list(pairwise(shape.widths))
    names = ["relu"] * (len(layers) - 1) + ["identity"]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    x, weights = draw(shape.M, shape.K), [draw(n, k) / k**0.5 for k, n in layers]
    biases, dz = [draw(n) for _, n in layers], draw(shape.M, shape.N)
    outputs = [draw(shape.M, n) for n in shape.widths]
    grad_weights = [torch.empty_like(weight) for weight in weights]
    forward, backward = torch.ops.fastmlp.network_forward, torch.ops.fastmlp.network_backward
    wanted = list(range(1 + 2 * len(layers)))

    def stock_forward() -> list[Tensor]:
        kept = [x]
        for weight, bias in zip(weights, biases, strict=True):
            y = torch.addmm(bias, kept[-1], weight.t())
            kept.append(y.relu_() if len(kept) < len(layers) else y)
        return kept

    kept = stock_forward()
    left = [*kept[1:-1], None]

    def stock_backward() -> list[Tensor]:
        grad, grads = dz, []
        for i in reversed(range(len(layers))):
            grads += [torch.mm(grad.t(), kept[i]), grad.sum(0)]
            grad = torch.mm(grad, weights[i])
            if i:
                grad = torch.ops.aten.threshold_backward(grad, kept[i], 0)
        return [*grads, grad]

    def library_forward() -> None:
        for i, weight in enumerate(weights):
            torch.mm(outputs[i], weight.t(), out=outputs[i + 1])

    def library_backward() -> None:
        for i in reversed(range(len(layers))):
            torch.mm(outputs[i + 1].t(), outputs[i], out=grad_weights[i])
            torch.mm(outputs[i + 1], weights[i], out=outputs[i])

    return {
        "chain forward": {
            "fastmlp": lambda: forward(x, weights, biases, names, []),
            "library": library_forward,
            "stock": stock_forward,
        },
        "chain backward": {
            "fastmlp": lambda: backward(dz, x, weights, left, names, [], wanted),
            "library": library_backward,
            "stock": stock_backward,
        },
    }


class Result(NamedTuple):
    """What was measured of one product at one shape; None where that could not be."""

    product: str
    shape: Shape
    gflops: timing.Quantiles | None  # 1e9 floating-point operations a second
    peak_gflops: timing.Quantiles | None
    peak_share: timing.Quantiles | None
    over_library: timing.Quantiles | None  # times as fast as torch.mm
    over_stock: timing.Quantiles | None  # times as fast as torch's own operations
    failed: dict[str, str]  # the sides that could not be measured, and why


def layers() -> list[Shape]:
    """The distinct layers of the grid, and the odd ones."""
    grid = ((batch, *pair) for net in (*GRID, ODD) for batch in net.batches for pair in pairwise(net.sizes))
    return [Shape(*layer) for layer in dict.fromkeys(grid)]


def cells(device: torch.device) -> list[tuple[str, Shape]]:
    """What is measured: of each of these its products, and on a GPU the narrow networks."""
    own = [(product, shape) for shape in layers() for product in PRODUCTS]
    if device.type == "cuda":
        for net in NARROW:
            first, *hidden, last = net.sizes
            shapes = [Shape(batch, first, last, tuple(hidden)) for batch in net.batches]
            own += [(product, shape) for shape in shapes for product in CHAINS]
    return own


def library_peak(dtype: torch.dtype) -> Peak:
    """The GPU library's product of large matrices."""
    a, b, c = (torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=dtype) for _ in range(3))
    return Peak(lambda: torch.mm(a, b, out=c), 2.0 * PEAK_SIZE**3)


def ceilings() -> ctypes.CDLL:
    """peak.cpp, compiled for this machine."""
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "peak.so")
        subprocess.run(
            ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", path], check=True
        )
        return ctypes.CDLL(str(path))


def compiled_peak() -> Peak:
    """multiply_add(threads, steps) of it."""
    multiply_add = ceilings().multiply_add
    multiply_add.argtypes, multiply_add.restype = [ctypes.c_int, ctypes.c_long], ctypes.c_double
    threads = torch.get_num_threads()
    return Peak(lambda: multiply_add(threads, PEAK_STEPS), multiply_add(threads, 1) * PEAK_STEPS)


def measure(
    product: str, shape: Shape, device: torch.device, dtype: torch.dtype, peak: Peak, rounds: int
) -> Result:
    """Times the sides of one product and the peak in turns."""
    flushed = device.type == "cuda" and shape.operations >= FLUSHED_OPERATIONS
    calls = 1
    if device.type == "cuda" and not flushed:
        calls = max(1, min(MOST_REPEATED, int(REPEATED_OPERATIONS / shape.operations)))

    @cache
    def sides() -> dict[str, Call]:
        return products(shape, device, dtype)[product]

    def make(name: str) -> Call:
        return timing.captured(sides()[name], calls) if device.type == "cuda" else sides()[name]

    makers: dict[str, Callable[[], Call]] = {name: partial(make, name) for name in SIDES}
    makers["peak"] = lambda: peak.call
    samples, failed = timing.sample_what_works(makers, device, rounds, flushed)
    for name in samples.keys() & SIDES:
        samples[name] = [[seconds / calls for seconds in own] for own in samples[name]]
    operations = shape.operations * (2 if product == "chain backward" else 1)  # dW and dx

    def over(other: str) -> timing.Quantiles | None:
        if not {other, "fastmlp"} <= samples.keys():
            return None
        return timing.summarise({name: samples[name] for name in (other, "fastmlp")})["fastmlp"].speedup

    def gflops(side: str, operations: float) -> timing.Quantiles | None:
        if side not in samples:
            return None
        return timing.Quantiles.of([operations / seconds / 1e9 for (seconds,) in samples[side]])

    over_peak = over("peak")
    return Result(
        product,
        shape,
        gflops("fastmlp", operations),
        gflops("peak", peak.operations),
        over_peak and over_peak.times(operations / peak.operations),
        over("library"),
        over("stock"),
        failed,
    )


def launches(device: torch.device, rounds: int) -> dict[str, str]:
    """Microseconds of a tiny kernel, one after the other; of a graph of one; and of one of twenty."""
    tiny = torch.empty(1, device=device)

    def fill() -> object:
        return tiny.fill_(1)

    makers: dict[str, Callable[[], Call]] = {"launch": lambda: fill}
    for kernels in (1, 20):
        makers[f"replay_{kernels}"] = partial(timing.captured, fill, kernels)
    samples, _ = timing.sample_what_works(makers, device, rounds)
    medians = {name: timed.seconds.p50 for name, timed in timing.summarise(samples).items()}
    return {f"{name}_us": f"{1e6 * medians[name]:.3f}" if name in medians else "" for name in makers}


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
            *(
                f"{figure.p50:{form}}" if figure else "-"
                for figure, form in (
                    (result.gflops, ".1f"),
                    (result.peak_share, ".0%"),
                    (result.over_library, ".2f"),
                    (result.over_stock, ".2f"),
                )
            ),
        )
    return table


def row(result: Result, job: dict[str, str | int]) -> dict[str, object]:
    """One line of the CSV file; what was not measured is empty."""
    return {
        "product": result.product,
        **result.shape.columns(),
        **timing.columns(result.gflops, "gflops", 3),
        **timing.columns(result.peak_gflops, "peak_gflops", 3),
        **timing.columns(result.peak_share, "peak_share", 4),
        **timing.columns(result.over_library, "over_library", 4),
        **timing.columns(result.over_stock, "over_stock", 4),
        "failed": "; ".join(f"{side}: {error}" for side, error in result.failed.items()),
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
    chosen = cells(device)
    if options.only:
        chosen = [cell for cell in chosen if options.only.search("{} {}".format(*cell))]
        if not chosen:
            parser.error(f"argument --only: no product and shape match '{options.only.pattern}'")
    if device.type == "cpu" and shutil.which("g++") is None:
        parser.error("the peak is measured by a program that g++ compiles, and there is no g++")
    if device.type == "cuda":
        job["architecture"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        job["products"] = os.environ.get("FASTMLP_PRODUCTS", "table")
        job |= launches(device, options.rounds)
    peak = compiled_peak() if device.type == "cpu" else library_peak(dtype)
    output = table_output()
    results = []
    keys = ("gpu", "dtype", "products", "product", "M", "K", "N", "hidden")
    with results_file(options, NAME, keys) as (path, take):
        output.print(f"{timing.in_words(job)}, {job['dtype' if job['gpu'] else 'instruction_set']}")
        for product, shape in measured(chosen, Console(stderr=True)):
            result = measure(product, shape, device, dtype, peak, options.rounds)
            take([row(result, job)])
            results.append(result)
        output.print(table(results))
        for result in results:
            for side, why in result.failed.items():
                output.print(f"{result.product} {result.shape}: {side} failed ({why})")
        if any("fastmlp" in result.failed for result in results):
            parser.exit(1, f"{parser.prog}: a product could not be measured\n")
    output.print(f"{path} is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
