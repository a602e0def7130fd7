"""What the CUDA compiler makes of the kernels: registers, the blocks that fit, and instructions."""

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def occupancy():
    """The benchmark of that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield import_module("occupancy")


@pytest.fixture(scope="module")
def compiled(occupancy, tmp_path_factory):
    """The kernels, compiled for all architectures at once: object file and report by architecture."""
    folder = tmp_path_factory.mktemp("registers")  # here: it is not for several threads
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(occupancy.compile_for, name, folder) for name in ARCHITECTURES}


@pytest.fixture
def kernels(occupancy, compiled, architecture, tmp_path):
    _, report = compiled[architecture].result()
    kernels = occupancy.kernels_of(report, tmp_path)
    assert len(kernels) == report.count("Compiling entry function") > 40
    return kernels


@every_architecture
def test_no_kernel_spills_a_register_or_has_a_stack(kernels):
    assert [kernel.name for kernel in kernels if kernel.memory] == []


@every_architecture
def test_as_many_blocks_of_a_product_fit_on_a_multiprocessor_as_it_is_compiled_for(
    occupancy, kernels, architecture
):
    for kernel in (kernel for kernel in kernels if kernel.name.startswith("product")):
        blocks, limit = occupancy.occupancy(kernel, occupancy.ARCHITECTURES[architecture])
        # sm_120 has no room for two large tiles of float32 on their way to memory.
        is_too_large = (architecture, limit) == ("sm_120", "shared memory") and "float" in kernel.name
        assert blocks >= (1 if is_too_large else kernel.least_blocks), kernel.name


# Each thread has 32 bytes or more on their way, all of them 24 KB or more. An H100 wants 18 KB from each
# of its 132 multiprocessors: its memory gives 3.35 TB/s after 0.7 µs.
LEAST_WARPS = 24


@every_architecture
def test_passes_over_memory_have_enough_warps_to_keep_it_busy(occupancy, kernels, architecture):
    passes = [kernel for kernel in kernels if re.match("elementwise|update|clipping|softmax", kernel.name)]
    assert len(passes) > 20
    for kernel in passes:
        blocks, _ = occupancy.occupancy(kernel, occupancy.ARCHITECTURES[architecture])
        assert blocks * kernel.threads >= 32 * LEAST_WARPS, kernel.name


TOUCHES_MEMORY = re.compile(r"\b(ld|st|atom|red|cp)\.\S*global")


@every_architecture
def test_a_kernel_waits_for_the_launch_before_where_that_has_not_ended(compiled, architecture):
    objects, _ = compiled[architecture].result()
    kernels = objects.with_name("backend.ptx").read_text().split(".entry ")[1:]
    waiting = [kernel for kernel in kernels if "griddepcontrol.wait" in kernel]
    cooperative = [kernel for kernel in kernels if "whole_step" in kernel.split("(")[0]]
    assert len(waiting) == (0 if architecture == "sm_80" else len(kernels) - len(cooperative))
    assert not any(TOUCHES_MEMORY.search(kernel.split("griddepcontrol.wait")[0]) for kernel in waiting)


# ---- instructions

FUNCTION = re.compile(r"Function : (\w+)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;?&/]*)")
Code = list[tuple[int, str, str]]  # address, operation, operands


@pytest.fixture
def sass(compiled, architecture) -> dict[str, Code]:
    """The instructions of each kernel, by its symbol."""
    if shutil.which("cuobjdump") is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    objects, _ = compiled[architecture].result()
    text = subprocess.run(["cuobjdump", "-sass", objects], capture_output=True, text=True, check=True).stdout
    functions: dict[str, Code] = {}
    own: Code = []
    for line in text.splitlines():
        if function := FUNCTION.search(line):
            own = functions.setdefault(function[1], [])
        elif found := INSTRUCTION.search(line):
            own.append((int(found[1], 16), found[2], found[3]))
    return functions


def main_loop(code: Code) -> Counter[str]:
    """How often each operation is in the shortest loop that multiplies tiles and copies later ones."""
    loops = []
    for end, operation, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if operation.startswith("BRA") and target and int(target[1], 16) < end:
            body = [name for at, name, _ in code if int(target[1], 16) <= at <= end]
            names = {name.split(".")[0] for name in body}
            if names & {"HMMA", "FFMA"} and {"LDGSTS", "BAR"} <= names:
                loops.append(body)
    return Counter(min(loops, key=len))


def count(loop: Counter[str], pattern: str) -> int:
    return sum(times for name, times in loop.items() if re.match(pattern, name))


@every_architecture
def test_the_main_loop_of_a_product_multiplies_on_tensor_cores_what_copies_bring_meanwhile(sass, kernels):
    products = [kernel for kernel in kernels if re.match(r"product<\w+, Tiling<.*?>, (4|16),", kernel.name)]
    assert len(products) > 20
    for kernel in products:
        loop = main_loop(sass[kernel.symbol])
        is_of_tensor_cores = "TensorCore" in kernel.name
        is_transposed = "float, true>, Operand<float, true>" in kernel.name
        assert (count(loop, "HMMA") >= 16) == is_of_tensor_cores, kernel.name
        assert (count(loop, "LDSM") >= 4) == (is_of_tensor_cores and not is_transposed), kernel.name
        assert count(loop, r"LDGSTS\.E\.BYPASS\.128" if ", 16, " in kernel.name else "LDGSTS") >= 4, (
            kernel.name
        )
        assert count(loop, r"IMAD\.WIDE|IMAD\.HI|I2F|MUFU") <= 4, kernel.name  # addresses are added up


@every_architecture
def test_no_kernel_has_an_instruction_of_local_memory(sass):
    assert [name for name, code in sass.items() if count(Counter(op for _, op, _ in code), "LDL|STL")] == []
