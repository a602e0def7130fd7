"""Builds a wheel for this Python, without CUDA: the kernels once, and a thin binding for each torch.

    TORCHES="2.13 2.14" python wheels.py bdist_wheel

Torch's wheels are unpacked to build/wheels, and none is imported: a binding needs only headers and libraries,
and what torch depends on would be gigabytes. The headers are the same for every Python.
"""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

releases = sorted(tuple(map(int, release.split("."))) for release in os.environ["TORCHES"].split())
flags = ["-O3", "-g0", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]  # those of setup.py
more_flags = ["-std=c++20", "-w"]  # setup.py shows the warnings
common = {"depends": [str(path) for path in Path("csrc").rglob("*.*")], "language": "c++"}


def torch_of(major: int, minor: int) -> Path:
    """Where the newest torch of a release is unpacked."""
    folder = Path(f"build/wheels/torch-{major}.{minor}").resolve()
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", folder, f"torch=={major}.{minor}.*"], check=True)
    return folder / "torch"


def binding(major: int, minor: int) -> Extension:
    torch = torch_of(major, minor)
    return Extension(
        f"fastmlp.torch_{major}_{minor}._C",
        ["csrc/torch.cpp"],
        include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
        define_macros=[("TORCH_EXTENSION_NAME", "_C"), ("TORCH_API_INCLUDE_EXTENSION_H", None)],
        extra_compile_args=[*flags, *more_flags],
        library_dirs=[str(torch / "lib")],
        libraries=["fastmlp_cpu", "c10", "torch", "torch_cpu", "torch_python"],
        extra_link_args=["-s", "-Wl,-rpath,$ORIGIN/.."],
        **common,
    )


kernels = Extension(
    "fastmlp.libfastmlp_cpu",
    [str(path) for path in sorted(Path("csrc/cpu").rglob("*.cpp"))],
    # Seen by the bindings, and called as directly among each other as in one extension.
    extra_compile_args=[*flags, *more_flags, "-fvisibility=default", "-fno-semantic-interposition"],
    extra_link_args=["-s", "-fopenmp", "-Wl,-Bsymbolic"],
    **common,
)


class Build(build_ext):
    """The kernels first, for the bindings are linked with them. As many files at once as there are cores."""

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libfastmlp_cpu"):
            return name.replace(".", "/") + ".so"  # the linker's name, without that of a Python
        return super().get_ext_filename(name)

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile
        with ThreadPoolExecutor(os.cpu_count()) as compilers, ThreadPoolExecutor() as bindings:

            def compile_at_once(files: list[str], **options: Any) -> list[str]:
                objects = compilers.map(lambda file: compile_in_turn([file], **options), files)
                return list(chain.from_iterable(objects))

            def build_binding(extension: Extension) -> None:
                own = copy.copy(self)
                own.build_temp = str(Path(self.build_temp, extension.name))  # all are of one source
                own.build_extension(extension)

            self.compiler.compile = compile_at_once
            self.compiler.add_library_dir(str(Path(self.build_lib, "fastmlp")))
            self.build_extension(kernels)
            list(bindings.map(build_binding, self.extensions[1:]))


(major, first), (_, last) = releases[0], releases[-1]
setup(
    ext_modules=[kernels, *(binding(*release) for release in releases)],
    cmdclass={"build_ext": Build},
    install_requires=[f"torch>={major}.{first},<{major}.{last + 1}"],
)
