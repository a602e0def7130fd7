"""How much faster than JAX's jitted training step fastmlp.TrainStep is, in each cell of the grid.

Each side has a process of its own, since the thread pools of two libraries in one process get in each other's
way. The processes take turns, and are bound to the same processors, as many as there are threads. Both start
from the same weights and see the same batch, and before anything is timed their first losses must agree.
"""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import timing
from command import Parser, benchmark_parser, execute, measured, start, table_output
from rows import write_rows
from shapes import GRID
from steps import CPU, LEARNING_RATE, Cell, one_call

NAME = "peers"
LEAST, MEAN = 1.2, 2.0  # times faster that every cell and the geometric mean are to be: goals, not results
LOSSES_COMPARED = 5
TOLERANCE = 1e-4  # relative, of a loss in float32
REST_SECONDS = 0.1  # between turns: threads that have no more work spin, OpenBLAS's for 30 milliseconds

Steps = Callable[[int], float]  # takes so many steps, and waits for them; the loss of the last
Side = Callable[[Cell], Steps]


# ---- the sides: each makes, for a cell, what takes its steps


def fastmlp_steps(cell: Cell) -> Steps:
    """By fastmlp.TrainStep."""
    step = one_call(cell)

    def steps(count: int) -> float:
        for _ in range(count):
            value = step()
        return value.item()

    return steps


def jax_steps(cell: Cell) -> Steps:
    """By a jitted JAX function that is given the parameters to keep, as JAX's own examples write it.

    Steps are enqueued, as in a training loop; only the last is waited for. Weights are [in_features,
    out_features], as is usual there.
    """
    import jax
    import jax.numpy as jnp

    def cross_entropy(y: Any, target: Any) -> Any:
        of_target = jnp.take_along_axis(y, target[:, None], axis=-1)
        return jnp.mean(jax.nn.logsumexp(y, axis=-1, keepdims=True) - of_target)

    losses: dict[str, Callable[[Any, Any], Any]] = {
        "cross_entropy": cross_entropy,
        "mse": lambda y, target: jnp.mean((y - target) ** 2),
        "bce": lambda y, target: jnp.mean(jax.nn.softplus(y) - target * y),
    }

    activation = {
        "relu": jax.nn.relu,
        "tanh": jnp.tanh,
        "elu": jax.nn.elu,
        "gelu": partial(jax.nn.gelu, approximate=False),
    }[cell.network.activation]

    def loss(layers: list[tuple[Any, Any]], x: Any, target: Any) -> Any:
        *hidden, (last_weight, last_bias) = layers
        for weight, bias in hidden:
            x = activation(x @ weight + bias)
        return losses[cell.network.loss](x @ last_weight + last_bias, target)

    def sgd(layers: Any, x: Any, target: Any) -> tuple[Any, Any]:
        value, gradients = jax.value_and_grad(loss)(layers, x, target)
        return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, layers, gradients), value

    jax.config.update("jax_platforms", "cpu")
    step = jax.jit(sgd, donate_argnums=0)
    x, target = (jnp.array(tensor.numpy()) for tensor in cell.data())
    parameters = [jnp.array(tensor.t().numpy()) for tensor in cell.weights()]
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))

    def steps(count: int) -> float:
        nonlocal layers
        for _ in range(count):
            layers, value = step(layers, x, target)
        jax.block_until_ready(layers)
        return float(value)

    return steps


SIDES: dict[str, Side] = {
    "jax": jax_steps,
    "fastmlp": fastmlp_steps,
}  # the first is what the others are compared with


# ---- in a side's process


def settle(threads: int) -> None:
    """Binds the process to as many processors as it may have threads, which is how JAX sizes its pool."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the measuring process ends this one


@lru_cache(maxsize=1)
def made(side: Side, cell: Cell) -> Steps:
    """The side's steps, which go on where they were left until another cell is asked for."""
    return side(cell)


def first_losses(side: Side, cell: Cell) -> list[float]:
    """The losses of the first steps."""
    steps = made(side, cell)
    return [steps(1) for _ in range(LOSSES_COMPARED)]


def warm_up(side: Side, cell: Cell) -> float:
    """Until all that the first steps pay for is paid; the least seconds of a step."""
    steps = made(side, cell)
    return timing.warm_up(lambda: steps(1), CPU)


def seconds(side: Side, cell: Cell, count: int) -> float:
    """Of a step, where so many follow each other and its threads are awake."""
    steps = made(side, cell)
    steps(count)
    return timing.seconds_of(lambda: steps(count), CPU) / count


# ---- in the measuring process


@contextmanager
def processes(threads: int, sides: Mapping[str, Side]) -> Iterator[dict[str, Executor]]:
    """A process for each side, bare of what this one has loaded and started."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=context, initializer=settle, initargs=(threads,))
            )
            for name in sides
        }


class Result(NamedTuple):
    """What was measured of each side in one cell."""

    cell: Cell
    timings: dict[str, timing.Timing]

    @property
    def speedup(self) -> timing.Quantiles:
        """Of fastmlp over its peer."""
        return self.timings["fastmlp"].speedup


def check(cell: Cell, losses: Mapping[str, Sequence[float]]) -> None:
    """Ends the measurement where the sides don't compute the same."""
    first, *others = losses.values()
    if not all(
        math.isclose(a, b, rel_tol=TOLERANCE) for own in others for a, b in zip(first, own, strict=True)
    ):
        raise SystemExit(f"{cell}: the losses differ, so nothing is measured: {losses}")


def measure(cell: Cell, workers: Mapping[str, Executor], sides: Mapping[str, Side], rounds: int) -> Result:
    """Checks the sides against each other, and times them in turns."""

    def on(name: str, function: Callable[..., Any], *arguments: object) -> Any:
        return workers[name].submit(function, sides[name], cell, *arguments).result()

    check(cell, {name: on(name, first_losses) for name in sides})
    counts = {name: max(1, round(timing.ROUND_SECONDS / on(name, warm_up))) for name in sides}
    samples: dict[str, list[list[float]]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in timing.in_turn(list(sides), index):
            time.sleep(REST_SECONDS)
            samples[name].append([on(name, seconds, counts[name])])
    return Result(cell, timing.summarise(samples))


# ---- reporting


def table(results: Sequence[Result], whole_grid: bool) -> Table:
    """A cell a row, then the geometric mean, whose target is that of the whole grid."""
    table = Table("", "ms", "JAX ms", "times as fast", "20 to 80 %", "target", box=box.SIMPLE_HEAD)
    for title in table.columns[1:]:
        title.justify = "right"
    for result in results:
        table.add_row(
            str(result.cell),
            f"{1e3 * result.timings['fastmlp'].seconds.p50:.3f}",
            f"{1e3 * result.timings['jax'].seconds.p50:.3f}",
            f"{result.speedup.p50:.2f}",
            f"{result.speedup.p20:.2f} - {result.speedup.p80:.2f}",
            f"{LEAST:.2f}",
        )
    table.add_section()
    mean = math.exp(math.fsum(math.log(result.speedup.p50) for result in results) / len(results))
    table.add_row("geometric mean", "", "", f"{mean:.2f}", "", f"{MEAN:.2f}" if whole_grid else "")
    return table


def row(result: Result, job: Mapping[str, str | int]) -> dict[str, object]:
    """One line of the CSV file."""
    return {
        **result.cell.columns(),
        **result.timings["fastmlp"].seconds.times(1e3).columns("ms", 6),
        **result.timings["jax"].seconds.times(1e3).columns("jax_ms", 6),
        **result.speedup.columns("speedup", 4),
        "target": LEAST,
        **job,
    }


def parser() -> Parser:
    """The command line."""
    return benchmark_parser((__doc__ or "").split("\n")[0], [network.name for network in GRID])


def run(parser: Parser, options: argparse.Namespace) -> None:
    """The whole grid, to table and file."""
    try:
        jax_version = version("jax")
    except PackageNotFoundError:
        parser.error("JAX is not installed here; make bench-peers has an environment with it")
    job = start(parser, options) | {"jax": jax_version}
    networks = [network for network in GRID if not options.only or network.name in options.only]
    cells = [Cell(network, batch) for network in networks for batch in network.batches]
    output = table_output()
    with timing.all_or_none(options.output) as folder, processes(int(job["threads"]), SIDES) as workers:
        output.print(f"{timing.in_words(job)}, JAX {jax_version}")
        results = [
            measure(cell, workers, SIDES, options.rounds) for cell in measured(cells, Console(stderr=True))
        ]
        write_rows(folder / f"{NAME}.csv", [row(result, job) for result in results])
    output.print(table(results, whole_grid=not options.only))
    output.print(f"{options.output / NAME}.csv is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
