"""How the project measures, and how it writes down what it measured.

On a shared machine an absolute time says little, so the sides of a comparison take turns: each round times
every side, and the figure that counts is the ratio to the first side within one round. All are quantiles.
"""

import os
import platform
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
GPU_WARM_UP_SECONDS, GPU_ROUND_SECONDS = 0.02, 0.005  # whose clock swings less, and whose time is dear
TRIALS = 3  # calls: a step that becomes a CUDA graph is captured at the second
FLUSHED_BYTES = 256 << 20  # more than the L2 cache of any GPU

Side = TypeVar("Side")
Call = Callable[[], object]
Samples = dict[str, list[list[float]]]  # seconds, as samples[side][round][call]


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


def columns(quantiles: Quantiles | None, name: str, decimals: int) -> dict[str, str]:
    """The same, empty for what was not measured."""
    own = (quantiles or Quantiles(0, 0, 0)).columns(name, decimals)
    return own if quantiles else dict.fromkeys(own, "")


class Timing(NamedTuple):
    """How long one side takes, and how that compares."""

    seconds: Quantiles  # per call
    speedup: Quantiles  # the first side's median seconds over this side's, round by round: above 1 is faster


def sample_what_works(
    makers: Mapping[str, Callable[[], Call]],
    device: torch.device,
    rounds: int = ROUNDS,
    flushed: bool = False,
    mode: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Samples, dict[str, str]]:
    """Makes the calls and times in turns those that work; of the others, why they do not.

    `mode`: what the calls run in.
    """
    calls: dict[str, Call] = {}
    failed = {}
    for name, make in makers.items():
        try:
            call = make()
            with mode():
                for _ in range(TRIALS):
                    seconds_of(call, device)
        except Exception as error:
            failed[name] = in_one_line(error)
        else:
            calls[name] = call
    try:
        with mode():
            return sample(calls, device, rounds, flushed), failed
    except Exception as error:  # one that a GPU tells late, and may never recover from
        return {}, failed | dict.fromkeys(calls, in_one_line(error))


def in_one_line(error: BaseException) -> str:
    """Its kind and how its message begins, and the same of the error that it came of, if of one."""
    message = str(error).strip().partition("\n")[0][:150]
    words = f"{type(error).__name__}: {message}" if message else type(error).__name__
    before = error.__context__
    if before is None or error.__suppress_context__ or in_one_line(before) in words:
        return words
    return f"{words}, after {in_one_line(before)}"


def captured(call: Call, calls: int = 1) -> Call:
    """So many calls as one CUDA graph."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(TRIALS):  # as torch asks for, before it captures
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    finally:
        torch.cuda.set_stream(current)  # where torch has not come back to after a capture that failed
    return graph.replay


def sample(
    sides: Mapping[str, Call], device: torch.device, rounds: int = ROUNDS, flushed: bool = False
) -> Samples:
    """Times the calls in turns: their seconds as samples[side][round][call], for `summarise`.

    Every round starts with another side. `flushed`: each call finds nothing in a GPU's L2 cache.
    """
    measure = flushed_seconds_of if flushed else seconds_of
    seconds = ROUND_SECONDS if device.type == "cpu" else GPU_ROUND_SECONDS
    calls = {name: max(1, round(seconds / warm_up(call, device))) for name, call in sides.items()}
    samples: Samples = {name: [] for name in sides}
    for index in range(rounds):
        for name in in_turn(list(sides), index):
            samples[name].append([measure(sides[name], device, calls[name])])
    return samples


def warm_up(call: Call, device: torch.device) -> float:
    """Calls until all that the first calls pay for is paid; the least seconds per call."""
    most = WARM_UP_SECONDS if device.type == "cpu" else GPU_WARM_UP_SECONDS
    start, seconds = perf_counter(), [seconds_of(call, device)]
    while len(seconds) < 2 or (len(seconds) < WARM_UP and perf_counter() - start < most):
        seconds.append(seconds_of(call, device))
    return min(seconds)


def seconds_of(call: Call, device: torch.device, calls: int = 1) -> float:
    """Seconds per call, from an idle device to an idle device."""
    synchronize(device)
    start = perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (perf_counter() - start) / calls


def flushed_seconds_of(call: Call, device: torch.device, calls: int = 1) -> float:
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
    first = next(iter(medians.values()), [])
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
    """The commit checked out, marked where files other than results differ from it; without git, COMMIT."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)

    try:
        commit = git("describe", "--always", "--abbrev=12", "--exclude=*").stdout.strip()
        results = (f":(top,exclude){path}" for path in ("benchmarks/results", "fastmlp/products.csv"))
        differs = git("diff", "--quiet", "HEAD", "--", ":/", *results).returncode == 1
    except OSError:  # no git here
        commit, differs = "", False
    return (f"{commit}-dirty" if differs else commit) or os.environ.get("COMMIT", "")


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
