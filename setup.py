"""Builds the extension against the torch that is installed: CPU always, CUDA where it can be built."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from threading import Thread

from setuptools import setup

TORCH = "torch>=2.11,<2.16"

# pip builds in an isolated environment, which does not see the torch of the environment it installs into,
# but runs that one's Python. Other installers tell nothing of where they install to. Torch is no build
# requirement: another release could be fetched, and the extension would not load with the user's.
sys.path += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]  # on Red Hat two folders
try:
    import torch
except ImportError:
    temporary = Path(sys.prefix).is_relative_to(tempfile.gettempdir())
    pip = "uv pip" if "UV" in os.environ else "pip" if temporary else f"{sys.executable} -m pip"
    sys.exit(
        f"fastmlp is built against the torch it will run with, and there is none in {sys.prefix}. Run:\n"
        f"    {pip} install '{TORCH}' setuptools ninja\n"
        f"    {pip} install --no-build-isolation .\n"
        "docs/install.md tells what to write in a project of uv."
    )


def output(*command: str) -> str:
    """What the command prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


# Torch takes the folder above the nvcc on PATH for the toolkit. That nvcc may be a link or a script: ask it.
nvcc = None if os.environ.get("CUDA_HOME") else shutil.which("nvcc")
if nvcc and (top := re.search(r"TOP=(.+)", output(nvcc, "--dryrun", "file.cu"))):
    os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())

from torch.utils import cpp_extension  # noqa: E402


def nvcc_version() -> str | None:
    """The release of the CUDA compiler that torch would use, such as "13.0"."""
    home = cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    found = nvcc and re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
    return found[1] if found else None


def why_no_cuda() -> str | None:
    """None where the CUDA kernels can be built here, or the reason why not."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = nvcc_version()
    if nvcc is None:
        return "there is no nvcc (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    if nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc} and torch of CUDA {torch.version.cuda}: the major versions differ"
    return None


def builds_cuda() -> bool:
    """What FASTMLP_CUDA asks for: 1 and 0 force, and without it CUDA is built where it can be."""
    asked = os.environ.get("FASTMLP_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"FASTMLP_CUDA: expected 0 or 1, got {asked!r}.")
    reason = None if asked == "0" else why_no_cuda()
    if asked == "1" and reason:
        sys.exit(f"FASTMLP_CUDA=1 asks for the CUDA kernels, but {reason}.")
    return asked != "0" and reason is None


def architectures() -> str:
    """Those of the GPUs in sight; where none is, Ampere to Blackwell. With PTX for what comes after."""
    in_sight = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    # 8.6 and 8.9 run what is built for 8.0.
    chosen = sorted(c for c in in_sight if c >= (8, 0)) or [(8, 0), (9, 0), (10, 0), (12, 0)]
    return ";".join(f"{major}.{minor}" for major, minor in chosen) + "+PTX"


def refuse_other_compilers() -> None:
    """Clang's -fopenmp brings a second OpenMP beside torch's, and its target pragmas differ."""
    compiler = cpp_extension.get_cxx_compiler()
    try:
        macros = output(*shlex.split(compiler), "-dM", "-E", "-x", "c++", os.devnull)
        name = output(*shlex.split(compiler), "--version").split("\n")[0]
    except OSError:
        macros, name = "", "not there"
    version = re.search(r"__GNUC__ (\d+)", macros)
    if "__clang__" in macros or not version or int(version[1]) < 11:
        sys.exit(
            f"fastmlp is compiled by g++ 11 or newer, and {compiler} is {name}. "
            "Name one, as in: CXX=g++-12 pip install ."
        )


def redirect(output: int, errors: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)


def follow(reader: int, log: Path, terminal: int) -> None:
    """Writes what is said to the log, and to the terminal which file each of ninja's steps has compiled."""
    with open(reader, errors="replace") as said, log.open("w") as whole:
        for line in said:
            whole.write(line)
            if step := re.match(r"(\[\d+/\d+\]) .* -c (\S+) -o ", line):
                os.write(terminal, f"{step[1]} {os.path.relpath(step[2])}\n".encode())


class Build(cpp_extension.BuildExtension):
    """Prints one line a step. The compiler's own words go to a log, which an error names."""

    def build_extensions(self) -> None:
        refuse_other_compilers()
        log = Path(self.build_temp, "compiler.log").resolve()
        log.parent.mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        own = [os.dup(1), os.dup(2)]
        thread = Thread(target=follow, args=(reader, log, own[0]))
        thread.start()
        redirect(writer, writer)  # what ninja and the linker inherit
        os.close(writer)
        failure = None
        try:
            super().build_extensions()
        except Exception as error:
            failure = error
        finally:
            redirect(*own)
            thread.join()
        if failure:
            wrong = [line for line in log.read_text().splitlines() if re.search(r"\berror\b", line, re.I)]
            sys.exit("\n".join([*wrong[:3], f"fastmlp could not be built: {failure}. See {log}"]))


sources = [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").rglob("*.cpp")]
flags = ["-O3", "-g0", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]
flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
arguments = {"extra_link_args": ["-fopenmp"], "depends": [str(p) for p in Path("csrc").rglob("*.*")]}
if builds_cuda():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
    extension = cpp_extension.CUDAExtension(
        "fastmlp._C",
        [str(p) for p in sorted([*sources, *Path("csrc/cuda").glob("*.cu")])],
        define_macros=[("FASTMLP_WITH_CUDA", None)],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--threads=2"]},
        **arguments,
    )
else:
    extension = cpp_extension.CppExtension(
        "fastmlp._C", [str(p) for p in sorted(sources)], extra_compile_args=flags, **arguments
    )

# The C++ interface of torch is stable within a release only: the package runs with the one it was built for.
release = ".".join(torch.__version__.split(".")[:2])
setup(ext_modules=[extension], cmdclass={"build_ext": Build}, install_requires=[f"torch=={release}.*"])
