"""What a GPU would launch for the layers of a network, without one: ``python -m fastmlp --plan 784-500-10``.

The plan is what the backend runs (csrc/cuda/plan.h, step_plan.h). The times are predictions, of an H100
(csrc/cuda/h100.h) whose kernels follow one another in a graph: nobody has measured them.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NamedTuple

from . import _C

#: The shared memory that a block of each architecture can have, in bytes.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}

MULTIPROCESSORS = 128
DTYPES = "float32", "bfloat16", "float16"


class Launch(NamedTuple):
    """A launch, or a call of torch's library, of a layer or from that on."""

    name: str
    layer: int
    owner: str
    rows: int
    columns: int
    K: int
    tile: int
    tiles: int
    splits: int
    steps: int  # of a split, each of 64 bytes of both operands
    blocks: int
    fill: float  # of the elements that the tiles multiply, those that are in the product
    bytes: int  # that have to be read and written once
    predicted: float  # µs, 0 of what is the library's

    @property
    def waves(self) -> float:
        """Blocks for each multiprocessor."""
        return self.blocks / MULTIPROCESSORS


def plan(
    sizes: Sequence[int],
    batch: int,
    dtype: str = "float32",
    architecture: str = "sm_90",
    products: str = "table",
) -> list[Launch]:
    """The launches of forward and backward of a network of ReLUs with these widths.

    Without a table of what was measured, large products are the library's; with ``products="own"`` none is.

    >>> [launch.name for launch in plan([64, 64, 64, 16], 65536, products="own")]
    ['chain forward', 'chain backward', 'dW', 'dW', 'dW']
    """
    rows = _C.plan(list(sizes), batch, dtype, SHARED_MEMORY[architecture], products == "own")
    return [Launch(*row[:3], *row[3], *row[4:]) for row in rows]


class Step(NamedTuple):
    """A training step in one launch."""

    blocks: int
    barriers: int  # of the whole grid
    predicted: float  # µs


def plan_step(
    sizes: Sequence[int], batch: int, clips: bool = False, architecture: str = "sm_90"
) -> Step | None:
    """The one launch that a training step of float32 is; None where it is a graph of launches.

    >>> plan_step([8, 64, 64, 4], 1)[:2]
    (1, 0)
    """
    blocks, barriers, time = _C.plan_step(
        list(sizes), batch, clips, MULTIPROCESSORS, SHARED_MEMORY[architecture]
    )
    return Step(blocks, barriers, time) if blocks else None


def report(sizes: Sequence[int], batch: int, dtype: str, architecture: str, products: str) -> str:
    """The plan as a table."""
    head = f"{'launch':15s}layer   rows x columns      K  tile  splits  blocks  waves  fill       MB     µs"
    lines = [f"{'-'.join(map(str, sizes))} @ {batch}, {dtype}, {architecture}", head]
    launches = plan(sizes, batch, dtype, architecture, products)
    for one in launches:
        shape = f"{one.rows} x {one.columns}"
        if one.owner == "own":
            own = f"{one.tile or '-':>6}{one.splits or 1:8d}{one.blocks:8d}{one.waves:7.2f}{one.fill:6.0%}"
            time = f"{one.predicted:7.1f}"
        else:
            own, time = "of torch's library".rjust(35), f"{'-':>7s}"
        lines.append(f"{one.name:15s}{one.layer:5d}{shape:>17s}{one.K:7d}{own}{one.bytes / 1e6:9.2f}{time}")
    own_time = sum(one.predicted for one in launches)
    lines.append(f"{len(launches)} launches; {own_time:.0f} µs predicted for those of fastmlp's kernels")
    if dtype == "float32" and (step := plan_step(sizes, batch, architecture=architecture)):
        lines.append(
            f"a training step is one launch of {step.blocks} blocks that meet {step.barriers} times; "
            f"{step.predicted:.0f} µs predicted"
        )
    else:
        lines.append("a training step is a CUDA graph, of these launches, the loss's and the optimizer's")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints the plan that the command line asks for."""
    parser = ArgumentParser(prog="python -m fastmlp", description="What a GPU would launch for a network.")
    parser.add_argument("--plan", required=True, help="widths: 784-500-10")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--architecture", choices=SHARED_MEMORY, default="sm_90")
    parser.add_argument("--products", choices=["table", "own"], default="table")
    given = parser.parse_args(arguments)
    sizes = [int(size) for size in given.plan.split("-")]
    if len(sizes) < 2 or min(*sizes, given.batch) < 1:
        parser.error(
            f"expected two or more widths and a batch, all positive, got {given.plan} @ {given.batch}"
        )
    print(report(sizes, given.batch, given.dtype, given.architecture, given.products))
    return 0
