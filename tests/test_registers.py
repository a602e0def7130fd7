"""What the CUDA compiler makes of the kernels: none keeps in memory what belongs in registers."""

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


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What ptxas tells of the kernels, compiled for all architectures at once: future by architecture."""

    folder = tmp_path_factory.mktemp("registers")  # here: it is not for several threads

    def compiled(architecture: str) -> subprocess.CompletedProcess[str]:
        output = folder / f"{architecture}.o"
        command = ["nvcc", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v"]
        command += ["-c", str(ROOT / "csrc/cuda/backend.cu"), "-o", str(output)]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        yield {architecture: pool.submit(compiled, architecture) for architecture in ARCHITECTURES}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_a_register_or_has_a_stack(reports, architecture):
    result = reports[architecture].result()
    assert result.returncode == 0, result.stderr
    kernels = MEMORY.findall(result.stderr)
    assert len(kernels) == result.stderr.count("Compiling entry function") > 40
    assert [name for name, *bytes_of_memory in kernels if any(map(int, bytes_of_memory))] == []
