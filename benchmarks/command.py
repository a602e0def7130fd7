"""What the benchmarks share as programs: their options, their output, and one line for every way to fail."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import timing
from rows import update_rows, write_rows

RESULTS = Path(__file__).parent / "results"
PART = Path("demo")  # a part of the grid must not replace the results of the whole
WIDTH = 110  # characters

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Cell = TypeVar("Cell")
Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """One that is short in its complaints."""

    def error(self, message: str) -> NoReturn:
        """Ends with one sentence; argparse would put the usage before it."""
        self.exit(2, f"{self.prog}: {message}\n")


class Output(Console):
    """Standard output, where a reader that has gone is an error like others."""

    def on_broken_pipe(self) -> None:
        """Rich would end without a word."""
        with suppress(SystemExit):
            super().on_broken_pipe()
        raise BrokenPipeError("standard output was closed")


def whole(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, not '{text}'")

    return parse


def benchmark_parser(
    description: str, names: Sequence[str] = (), parts: Sequence[str] = (), gpu: bool = False
) -> Parser:
    """The options of a benchmark, of which parts may be left out by name, and which may run on a GPU.

    `parts`: names of smaller parts, NAME@BATCH.
    """
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--rounds", type=whole(1, 1000), default=timing.ROUNDS, help="turns of each side (%(default)s)")
    if gpu:
        add("--device", choices=("cpu", "cuda"), help="(%(default)s)")
        add(
            "--dtype",
            choices=DTYPES,
            help="on a GPU: of everything; tf32 multiplies float32 so (%(default)s)",
        )
    if names:
        metavar = "NAME[@BATCH]" if parts else "NAME"
        choices = [*names, *parts]
        add("--only", nargs="+", choices=choices, metavar=metavar, help=f"{', '.join(names)} (all)")
    parser.set_defaults(device="cpu", dtype="float32", columns=None)
    add("--threads", type=whole(1, os.cpu_count() or 1), help="of the CPU (as many as torch takes)")
    add("--output", type=Path, metavar="DIR", help=f"where results go (results/; with --only, {PART})")
    return parser


def start(parser: Parser, options: argparse.Namespace) -> dict[str, str | int]:
    """Puts the options of `benchmark_parser` into effect; returns what the figures will be measured on."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no GPU")
    if options.device == "cpu" and options.dtype != "float32":
        parser.error("argument --dtype: on the CPU float32 is measured")
    options.output = options.output or (PART if options.only or options.columns else RESULTS)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    return timing.machine(torch.device(options.device))


@contextmanager
def results_file(
    options: argparse.Namespace, name: str, keys: Sequence[str]
) -> Iterator[tuple[Path, Callable[[Sequence[Mapping[str, object]]], None]]]:
    """Where rows are written to, and what takes them.

    A CPU's are written at the end, all or none. A GPU may be lent for minutes: its rows are written at once,
    to a file beside the CPU's, in the place of those there that agree in all keys.
    """
    if options.device != "cpu":
        path = options.output / f"{name}_{options.device}.csv"
        yield path, lambda rows: update_rows(path, rows, keys)
        return
    path = options.output / f"{name}.csv"
    rows: list[Mapping[str, object]] = []
    with timing.all_or_none(options.output) as folder:
        yield path, rows.extend
        write_rows(folder / path.name, rows)


def table_output() -> Output:
    """Standard output, wide enough for the tables wherever it goes."""
    return Output(width=WIDTH, markup=False, emoji=False, highlight=False)


def measured(cells: Sequence[Cell], screen: Console) -> Iterable[Cell]:
    """The cells one after the other, with a bar that tells how many are done."""
    with Progress(console=screen, auto_refresh=False, disable=not screen.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(cells))
        for cell in cells:
            yield cell
            # Drawn between the cells and not by a thread of its own, which would take time from them.
            progress.update(task, advance=1, refresh=True)


def measure_all(
    parser: Parser,
    options: argparse.Namespace,
    name: str,
    cells: Sequence[Cell],
    measure: Callable[[Cell, int], Iterable[Result]],
    row: Callable[[Result, dict[str, str | int]], Mapping[str, object]],
    table: Callable[[Sequence[Result]], Table],
) -> None:
    """All cells, each for so many rounds, to table and file."""
    job = start(parser, options)
    output = table_output()
    results: list[Result] = []
    with timing.all_or_none(options.output) as folder:
        output.print(timing.in_words(job))
        for cell in measured(cells, Console(stderr=True)):
            results += measure(cell, options.rounds)
        write_rows(folder / f"{name}.csv", [row(result, job) for result in results])
    output.print(table(results))
    output.print(f"{options.output / name}.csv is written")


def execute(
    parser: Parser, run: Callable[[Parser, argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Runs the job with the options, and turns an interruption or a failed write into an exit status."""
    options = parser.parse_args(argv)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(parser, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a broken stdout still holds has nowhere to go
        place = f"argument --output: cannot write to {options.output}" if error.filename else "cannot write"
        parser.error(f"{place} ({error.strerror or error})")
    return 0
