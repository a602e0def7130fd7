"""What the tests of the package share: every instruction set that the machine has, one after the other."""

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
