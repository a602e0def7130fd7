"""What the CUDA compiler makes of the kernels: none keeps in memory what belongs in registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPORT = re.compile(
    r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes spill stores.*?Used (\d+) reg", re.S
)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_no_kernel_spills_a_register(architecture, tmp_path):
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v"]
    command += ["-c", str(ROOT / "csrc/cuda/backend.cu"), "-o", str(tmp_path / "backend.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = {
        name: (int(spilled), int(registers)) for name, spilled, registers in REPORT.findall(result.stderr)
    }
    assert len(kernels) == result.stderr.count("Compiling entry function") > 30
    assert [name for name, (spilled, _) in kernels.items() if spilled] == []
