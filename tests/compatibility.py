"""How the tests of habits see on which path layers compute, and how docs/compatibility.md tells it.

`python tests/compatibility.py` writes the tables of that page; with `--check` it only tells, by its exit
status, whether that would change anything.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent

from fastmlp import _C
from fastmlp.activations import ACTIVATIONS

FILE = Path(__file__).parent.parent / "docs/compatibility.md"

BEGIN = "<!-- tests/compatibility.py writes what follows -->\n"

ACTIVATIONS_HEAD = [
    "## Activations\n",
    "As `fastmlp.Linear` and `MLP` take them: by name, by name and parameters, or as a module.\n",
    "| name | module | parameters |",
    "| :-- | :-- | :-- |",
]

# The ops that compute layers, ours and torch's, as the profiler names them.
OURS = {f"fastmlp::{op}" for op in ("network", "network_forward", "network_backward", "train_step_")}
TORCHS = {f"aten::{op}" for op in ("linear", "matmul", "addmm", "mm", "baddbmm", "bmm")}


@contextmanager
def recorded_paths() -> Iterator[set[str]]:
    """The paths that layers take in the block, there when it ends: "fused", "composite", both or none."""
    seen: set[str] = set()
    with torch.autograd.profiler.profile() as profile:
        yield seen
    seen.update(path for event in profile.function_events for path in _path(event))


def _path(event: FunctionEvent) -> Iterator[str]:
    if event.name in TORCHS:
        yield "composite"
    # An op of ours that calls torch's is the composite path itself.
    elif event.name in OURS and not any(below.name in TORCHS for below in _all_below(event)):
        yield "fused"


def _all_below(event: FunctionEvent) -> Iterator[FunctionEvent]:
    for child in event.cpu_children:
        yield child
        yield from _all_below(child)


def text() -> str:
    """The page as it is up to its tables: one for each class of tests, with a row for each habit."""
    import test_habits

    head, begin, _ = FILE.read_text().partition(BEGIN)
    parts = [head + begin, "\n".join([*ACTIVATIONS_HEAD, *_activations(), ""])]
    for group in vars(test_habits).values():
        if isinstance(group, type) and (rows := list(_rows(group))):
            parts.append(
                "\n".join([f"## {group.__doc__}\n", "| | path | |", "| :-- | :-- | :-- |", *rows, ""])
            )
    return "\n".join(parts)


def _activations() -> Iterator[str]:
    for name, row in ACTIVATIONS.items():
        module = f"nn.{row.module.__name__}" + ('(approximate="tanh")' if name == "gelu_tanh" else "")
        values = zip(row.attributes, _C.activations[name], strict=True)
        yield f"| `{name}` | `{module}` | {', '.join(f'{key} = {value:g}' for key, value in values)} |"


def _rows(tests: type) -> Iterator[str]:
    for test in vars(tests).values():
        for mark in getattr(test, "pytestmark", []):
            if mark.name == "habit":
                what, path, *remark = mark.args
                yield f"| {what} | {path} | {''.join(remark)} |"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        is_stale = FILE.read_text() != text()
        sys.exit(f"{FILE} is not what the tests say: run python tests/compatibility.py" if is_stale else 0)
    FILE.write_text(text())
