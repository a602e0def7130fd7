"""What torch.compile and autocast leave of the speed of fused layers: a training step with and without them.

To torch.compile a fused layer is one op, which it cannot fuse with its neighbours as it can torch's own. Both
sides are compiled alike here, and differ in nothing but the layers. All take turns.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import nn

import fastmlp
import timing
from command import Parser, benchmark_parser, execute, measure_all
from shapes import GRID, stock_mlp
from steps import CPU, Cell, standard_loop
from timing import Call

NAME = "habits"
BATCHES = {"seed": 64, "tabular": 128}  # of the grid
CELLS = [Cell(network, BATCHES[network.name]) for network in GRID if network.name in BATCHES]

MakeModel = Callable[..., nn.Module]


def cast(make_model: MakeModel) -> MakeModel:
    """Models that compute in bfloat16 by autocast."""

    def make(*sizes: int, **options: Any) -> nn.Module:
        model = make_model(*sizes, **options)
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        return model

    return make


HABITS: dict[str, Callable[[Cell, MakeModel], Call]] = {
    "eager": standard_loop,
    "compile": lambda cell, make: standard_loop(cell, make, compiled="default"),
    "autocast": lambda cell, make: standard_loop(cell, cast(make)),
    "both": lambda cell, make: standard_loop(cell, cast(make), compiled="default"),
}


class Result(NamedTuple):
    """What was measured of one habit in one cell."""

    cell: Cell
    habit: str
    stock: timing.Quantiles  # seconds of a step
    ours: timing.Quantiles
    speedup: timing.Quantiles  # of ours over stock with the same habit
    over_eager: timing.Quantiles  # of ours over stock in eager mode


def measure(cell: Cell, rounds: int) -> list[Result]:
    """Times stock and ours with each habit, all in turns."""
    torch.compiler.reset()  # or the shapes of the last cell would count as reasons to compile for any shape
    calls = {}
    for habit, make_step in HABITS.items():
        calls[f"stock, {habit}"] = make_step(cell, stock_mlp)
        calls[f"ours, {habit}"] = make_step(cell, fastmlp.MLP)
    samples = timing.sample(calls, CPU, rounds)

    def ours_over(stock: str, habit: str) -> timing.Quantiles:
        pair = timing.summarise({name: samples[name] for name in (f"stock, {stock}", f"ours, {habit}")})
        return pair[f"ours, {habit}"].speedup

    seconds = {name: timed.seconds for name, timed in timing.summarise(samples).items()}
    return [
        Result(
            cell,
            habit,
            seconds[f"stock, {habit}"],
            seconds[f"ours, {habit}"],
            ours_over(habit, habit),
            ours_over("eager", habit),
        )
        for habit in HABITS
    ]


def table(results: Sequence[Result]) -> Table:
    """A cell and habit a row."""
    titles = ("", "", "stock ms", "ms", "times as fast", "20 to 80 %", "over eager")
    table = Table(*titles, box=box.SIMPLE_HEAD)
    for title in table.columns[2:]:
        title.justify = "right"
    for result in results:
        table.add_row(
            str(result.cell),
            result.habit,
            f"{1e3 * result.stock.p50:.3f}",
            f"{1e3 * result.ours.p50:.3f}",
            f"{result.speedup.p50:.2f}",
            f"{result.speedup.p20:.2f} - {result.speedup.p80:.2f}",
            f"{result.over_eager.p50:.2f}",
        )
    return table


def row(result: Result, job: Mapping[str, str | int]) -> dict[str, object]:
    """One line of the CSV file."""
    return {
        "network": result.cell.network.name,
        "sizes": "-".join(map(str, result.cell.network.sizes)),
        "batch": result.cell.batch,
        "habit": result.habit,
        **result.stock.times(1e3).columns("stock_ms", 6),
        **result.ours.times(1e3).columns("ms", 6),
        **result.speedup.columns("speedup", 4),
        **result.over_eager.columns("over_eager", 4),
        **job,
    }


def parser() -> Parser:
    """The command line."""
    return benchmark_parser((__doc__ or "").split("\n")[0], [cell.network.name for cell in CELLS])


def run(parser: Parser, options: argparse.Namespace) -> None:
    """All cells, to table and file."""
    cells = [cell for cell in CELLS if not options.only or cell.network.name in options.only]
    measure_all(parser, options, NAME, cells, measure, row, table)


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
