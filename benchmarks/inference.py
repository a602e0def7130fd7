"""How long the inference of a small network takes, from array to array, by every way to it on a CPU.

Stock eager, TorchScript frozen, AOTInductor, ONNX Runtime, NumPy; a model after fastmlp.fuse, and
fastmlp.Predictor. As in peers.py each has a process of its own, they take turns, and what is missing is left
out. All start from the same weights and get the same batch, and before anything is timed their outputs must
agree. At batch 1 the bound is reading the weights, which stands beside them.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable, Sequence
from statistics import geometric_mean
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
from kernels import ceilings
from peers import Peer, Result, Steps, measure, present, processes, versions
from rows import write_rows
from shapes import GRID, stock_mlp
from steps import CPU, Cell, made

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
    """Stock, as TorchScript with constant weights, prepared for inference."""

    def prepare(model: torch.nn.Module, x: torch.Tensor) -> Any:
        traced = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))

    return of_module(cell, prepare)


def aot_inductor(cell: Cell) -> Steps:
    """Stock, compiled to a library ahead of time, with constant weights."""

    def prepare(model: torch.nn.Module, x: torch.Tensor) -> Any:
        with TemporaryDirectory() as folder:
            path = torch._inductor.aoti_compile_and_package(
                torch.export.export(model, (x,)),
                package_path=f"{folder}/model.pt2",
                inductor_configs={"freezing": True},
            )
            return torch._inductor.aoti_load_package(path)

    return of_module(cell, prepare)


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
    with TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=False)
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


def reading(cell: Cell) -> Steps:
    """The machine's own bound: reading the parameters once, on all threads or on one, whichever is faster.

    It says that it has computed what stock does.
    """
    read, parameters = ceilings().read, torch.cat([p.flatten() for p in cell.weights()])
    read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_long]

    def reads(threads: int) -> Steps:
        arguments = threads, parameters.data_ptr(), parameters.numel()

        def steps(count: int, held: torch.Tensor = parameters) -> float:  # or their memory would be another's
            for _ in range(count):
                read(*arguments)
            return y

        return steps

    y = eager(cell)(1)
    ways = [reads(1), reads(torch.get_num_threads())]
    return min(ways, key=lambda steps: timing.warm_up(lambda: steps(100), CPU))


SIDES: dict[str, Peer] = {
    "eager": Peer(eager),
    "frozen": Peer(frozen),
    "aot_inductor": Peer(aot_inductor, program="g++"),
    "onnx_runtime": Peer(onnx_runtime, "onnxruntime"),
    "numpy": Peer(numpy, "numpy"),
    "fused": Peer(fused),
    "predictor": Peer(predictor),
    "reading": Peer(reading, program="g++"),
}
# Ours, and how many times as fast as the fastest peer they are to be in the geometric mean: goals.
OURS = {"fused": 1.2, "predictor": 1.8}


def over_the_fastest(result: Result, side: str) -> float:
    """How many times as fast as the fastest of the peers one of ours is."""
    fastest = min(result.samples.keys() - OURS - {"reading"}, key=lambda name: result.seconds(name).p50)
    return result.speedup(side, fastest).p50


def table(results: Sequence[Result]) -> Table:
    """Microseconds, a cell a row, and how ours compare with the fastest peer; then the geometric means."""
    sides = list(results[0].samples)
    titles = [name.replace("_", " ") for name in sides] + [f"× {name}" for name in OURS]
    table = Table("µs", *titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        table.add_row(
            str(result.case),
            *(f"{1e6 * result.seconds(name).p50:.1f}" for name in sides),
            *(f"{over_the_fastest(result, name):.2f}" for name in OURS),
        )
    table.add_section()
    means = [geometric_mean([over_the_fastest(result, name) for result in results]) for name in OURS]
    table.add_row("mean", *[""] * len(sides), *(f"{mean:.2f}" for mean in means))
    table.add_row("target", *[""] * len(sides), *(f"{target:.2f}" for target in OURS.values()))
    return table


def row(result: Result, job: dict[str, str | int]) -> dict[str, object]:
    """One line of the CSV file; what was left out is empty."""
    columns: dict[str, object] = {**result.case.columns()}
    for name in SIDES:
        seconds = result.seconds(name).times(1e6) if name in result.samples else None
        columns |= timing.columns(seconds, f"{name}_us", 3)
    return columns | job


def parser() -> Parser:
    """The command line."""
    return benchmark_parser((__doc__ or "").split("\n")[0], list(dict.fromkeys(name for name, _ in CELLS)))


def run(parser: Parser, options: argparse.Namespace) -> None:
    """All cells, to table and file."""
    job, output = start(parser, options), table_output()
    sides = present(SIDES, output.print)
    job |= versions(SIDES, sides)
    networks = {network.name: network for network in GRID}
    cells = [Cell(networks[name], batch) for name, batch in CELLS if not options.only or name in options.only]
    makers = {name: side.make for name, side in sides.items()}
    with timing.all_or_none(options.output) as folder, processes(int(job["threads"]), makers) as workers:
        output.print(timing.in_words(job))
        results = [measure(cell, workers, options.rounds) for cell in measured(cells, Console(stderr=True))]
        write_rows(folder / f"{NAME}.csv", [row(result, job) for result in results])
    output.print(table(results))
    output.print(f"{options.output / NAME}.csv is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
