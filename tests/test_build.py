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
from fastmlp import _C
from fastmlp import __main__ as self_check

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow  # each imports torch in a process of its own, or builds


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
        ([], "8.0;9.0;10.0;12.0+PTX"),
        ([(7, 5)], "8.0;9.0;10.0;12.0+PTX"),  # too old for the kernels
        ([(8, 9), (8, 9)], "8.9+PTX"),
        ([(9, 0), (8, 0)], "8.0;9.0+PTX"),
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


WHEEL_TORCHES = ["2.13", "2.14"]
builds_wheels = pytest.mark.skipif(
    os.environ.get("FASTMLP_TEST_WHEELS") != "1",
    reason="FASTMLP_TEST_WHEELS=1 builds for two releases of torch, and downloads both: gigabytes",
)


@pytest.fixture(scope="module")
def wheel_of_many_torches():
    python = "python{}.{}".format(*sys.version_info)
    variables = [f"PYTHONS={python}", f"TORCHES={' '.join(WHEEL_TORCHES)}"]
    made = subprocess.run(["make", "wheels", *variables], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (built,) = (ROOT / f"build/wheels/{python}/dist").glob("*.whl")
    return max((ROOT / "dist").glob(f"{built.stem.rpartition('-')[0]}-*.whl"), key=os.path.getmtime)


@builds_wheels
def test_a_wheel_of_many_torches_has_the_kernels_once_and_a_binding_for_each(wheel_of_many_torches):
    with zipfile.ZipFile(wheel_of_many_torches) as archive:
        libraries = {re.sub(r"\.cpython\S*", "", name) for name in archive.namelist() if ".so" in name}
        metadata = archive.read(f"fastmlp-{fastmlp.__version__}.dist-info/METADATA").decode()
    assert libraries == {"fastmlp/libfastmlp_cpu.so", "fastmlp/torch_2_13/_C", "fastmlp/torch_2_14/_C"}
    assert re.findall(r"^Requires-Dist: torch(.*)$", metadata, re.M) == ["<2.15,>=2.13"]


@builds_wheels
@pytest.mark.parametrize("release", WHEEL_TORCHES)
def test_a_wheel_of_many_torches_runs_with_each_of_them_without_a_compiler(
    wheel_of_many_torches, release, tmp_path
):
    code, _, err = run("-m", "venv", tmp_path)
    assert code == 0, err
    python = tmp_path / "bin/python"
    environment = {"PATH": str(python.parent), "HOME": os.environ["HOME"]}

    def fresh(*arguments):
        command = [python, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    fresh("-m", "pip", "install", "--quiet", f"torch=={release}.*", wheel_of_many_torches)
    report = fresh("-m", "fastmlp")
    assert f"binding   torch_{release.replace('.', '_')}/_C." in report
    assert "every kernel is right" in report
    fresh(
        "-c",
        """
import torch, fastmlp
model = fastmlp.MLP(20, 30, 5)
step = fastmlp.TrainStep(model, fastmlp.CrossEntropyLoss(), fastmlp.SGD(model.parameters(), lr=0.1))
x, target = torch.randn(64, 20), torch.randint(5, (64,))
losses = [float(step(x, target)) for _ in range(20)]
assert losses[-1] < losses[0], losses
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(mapped) == 1 and "/torch/lib/" in mapped.pop(), mapped
""",
    )


def test_a_torch_that_a_wheel_has_no_binding_for_is_told_in_one_sentence(tmp_path):
    package = tmp_path / "fastmlp"
    for release in ("2_11", "2_12"):
        (package / f"torch_{release}").mkdir(parents=True)
    (package / "__init__.py").write_text((ROOT / "fastmlp/__init__.py").read_text())
    code, _, err = run("-c", "import fastmlp", PYTHONPATH=str(tmp_path), cwd=tmp_path)
    assert code == 1
    assert err.count("Error: ") == 1
    assert err.strip().splitlines()[-1] == (
        f"ImportError: this wheel of fastmlp runs with torch 2.11, 2.12, and found torch {torch.__version__}"
    )


def test_wheels_are_compiled_with_the_flags_of_a_build_from_source():
    source, wheels = (
        re.findall(r"^flags = (\[.*\])", (ROOT / name).read_text(), re.M)
        for name in ("setup.py", "wheels.py")
    )
    assert len(source) == 1
    assert source == wheels


def test_the_self_check_tells_who_has_a_cuda_torch_that_there_are_no_cuda_kernels(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_C, "cuda", None)
    monkeypatch.setattr(_C, "instruction_sets", list)  # checks none
    assert self_check.main() == 0
    said = capsys.readouterr().out
    assert "without CUDA kernels" in said
    assert "this build has no CUDA kernels, a build from source has: PyTorch's own operations run" in said


def test_the_self_check_tells_who_has_a_gpu_that_the_build_has_no_code_for_and_checks_none_there(
    monkeypatch, capsys
):
    reason = "the kernels are built for sm_80 and not for this GPU"
    monkeypatch.setattr(_C, "cuda", "13.0")
    monkeypatch.setattr(_C, "use_products", lambda owner, rows: None, raising=False)
    monkeypatch.setattr(_C, "instruction_sets", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(self_check, "why_not_on_gpu", lambda: reason)
    assert self_check.main() == 0
    assert f"a GPU; {reason}: PyTorch's own operations run" in capsys.readouterr().out
