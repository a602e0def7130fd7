"""What the tests share: every instruction set that the machine has, and the benchmarks as modules."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from fastmlp import _C


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"])
def instruction_set(request):
    """Runs the test once with each instruction set; bfloat16 is then computed by the kernels everywhere."""
    if request.param not in _C.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a benchmark script, for what needs no process of its own: starting one takes seconds."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module
