"""The main job: the same network learns handwritten digits with stock PyTorch and with fastmlp, side by side.

Every side starts from the same weights and sees the same batches in the same order, so the losses should
agree and only the time differ. The sides take turns, a few steps each. A step is forward, loss, zero_grad,
backward and update; gathering the batch is not counted.
"""

import os
import signal
import sys

if __name__ == "__main__":
    # Nothing is on disk yet while torch and the others load, so Ctrl-C may end the process on the spot.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import argparse
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import data
import fastmlp
import timing
from command import Output, Parser, execute, whole
from plot import draw
from rows import write_rows
from shapes import stock_mlp

RESULTS = Path("demo")
NAME = "train"
CHUNK = 20  # steps that a side takes in its turn
EPOCHS_DIGITS, EPOCHS_IDX = 100, 5
LARGEST = 1 << 16  # of the numbers in --sizes

Step = Callable[[Tensor, Tensor], Tensor]


def standard_loop(model: nn.Module, lr: float) -> Step:
    """The training step as every PyTorch tutorial writes it; returns the loss of the batch."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def one_call(model: nn.Module, lr: float) -> Step:
    """The same by fastmlp.TrainStep."""
    return fastmlp.TrainStep(model, nn.CrossEntropyLoss(), fastmlp.SGD(model.parameters(), lr=lr))


class Side(NamedTuple):
    """A way to train: what makes the model from its sizes, and the step from model and learning rate."""

    name: str
    make_model: Callable[..., nn.Module]
    make_step: Callable[[nn.Module, float], Step] = standard_loop


# The first is what the others are measured against.
SIDES = (
    Side("stock PyTorch", stock_mlp),
    Side("fastmlp", fastmlp.MLP),
    Side("fastmlp.TrainStep", fastmlp.MLP, one_call),
)


@dataclass
class Run:
    """One side's training: its model, and what was seen of it."""

    model: nn.Module
    step: Step
    seconds: list[list[float]] = field(default_factory=list)  # [round][step]
    losses: list[Tensor] = field(default_factory=list)  # [step], of the batch, before the update

    def take(self, x: Tensor, y: Tensor) -> float:
        """One step; its seconds."""
        return timing.seconds_of(lambda: self.losses.append(self.step(x, y)), x.device)


def start(side: Side, options: argparse.Namespace) -> Run:
    """The side's model with the weights that `--seed` gives to the stock model, ready to train."""
    torch.manual_seed(options.seed)
    reference = stock_mlp(*options.sizes)
    model = side.make_model(*options.sizes)
    with torch.no_grad():
        for own, weights in zip(model.parameters(), reference.parameters(), strict=True):
            own.copy_(weights)
    model.to(options.device)
    return Run(model, side.make_step(model, options.lr))


def batches(count: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """Indices [batch] of the training images of each step, shuffled anew each epoch.

    Images that do not fill a batch sit the epoch out, so that every step is the same amount of work.
    """
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        order = torch.randperm(count, generator=generator)
        full = order[: count // options.batch * options.batch].reshape(-1, options.batch)
        yield from full.to(options.device)


def train(images: data.Dataset, options: argparse.Namespace, progress: Progress) -> dict[str, Run]:
    """Trains all sides in turns, after a warm-up."""
    for side in SIDES:  # on models that are thrown away
        x, y = images.train_x[: options.batch], images.train_y[: options.batch]
        spare = start(side, options)
        for _ in range(timing.WARM_UP):
            spare.take(x, y)

    runs = {side.name: start(side, options) for side in SIDES}
    steps = len(images.train_x) // options.batch * options.epochs
    task = progress.add_task("training", total=steps)
    stream = batches(len(images.train_x), options)
    for index in range(math.ceil(steps / CHUNK)):
        chunk = list(islice(stream, CHUNK))
        for run in timing.in_turn(list(runs.values()), index):
            run.seconds.append([run.take(images.train_x[batch], images.train_y[batch]) for batch in chunk])
        # Drawn between the turns and not by a thread of its own, which would take time from the steps.
        progress.update(task, advance=len(chunk), refresh=True)
    return runs


class Result(NamedTuple):
    """What one side reached."""

    timing: timing.Timing
    final_loss: float  # mean over all training images
    accuracy: float  # share of the test images recognised
    difference: float  # largest distance of the loss curve from the first side's


@torch.inference_mode()
def judge(runs: dict[str, Run], images: data.Dataset) -> dict[str, Result]:
    """The result of each side."""
    timings = timing.summarise({name: run.seconds for name, run in runs.items()})
    curves = {name: torch.stack(run.losses) for name, run in runs.items()}
    first = next(iter(curves.values()))
    return {
        name: Result(
            timings[name],
            F.cross_entropy(run.model(images.train_x), images.train_y).item(),
            (run.model(images.test_x).argmax(1) == images.test_y).double().mean().item(),
            (curves[name] - first).abs().max().item(),
        )
        for name, run in runs.items()
    }


def table(results: dict[str, Result]) -> Table:
    """The results side by side."""
    table = Table("", *results, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"

    def span(unit: float, value: timing.Quantiles, decimals: int) -> str:
        return f"{unit * value.p20:.{decimals}f} - {unit * value.p80:.{decimals}f}"

    def row(title: str, cell: Callable[[Result], str], first: bool = True) -> None:
        cells = [cell(result) for result in results.values()]
        table.add_row(title, *(cells if first else ["", *cells[1:]]))

    row("final training loss", lambda result: f"{result.final_loss:.4f}")
    row("test accuracy", lambda result: f"{result.accuracy:.2%}")
    row("ms a step, median", lambda result: f"{1e3 * result.timing.seconds.p50:.3f}")
    row("  20 to 80 %", lambda result: span(1e3, result.timing.seconds, 3))
    row("times as fast, median", lambda result: f"{result.timing.speedup.p50:.2f}", first=False)
    row("  20 to 80 %", lambda result: span(1, result.timing.speedup, 2), first=False)
    row("largest loss difference", lambda result: f"{result.difference:.1e}", first=False)
    return table


def write_curves(path: Path, runs: dict[str, Run]) -> None:
    """One row a step; `seconds` is the side's own training time up to the end of the step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["side", "step", "seconds", "loss"])
        for name, run in runs.items():
            elapsed = accumulate(chain.from_iterable(run.seconds))
            losses = torch.stack(run.losses).tolist()
            for step, (seconds, loss) in enumerate(zip(elapsed, losses, strict=True), start=1):
                writer.writerow([name, step, f"{seconds:.7f}", f"{loss:.9g}"])


def write_summary(path: Path, results: dict[str, Result], job: dict[str, object]) -> None:
    """One row a side: the figures of the table, and all that is needed to get them again."""
    rows = [
        {
            "side": name,
            "final_loss": f"{result.final_loss:.9g}",
            "test_accuracy": f"{result.accuracy:.6f}",
            **result.timing.seconds.times(1e3).columns("ms", 6),
            **result.timing.speedup.columns("speedup", 4),
            "loss_difference": f"{result.difference:.3g}",
            **job,
        }
        for name, result in results.items()
    ]
    write_rows(path, rows)


def parse_sizes(text: str) -> list[int]:
    """Sizes as in 784,500,10."""
    with suppress(argparse.ArgumentTypeError):
        sizes = [whole(1, LARGEST)(part) for part in text.split(",")]
        if len(sizes) > 1:
            return sizes
    message = f"expected two or more whole numbers from 1 to {LARGEST}, as in 784,500,10, not '{text}'"
    raise argparse.ArgumentTypeError(message)


def parse_lr(text: str) -> float:
    """A learning rate."""
    with suppress(ValueError):
        if 0 < (lr := float(text)) < math.inf:
            return lr
    raise argparse.ArgumentTypeError(f"expected a number above 0, not '{text}'")


def parser() -> Parser:
    """The command line."""
    cores = os.cpu_count() or 1
    parser = Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--sizes", type=parse_sizes, default="784,500,10", help="features of each layer (%(default)s)")
    add("--batch", type=whole(1, 1 << 20), default=64, help="images a step (%(default)s)")
    add("--epochs", type=whole(1, 1 << 20), help=f"({EPOCHS_DIGITS}, with --data {EPOCHS_IDX})")
    add("--lr", type=parse_lr, default=0.01, help="learning rate of SGD (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    add("--threads", type=whole(1, cores), help="of the CPU (as many as torch takes)")
    add("--seed", type=whole(0, (1 << 63) - 1), default=0, help="of all that is random (%(default)s)")
    add("--data", type=Path, metavar="DIR", help="with MNIST's IDX files (scikit-learn's digits)")
    add("--output", type=Path, metavar="DIR", default=RESULTS, help="where results go (%(default)s)")
    return parser


def load(parser: Parser, options: argparse.Namespace) -> data.Dataset:
    """The data set, where network and batch fit it; ends the program where not."""
    try:
        images = data.idx(options.data, options.sizes[-1]) if options.data else data.digits(options.seed)
    except data.DataError as error:
        parser.error(f"argument --data: {error}")
    if options.sizes[0] != images.pixels:
        parser.error(f"argument --sizes: expected {images.pixels} first, the pixels of an image")
    if options.sizes[-1] < images.classes:
        parser.error(f"argument --sizes: expected {images.classes} or more last, the classes of the images")
    if options.batch > len(images.train_x):
        parser.error(f"argument --batch: expected at most the {len(images.train_x)} training images")
    return images.to(options.device)


def run(parser: Parser, options: argparse.Namespace) -> None:
    """The whole job, from data to table and files."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device")
    options.device = torch.device(options.device)
    options.epochs = options.epochs or (EPOCHS_IDX if options.data else EPOCHS_DIGITS)
    if options.threads:
        torch.set_num_threads(options.threads)
    images = load(parser, options)
    machine = timing.machine(options.device)
    job: dict[str, object] = {
        "data": images.name,
        "sizes": "-".join(map(str, options.sizes)),
        "batch": options.batch,
        "epochs": options.epochs,
        "lr": options.lr,
        "seed": options.seed,
        "device": options.device.type,
        **machine,
    }

    output = Output(markup=False, emoji=False, highlight=False, soft_wrap=True)
    with timing.all_or_none(options.output) as folder:
        output.print(
            f"{job['sizes']}, ReLU, cross-entropy, SGD(lr={options.lr:g}), batch {options.batch}, "
            f"epochs {options.epochs}\n"
            f"{images.name}: {len(images.train_x)} images to learn, {len(images.test_x)} to test\n"
            f"{timing.in_words(machine)}"
        )
        screen = Console(stderr=True)
        with Progress(console=screen, auto_refresh=False, disable=not screen.is_terminal) as progress:
            runs = train(images, options, progress)
        results = judge(runs, images)
        write_curves(folder / f"{NAME}.csv", runs)
        write_summary(folder / f"{NAME}_summary.csv", results, job)
        draw(folder / f"{NAME}.csv", folder / NAME, options.output / "steps.csv")
    output.print(table(results))
    output.print(f"{options.output / NAME}.svg, -dark.svg, .png, .csv and _summary.csv are written")


def main(argv: Sequence[str] | None = None) -> int:
    """The job, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
