"""What the docs say is so: every example in a docstring or in the README runs, and prints what it says."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch

import fastmlp

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "fastmlp",
        "fastmlp.functional",
        "fastmlp.fuse",
        "fastmlp.nn",
        "fastmlp.optim",
        "fastmlp.reasons",
        "fastmlp.step",
    ],
)
def test_the_examples_in_docstrings_print_what_they_say(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "fastmlp": fastmlp})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_the_examples_in_the_readme_run(number):
    example = re.findall(r"```python\n(.*?)```", README, re.S)[number]
    exec(compile(example, "README.md", "exec"), {})


def test_every_public_name_has_a_docstring():
    public = [
        getattr(m, n)
        for m in (fastmlp, fastmlp.functional, fastmlp.nn, fastmlp.optim, fastmlp.step)
        for n in m.__all__
    ]
    missing = [thing for thing in public if isinstance(thing, type | FunctionType) and not thing.__doc__]
    assert not missing


@pytest.mark.parametrize("script", ["benchmarks/readme.py", "tests/compatibility.py"])
def test_what_scripts_write_into_the_docs_is_up_to_date(script):
    result = subprocess.run([sys.executable, ROOT / script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
