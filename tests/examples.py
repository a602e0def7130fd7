"""Runs a script of examples/ as its readers do, on little data."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, amount: int, folder: Path) -> str:
    """What it prints, after a run in `folder` that succeeded and told what was saved."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", str(amount)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads would wait for one another on a busy machine
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^saved: -?\d+% of the time, \d+\.\d\d times as fast$", result.stdout, re.M)
    return result.stdout


def figures(pattern: str, output: str) -> list[float]:
    """The numbers that the pattern finds, stock's first."""
    return [float(number) for number in re.findall(pattern, output)]
