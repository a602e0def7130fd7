"""Draws the loss of each side against the time it has trained, from the CSV that train.py writes.

Beside it how much faster whole steps are, from the CSV of steps.py, where that stands beside it.
`python benchmarks/plot.py [CSV]` draws the picture again, with nothing measured again.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from timing import all_or_none

Floats = NDArray[np.float64]

CURVES = Path("demo/train.csv")


class Scheme(NamedTuple):
    """The colours of a drawing."""

    background: str
    ink: str
    lines: tuple[str, ...]

    def style(self) -> dict[Any, Any]:
        """The same as matplotlib's settings."""
        keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
        return {
            **dict.fromkeys(keys, self.ink),
            "figure.facecolor": self.background,
            "axes.facecolor": "none",
            "axes.prop_cycle": cycler(color=self.lines),
        }


# By what follows the file's name. The lines' colours are Okabe and Ito's, which the colour-blind tell apart:
# https://jfly.uni-koeln.de/color. The dark drawing lies on whatever background the page has.
SCHEMES = {
    "": Scheme("white", "black", ("#999999", "#D55E00", "#0072B2", "#009E73", "#CC79A7")),
    "-dark": Scheme("none", "#E6EDF3", ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")),
}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
    "svg.hashsalt": "fastmlp",  # the same figures give the same file
}
WINDOWS = 60  # parts of a curve; the running mean goes over one of them

# The bars: network, batch and column of steps.py, those that have been measured.
BARS = {
    "MNIST classifier\nbatch 64": ("seed", "64", "step"),
    "RL policy\nbatch 1": ("rl", "1", "step"),
    "RL policy\nbatch 64": ("rl", "64", "step"),
    "tabular data\nbatch 128": ("tabular", "128", "step"),
    "tabular data\nbatch 128, Adam": ("tabular", "128", "adam step"),
    "RL policy, batch 64\nAdam, clipped": ("rl", "64", "clipped step"),
}


class Curve(NamedTuple):
    """What one side's training looked like."""

    seconds: Floats  # [steps], training time of this side so far
    loss: Floats  # [steps]


def read_curves(path: Path) -> dict[str, Curve]:
    """The curve of each side."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            points[row["side"]].append((float(row["seconds"]), float(row["loss"])))
    return {side: Curve(*np.array(own).T) for side, own in points.items()}


def read_summary(path: Path) -> dict[str, dict[str, str]]:
    """The row of each side, from the summary that stands beside the curves."""
    with path.with_name(f"{path.stem}_summary.csv").open(newline="") as file:
        return {row["side"]: row for row in csv.DictReader(file)}


def running_mean(values: Floats, window: int) -> Floats:
    """Over the last `window` values; the first ones have fewer before them."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(1, len(total))
    first = np.maximum(last - window, 0)
    mean: Floats = (total[last] - total[first]) / (last - first)
    return mean


def read_speedups(path: Path) -> dict[str, float]:
    """How many times as fast TrainStep is, of those bars that the file has."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        found = {
            (row["network"], row["batch"], row["column"]): float(row["speedup_p50"])
            for row in csv.DictReader(file)
        }
    return {name: found[key] for name, key in BARS.items() if key in found}


def draw(csv_path: Path, out_stem: Path, speedups_path: Path | None = None) -> None:
    """Writes out_stem.svg, -dark.svg and .png; the words come from the summary beside `csv_path`."""
    curves, summary = read_curves(csv_path), read_summary(csv_path)
    speedups = read_speedups(speedups_path or csv_path.with_name("steps.csv"))
    job = next(iter(summary.values()))
    for suffix, scheme in SCHEMES.items():
        with rc_context(STYLE | scheme.style()):
            figure = Figure(figsize=(8.4, 4.2), layout="constrained")
            left, *right = figure.subplots(
                ncols=1 + bool(speedups), width_ratios=[3, 2][: 1 + bool(speedups)], squeeze=False
            )[0]
            draw_curves(left, curves, summary)
            left.set_title("{sizes} on {data}, batch {batch}".format_map(job), loc="left", weight="bold")
            for axes in right:
                draw_bars(axes, speedups, scheme)
            machine = f"{job['gpu'] or job['cpu']}, {job['threads']} threads, torch {job['torch']}"
            figure.supxlabel(machine, x=0.99, ha="right", fontsize=8, alpha=0.7)
            figure.savefig(f"{out_stem}{suffix}.svg", metadata={"Date": None})
            if not suffix:
                figure.savefig(f"{out_stem}.png", dpi=200)


def draw_curves(axes: Axes, curves: dict[str, Curve], summary: dict[str, dict[str, str]]) -> None:
    """One line a side, which ends where its training does, with its name and how much faster it was."""
    window = max(1, len(next(iter(curves.values())).loss) // WINDOWS)
    for index, (side, curve) in enumerate(curves.items()):
        # The first side lies under the others, wider: where curves coincide, all stay in sight.
        width = 1.8 if index else 4.0
        loss = running_mean(curve.loss, window)
        (line,) = axes.plot(curve.seconds, loss, marker="o", markevery=[-1], linewidth=width)
        speedup = f"\n×{float(summary[side]['speedup_p50']):.2f}" if index else ""
        axes.annotate(
            side.replace(" ", "\n").replace(".", ".\n") + speedup,
            (curve.seconds[-1], loss[-1]),
            (0, -9 if index else 9),  # the first ends last: above it is room
            textcoords="offset points",
            ha="center",
            va="top" if index else "bottom",
            color=line.get_color(),
            weight="bold",
            annotation_clip=False,
        )
    axes.set_xlabel("training time [s]")
    axes.set_ylabel("cross-entropy loss")
    axes.set_xlim(0, 1.08 * max(curve.seconds[-1] for curve in curves.values()))
    axes.set_yscale("log")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 2.5)  # room for the names
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(linewidth=0.5, alpha=0.15)


def draw_bars(axes: Axes, speedups: dict[str, float], scheme: Scheme) -> None:
    """How many times as fast TrainStep is as the best of stock, which ends at the line at 1."""
    bars = axes.barh(list(speedups), list(speedups.values()), color=scheme.lines[2], height=0.7)
    axes.bar_label(bars, [f"×{speedup:.1f}" for speedup in speedups.values()], padding=4, weight="bold")
    axes.axvline(1, color=scheme.lines[0], linewidth=1.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(speedups.values()))
    axes.set_xlabel("times as fast as PyTorch")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title("TrainStep", loc="left", weight="bold")


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else CURVES
    if not source.is_file():
        sys.exit(f"plot.py: {source}: no such file; train.py writes it")
    with all_or_none(source.parent) as folder:
        draw(source, folder / source.stem)
