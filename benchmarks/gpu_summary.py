"""What gpu_check.sh has found, in at most 40 lines: python benchmarks/gpu_summary.py DIR.

Of its log, which parts have failed, and what tests and sanitizers say. Of its CSV files, how each product
and each way of a step compares with stock, which products are left to the library, and what could not be
measured. It needs nothing but Python, since that is the part to rely on.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from textwrap import wrap
from typing import NamedTuple

from products import in_words
from rows import read_rows

LINES = 40
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOO_LONG = (124, 137)  # the status of what `timeout` has stopped

Row = Mapping[str, str]


class Part(NamedTuple):
    """One part of the check."""

    name: str
    status: int
    seconds: int
    said: list[str]

    def __str__(self) -> str:
        """How it went."""
        how = (
            "ok" if not self.status else "too long" if self.status in TOO_LONG else f"FAILED ({self.status})"
        )
        return f"{self.name} {how} {self.seconds} s"

    def last(self, pattern: str, otherwise: str) -> str:
        """The last line in which the pattern is found."""
        return next((line.strip("= ") for line in reversed(self.said) if re.search(pattern, line)), otherwise)


def parts(log: str) -> list[Part]:
    """Those that the log tells of, under headings such as "== tests (0, 61 s): pytest"."""
    texts = re.split(r"^== (.+?) \((\d+), (\d+) s\): .*\n", log, flags=re.M)[1:]
    return [
        Part(texts[i], int(texts[i + 1]), int(texts[i + 2]), texts[i + 3].splitlines())
        for i in range(0, len(texts), 4)
    ]


def tested(part: Part) -> list[str]:
    """How many tests have passed, and some that have not."""
    failed = [line[:150] for line in part.said if line.startswith(("FAILED ", "ERROR "))]
    now = next((line for line in reversed(part.said) if "::" in line), "none")
    return [f"tests: {part.last(r'(passed|failed|error).* in ', f'not ended, at {now}')}", *failed[:3]]


def sanitized(checks: Sequence[Part]) -> list[str]:
    """What each tool has counted, and the first of its errors in a kernel of ours, or in any."""
    counts = [f"{part.name}: {part.last('SUMMARY', 'not ended')}" for part in checks]
    lines = ["; ".join(counts)] if counts else []
    for part in checks:
        reports = [i for i, line in enumerate(part.said) if re.match(r"=+ +at ", line)]
        ours = [i for i in reports if "fastmlp" in part.said[i]]
        if reports:
            i = (ours or reports)[0]
            what = " ".join(line.strip("= ") for line in part.said[max(i - 1, 0) : i + 1])
            lines.append(f"  {part.name}: {len(ours)} of {len(reports)} in ours, as {what[:160]}")
    return lines


def place(row: Row) -> str:
    """The shape or the cell that was measured."""
    if "network" in row:
        return f"{row['network']}@{row['batch']}"
    return "x".join(filter(None, (row["M"], row["K"], row["hidden"].replace("-", "x"), row["N"])))


def compared(rows: Sequence[Row], figure: str, other: str) -> str:
    """The geometric mean of a figure, the worst, and the mean of another figure."""
    found = [(float(row[figure]), row) for row in rows if row[figure]]
    if not found:
        return "-"
    worst, row = min(found, key=lambda pair: pair[0])
    others = [float(row[other]) for row in rows if row[other]]
    beside = f"{geometric_mean(others):.2f}" if others else "-"
    return f"{geometric_mean(value for value, _ in found):.2f} {worst:.2f} {place(row)} ({beside})"


def comparison(rows: Sequence[Row], name: str, figure: str, other: str, title: str) -> list[str]:
    """A line for each product or column, with a cell for each dtype."""
    if not rows:
        return []
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lines = [[title, *dtypes]]
    for kind in dict.fromkeys(row[name] for row in rows):
        own = [[row for row in rows if row[name] == kind and row["dtype"] == dtype] for dtype in dtypes]
        lines.append([kind, *(compared(each, figure, other) for each in own)])
    widths = [max(len(line[i]) for line in lines) for i in range(1 + len(dtypes))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def left_out(rows: Sequence[Row], ours: set[str]) -> list[str]:
    """The sides that could not be measured, each with why and in how many places; ours come first."""
    places: dict[tuple[bool, str], set[str]] = {}
    for row in rows:
        for failure in filter(None, row["failed"].split("; ")):
            is_stock = failure.partition(":")[0] not in ours
            what = f"{row['dtype']} {failure[:120]}"
            places.setdefault((is_stock, what), set()).add(row.get("product", "") + place(row))
    return [f"left out: {what} ({len(places[key])} times)" for key in sorted(places) for what in key[1:]]


def summary(folder: Path) -> list[str]:
    """The lines."""
    log = folder / "gpu_check.log"
    found = parts(log.read_text(errors="replace") if log.exists() else "")
    kernels, steps = (read_rows(folder / f"{name}_cuda.csv") for name in ("kernels", "steps"))
    for row in steps:
        eager, own = row["eager_ms_p50"], row["ms_p50"]
        row["over_eager"] = str(float(eager) / float(own)) if eager and own else ""
    where = ("driver", "cuda", "torch", "fastmlp", "commit")
    machines = [
        ", ".join([row["gpu"], *(f"{name} {row[name]}" for name in where)]) for row in (*kernels, *steps)
    ]
    launch = [
        f"µs: a launch {row['launch_us']}, a replay {row['replay_1_us']}, of 20 kernels {row['replay_20_us']}"
        for row in kernels[-1:]
    ]
    library = in_words(read_rows(folder / "products.csv"))
    return [
        *list(dict.fromkeys(machines))[:2],
        *wrap("; ".join(map(str, found)), 110)[:4],
        *(line for part in found if part.name == "tests" for line in tested(part)),
        *sanitized([part for part in found if part.name in TOOLS]),
        *launch,
        "times as fast: geometric mean, worst (and the mean over torch.mm, or over eager)",
        *comparison(kernels, "product", "over_stock_p50", "over_library_p50", "over stock (mm)"),
        *(f"the library's: {line}" for line in library[:4]),
        *comparison(steps, "column", "speedup_p50", "over_eager", "over stock (eager)"),
        *(left_out(kernels, {"fastmlp"}) + left_out(steps, {row["column"] for row in steps}))[:4],
    ]


if __name__ == "__main__":
    lines = summary(Path(sys.argv[1]))
    print(*lines[:LINES], sep="\n")
