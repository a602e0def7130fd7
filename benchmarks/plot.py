"""Draws the loss of each side against the time it has trained, from the CSV that train.py writes.

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
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
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
    "legend.frameon": False,
    "svg.hashsalt": "fastmlp",  # the same figures give the same file
}
WINDOWS = 60  # parts of a curve; the running mean goes over one of them


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


def draw(csv_path: Path, out_stem: Path) -> None:
    """Writes out_stem.svg, -dark.svg and .png; the words come from the summary beside `csv_path`."""
    curves, summary = read_curves(csv_path), read_summary(csv_path)
    job = next(iter(summary.values()))
    for suffix, scheme in SCHEMES.items():
        with rc_context(STYLE | scheme.style()):
            figure = Figure(figsize=(7.2, 4.2), layout="constrained")
            axes = figure.add_subplot()
            draw_curves(axes, curves, summary)
            title = "{sizes} on {data}: batch {batch}, lr {lr}, epochs {epochs}".format_map(job)
            axes.set_title(title, loc="left", weight="bold")
            machine = f"{job['gpu'] or job['cpu']}, {job['threads']} threads, torch {job['torch']}"
            figure.supxlabel(machine, x=0.99, ha="right", fontsize=8, alpha=0.7)
            figure.savefig(f"{out_stem}{suffix}.svg", metadata={"Date": None})
            if not suffix:
                figure.savefig(f"{out_stem}.png", dpi=200)


def draw_curves(axes: Axes, curves: dict[str, Curve], summary: dict[str, dict[str, str]]) -> None:
    """One line a side, with its median times in the legend."""
    window = max(1, len(next(iter(curves.values())).loss) // WINDOWS)
    for index, (side, curve) in enumerate(curves.items()):
        label = f"{side}: {float(summary[side]['ms_p50']):.2f} ms a step"
        if index:
            label += f", {float(summary[side]['speedup_p50']):.2f} times as fast"
        # The first side lies under the others, wider: where curves coincide, all stay in sight.
        width = 1.8 if index else 4.0
        loss = running_mean(curve.loss, window)
        axes.plot(curve.seconds, loss, marker="o", markevery=[-1], label=label, linewidth=width)
    axes.set_xlabel("training time [s]")
    axes.set_ylabel(f"cross-entropy loss, mean of {window} batches" if window > 1 else "cross-entropy loss")
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.5, alpha=0.15)
    axes.legend(loc="upper right")


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else CURVES
    if not source.is_file():
        sys.exit(f"plot.py: {source}: no such file; train.py writes it")
    with all_or_none(source.parent) as folder:
        draw(source, folder / source.stem)
