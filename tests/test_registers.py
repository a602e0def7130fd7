"""What the CUDA compiler makes of the kernels: what it keeps in memory, and where they wait."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
MEMORY = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
    re.S,
)
TOUCHES_MEMORY = re.compile(r"\b(ld|st|atom|red|cp)\.\S*global")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What ptxas tells of the kernels, and where their PTX is, compiled for all architectures at once."""

    folder = tmp_path_factory.mktemp("registers")  # here: it is not for several threads

    def compiled(architecture: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        own = folder / architecture
        own.mkdir()
        command = ["nvcc", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v"]
        command += ["-c", str(ROOT / "csrc/cuda/backend.cu"), "-o", str(own / "backend.o")]
        result = subprocess.run([*command, "--keep-dir", own, "--keep"], capture_output=True, text=True)
        return result, own / "backend.ptx"

    with ThreadPoolExecutor() as pool:
        yield {architecture: pool.submit(compiled, architecture) for architecture in ARCHITECTURES}


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.parametrize("architecture", ARCHITECTURES),
]


def test_no_kernel_spills_a_register_or_has_a_stack(reports, architecture):
    result, _ = reports[architecture].result()
    assert result.returncode == 0, result.stderr
    kernels = MEMORY.findall(result.stderr)
    assert len(kernels) == result.stderr.count("Compiling entry function") > 40
    assert [name for name, *bytes_of_memory in kernels if any(map(int, bytes_of_memory))] == []


def test_a_kernel_waits_for_the_launch_before_where_that_has_not_ended(reports, architecture):
    _, ptx = reports[architecture].result()
    kernels = ptx.read_text().split(".entry ")[1:]
    waiting = [kernel for kernel in kernels if "griddepcontrol.wait" in kernel]
    cooperative = [kernel for kernel in kernels if "whole_step" in kernel.split("(")[0]]
    assert len(waiting) == (0 if architecture == "sm_80" else len(kernels) - len(cooperative))
    assert not any(TOUCHES_MEMORY.search(kernel.split("griddepcontrol.wait")[0]) for kernel in waiting)
