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


@pytest.mark.slow
def test_a_wheel_imports_where_it_is_installed(wheel, tmp_path):
    code, out, err = run("-m", "pip", "install", "--no-deps", "--target", tmp_path, wheel)
    assert code == 0, out + err
    program = "import fastmlp, torch; fastmlp.MLP(3, 2)(torch.ones(1, 3)); print(fastmlp.__file__)"
    code, out, err = run("-c", program, PYTHONPATH=str(tmp_path), cwd="/")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "fastmlp/__init__.py")


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_runs_with_the_torch_it_was_built_for(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"fastmlp-{fastmlp.__version__}.dist-info/METADATA").decode()
    assert {"fastmlp/__init__.py", "fastmlp/py.typed", "fastmlp/_C.pyi"} <= names
    assert any(re.fullmatch(r"fastmlp/_C\..*\.so", name) for name in names)
    release = ".".join(torch.__version__.split(".")[:2])
    assert re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) == [f"torch=={release}.*"]
    assert f"Version: {fastmlp.__version__}\n" in metadata


@pytest.mark.parametrize(
    ("installer", "environment"), [(f"{sys.executable} -m pip", {}), ("uv pip", {"UV": "/usr/bin/uv"})]
)
def test_without_torch_the_build_stops_with_the_commands_to_type(tmp_path, installer, environment):
    hidden = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']"
    own = {"TMPDIR": str(tmp_path)}  # or this environment may lie where temporary ones do
    code, _, err = run("-c", f"{hidden}; runpy.run_path('setup.py')", **own, **environment)
    assert code == 1
    assert f"{installer} install 'torch>=2.11,<2.16' setuptools ninja\n" in err
    assert f"{installer} install --no-build-isolation .\n" in err
    assert "Traceback" not in err


def compiler(folder: Path, macros: str, work: str) -> dict[str, str]:
    """The environment that names a compiler which is of some version, and compiles by `work` in the shell."""
    script = folder / "compiler"
    script.write_text(
        f"""#!/bin/sh
case "$*" in
  *-dM*) echo '{macros}' ;;
  *--version) echo 'some compiler 1.2' ;;
  *) echo 'many words'; {work} ;;
esac"""
    )
    script.chmod(0o755)
    return {"CXX": str(script), "FASTMLP_CUDA": "0", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}


def build(folder: Path, **environment: str) -> tuple[int, str, str]:
    folders = ["--build-temp", folder / "build", "--build-lib", folder / "lib"]
    return run("setup.py", "--quiet", "build_ext", *folders, **environment)


@pytest.mark.parametrize("macros", ["#define __GNUC__ 10", "#define __GNUC__ 14\n#define __clang__ 1", ""])
def test_a_compiler_that_cannot_do_it_is_refused_with_the_way_to_name_another(tmp_path, macros):
    environment = compiler(tmp_path, macros, "exit 1")
    code, _, err = build(tmp_path, **environment)
    assert code == 1
    assert err.splitlines()[-1] == (
        f"fastmlp is compiled by g++ 11 or newer, and {environment['CXX']} is some compiler 1.2. "
        "Name one, as in: CXX=g++-12 pip install ."
    )


def test_a_step_is_a_line_and_what_the_compiler_says_is_in_the_log(tmp_path):
    writes = 'while [ $# -gt 0 ]; do case $1 in -o | -MF) : > "$2" ;; esac; shift; done'
    code, out, err = build(tmp_path, **compiler(tmp_path, "#define __GNUC__ 11", writes))
    assert code == 0, err
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/**/*.cpp")]
    count = len(sources)
    lines = [line.split() for line in out.splitlines()]
    assert [number for number, _ in lines] == [f"[{i + 1}/{count}]" for i in range(count)]
    assert {source for _, source in lines} == {str(path.relative_to(ROOT)) for path in sources}
    assert (tmp_path / "build/compiler.log").read_text().count("many words") == count + 1  # and the link
    assert "many words" not in err


def test_a_failure_of_the_compiler_is_told_with_the_path_of_the_log(tmp_path):
    code, _, err = build(
        tmp_path, **compiler(tmp_path, "#define __GNUC__ 11", "echo 'x.h:1: error: wrong'; exit 1")
    )
    assert code == 1
    assert "x.h:1: error: wrong\n" in err
    assert err.endswith(f"See {tmp_path / 'build/compiler.log'}\n")
    assert "many words" not in err


@pytest.mark.parametrize(
    ("in_sight", "expected"),
    [
        ([], "8.0;9.0a;10.0;12.0+PTX"),
        ([(7, 5)], "8.0;9.0a;10.0;12.0+PTX"),  # too old for the kernels
        ([(8, 9), (8, 9)], "8.9+PTX"),
        ([(9, 0), (8, 0)], "8.0;9.0a+PTX"),
    ],
)
def test_the_cuda_kernels_are_built_for_the_gpus_in_sight_or_for_all(in_sight, expected):
    program = f"""
import runpy, setuptools, torch
setuptools.setup = lambda **arguments: None
torch.cuda.device_count = lambda: len({in_sight})
torch.cuda.get_device_capability = {in_sight}.__getitem__
print(runpy.run_path("setup.py")["architectures"]())"""
    code, out, err = run("-c", program)
    assert code == 0, err
    assert out.strip() == expected


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
