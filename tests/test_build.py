"""Building and installing: what is asked for is built, and what cannot be is refused in one sentence."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fastmlp

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture(scope="module", params=["with build isolation", "without build isolation"])
def wheel(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = [] if request.param.startswith("with ") else ["--no-build-isolation"]
    code, out, err = run("-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, *options, ".")
    assert code == 0, out + err
    return next(folder.glob("*.whl"))


def test_a_wheel_imports_where_it_is_installed(wheel, tmp_path):
    code, out, err = run("-m", "pip", "install", "--no-deps", "--target", tmp_path, wheel)
    assert code == 0, out + err
    program = "import fastmlp, torch; fastmlp.MLP(3, 2)(torch.ones(1, 3)); print(fastmlp.__file__)"
    code, out, err = run("-c", program, PYTHONPATH=str(tmp_path), cwd="/")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "fastmlp/__init__.py")


def test_a_wheel_holds_the_package_and_runs_with_the_torch_it_was_built_for(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"fastmlp-{fastmlp.__version__}.dist-info/METADATA").decode()
    assert {"fastmlp/__init__.py", "fastmlp/py.typed", "fastmlp/_C.pyi"} <= names
    assert any(re.fullmatch(r"fastmlp/_C\..*\.so", name) for name in names)
    release = ".".join(torch.__version__.split(".")[:2])
    assert re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) == [f"torch=={release}.*"]
    assert f"Version: {fastmlp.__version__}\n" in metadata


def test_without_torch_the_build_stops_with_the_command_to_type():
    hidden = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']"
    code, _, err = run("-c", f"{hidden}; runpy.run_path('setup.py')")
    assert code == 1
    assert f"{sys.executable} -m pip install 'torch>=2.11,<2.14'" in err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_cuda_kernels_that_are_forced_and_cannot_be_built_are_refused_in_one_sentence():
    code, _, err = run("setup.py", "--version", FASTMLP_CUDA="1")
    assert code == 1
    assert err.strip() == (
        f"FASTMLP_CUDA=1 asks for the CUDA kernels, but torch {torch.__version__} is built without CUDA."
    )


@pytest.mark.parametrize("value", ["yes", "2"])
def test_a_wrong_value_of_the_cuda_switch_is_refused(value):
    code, _, err = run("setup.py", "--version", FASTMLP_CUDA=value)
    assert code == 1
    assert err.splitlines()[-1] == f"FASTMLP_CUDA: expected 0 or 1, got '{value}'."


def test_an_extension_of_another_torch_is_refused_with_the_command_to_type(tmp_path):
    package = tmp_path / "fastmlp"
    package.mkdir()
    for source in (ROOT / "fastmlp").glob("*.py"):
        (package / source.name).write_text(source.read_text())
    (package / "_C.py").write_text("raise ImportError('undefined symbol')")
    code, _, err = run("-c", "import fastmlp", PYTHONPATH=str(tmp_path), cwd=tmp_path)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: fastmlp's extension is not built for torch {torch.__version__}")
    assert "pip install --force-reinstall --no-deps ." in last
