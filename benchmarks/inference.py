"""How long the inference of a small network takes, from array to array, by every way to it on a CPU.

Stock eager, TorchScript frozen, ONNX Runtime, NumPy; a model after fastmlp.fuse, and fastmlp.Predictor. As in
peers.py each has a process of its own, and they take turns. All start from the same weights and get the same
batch, and before anything is timed their outputs must agree.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fastmlp
import timing
from command import Parser, benchmark_parser, execute, measured, start, table_output
from peers import Result, Side, Steps, measure, processes
from rows import write_rows
from shapes import GRID, stock_mlp
from steps import Cell, made

NAME = "inference"
CELLS = [("policy", 1), ("policy", 8), ("policy", 64), ("rl", 1), ("rl", 8), ("rl", 64),
         ("seed", 1), ("seed", 8), ("seed", 64)]  # fmt: skip
Array = np.ndarray[Any, np.dtype[np.float32]]
NUMPYS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda z: np.maximum(z, np.float32(0)),
    "tanh": np.tanh,
}


def repeated(call: Callable[[], Any]) -> Steps:
    """So many calls; the sum of the last output's sizes."""

    def steps(count: int) -> float:
        for _ in range(count):
            y = call()
        return float(abs(y).sum())

    return steps


def of_module(cell: Cell, prepare: Callable[[torch.nn.Module, torch.Tensor], Any]) -> Steps:
    """By what `prepare` makes of stock's model, under torch.inference_mode."""
    x = cell.data()[0]
    forward = prepare(made(cell, stock_mlp).eval(), x)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        y: torch.Tensor = forward(x)
        return y

    return repeated(call)


def eager(cell: Cell) -> Steps:
    """Stock."""
    return of_module(cell, lambda model, x: model)


def frozen(cell: Cell) -> Steps:
    """Stock, as TorchScript with constant weights."""
    return of_module(cell, lambda model, x: torch.jit.freeze(torch.jit.trace(model, x)))  # type: ignore[no-untyped-call]


def fused(cell: Cell) -> Steps:
    """After fastmlp.fuse."""
    return of_module(cell, lambda model, x: fastmlp.fuse(model))


def predictor(cell: Cell) -> Steps:
    """By fastmlp.Predictor, from NumPy's array to NumPy's array."""
    x, predict = cell.data()[0].numpy(), fastmlp.Predictor(made(cell, stock_mlp).eval())
    return repeated(lambda: predict(x))


def onnx_runtime(cell: Cell) -> Steps:
    """By ONNX Runtime, from NumPy's array to NumPy's array."""
    import onnxruntime  # type: ignore[import-untyped]

    x, model = cell.data()[0], made(cell, stock_mlp).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=False)  # it is talkative
        session = onnxruntime.InferenceSession(path, options)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return repeated(lambda: session.run(None, feed)[0])


def numpy(cell: Cell) -> Steps:
    """As one writes it with NumPy."""
    x, parameters = cell.data()[0].numpy(), [p.numpy() for p in cell.weights()]
    activation = NUMPYS[cell.network.activation]
    *hidden, (last_weight, last_bias) = zip(
        [np.ascontiguousarray(weight.T) for weight in parameters[::2]], parameters[1::2], strict=True
    )

    def call() -> Array:
        h = x
        for weight, bias in hidden:
            h = activation(h @ weight + bias)
        y: Array = h @ last_weight + last_bias
        return y

    return repeated(call)


SIDES: dict[str, Side] = {
    "eager": eager,
    "frozen": frozen,
    "onnx_runtime": onnx_runtime,
    "numpy": numpy,
    "fused": fused,
    "predictor": predictor,
}


def table(results: Sequence[Result]) -> Table:
    """Microseconds, a cell a row."""
    table = Table("µs", *(name.replace("_", " ") for name in SIDES), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        table.add_row(str(result.cell), *(f"{1e6 * result.timings[name].seconds.p50:.1f}" for name in SIDES))
    return table


def row(result: Result, job: dict[str, str | int]) -> dict[str, object]:
    """One line of the CSV file."""
    columns: dict[str, object] = {**result.cell.columns()}
    for name in SIDES:
        columns |= result.timings[name].seconds.times(1e6).columns(f"{name}_us", 3)
    return columns | job


def parser() -> Parser:
    """The command line."""
    return benchmark_parser((__doc__ or "").split("\n")[0], list(dict.fromkeys(name for name, _ in CELLS)))


def run(parser: Parser, options: argparse.Namespace) -> None:
    """All cells, to table and file."""
    job = start(parser, options) | {name: version(name) for name in ("onnxruntime", "numpy")}
    networks = {network.name: network for network in GRID}
    cells = [Cell(networks[name], batch) for name, batch in CELLS if not options.only or name in options.only]
    output = table_output()
    with timing.all_or_none(options.output) as folder, processes(int(job["threads"]), SIDES) as workers:
        output.print(timing.in_words(job))
        results = [
            measure(cell, workers, SIDES, options.rounds) for cell in measured(cells, Console(stderr=True))
        ]
        write_rows(folder / f"{NAME}.csv", [row(result, job) for result in results])
    output.print(table(results))
    output.print(f"{options.output / NAME}.csv is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
