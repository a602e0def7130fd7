"""Writes the figures of the README from the CSV files in results/: none of them is typed.

A figure stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is a key of FIGURES.
`python benchmarks/readme.py` rewrites README.md in place; with `--check` it only tells, by its exit status,
whether that would change anything.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

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
    difference = float(sides[-1]["loss_difference"])
    return (
        f"{table(header, body)}\n\n"
        f"The two loss curves differ by {difference:.0e} at most. Measured on {where(sides[0])}."
    )


FIGURES: dict[str, Callable[[], str]] = {"train": train}


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
        sys.exit("README.md is not what the results say: run make readme" if after != before else 0)
    README.write_text(after)
