"""How much faster than stock a training step and an inference are, for every network and batch of the grid.

Each column is a way to use fastmlp, with SGD, with Adam, or with Adam and clipped gradients; stock is the
best of its variants, cell by cell. All start from the same weights and see the same random batch, and take
turns. A step is forward, loss, zero_grad, backward, update. On a GPU there are CUDA graphs of it besides, of
stock and of ours. What cannot be measured is left out, and the file and the last lines tell why.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import fastmlp
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
from shapes import GRID, Network, stock_mlp
from timing import Call, captured

NAME = "steps"
CPU = torch.device("cpu")
LEARNING_RATE = 0.01
# With that, Adam would soon fit the one batch, and gradients become subnormal numbers, which cost some
# processors a hundred times as much.
ADAMS_LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 0.5
FLUSHED_ELEMENTS = (
    1 << 20
)  # the activations of a layer from which on a GPU's L2 cache is emptied before each call

LOSSES: dict[str, nn.Module] = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(),
}

FASTMLP_LOSSES = {**LOSSES, "cross_entropy": fastmlp.CrossEntropyLoss()}

# Times faster than stock that each column is to reach on two AVX-512 cores: goals, not results.
TARGETS = {
    ("seed", 1): {"swap": 1.5, "all": 2.5, "step": 5.0, "infer": 2.0},
    ("seed", 64): {"swap": 1.45, "all": 1.8, "step": 2.4, "infer": 1.6},
    ("rl", 1): {"swap": 1.5, "all": 2.5, "step": 8.0, "infer": 3.0},
    ("rl", 64): {"swap": 1.5, "all": 1.9, "step": 2.6, "infer": 2.0},
    ("tabular", 128): {"swap": 1.5, "all": 1.9, "step": 2.5, "infer": 1.8},
    ("wide", 256): {"swap": 1.22, "all": 1.25, "step": 1.4, "infer": 1.3},
    ("wide", 2048): {"swap": 1.15, "all": 1.15, "step": 1.2, "infer": 1.15},
}
LEAST = {"swap": 1.0, "step": 1.12}  # of every other cell
ELSE = 1.05  # of every other column
STOCKS = 1.0  # of every cell and column on a GPU
MEAN = {  # geometric, of the grid
    "swap": 1.35,
    "all": 1.7,
    "step": 2.5,
    "adam": 1.5,
    "adam step": 2.6,
    "clipped": 1.5,
    "clipped step": 2.8,
    "infer": 1.6,
    "predict": 1.8,
}


class Cell(NamedTuple):
    """A network at one of its batches."""

    network: Network
    batch: int
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """As network @ batch."""
        return f"{self.network.name} @ {self.batch}"

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs [batch, in_features] and what the loss compares the outputs with."""
        torch.manual_seed(0)
        features, outputs = self.network.sizes[0], self.network.sizes[-1]
        x = torch.randn(self.batch, features).to(self.device, self.dtype)
        if self.network.loss == "cross_entropy":
            return x, torch.randint(outputs, (self.batch,)).to(self.device)
        target = torch.randn(self.batch, outputs)
        return x, ((target > 0) if self.network.loss == "bce" else target).to(x)

    @property
    def flushed(self) -> bool:
        """Whether it is so large on a GPU that each call is to find its cache empty."""
        return self.device.type == "cuda" and self.batch * max(self.network.sizes) >= FLUSHED_ELEMENTS

    def weights(self) -> list[Tensor]:
        """The parameters that every side starts from."""
        torch.manual_seed(0)
        return [parameter.detach() for parameter in stock_mlp(*self.network.sizes).parameters()]

    def columns(self) -> dict[str, object]:
        """The columns of a CSV file that name it."""
        network = self.network
        sizes = "-".join(map(str, network.sizes))
        kind = {"activation": network.activation, "loss": network.loss}
        return {"network": network.name, "sizes": sizes, "batch": self.batch, **kind}


# ---- the sides: each makes, for a cell, the call that is timed


def made(cell: Cell, make_model: Callable[..., nn.Module]) -> nn.Module:
    """A model with the cell's sizes and weights."""
    network = cell.network
    model = make_model(*network.sizes, activation=network.activation).to(cell.device, cell.dtype)
    with torch.no_grad():
        for own, weights in zip(model.parameters(), cell.weights(), strict=True):
            own.copy_(weights)
    return model


def standard_loop(
    cell: Cell,
    make_model: Callable[..., nn.Module] = stock_mlp,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    losses: Mapping[str, nn.Module] = LOSSES,
    clip: Callable[..., Tensor] | None = None,
    compiled: str | None = None,
    lr: float = LEARNING_RATE,
    **optimizer_options: bool,
) -> Call:
    """The training step as every PyTorch tutorial writes it; `compiled`: forward and loss, in this mode."""
    (x, target), model, loss = cell.data(), made(cell, make_model), losses[cell.network.loss]
    optimizer = make_optimizer(model.parameters(), lr=lr, **optimizer_options)

    def forward(x: Tensor, target: Tensor) -> Tensor:
        value: Tensor = loss(model(x), target)
        return value

    if compiled:
        forward = torch.compile(forward, dynamic=False, mode=compiled)

    def step() -> None:
        value = forward(x, target)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if clip:
            clip(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()

    return step


def one_call(
    cell: Cell,
    make_optimizer: Callable[..., torch.optim.Optimizer] = fastmlp.SGD,
    max_grad_norm: float | None = None,
    lr: float = LEARNING_RATE,
) -> Callable[[], Tensor]:
    """The training step by fastmlp.TrainStep."""
    (x, target), model = cell.data(), made(cell, fastmlp.MLP)
    optimizer = make_optimizer(model.parameters(), lr=lr)
    step = fastmlp.TrainStep(model, LOSSES[cell.network.loss], optimizer, max_grad_norm=max_grad_norm)
    return lambda: step(x, target)


def inference(cell: Cell, make_model: Callable[..., nn.Module] = stock_mlp) -> Call:
    """The forward pass alone."""
    (x, _), model = cell.data(), made(cell, make_model).eval()
    return lambda: model(x)


def prediction(cell: Cell) -> Call:
    """The same by fastmlp.Predictor."""
    (x, _), predict = cell.data(), fastmlp.Predictor(made(cell, stock_mlp).eval())
    return lambda: predict(x)


def captured_inference(cell: Cell, make_model: Callable[..., nn.Module] = stock_mlp) -> Call:
    """The same, as a CUDA graph."""
    call = inference(cell, make_model)
    with torch.inference_mode():
        return captured(call)


def compiled_inference(cell: Cell, mode: str = "default", **config: bool) -> Call:
    """The same, compiled in this mode, with this configuration of torch's compiler."""
    (x, _), model = cell.data(), made(cell, stock_mlp).eval()
    forward = torch.compile(model, dynamic=False, mode=mode)
    # Not by torch.compile(options=): weights are frozen while the model is traced, before options count.
    quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    with torch.inference_mode(), inductor_config.patch({**quiet, **config}):
        forward(x)
    return lambda: forward(x)


class Side(NamedTuple):
    """One of the ways to do what a column times."""

    make: Callable[[Cell], Call]
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def is_measured(self, cell: Cell, compiles: bool) -> bool:
        """Whether it is one of the cell's device, and without compiling where that is not wanted."""
        return (compiles or not self.compiles) and cell.device.type in self.devices


ON_A_CPU, ON_A_GPU = ("cpu",), ("cuda",)


def graph_of(make: Callable[[Cell], Call]) -> Side:
    """The same as one CUDA graph."""
    return Side(lambda cell: captured(make(cell)), devices=ON_A_GPU)


STOCK_STEPS = {
    "eager": Side(standard_loop),
    "fused_sgd": Side(lambda cell: standard_loop(cell, fused=True)),
    "graph": graph_of(partial(standard_loop, fused=True)),
    "compile": Side(lambda cell: standard_loop(cell, compiled="default", fused=True), compiles=True),
    "reduce_overhead": Side(
        lambda cell: standard_loop(cell, compiled="reduce-overhead", fused=True), True, ON_A_GPU
    ),
}
STOCK_INFERENCES = {
    "eager": Side(inference),
    "graph": Side(captured_inference, devices=ON_A_GPU),
    "compile": Side(compiled_inference, compiles=True),
    "reduce_overhead": Side(lambda cell: compiled_inference(cell, "reduce-overhead"), True, ON_A_GPU),
    "freezing": Side(lambda cell: compiled_inference(cell, freezing=True), True, ON_A_CPU),
    # On a GPU it would compile for minutes a layer.
    "max_autotune": Side(
        lambda cell: compiled_inference(cell, freezing=True, max_autotune=True), True, ON_A_CPU
    ),
}


def stocks_adam(**options: Any) -> dict[str, Side]:
    """Its variants, with these options of the loop."""
    loop = partial(standard_loop, make_optimizer=torch.optim.Adam, lr=ADAMS_LEARNING_RATE, **options)
    return {
        "eager": Side(loop),
        "foreach": Side(partial(loop, foreach=True)),
        "fused": Side(partial(loop, fused=True)),
        "graph": graph_of(partial(loop, fused=True, capturable=True)),
        "compile": Side(partial(loop, compiled="default", fused=True), compiles=True),
        "reduce_overhead": Side(partial(loop, compiled="reduce-overhead", fused=True), True, ON_A_GPU),
    }


all_of_ours = partial(standard_loop, make_model=fastmlp.MLP, losses=FASTMLP_LOSSES)
adam_of_ours = partial(all_of_ours, make_optimizer=fastmlp.Adam, lr=ADAMS_LEARNING_RATE)
adam_in_one_call = partial(one_call, make_optimizer=fastmlp.Adam, lr=ADAMS_LEARNING_RATE)


class Group(NamedTuple):
    """Columns that do the same work, and so have the same stock to be compared with."""

    mode: Callable[[], AbstractContextManager[object]]
    stock: Mapping[str, Side]
    columns: Mapping[str, Side]


GROUPS = (
    Group(
        torch.enable_grad,
        STOCK_STEPS,
        {
            "swap": Side(lambda cell: standard_loop(cell, fastmlp.MLP)),
            "all": Side(partial(all_of_ours, make_optimizer=fastmlp.SGD)),
            "step": Side(one_call),
            "graph of all": graph_of(partial(all_of_ours, make_optimizer=fastmlp.SGD)),
        },
    ),
    Group(
        torch.enable_grad,
        stocks_adam(),
        {
            "adam": Side(adam_of_ours),
            "adam step": Side(adam_in_one_call),
        },
    ),
    Group(
        torch.enable_grad,
        stocks_adam(clip=nn.utils.clip_grad_norm_),
        {
            "clipped": Side(partial(adam_of_ours, clip=fastmlp.clip_grad_norm_)),
            "clipped step": Side(partial(adam_in_one_call, max_grad_norm=MAX_GRAD_NORM)),
        },
    ),
    Group(
        torch.inference_mode,
        STOCK_INFERENCES,
        {
            "infer": Side(lambda cell: inference(cell, fastmlp.MLP)),
            "predict": Side(prediction, devices=ON_A_CPU),
            "graph of infer": Side(lambda cell: captured_inference(cell, fastmlp.MLP), devices=ON_A_GPU),
        },
    ),
)

VARIANTS = list(dict.fromkeys(name for group in GROUPS for name in group.stock))

# ---- measuring


class Result(NamedTuple):
    """What was measured of one column in one cell."""

    cell: Cell
    column: str
    seconds: timing.Quantiles | None  # None where it could not be measured
    speedup: timing.Quantiles | None  # over the best variant of stock
    stock: dict[str, timing.Quantiles]  # seconds of each variant
    best: str  # of them
    failed: dict[str, str]  # the sides that could not be measured, and why

    @property
    def target(self) -> float:
        """What the speedup is to reach."""
        if self.cell.device.type == "cuda":
            return STOCKS
        key = (self.cell.network.name, self.cell.batch)
        return (LEAST | TARGETS.get(key, {})).get(self.column, ELSE)


def measure(cell: Cell, group: Group, compiles: bool, rounds: int) -> list[Result]:
    """Times the columns of a group and the variants of stock in turns."""
    torch.compiler.reset()  # or the shapes of the last cell would count as reasons to compile for any shape
    sides = {**group.stock, **group.columns}
    makers = {
        name: partial(side.make, cell) for name, side in sides.items() if side.is_measured(cell, compiles)
    }
    samples, failed = timing.sample_what_works(makers, cell.device, rounds, cell.flushed, group.mode)
    seconds = {name: timed.seconds for name, timed in timing.summarise(samples).items()}
    stock = {name: seconds[name] for name in group.stock if name in seconds}
    best = min(stock, key=lambda name: stock[name].p50, default="")
    results = []
    for column in group.columns:
        if column in makers:
            pair = {name: samples[name] for name in (best, column) if name in samples}
            speedup = timing.summarise(pair)[column].speedup if len(pair) == 2 else None
            results.append(Result(cell, column, seconds.get(column), speedup, stock, best, failed))
    return results


# ---- reporting


def geometric_means(results: Sequence[Result]) -> dict[str, float]:
    """Of each column's median speedups."""
    logs: dict[str, list[float]] = {}
    for result in results:
        if result.speedup:
            logs.setdefault(result.column, []).append(math.log(result.speedup.p50))
    return {column: math.exp(math.fsum(own) / len(own)) for column, own in logs.items()}


def table(results: Sequence[Result], whole_grid: bool) -> Table:
    """A cell and column a row, then the geometric means, whose targets are those of the whole grid."""
    titles = ("", "", "ms", "stock ms", "stock", "times as fast", "20 to 80 %", "target")
    table = Table(*titles, box=box.SIMPLE_HEAD)
    for title in table.columns:
        title.justify = "left" if title.header in ("", "stock") else "right"
    for result in results:
        if result.seconds and result.speedup:
            table.add_row(
                str(result.cell),
                result.column,
                f"{1e3 * result.seconds.p50:.3f}",
                f"{1e3 * result.stock[result.best].p50:.3f}",
                result.best,
                f"{result.speedup.p50:.2f}",
                f"{result.speedup.p20:.2f} - {result.speedup.p80:.2f}",
                f"{result.target:.2f}",
            )
    table.add_section()
    on_a_cpu = results[0].cell.device.type == "cpu"
    for column, mean in geometric_means(results).items():
        target = f"{MEAN[column]:.2f}" if whole_grid and on_a_cpu else ""
        table.add_row("geometric mean", column, "", "", "", f"{mean:.2f}", "", target)
    return table


def failures(results: Sequence[Result]) -> list[str]:
    """The sides that could not be measured, each with why and where; stock's by a column beside them."""
    own = {column for group in GROUPS for column in group.columns}
    cells: dict[str, list[str]] = {}
    seen = set()
    for result in results:
        for side, why in result.failed.items():
            if (id(result.failed), side) not in seen:
                what = side if side in own else f"{side} beside {result.column}"
                cells.setdefault(f"{what} failed ({why})", []).append(str(result.cell))
            seen.add((id(result.failed), side))
    return [f"{what}: {', '.join(where)}" for what, where in cells.items()]


def row(result: Result, job: Mapping[str, str | int]) -> dict[str, object]:
    """One line of the CSV file; what was not measured is empty."""
    columns: dict[str, object] = {
        **result.cell.columns(),
        "column": result.column,
        **timing.columns(result.seconds and result.seconds.times(1e3), "ms", 6),
        **timing.columns(result.speedup, "speedup", 4),
        "target": result.target,
        "best": result.best,
        "variants": " ".join(result.stock),
        "failed": "; ".join(f"{name}: {error}" for name, error in result.failed.items()),
    }
    for name in VARIANTS:
        seconds = result.stock.get(name)
        columns |= timing.columns(seconds and seconds.times(1e3), f"{name}_ms", 6)
    return columns | dict(job)


def parser() -> Parser:
    """The command line."""
    names = [network.name for network in GRID]
    parts = [f"{network.name}@{batch}" for network in GRID for batch in network.batches]
    parser = benchmark_parser((__doc__ or "").split("\n")[0], names, parts, gpu=True)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes"
    )
    columns = [column for group in GROUPS for column in group.columns]
    parser.add_argument(
        "--columns", nargs="+", choices=columns, metavar="COLUMN", help=f"{', '.join(columns)} (all)"
    )
    return parser


def chosen(columns: Sequence[str] | None) -> list[Group]:
    """The groups, with these of their columns; with all where none are given."""
    groups = []
    for group in GROUPS:
        own = {name: side for name, side in group.columns.items() if not columns or name in columns}
        groups += [group._replace(columns=own)] if own else []
    return groups


def run(parser: Parser, options: argparse.Namespace) -> None:
    """The whole grid, to table and file."""
    job = {**start(parser, options), "dtype": options.dtype}
    place = torch.device(options.device), DTYPES[options.dtype]
    cells = [
        (Cell(network, batch, *place), group)
        for network in GRID
        for batch in network.batches
        for group in chosen(options.columns)
        if not options.only or {network.name, f"{network.name}@{batch}"} & {*options.only}
    ]
    output = table_output()
    results: list[Result] = []
    with results_file(options, NAME, ("gpu", "dtype", "network", "batch", "column")) as (path, take):
        output.print(timing.in_words(job))
        for cell, group in measured(cells, Console(stderr=True)):
            own = measure(cell, group, not options.no_compile, options.rounds)
            take([row(result, job) for result in own])
            results += own
        output.print(table(results, whole_grid=not options.only))
        for failure in failures(results):
            output.print(failure)
        if not all(result.speedup for result in results):
            parser.exit(1, f"{parser.prog}: a column could not be measured\n")
    output.print(f"{path} is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
