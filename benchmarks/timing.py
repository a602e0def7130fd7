"""How the project measures, and how it writes down what it measured.

On a shared machine an absolute time says little, so the sides of a comparison take turns: each round times
every side, and the figure that counts is the ratio to the first side within one round. All are quantiles.
"""

import csv
import platform
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch

import fastmlp

WARM_UP = 20  # calls
WARM_UP_SECONDS = 0.1  # enough for calls so long that 20 would take longer
ROUNDS = 9
ROUND_SECONDS = 0.02  # long against the resolution of the clock, short against the swings of a shared machine
FLUSHED_BYTES = 256 << 20  # more than the L2 cache of any GPU

Side = TypeVar("Side")


class Quantiles(NamedTuple):
    """What stays of many samples."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quantiles":
        """The quantiles of one or more samples."""
        values = torch.tensor(samples, dtype=torch.float64)
        return cls(*values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())

    def times(self, factor: float) -> "Quantiles":
        """The same in another unit."""
        return Quantiles(*(factor * value for value in self))

    def columns(self, name: str, decimals: int) -> dict[str, str]:
        """Columns of a CSV file: NAME_p20, NAME_p50, NAME_p80."""
        return {f"{name}_{key}": f"{value:.{decimals}f}" for key, value in self._asdict().items()}


class Timing(NamedTuple):
    """How long one side takes, and how that compares."""

    seconds: Quantiles  # per call
    speedup: Quantiles  # the first side's median seconds over this side's, round by round: above 1 is faster


def sample(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = ROUNDS,
    flushed: bool = False,
) -> dict[str, list[list[float]]]:
    """Times the calls in turns: their seconds as samples[side][round][call], for `summarise`.

    Every round starts with another side. `flushed`: each call finds nothing in a GPU's L2 cache.
    """
    measure = flushed_seconds_of if flushed else seconds_of
    calls = {name: max(1, round(ROUND_SECONDS / warm_up(call, device))) for name, call in sides.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in in_turn(list(sides), index):
            samples[name].append([measure(sides[name], device, calls[name])])
    return samples


def warm_up(call: Callable[[], object], device: torch.device) -> float:
    """Calls until all that the first calls pay for is paid; the least seconds per call."""
    start, seconds = perf_counter(), [seconds_of(call, device)]
    while len(seconds) < 2 or (len(seconds) < WARM_UP and perf_counter() - start < WARM_UP_SECONDS):
        seconds.append(seconds_of(call, device))
    return min(seconds)


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call, from an idle device to an idle device."""
    synchronize(device)
    start = perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (perf_counter() - start) / calls


def flushed_seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call on a GPU whose L2 cache holds nothing of use, by the GPU's own clock."""
    other = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    seconds = 0.0
    for _ in range(calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        other.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds += begin.elapsed_time(end) / 1e3
    return seconds / calls


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(sides: Sequence[Side], index: int) -> list[Side]:
    """The sides in the order of round `index`, so that none always comes first."""
    first = index % len(sides)
    return [*sides[first:], *sides[:first]]


def summarise(samples: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Timing]:
    """From seconds per call, as samples[side][round][call], to quantiles."""
    medians = {name: [Quantiles.of(calls).p50 for calls in rounds] for name, rounds in samples.items()}
    first = next(iter(medians.values()))
    return {
        name: Timing(
            seconds=Quantiles.of(list(chain.from_iterable(samples[name]))),
            speedup=Quantiles.of([a / b for a, b in zip(first, own, strict=True)]),
        )
        for name, own in medians.items()
    }


def machine(device: torch.device) -> dict[str, str | int]:
    """Where the figures come from: they mean nothing without it."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "driver": _driver() if device.type == "cuda" else "",
        "cuda": torch.version.cuda if device.type == "cuda" and torch.version.cuda else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastmlp": fastmlp.__version__,
        "commit": _commit(),
    }


def in_words(machine: Mapping[str, str | int]) -> str:
    """What `machine` tells, for people."""
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"fastmlp {machine['fastmlp']}, Python {machine['python']}"
    )


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file of one or more rows, which all have the columns of the first."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    """The GPU driver's version; empty where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.partition("\n")[0].strip()


def _commit() -> str:
    """The commit checked out, marked where files other than results differ from it; empty outside git."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)

    try:
        commit = git("describe", "--always", "--abbrev=12", "--exclude=*").stdout.strip()
        differs = (
            git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results").returncode == 1
        )
    except OSError:  # no git here
        return ""
    return f"{commit}-dirty" if differs else commit


@contextmanager
def all_or_none(folder: Path) -> Iterator[Path]:
    """A place to write files that belong together: at the end all move to `folder`, on an exception none."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as staging:
        yield Path(staging)
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C must not fall between two files
        try:
            for path in Path(staging).iterdir():
                path.replace(folder / path.name)
        finally:
            signal.signal(signal.SIGINT, previous)
