"""Builds the extension against the torch that is installed: CPU always, CUDA where it can be built."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# pip builds in an isolated environment, which does not see the torch of the environment it installs into.
# Torch is no build requirement: another release could be fetched, and the extension would not load with the
# user's.
try:
    import torch
except ImportError:
    sys.path.append(sysconfig.get_path("purelib"))
    try:
        import torch
    except ImportError:
        sys.exit(
            "fastmlp is built against the torch it will run with, and none is installed here. Run:\n"
            f"    {sys.executable} -m pip install 'torch>=2.11,<2.14'\nand then this command again."
        )


def output(*command: str) -> str:
    """What the command prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


# Torch takes the folder above the nvcc on PATH for the toolkit. That nvcc may be a link or a script: ask it.
nvcc = None if os.environ.get("CUDA_HOME") else shutil.which("nvcc")
if nvcc and (top := re.search(r"TOP=(.+)", output(nvcc, "--dryrun", "file.cu"))):
    os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# Ampere to Blackwell, with PTX for what comes after. 9.0a by name: Hopper's own instructions need it.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


def nvcc_version() -> str | None:
    """The release of the CUDA compiler that torch would use, such as "13.0"."""
    nvcc = shutil.which("nvcc", path=str(Path(CUDA_HOME, "bin"))) if CUDA_HOME else None
    if nvcc is None:
        return None
    found = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
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


sources = [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]
flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
arguments = {"extra_link_args": ["-fopenmp"], "depends": [str(p) for p in Path("csrc").rglob("*.*")]}
if builds_cuda():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    extension = CUDAExtension(
        "fastmlp._C",
        [str(p) for p in sorted([*sources, *Path("csrc/cuda").glob("*.cu")])],
        define_macros=[("FASTMLP_WITH_CUDA", None)],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--threads=2"]},
        **arguments,
    )
else:
    extension = CppExtension(
        "fastmlp._C", [str(p) for p in sorted(sources)], extra_compile_args=flags, **arguments
    )

# The C++ interface of torch is stable within a release only: the package runs with the one it was built for.
release = ".".join(torch.__version__.split(".")[:2])
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    install_requires=[f"torch=={release}.*"],
)
