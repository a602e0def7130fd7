"""What the docs say is so: every example in a docstring or on a page runs, and prints what it says."""

import doctest
import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FunctionType

import pytest
import torch

import fastmlp

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.S) for page in PAGES}


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


@pytest.mark.parametrize("page", [page for page in EXAMPLES if EXAMPLES[page]])
def test_the_examples_of_a_page_run_in_order_and_print_what_they_say(page, tmp_path, capsys):
    program = "".join(EXAMPLES[page])
    path = tmp_path / "page.py"
    path.write_text(program)  # since fuse reads the source of a forward
    runpy.run_path(str(path))
    said = re.findall(r"^print\(.*\)  # (.*)$", program, re.M)
    for line, words in zip(capsys.readouterr().out.splitlines(), said, strict=True):
        assert words.startswith(line)


def test_the_picture_of_the_architecture_names_files_that_are_there():
    named = re.findall(r"\w+\.(?:py|cpp|h|inc|cuh?)\b", (ROOT / "docs/architecture.svg").read_text())
    there = {path.name for folder in ("csrc", "fastmlp") for path in (ROOT / folder).rglob("*.*")}
    assert set(named) <= there


def test_the_docs_have_the_address_and_the_version_of_the_package():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert f"git clone {address}\n" in (ROOT / "README.md").read_text()
    assert f"repository-code: {address}\n" in (ROOT / "CITATION.cff").read_text()
    assert f'version = "{fastmlp.__version__}"\n' in (ROOT / "docs/install.md").read_text()


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
