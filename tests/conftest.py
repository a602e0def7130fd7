"""What the tests share: instruction sets, benchmarks as modules, the paths of habits, counts of samples."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from compatibility import recorded_paths

from fastmlp import _C

TRIED = pytest.StashKey[Counter[str]]()


BEST, *OTHERS = _C.instruction_sets()


@pytest.fixture(params=[BEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def instruction_set(request):
    """Runs the test once with each instruction set; bfloat16 is then computed by the kernels everywhere.

    With the processor's best first: what the others compute, test_kernels.py shows sooner.
    """
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a benchmark script, for what needs no process of its own: starting one takes seconds."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module


class Habit:
    """Holds a test to the path that its marker names, so that the table made of the markers is true."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_shown = False

    @contextmanager
    def holds(self) -> Iterator[None]:
        """Every layer in the block takes the path."""
        with recorded_paths() as seen:
            yield
        self.saw(seen)

    def saw(self, seen: set[str]) -> None:
        """So did every layer where `seen` was recorded, in another process perhaps."""
        assert seen == {self.path}
        self.is_shown = True

    @contextmanager
    def refused(self, error: type[Exception], match: str) -> Iterator[None]:
        """The block is refused, with this error."""
        assert self.path == "refused"
        with pytest.raises(error, match=match):
            yield
        self.is_shown = True


@pytest.fixture
def habit(request: pytest.FixtureRequest) -> Iterator[Habit]:
    """What the marker says, `@pytest.mark.habit(what, path, remark)`: a row of docs/compatibility.md."""
    marker = request.node.get_closest_marker("habit")
    habit = Habit(marker.args[1])
    yield habit
    assert habit.is_shown, "the test has not shown what its marker says"


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts a sample of the suite of that name, for the summary."""
    return lambda suite: request.config.stash[TRIED].update([suite])


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TRIED] = Counter()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for suite, count in terminalreporter.config.stash[TRIED].items():
        terminalreporter.write_line(f"PyTorch's {suite}: {count} samples tried")
