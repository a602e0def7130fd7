"""The CPU kernels on 64-bit Arm: cross-compiled as they are, and checked under qemu."""

import re
import shutil
import subprocess

import pytest
from test_kernels import FLAGS, OPENMP, ROOT, SOURCES

TOOLS = "aarch64-linux-gnu-"
MISSING = [tool for tool in (f"{TOOLS}g++", f"{TOOLS}objdump", "qemu-aarch64") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]

COMPILE = [f"{TOOLS}g++", "-std=c++17", "-O3", *OPENMP, "-ffp-contract=off"]  # optimised as the package is


def run(*command: object) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def innermost_loops(disassembly: str) -> list[str]:
    """What stands between each branch backwards and its target, where no other branch does."""
    loops = []
    straight: list[tuple[int, str]] = []  # since the last branch: address, instruction
    for address, instruction in re.findall(r"^ +([0-9a-f]+):\t(.+)$", disassembly, re.MULTILINE):
        branch = re.match(r"(?:b\S*|cbn?z|tbn?z)\t(?:.+, )?([0-9a-f]+) <", instruction)
        if branch is None:
            straight.append((int(address, 16), instruction))
            continue
        target = int(branch[1], 16)
        if straight and straight[0][0] <= target < int(address, 16):
            loops.append("\n".join(text for at, text in straight if at >= target))
        straight = []
    return loops


def test_every_dtype_and_activation_is_right(tmp_path):
    driver = tmp_path / "driver"
    sources = [ROOT / source for source in SOURCES["portable"]]
    run(*COMPILE, "-static", *FLAGS["cpu"], f"-I{ROOT / 'tests'}", *sources, "-o", driver)
    assert run("qemu-aarch64", driver, "portable") == "0 failures\n"


def test_the_products_multiply_and_add_registers_in_one_instruction(tmp_path):
    run(*COMPILE, "-c", ROOT / "csrc/cpu/isa/portable.cpp", "-o", tmp_path / "portable.o")
    disassembly = run(f"{TOOLS}objdump", "-d", "--no-show-raw-insn", tmp_path / "portable.o")
    loops = [loop for loop in innermost_loops(disassembly) if not re.search("fmadd|fmul|fadd", loop)]
    assert max(len(re.findall(r"fmla\tv\d+\.4s", loop)) for loop in loops) >= 8  # the sums of a tile
