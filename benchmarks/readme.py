"""Writes the figures of the README from the CSV files in results/: none of them is typed.

A figure stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is a key of FIGURES.
`python benchmarks/readme.py` rewrites README.md in place; with `--check` it only tells, by its exit status,
whether that would change anything.
"""

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file in results/."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table, the first column left, the others right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(row: dict[str, str]) -> str:
    """What a figure is worth nothing without."""
    versions = f"torch {row['torch']}, fastmlp {row['fastmlp']} at {row['commit']}"
    return f"{row['gpu'] or row['cpu']}, {row['threads']} threads, {versions}"


def train() -> str:
    """The table that train.py prints at its end."""
    sides = rows("train_summary")
    body = [
        [
            side["side"],
            f"{float(side['final_loss']):.4f}",
            f"{float(side['test_accuracy']):.2%}",
            f"{float(side['ms_p50']):.2f}",
            f"{float(side['speedup_p50']):.2f}",
        ]
        for side in sides
    ]
    header = ["", "final loss", "test accuracy", "ms a step", "times as fast"]
    difference = max(float(side["loss_difference"]) for side in sides)
    return (
        f"{table(header, body)}\n\n"
        f"The loss curves differ by {difference:.0e} at most. Measured on {where(sides[0])}."
    )


def steps() -> str:
    """How many times faster than stock each column of steps.py is, a cell of the grid a row."""
    results = rows("steps")
    columns = list(dict.fromkeys(row["column"] for row in results))
    cells: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in results:
        cell = cells.setdefault((row["network"], row["sizes"], row["batch"]), {})
        cell[row["column"]] = float(row["speedup_p50"])
    body = [
        [name, sizes, batch, *(f"{cell[column]:.2f}" for column in columns)]
        for (name, sizes, batch), cell in cells.items()
    ]
    means = (geometric_mean([cell[column] for cell in cells.values()]) for column in columns)
    body.append(["geometric mean", "", "", *(f"{mean:.2f}" for mean in means)])
    return f"{table(['', 'network', 'batch', *columns], body)}\n\nMeasured on {where(results[0])}."


def kernels() -> str:
    """The share of the peak that each product reaches where it is large enough to, a shape a row."""
    least_operations = 50e6
    shapes: dict[tuple[str, str, str], list[str]] = {}
    results = rows("kernels")
    for row in results:
        shape = row["M"], row["K"], row["N"]
        if 2 * math.prod(map(int, shape)) >= least_operations:
            shares = shapes.setdefault(shape, [])
            shares.append(f"{float(row['peak_share_p50']):.0%}")
    body = [[" x ".join(shape), *shares] for shape, shares in shapes.items()]
    machine = f"{where(results[0])}, {results[0]['instruction_set']}"
    return f"{table(['M x K x N', 'y = relu(x Wᵀ + b)', 'dW, db', 'dx'], body)}\n\nMeasured on {machine}."


def peers() -> str:
    """How many times faster than JAX's a step is, a cell a row."""
    results = rows("peers")
    body = [
        [
            row["network"],
            row["sizes"],
            row["batch"],
            f"{float(row['jax_ms_p50']):.3f}",
            f"{float(row['ms_p50']):.3f}",
            f"{float(row['speedup_p50']):.2f}",
        ]
        for row in results
    ]
    mean = geometric_mean([float(row["speedup_p50"]) for row in results])
    body.append(["geometric mean", "", "", "", "", f"{mean:.2f}"])
    header = ["", "network", "batch", "JAX ms", "fastmlp.TrainStep ms", "times as fast"]
    return (
        "A training step beside JAX's, jitted and with donated parameters, in turns, each in a process of\n"
        "its own on the same processors (`make bench-peers`):\n\n"
        f"{table(header, body)}\n\n"
        f"Measured on {where(results[0])}, JAX {results[0]['jax']}."
    )


def habits() -> str:
    """What torch.compile and autocast make of a training step, a cell and habit a row."""
    names = {"eager": "", "compile": "torch.compile", "autocast": "autocast", "both": "both"}
    results = rows("habits")
    body = [
        [
            f"{row['network']} @ {row['batch']}",
            names[row["habit"]],
            *(f"{float(row[column]):.2f}" for column in ("stock_ms_p50", "ms_p50", "speedup_p50")),
        ]
        for row in results
    ]
    header = ["", "with", "stock ms", "fastmlp ms", "times as fast"]
    return f"{table(header, body)}\n\nMeasured on {where(results[0])}."


def training() -> str:
    """How many times faster the updates of trainers are, a job a row."""
    results = rows("training")
    body = [
        [
            row["what"],
            f"{float(row[row['best'] + '_ms_p50']):.3f}",
            *(f"{float(row[column]):.2f}" for column in ("loop_speedup_p50", "step_speedup_p50")),
            row["way"],
        ]
        for row in results
    ]
    header = ["", "stock ms", "loop", "TrainStep", "which is"]
    return f"{table(header, body)}\n\nMeasured on {where(results[0])}."


def integrations() -> str:
    """How many times faster models of other libraries are, a model a row."""
    results = rows("integrations")
    models: dict[str, list[str]] = {}
    for row in results:
        models.setdefault(row["name"], []).append(f"{float(row['speedup_p50']):.2f}")
    columns = list(dict.fromkeys(row["column"] for row in results))
    body = [[name, *speedups] for name, speedups in models.items()]
    return f"{table(['', *columns], body)}\n\nMeasured on {where(results[0])}."


FIGURES: dict[str, Callable[[], str]] = {
    figure.__name__: figure for figure in (train, steps, training, kernels, peers, habits, integrations)
}


def filled(text: str) -> str:
    """The text with every figure as the CSV files have it."""
    for name, figure in FIGURES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"README.md: expected {begin.strip()} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}{figure()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    before = README.read_text()
    after = filled(before)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is stale: run python benchmarks/readme.py" if after != before else 0)
    README.write_text(after)
