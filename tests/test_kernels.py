"""Every kernel, by itself, against float64: the CPU's in each instruction set, CUDA's emulated.

The sources are compiled by g++ as they are: cuda_emulator.h gives CUDA's part of the language its meaning,
avx512_emulator.h the intrinsics of AVX-512, for processors that lack them. The processor's best instruction
set, the portable one and CUDA are tried on a few shapes. Slow tests try the others, more shapes, all
parameters together, and sanitizers: what is compiled for them looks for undefined behaviour.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmlp import _C

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ["float32", "bfloat16", "float16"]
INSTRUCTION_SETS = ["avx512bf16", "avx512", "avx2", "portable"]
BACKENDS = [*INSTRUCTION_SETS, "cuda"]
BEST = _C.instruction_sets()[0]  # of the processor
QUICK = {BEST, "portable", "cuda"}  # the self-check, a test too, runs all that the extension has


def cases(names, values, is_quick, **options):
    """As of reference.py; backends are fixtures."""
    return reference.cases(
        names, values, is_quick, indirect=[name for name in names if name == "backend"], **options
    )


def every_backend(backends=BACKENDS, slow=()):
    return cases(["backend"], [(name,) for name in backends], lambda name: name in QUICK and name not in slow)


KERNELS = [
    (backend, dtype) for backend in BACKENDS for dtype in DTYPES if backend == "cuda" or dtype != "float16"
]
# CUDA's passes around products that torch's library computes; in its place is a loop of kernels_driver.cpp.
OF_THE_LIBRARY = [("cuda library", dtype) for dtype in DTYPES]
every_kernel = cases(["backend", "dtype"], KERNELS, lambda backend, _: backend in QUICK)
every_sweep = cases(["sweep"], [(number,) for number in range(4)], lambda number: number == 0)
every_variant = cases(["variant"], [(1,), (2,), (3,), (6,)], lambda variant: variant == 3)
SHAPES = [(1, 1, 1), (3, 5, 7), (64, 10, 500), (65, 67, 33), (0, 4, 3), (4, 0, 3), (4, 3, 0), (300, 3, 2)]
SHAPES += [(300, 40, 600), (530, 550, 20)]  # sums deeper than a panel, more rows than a block
SHAPES += [(1100, 20, 9)]  # a batch that goes through the threads by rows
SHAPES += [(250, 248, 256)]  # the large tiles of a GPU
NETWORKS = [(0, (3, 4, 2)), (70, (20, 33, 40, 3)), (1100, (9, 20, 5, 2))]
NETWORKS += [(130, (20, 128, 9, 70, 5)), (70, (20, 130, 40, 3))]  # of the widths of a chain, and of others
NETWORK_ACTIVATIONS = {
    "relu": ["relu"] * 4 + ["identity"],
    "mixed": ["silu", "tanh", "relu", "gelu"],  # of layers that have y or z read, one after the other
}
LAUNCH_FAILURE = 719

STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a unit in the last place
UNDERFLOW = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}


class Activation(NamedTuple):
    """A row of the table in activation.h with some parameters, and what torch has for it."""

    row: str
    torch: Callable[[torch.Tensor], torch.Tensor]
    parameters: tuple[float, ...] = ()
    exact: Callable[[torch.Tensor], torch.Tensor] | None = None  # where torch's cancels even in float64

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return self.torch(torch.from_numpy(z)).numpy()

    def slope(self, saved: np.ndarray) -> np.ndarray:
        """g' from what backward reads: y or z."""
        if self.row in SLOPES_OF_Y:
            return SLOPES_OF_Y[self.row](saved)
        z = torch.from_numpy(saved).requires_grad_()  # or y, if g and g' are the same there
        return torch.autograd.grad(self.torch(z).sum(), z)[0].numpy()


SLOPES_OF_Y = {"sigmoid": lambda y: y * (1 - y), "tanh": lambda y: 1 - y * y}
GELU_TANH = 2 * (2 / np.pi) ** 0.5
SELU = (1.6732632423543772, 1.0507009873554805, 1)
ACTIVATIONS = {
    "identity": Activation("identity", lambda z: z * 1),
    "relu": Activation("relu", F.relu),
    "leaky_relu": Activation("leaky_relu", F.leaky_relu, (0.01,)),
    "leaky_relu of a negative slope": Activation("leaky_relu", lambda z: F.leaky_relu(z, -0.5), (-0.5,)),
    "relu6": Activation("hardtanh", F.relu6, (0, 6)),
    "hardtanh": Activation("hardtanh", lambda z: F.hardtanh(z, -0.5, 2), (-0.5, 2)),
    "elu": Activation("elu", lambda z: F.elu(z, 0.7), (0.7, 1, 1)),
    "celu": Activation("elu", lambda z: F.celu(z, 0.3), (0.3, 1, 1 / 0.3)),
    "selu": Activation("elu", F.selu, SELU),
    "sigmoid": Activation("sigmoid", torch.sigmoid),
    "tanh": Activation("tanh", torch.tanh),
    "softplus": Activation("softplus", F.softplus, (1, 20)),
    "softplus of a low threshold": Activation("softplus", lambda z: F.softplus(z, 0.75, 6), (0.75, 6)),
    "silu": Activation("silu", F.silu),
    "gelu": Activation("gelu", F.gelu, (), lambda z: z * torch.special.erfc(-z / 2**0.5) / 2),
    "gelu_tanh": Activation(
        "gelu_tanh",
        lambda z: F.gelu(z, approximate="tanh"),
        (),
        lambda z: z * torch.sigmoid(GELU_TANH * (z + 0.044715 * z**3)),
    ),
    "mish": Activation("mish", F.mish),
    "hardswish": Activation("hardswish", F.hardswish),
    "hardsigmoid": Activation("hardsigmoid", F.hardsigmoid),
}
# Each shape with one of those that differ in how they are computed. Slow: each of them in every shape, and
# the others, which test_an_activation_is_as_exact_as_torch tries too, along the sum and across it.
DIFFERENT = ["identity", "relu", "tanh", "silu"]
CHOSEN = [*zip(itertools.cycle(DIFFERENT), SHAPES, strict=False)]
CASES = [*itertools.product(DIFFERENT, SHAPES)]
CASES += [*itertools.product(ACTIVATIONS.keys() - {*DIFFERENT}, [(3, 5, 7), (65, 67, 33)])]


def is_quick(backend, dtype, activation, shape):
    """Few of those that hardly differ, and that the emulator takes long for."""
    if (activation, shape) not in CHOSEN:
        return False
    if backend == "cuda library":
        return dtype == "bfloat16" or shape == (65, 67, 33)
    if backend not in QUICK:
        return False
    if backend == "cuda":
        small = shape in [(3, 5, 7), (65, 67, 33)]
        large = shape in [(300, 40, 600), (530, 550, 20)]
        return {"float32": not large, "bfloat16": True, "float16": small}[dtype]
    return (
        dtype == "float32" or (backend == BEST and 0 not in shape) or shape in [(65, 67, 33), (300, 40, 600)]
    )


every_layer = cases(
    ["backend", "dtype", "activation", "shape"],
    [(*kernel, *case) for kernel in [*KERNELS, *OF_THE_LIBRARY] for case in sorted(CASES)],
    is_quick,
    ids=str,
)

# Edits of the CUDA kernels that a test must notice, and what the emulator says of them. It says nothing where
# only the values are wrong.
BARRIER = "__syncthreads();"
BROKEN = {
    "the tiles are read before other threads have written them": (
        "product.cuh", f"{BARRIER}  // the step's tiles", "// the step's tiles", "a race"
    ),
    "the tiles are read before the copies have arrived": (
        "product.cuh", "wait_for_copies<stages - 2>", "wait_for_copies<stages - 1>", "an asynchronous copy"
    ),
    "a tail is taken for one element longer": (
        "product.cuh", "columns - column() : 0;", "columns - column() + 1 : 0;", ""
    ),
    "sums take the place of tiles that are read": (
        "product.cuh", f"{BARRIER}  // the operands' tiles", "// the operands' tiles", "a race"
    ),
    "the matrices of a fragment are swapped": (
        "tensor_core.cuh", "rows_first ? matrix % 2 : matrix / 2", "rows_first ? matrix / 2 : matrix % 2", ""
    ),
    "a barrier that some threads skip": (
        "product.cuh", f"{BARRIER}\n    for (int", f"if (threadIdx.x) return;\n{BARRIER}for (int", "part ways"
    ),
    "a layer is overwritten before it has been read": (
        "chain.cuh", f"{BARRIER}  // A has", "// A has", "a race"
    ),
    "the values are overwritten while in use": ("across.cuh", f"{BARRIER}\n  values", "values", "a race"),
    "parts of a sum are read before all have been written": (
        "splits.cuh", f"{BARRIER}  // the block's sums", "// the block's sums", "a race"
    ),
    "parts of a sum are not fenced": (
        "splits.cuh", "__threadfence();\n    __sync", "__sync", "a race: block"
    ),
    "a block takes itself for the last too early": (
        "splits.cuh", "next - none == members", "next - none + 1 == members", "a race: block"
    ),
    "a launch does not wait for the one before": (
        "product.cuh", "wait_for_previous();\n  for", "for", "has not waited"
    ),
    "weights are read before the launch that changes them has ended": (
        "chain.cuh", "wait_for_previous();\n  start_weight(0);", "start_weight(0), wait_for_previous();",
        "touches"
    ),
    "threads without work do not wait": (
        "elementwise.cuh", "wait_for_previous(), let_next_begin();\n  const int64_t i",
        "if (threadIdx.x < 101) wait_for_previous();\nelse return;\n  const int64_t i", "ends"
    ),
    "sums are added before all threads have theirs": (
        "elementwise.cuh", f"{BARRIER}\n  float sum", "float sum", "a race"
    ),
}  # fmt: skip


# ---- building

COMMON = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
DRIVER = "tests/kernels_driver.cpp"
SOURCES = {"cuda": ["csrc/cuda/backend.cu", DRIVER]}
SOURCES |= {name: [f"csrc/cpu/isa/{name}.cpp", *COMMON, DRIVER] for name in INSTRUCTION_SETS}
FLAGS = {
    # Few multiprocessors, so that small shapes need the large tiles, and few parts of a sum are too many for
    # one block. Elements are read as words, which a CPU's optimizer need not see as a reading of them. Each
    # library has an emulator of its own.
    "cuda": [
        *("-DFASTMLP_EMULATE", "-DFASTMLP_MULTIPROCESSORS=4", "-DFASTMLP_FAN=3"),
        *("-fno-strict-aliasing", "-fno-gnu-unique"),
        "-fno-tree-sra",  # packs are accessed as a whole
    ],
    "cpu": ["-DFASTMLP_COST_OF_THREADS=0"],
}
OPENMP = ["-fopenmp", "-Wl,--wrap=GOMP_barrier"]  # the driver counts who comes to a barrier
OLDEST = "g++-11"  # the oldest compiler that the package can be built with
# The instruction sets that can be emulated, and the flag of a processor that has them.
EMULATED = {"avx512bf16": "avx512_bf16", "avx512": "avx512vl"}
PROCESSOR = Path("/proc/cpuinfo").read_text().split()
LACKING = [name for name, flag in EMULATED.items() if flag not in PROCESSOR]
LIBRARY = ["-shared", "-fPIC", "-Wl,-Bsymbolic"]  # for a symbol of libgomp that the driver replaces


def emulate(instruction_sets: Iterable[str]) -> list[str]:
    return [f"-DFASTMLP_EMULATE_{name.upper()}" for name in instruction_sets]


def break_source(folder: Path, file: str, old: str, new: str, _: str) -> Path:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "tests").mkdir()
    for name in ("kernels_driver.cpp", "cuda_emulator.h"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    kernels = folder / "csrc/cuda" / file
    text = kernels.read_text()
    assert text.count(old) == 1
    kernels.write_text(text.replace(old, new))
    return folder


class Builds:
    """What is compiled for the tests, a source for each processor at a time, once it is asked for.

    The names: a backend, for the library that the tests call; an edit of BROKEN, for one of the CUDA backend
    with it; a backend and "sanitized", for a program under AddressSanitizer; an instruction set and OLDEST.
    """

    def __init__(self, pool: ThreadPoolExecutor, folder: Path, sanitized: bool) -> None:
        self.pool, self.folder, self.sanitized = pool, folder, sanitized
        self.objects: dict[tuple[object, ...], Future[Path]] = {}

    def plan(self, name: str) -> tuple[str, list[str], list[str], str, Path]:
        """The compiler, its flags, the linker's, the backend, and the folder of its sources."""
        if name in BROKEN:
            folder = self.folder / f"broken {[*BROKEN].index(name)}"
            root = folder if folder.exists() else break_source(folder, *BROKEN[name])
            return "g++", LIBRARY, LIBRARY, "cuda", root
        backend, _, kind = name.partition(" ")
        if kind == "sanitized":
            # All that can be: AddressSanitizer does not see what a masked instruction reads and writes.
            own = "address,undefined" if backend == "cuda" else "address"
            flags = ["-g", f"-fsanitize={own}", "-fno-sanitize-recover", *emulate(EMULATED)]
            return "g++", flags, flags, backend, ROOT
        if kind == OLDEST:  # optimised as the package is
            return OLDEST, [*LIBRARY, "-O3"], LIBRARY, backend, ROOT
        # The emulator is slow enough without UndefinedBehaviorSanitizer, which its program has too.
        undefined = ["-fsanitize=undefined", "-fno-sanitize-recover"]
        own = undefined if self.sanitized and backend != "cuda" else []
        flags = [*LIBRARY, *emulate({backend} & {*LACKING}), "-O1", *own]
        return "g++", flags, [*LIBRARY, *own], backend, ROOT

    def ask(self, name: str) -> list[Future[Path]]:
        """Has the objects of a build compiled, if they are not yet."""
        compiler, flags, _, backend, root = self.plan(name)
        flags = [*flags, *FLAGS["cuda" if backend == "cuda" else "cpu"], f"-I{root / 'tests'}"]
        futures = []
        for source in SOURCES[backend]:
            # The emulator stands in for the library of -fsanitize=thread, which therefore is not linked.
            own = ["-fsanitize=thread"] if source.endswith(".cu") and "-shared" in flags else []
            key = (compiler, *flags, *own, "-c", "-x", "c++", root / source)
            if key not in self.objects:
                output = self.folder / f"{len(self.objects)}.o"
                self.objects[key] = self.pool.submit(self.gxx, *key, "-o", output)
            futures.append(self.objects[key])
        return futures

    def gxx(self, compiler: str, *arguments: object) -> Path:
        command = [compiler, "-std=c++17", *OPENMP, "-ffp-contract=off", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return Path(command[-1])

    def __getitem__(self, name: str) -> Path:
        output = self.folder / f"{name}.linked"
        if not output.exists():
            compiler, _, flags, *_ = self.plan(name)
            self.gxx(compiler, *flags, *[future.result() for future in self.ask(name)], "-o", output)
        return output


@pytest.fixture(scope="session")
def builds(request, tmp_path_factory):
    """The builds; those that the tests of this run name in their parameters are begun at once."""
    own = [item for item in request.session.items if item.path == Path(__file__)]
    sanitized = any(item.get_closest_marker("slow") for item in own)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    builds = Builds(pool, tmp_path_factory.mktemp("kernels"), sanitized)
    parameters = [item.callspec.params for item in own if hasattr(item, "callspec")]
    for name in dict.fromkeys(
        each[key] for each in parameters for key in ("backend", "build") if key in each
    ):
        builds.ask(name)
    yield builds
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def backend(request, builds: Builds) -> ctypes.CDLL:
    return loaded(builds[request.param], request.param)


def loaded(path: Path, name: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    calls = ["forward", "backward", "cross_entropy", "clip"]
    calls += ["forward_all", "backward_all"] if name in INSTRUCTION_SETS else []
    workspaces = [f"{call}_workspace" for call in calls]
    for function in (*workspaces, "cross_entropy"):
        getattr(library, function).restype = ctypes.c_int64
    library.activations.restype = ctypes.c_char_p
    library.name = name
    if not library.use(name.encode()):
        pytest.skip(f"this processor has no {name}")
    return library


# ---- calling


EVERYTHING = ("grad_x", "grad_weight", "grad_bias")


class Row(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("parameters", ctypes.c_float * 3)]


class Forward(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("reduced", ctypes.c_bool), ("activation", Row)]
    _fields_ += [(size, ctypes.c_int64) for size in "MNK"]
    _fields_ += [("x", ctypes.c_void_p), ("ldx", ctypes.c_int64)]
    _fields_ += [("weight", ctypes.c_void_p), ("ldw", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("bias", "y", "z")]


class Backward(ctypes.Structure):
    _fields_ = [*Forward._fields_[:6], ("grad_y", ctypes.c_void_p), ("saved", ctypes.c_void_p)]
    _fields_ += Forward._fields_[6:10]
    _fields_ += [(name, ctypes.c_void_p) for name in ("grad_x", "grad_weight", "grad_bias")]
    _fields_ += [("x_activation", Row)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("trained_weight", "trained_bias")]


class Optimizer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("kind", "dtype", "states")]
    _fields_ += [(name, ctypes.c_float) for name in ("weight_decay", "momentum", "undamped")]
    _fields_ += [(name, ctypes.c_float) for name in ("momentum_square", "undamped_square", "eps", "kept")]
    _fields_ += [(name, ctypes.c_bool) for name in ("maximize", "nesterov", "first", "in_memory")]


class Update(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("param", "grad")]
    _fields_ += [("states", 3 * ctypes.c_void_p), ("size", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_float) for name in ("rate", "inverse_root")]


class Numbers(ctypes.Structure):
    _fields_ = [("optimizer", Optimizer), ("rate", ctypes.c_float), ("inverse_root", ctypes.c_float)]


class Clip(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("max_norm", ctypes.c_double), ("only_finite", ctypes.c_bool)]
    _fields_ += [("norm", ctypes.c_void_p)]


class Gradient(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_int64)]


class Buffer:
    """Elements of a dtype between two guard bands; NaN until written."""

    def __init__(self, dtype: str, shape: tuple[int, ...], values: np.ndarray | None = None, guard: int = 64):
        self.dtype, self.shape, self.size, self.guard = dtype, shape, int(np.prod(shape)), guard
        elements, item = self.size + 2 * self.guard, np.dtype(STORAGE[dtype]).itemsize
        memory = np.empty(elements * item + 64, np.uint8)  # of which a part begins at a multiple of 64 bytes
        begin = -memory.ctypes.data % 64
        self.memory = memory[begin : begin + elements * item].view(STORAGE[dtype])
        self.memory.view(np.uint8)[:] = 0xFF
        self.elements = self.memory[self.guard : self.guard + self.size]
        if values is not None and dtype == "bfloat16":
            bits = values.astype(np.float32).ravel().view(np.uint32)
            self.elements[:] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        elif values is not None:
            self.elements[:] = values.ravel()

    @property
    def pointer(self) -> int:
        return self.elements.ctypes.data

    def check_bands(self) -> None:
        for band in (self.memory[: self.guard], self.memory[self.guard + self.size :]):
            assert (band.view(np.uint8) == 0xFF).all(), "written beyond the end"

    def float64(self) -> np.ndarray:
        """The values, once the guard bands have been seen to be whole."""
        self.check_bands()
        values = self.elements
        if self.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float64).reshape(self.shape)


def complaint(backend: ctypes.CDLL) -> str:
    """What the emulator found wrong in the last launch."""
    if not hasattr(backend, "complaint"):
        return ""
    backend.complaint.restype = ctypes.c_char_p
    return backend.complaint().decode()


def blocks_of_launches(function: Callable[..., int], *arguments: object) -> list[int]:
    """What a function of the driver tells of launches."""
    blocks = (ctypes.c_int64 * 1000)()
    return blocks[: function(*arguments, blocks)]


def run(backend: ctypes.CDLL, variant: int, *layers: Forward | Backward, networks: int | None = None) -> None:
    """Calls the backend with the layers, in a workspace of the size that it asks for.

    `networks`: how many networks they are, one after the other, where they are called together.
    What CUDA launches is what its plan says.
    """
    name = "forward" if isinstance(layers[0], Forward) else "backward"
    array = (type(layers[0]) * len(layers))(*layers)
    counts = [len(layers)]
    if networks is not None:
        name, counts = f"{name}_all", [len(layers) // networks, networks]
    arguments = array, *map(ctypes.c_int64, counts)
    size = getattr(backend, f"{name}_workspace")(*arguments, variant)
    workspace = Buffer("float32", (size // 4,))
    if hasattr(backend, "launched"):
        backend.forget_launches()
    error = getattr(backend, name)(*arguments, ctypes.c_void_p(workspace.pointer), variant)
    assert error == 0, f"error {error}: {complaint(backend)}"
    workspace.check_bands()
    if hasattr(backend, "launched"):
        backend.launches = blocks_of_launches(backend.launched)
        assert backend.launches == blocks_of_launches(getattr(backend, f"planned_{name}"), *arguments)


def row(backend: ctypes.CDLL, activation: str) -> Row:
    g = ACTIVATIONS[activation]
    kind = backend.activations().decode().split().index(g.row)
    return Row(kind, (ctypes.c_float * 3)(*g.parameters))


def reads_z(backend: ctypes.CDLL, activation: str) -> bool:
    return bool(backend.reads_z(ctypes.byref(row(backend, activation))))


class Layer:
    """One linear layer with inputs drawn by a seed, its calls to the backend, and the float64 results."""

    def __init__(self, backend, dtype, activation, shape, ldx=None, ldw=None, bias=True, seed=0):
        self.backend, self.dtype, self.activation, (self.M, self.N, self.K) = (
            backend,
            dtype,
            activation,
            shape,
        )
        self.g, self.reads_z, self.x_activation = (
            ACTIVATIONS[activation],
            reads_z(backend, activation),
            "identity",
        )
        self.ldx = self.K if ldx is None else ldx
        self.ldw = self.K if ldw is None else ldw
        self.reduced = False
        random = np.random.default_rng(seed)

        def draw(*sizes: int) -> Buffer:
            return Buffer(dtype, sizes, random.standard_normal(sizes))

        self.x_memory = draw(max(self.M - 1, 0) * self.ldx + self.K if self.M else 0)
        self.weight_memory = draw(max(self.N - 1, 0) * self.ldw + self.K if self.N else 0)
        self.bias = draw(self.N) if bias else None
        self.grad_y = draw(self.M, self.N)
        self.z = draw(self.M, self.N)
        self.y = Buffer(dtype, (self.M, self.N), self.g(self.z.float64()))

    @property
    def x(self) -> np.ndarray:
        return self.x_memory.float64()[np.arange(self.M)[:, None] * self.ldx + np.arange(self.K)]

    @property
    def weight(self) -> np.ndarray:
        return self.weight_memory.float64()[np.arange(self.N)[:, None] * self.ldw + np.arange(self.K)]

    @property
    def saved(self) -> Buffer:
        return self.z if self.reads_z else self.y

    def arguments(self, struct: type[ctypes.Structure], **buffers: Buffer | None) -> ctypes.Structure:
        numbers = {"dtype": DTYPES.index(self.dtype), "activation": row(self.backend, self.activation)}
        pointers = {key: buffer.pointer if buffer is not None else None for key, buffer in buffers.items()}
        sizes = {"M": self.M, "N": self.N, "K": self.K, "ldx": self.ldx, "ldw": self.ldw}
        numbers["reduced"] = self.reduced
        return struct(**numbers, **sizes, **pointers)

    def forward_arguments(self, x: Buffer | None, y: Buffer | None, z: Buffer | None = None) -> Forward:
        return self.arguments(Forward, x=x, weight=self.weight_memory, bias=self.bias, y=y, z=z)

    def backward_arguments(self, **outputs: Buffer) -> Backward:
        backward = self.arguments(
            Backward,
            grad_y=self.grad_y,
            saved=self.saved if self.activation != "identity" else None,
            x=self.x_memory if "grad_weight" in outputs else None,
            weight=self.weight_memory if "grad_x" in outputs else None,
            **outputs,
        )
        backward.x_activation = row(self.backend, self.x_activation)
        return backward

    def gradients(self, *names: str) -> dict[str, Buffer]:
        shapes = {"grad_x": (self.M, self.K), "grad_weight": (self.N, self.K), "grad_bias": (self.N,)}
        return {name: Buffer(self.dtype, shapes[name]) for name in names}

    def forward(self, variant: int = 0) -> np.ndarray:
        y, z = (Buffer(self.dtype, (self.M, self.N)) for _ in range(2))
        run(self.backend, variant, self.forward_arguments(self.x_memory, y, z if self.reads_z else None))
        if self.reads_z:
            self.assert_z(z.float64())
        return y.float64()

    def backward(self, variant: int = 0, wanted=EVERYTHING) -> dict[str, np.ndarray]:
        outputs = self.gradients(*wanted)
        run(self.backend, variant, self.backward_arguments(**outputs))
        return {name: output.float64() for name, output in outputs.items()}

    def check(self, variant: int = 0) -> None:
        self.assert_forward(self.forward(variant))
        self.assert_backward(self.backward(variant))

    # The bounds are the textbook's: a sum of n terms in float32 is off by at most n roundings of Σ |term|.

    def expected_z(self) -> tuple[np.ndarray, np.ndarray]:
        """z and how far off it may be."""
        bias = self.bias.float64() if self.bias else np.zeros(self.N)
        size = np.abs(self.x) @ np.abs(self.weight).T + np.abs(bias)
        return self.x @ self.weight.T + bias, (self.K + 4) * ROUNDING["float32"] * size

    def assert_z(self, z: np.ndarray) -> None:
        self.assert_close(z, *self.expected_z())

    def assert_forward(self, y: np.ndarray) -> None:
        z, error = self.expected_z()
        if self.activation not in ("identity", "relu"):  # y is g of z as it is stored
            error = 1.76 * (error + ROUNDING[self.dtype] * np.abs(z)) + 16 * ROUNDING["float32"]
        self.assert_close(y, self.g(z), error)  # 1.76: the steepest slope, selu's

    def assert_backward(self, gradients: dict[str, np.ndarray]) -> None:
        grad_y, slope = self.grad_y.float64(), self.g.slope(self.saved.float64())
        x = ACTIVATIONS[self.x_activation](self.x)
        dz = grad_y * slope
        computed = 16 * ROUNDING["float32"] * np.abs(grad_y)
        stored = computed + ROUNDING[self.dtype] * np.abs(dz) + UNDERFLOW[self.dtype]
        x_error = 0 if self.x_activation == "identity" else ROUNDING[self.dtype] + 16 * ROUNDING["float32"]
        products = {"grad_x": (dz, stored, self.weight), "grad_weight": (dz.T, stored.T, x)}
        for name in gradients.keys() & products.keys():
            left, left_error, right = products[name]
            terms = left.shape[1]
            roundings = (terms + 4) * ROUNDING["float32"] * np.abs(left)
            right_error = x_error * np.abs(left) @ np.abs(right) if name == "grad_weight" else 0
            error = (left_error + roundings) @ np.abs(right) + right_error
            self.assert_close(gradients[name], left @ right, error)
        if "grad_bias" in gradients:
            roundings = 48 * ROUNDING["float32"] * np.abs(dz)
            error = (
                stored if "cuda" in self.backend.name else computed
            ) + roundings  # CUDA's is of dz as stored
            self.assert_close(gradients["grad_bias"], dz.sum(0), error.sum(0))

    def assert_close(self, actual: np.ndarray, expected: np.ndarray, error: np.ndarray) -> None:
        rounding = (ROUNDING[self.dtype] + 8 * ROUNDING["float32"]) * np.abs(expected)
        excess = np.abs(actual - expected) - 1.01 * (error + rounding) - UNDERFLOW[self.dtype]
        assert (excess <= 0).all()  # NaN, which is what an element not written holds, is not


# ---- the specification


@every_layer
def test_forward_is_right(backend, dtype, activation, shape):
    layer = Layer(backend, dtype, activation, shape)
    layer.assert_forward(layer.forward())


@every_layer
def test_backward_is_right(backend, dtype, activation, shape):
    layer = Layer(backend, dtype, activation, shape)
    layer.assert_backward(layer.backward())


@cases(
    ["backend", "dtype", "activation", "shape"],
    [
        (*kernel, *case)
        for kernel in [*KERNELS, *OF_THE_LIBRARY]
        for case in itertools.product(["silu", "tanh"], SHAPES)
    ],
    lambda backend, dtype, *case: (
        backend in (*QUICK, "cuda library")
        and case
        in [("silu", (65, 67, 33)), ("tanh", (3, 5, 7)), ("tanh", (300, 40, 600))][: 3 - ("cuda" in backend)]
    ),
    ids=str,
)
def test_a_layer_may_be_given_its_x_as_what_it_is_the_activation_of(backend, dtype, activation, shape):
    layer = Layer(backend, dtype, "relu", shape)
    layer.x_activation = activation
    layer.assert_backward(layer.backward())


sizes = st.one_of(st.integers(0, 20), st.sampled_from([63, 64, 65, 129]))


@every_sweep
@cases(
    ["backend", "dtype"],
    [*KERNELS, *OF_THE_LIBRARY],
    lambda backend, dtype: backend in QUICK or (backend, dtype) == OF_THE_LIBRARY[1],
)
@settings(max_examples=25, deadline=None, database=None)
@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    shape=st.tuples(sizes, sizes, sizes),
    gaps=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_stride_is_right(backend, dtype, sweep, activation, shape, gaps, bias, seed):
    layer = Layer(backend, dtype, activation, shape, shape[2] + gaps[0], shape[2] + gaps[1], bias, seed)
    layer.check(variant=seed)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(OLDEST) is None, reason=f"needs {OLDEST}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [f"{name} {OLDEST}" for name in INSTRUCTION_SETS if name not in LACKING])
def test_compilers_and_what_they_optimise_change_no_bit(builds, build, dtype):
    name = build.split()[0]
    libraries = [loaded(builds[each], name) for each in (name, build)]
    shapes = [(65, 67, 33), (300, 40, 600), (3, 5, 7)]
    for activation, shape in [("relu", shapes[1]), *itertools.product(ACTIVATIONS, shapes[::2])]:
        layers = [Layer(library, dtype, activation, shape) for library in libraries]
        ours, theirs = ({"y": layer.forward(), **layer.backward()} for layer in layers)
        for result in ours:
            assert np.array_equal(ours[result], theirs[result]), (activation, shape, result)


@every_kernel
def test_one_row_of_x_can_stand_for_all(backend, dtype):
    Layer(backend, dtype, "tanh", (70, 5, 9), ldx=0).check()


@every_kernel
def test_bias_can_be_missing(backend, dtype):
    layer = Layer(backend, dtype, "relu", (5, 4, 3), bias=False)
    layer.assert_forward(layer.forward())


WANTED = [some for count in range(4) for some in itertools.combinations(EVERYTHING, count)]


@cases(
    ["backend", "activation", "wanted"],
    itertools.product(BACKENDS, ["identity", "relu"], WANTED),
    lambda backend, activation, wanted: backend in (BEST, "cuda") and activation == "relu",
    ids=str,
)
def test_each_gradient_can_be_had_alone_from_the_inputs_it_needs(backend, wanted, activation):
    layer = Layer(backend, "float32", activation, (300, 5, 9))
    everything, some = layer.backward(), layer.backward(wanted=wanted)
    assert all((some[name] == everything[name]).all() for name in wanted)


@every_variant
@every_backend()
def test_neither_the_number_of_threads_nor_their_order_changes_a_bit(backend, variant):
    layer = Layer(backend, "float32", "silu", (260, 66, 20))
    layer.x_activation = "silu"
    assert (layer.forward() == layer.forward(variant)).all()
    gradients, again = layer.backward(), layer.backward(variant)
    assert all((gradients[name] == again[name]).all() for name in gradients)


def least_work(backend: ctypes.CDLL, threads: int, barriers: int) -> float:
    """The multiply-adds from which on so many threads are worth waking."""
    backend.pays.argtypes = [ctypes.c_int, ctypes.c_double, ctypes.c_int64]
    low, high = 1.0, 1e12
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if backend.pays(threads, middle, barriers) else (middle, high)
    return high


@pytest.mark.parametrize("backend", [BEST], indirect=True)
def test_more_threads_and_more_barriers_ask_for_more_work(backend):
    counts = (4, 16, 64)  # two save less than four, and so ask for no less
    least = np.array([[least_work(backend, n, barriers) for n in counts] for barriers in (0, 2, 6)])
    barriers = np.diff(least, axis=0)
    assert (barriers > 0).all()
    assert (np.diff(least, axis=1) > 0).all()
    assert (np.diff(barriers, axis=1) > 0).all()
    policy, classifier = 2 * 4864, 2 * 397000  # 8-64-64-4 and 784-500-10 at batch 1
    assert policy < least.min()
    assert least_work(backend, 2, 1) < classifier < least_work(backend, 64, 1)


def test_the_parts_of_a_sum_are_added_in_their_order_and_counted_anew_in_every_run(builds):
    library = loaded(builds["cuda"], "cuda")
    layer = Layer(library, "float32", "relu", (40, 50, 700))
    layer.assert_forward(first := layer.forward())
    for variant in range(1, 7):
        y = Buffer("float32", (40, 50))
        # As a graph does, with the same arguments.
        library.run_each_launch(3, ctypes.c_void_p(y.pointer), ctypes.c_int64(4 * y.size))
        run(library, variant, layer.forward_arguments(layer.x_memory, y))
        assert (y.float64() == first).all()
    library.run_each_launch(1, None, ctypes.c_int64(0))


QUICK_NETWORKS = [(NETWORKS[1], "relu"), (NETWORKS[3], "mixed"), (NETWORKS[2], "mixed")]


@cases(
    ["backend", "dtype", "network", "kind"],
    [
        (*kernel, *case)
        for kernel in [*KERNELS, *OF_THE_LIBRARY]
        for case in itertools.product(NETWORKS, NETWORK_ACTIVATIONS)
    ],
    lambda backend, dtype, *case: (
        backend in (*QUICK, "cuda library")
        and case in QUICK_NETWORKS
        and ("cuda" not in backend or dtype == ("float32" if case == QUICK_NETWORKS[2] else "bfloat16"))
    ),
    ids=str,
)
def test_a_network_gives_the_bits_of_its_layers(backend, dtype, network, kind):
    check_network(backend, dtype, *network, NETWORK_ACTIVATIONS[kind])


def check_network(backend, dtype, batch, sizes, activations, reduced=False):
    shapes = [(batch, n, k) for k, n in itertools.pairwise(sizes)]
    chosen = activations[-len(shapes) :]
    layers = [Layer(backend, dtype, g, shape, seed=shape[1]) for g, shape in zip(chosen, shapes, strict=True)]
    x = layers[0].x_memory
    for layer in layers:
        layer.x_memory, layer.reduced = x, reduced
        run(backend, 0, layer.forward_arguments(x, layer.y, layer.z if layer.reads_z else None))
        x = layer.y
    ends = [
        (layers[0].x_memory, None),
        *[(None, None)] * (len(layers) - 2),
        (None, Buffer(dtype, layers[-1].y.shape)),
    ]
    zs = [Buffer(dtype, layer.z.shape) if layer.reads_z else None for layer in layers]
    together = zip(layers, ends, zs, strict=True)
    run(backend, 3, *(layer.forward_arguments(*end, z) for layer, end, z in together))
    assert (ends[-1][1].float64() == layers[-1].y.float64()).all()
    assert all((z.float64() == layer.z.float64()).all() for layer, z in zip(layers, zs, strict=True) if z)

    for below, layer in itertools.pairwise(layers):
        if below.reads_z:
            layer.x_memory, layer.x_activation = below.z, below.activation
    layers.reverse()
    alone = [layer.gradients(*EVERYTHING) for layer in layers]
    together = [layer.gradients(*EVERYTHING) for layer in layers]
    arguments = []
    for i, layer in enumerate(layers):
        if i > 0:
            layer.grad_y = alone[i - 1]["grad_x"]
        run(backend, 0, layer.backward_arguments(**alone[i]))
        arguments.append(layer.backward_arguments(**together[i]))
        if i > 0:
            arguments[-1].grad_y = arguments[-2].grad_x = None
    run(backend, 3, *arguments)
    for name, index in [("grad_x", -1), *itertools.product(EVERYTHING[1:], range(len(layers)))]:
        assert (together[index][name].float64() == alone[index][name].float64()).all()


@pytest.mark.parametrize("batch", [70, 1100])  # by layers, and by rows
@every_variant
@every_backend(INSTRUCTION_SETS)
def test_networks_together_give_the_bits_of_each_alone(backend, variant, batch):
    networks = [
        [Layer(backend, "float32", "silu", (batch, 33, 20), seed=2 * n),
         Layer(backend, "float32", "relu", (batch, 5, 33), seed=2 * n + 1)]
        for n in range(5)
    ]  # fmt: skip

    def forward():
        ys = [Buffer("float32", (batch, 5)) for _ in networks]
        return ys, [
            layer
            for y, (first, last) in zip(ys, networks, strict=True)
            for layer in (first.forward_arguments(first.x_memory, None), last.forward_arguments(None, y))
        ]

    def backward():
        outputs, layers = [], []
        for first, last in networks:
            own = last.gradients("grad_weight", "grad_bias"), first.gradients(*EVERYTHING)
            arguments = last.backward_arguments(**own[0]), first.backward_arguments(**own[1])
            arguments[0].weight, arguments[1].grad_y = last.weight_memory.pointer, None
            outputs += [gradient for each in own for gradient in each.values()]
            layers += arguments
        return outputs, layers

    for direction in (forward, backward):
        outputs, layers = direction()
        for n in range(len(networks)):
            run(backend, 0, *layers[2 * n : 2 * n + 2])
        alone = [output.float64() for output in outputs]
        outputs, layers = direction()
        run(backend, variant, *layers, networks=len(networks))
        assert all((output.float64() == right).all() for output, right in zip(outputs, alone, strict=True))


@every_backend()
def test_float32_is_multiplied_in_less_precision_where_that_is_allowed_and_faster(backend):
    layer = Layer(backend, "float32", "relu", (40, 50, 61))
    exact = {"y": layer.forward(), **layer.backward()}
    layer.reduced = True
    reduced = {"y": layer.forward(), **layer.backward()}
    rounding = {"avx512bf16": ROUNDING["bfloat16"], "cuda": 2.0**-11}.get(backend.name)
    for name in ("y", "grad_x", "grad_weight"):
        difference = np.abs(reduced[name] - exact[name]).max() / np.abs(exact[name]).max()
        assert (2 * ROUNDING["float32"] < difference < 2 * rounding) if rounding else difference == 0
    assert (reduced["grad_bias"] == exact["grad_bias"]).all()


@every_backend(slow={"cuda"})
def test_bias_gradient_of_a_large_batch_is_as_accurate_as_a_blocked_sum(backend):
    layer = Layer(backend, "float32", "identity", (65536, 1, 0))
    layer.grad_y = Buffer("float32", (65536, 1), np.full(65536, 0.1))
    gradient, expected = layer.backward()["grad_bias"], layer.grad_y.float64().sum(0)
    assert abs(gradient - expected) <= 8 * ROUNDING["float32"] * expected


def sweep() -> np.ndarray:
    """The whole range of float32: every exponent, what is near 0, and on both sides of every bound."""
    every_exponent = np.arange(0, 0x7F800000, 0x7F800000 // 10000, dtype=np.uint32).view(np.float32)
    bounds = np.array([0, 1e-45, np.inf, 3, 6, 0.5, 0.625, 1.25, 2, 20, 88.7, 105], np.float32)
    beside = [np.nextafter(bounds, np.float32(to)) for to in (0, np.inf)]
    z = np.concatenate([every_exponent, np.linspace(0, 20, 10000, dtype=np.float32), bounds, *beside])
    return np.concatenate([np.float32([np.nan]), z, -z])


@cases(
    ["backend", "activation"],
    itertools.product(BACKENDS, ACTIVATIONS),
    lambda backend, activation: (  # where they are the same lines, one that reads y and one that reads z
        backend == BEST or (backend in QUICK and activation in ("tanh", "gelu"))
    ),
)
def test_an_activation_is_as_exact_as_torch_and_the_same_where_it_is_not_finite(backend, activation):
    """Both errors, of g and of g', in units in the last place of the float64 result, from range to range."""
    z = sweep()
    layer = Layer(backend, "float32", activation, (len(z), 1, 1))
    layer.x_memory, layer.bias = Buffer("float32", z.shape, z), None
    layer.z = Buffer("float32", layer.z.shape, z)
    layer.weight_memory.elements[:] = layer.grad_y.elements[:] = 1
    run(backend, 0, layer.forward_arguments(layer.x_memory, layer.y))
    ours = layer.y.float64()[:, 0], layer.backward(wanted=("grad_x",))["grad_x"][:, 0]
    with np.errstate(all="ignore"):
        stock = both(layer.g.torch, torch.from_numpy(z))
        exact = both(layer.g.exact or layer.g.torch, torch.from_numpy(z).double())
        for own, torchs, value in zip(ours, stock, exact, strict=True):
            single = value.astype(np.float32).astype(np.float64)
            near_root = (z > -2) & (z < -0.5)  # of g', where what matters is the error beside 1
            unit = np.spacing(np.maximum(np.abs(single), near_root / 16).astype(np.float32)).astype(
                np.float64
            )
            finite = np.isfinite(z) & np.isfinite(single)
            for low, high in itertools.pairwise([-np.inf, -20, -6, -1, 1, 6, 20, np.inf]):
                some = finite & (z >= low) & (z < high)
                error, allowed = (np.nanmax(np.abs(y - value)[some] / unit[some]) for y in (own, torchs))
                assert not np.isnan(own[some & ~np.isnan(torchs)]).any()
                assert error <= FACTOR.get(backend.name, 1.5) * max(allowed, 1)
            for i in np.flatnonzero(~finite):  # the limit will do where torch has NaN for it
                limit = own[z == np.nextafter(z[i], np.float32(0))] if np.isnan(torchs[i]) else torchs[i]
                assert np.isnan([own[i], torchs[i]]).all() or own[i] in (single[i], limit)


# The portable kernels have no fused multiply-add on x86, nor has the emulator.
FACTOR = {"portable": 2, "cuda": 2}


def both(g: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    z.requires_grad_()
    y = g(z)
    return tuple(t.detach().double().numpy() for t in (y, torch.autograd.grad(y.sum(), z)[0]))


# ---- cross-entropy


class CrossEntropy(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("reduction", ctypes.c_int)]
    _fields_ += [("N", ctypes.c_int64), ("C", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("input", "target", "weight")]
    _fields_ += [("ignore_index", ctypes.c_int64), ("label_smoothing", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("loss", "grad")]


REDUCTIONS = ["none", "mean", "sum"]


class Loss:
    """A loss with logits and targets drawn by a seed, its call to the backend, and the float64 results."""

    def __init__(self, dtype, reduction, N, C, weighted=False, ignore_index=-100, smoothing=0.0, seed=0):
        random = np.random.default_rng(seed)
        self.dtype, self.reduction, self.N, self.C = dtype, reduction, N, C
        self.ignore_index, self.smoothing = ignore_index, smoothing
        self.input = Buffer(dtype, (N, C), 3 * random.standard_normal((N, C)))
        self.target = random.integers(0, C, N)
        self.weight = Buffer("float32", (C,), random.random(C)) if weighted else None

    def run(self, backend: ctypes.CDLL, variant: int = 0, wants_grad=True, wrong=-1) -> list[np.ndarray]:
        loss = Buffer(self.dtype, (self.N,) if self.reduction == "none" else (1,))
        grad = Buffer("float32", (self.N, self.C)) if wants_grad else None
        call = CrossEntropy(
            dtype=DTYPES.index(self.dtype),
            reduction=REDUCTIONS.index(self.reduction),
            N=self.N,
            C=self.C,
            input=self.input.pointer,
            target=self.target.ctypes.data,
            weight=self.weight.pointer if self.weight else None,
            ignore_index=self.ignore_index,
            label_smoothing=self.smoothing,
            loss=loss.pointer,
            grad=grad.pointer if wants_grad else None,
        )
        workspace = Buffer("float32", (backend.cross_entropy_workspace(ctypes.byref(call)) // 4,))
        result = backend.cross_entropy(ctypes.byref(call), ctypes.c_void_p(workspace.pointer), variant)
        assert result == wrong, complaint(backend)
        workspace.check_bands()
        return [buffer.float64() for buffer in (loss, grad) if buffer is not None]

    def check(self, backend: ctypes.CDLL, variant: int = 0) -> None:
        z, counts = self.input.float64(), self.target != self.ignore_index
        weight = self.weight.float64() if self.weight else np.ones(self.C)
        chosen = np.arange(self.C) == self.target[:, None]
        q = weight * ((1 - self.smoothing) * chosen + self.smoothing / self.C) * counts[:, None]
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        losses, grad = -(q * log_p).sum(1), np.exp(log_p) * q.sum(1, keepdims=True) - q
        expected = losses if self.reduction == "none" else losses.sum(keepdims=True)
        size = (q * (np.abs(log_p) + np.abs(z).max(1, initial=0, keepdims=True))).sum(1)
        size = size if self.reduction == "none" else size.sum(keepdims=True)
        total = 1.0
        if self.reduction == "mean":
            total = (weight[self.target] * counts).sum()
        actual, actual_grad = self.run(backend, variant)
        relative = (32 + 2 * np.sqrt(self.C)) * ROUNDING["float32"]
        with np.errstate(invalid="ignore", divide="ignore"):
            error = (relative * size + ROUNDING[self.dtype] * expected) / total
            grad_error = (4 * relative * np.abs(q).sum(1, keepdims=True) + 1e-9) / total
            assert (np.abs(actual - expected / total) < error + 1e-6).all()
            assert (np.abs(actual_grad - grad / total) < grad_error).all()


@every_sweep
@every_kernel
@settings(max_examples=40, deadline=None, database=None)
@given(
    reduction=st.sampled_from(REDUCTIONS),
    rows=st.one_of(st.integers(1, 20), st.just(130)),
    count=st.one_of(st.integers(2, 40), st.sampled_from([64, 1000, 1500])),
    weighted=st.booleans(),
    ignore_index=st.sampled_from([-100, 1]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_cross_entropy_is_right(
    backend, dtype, sweep, reduction, rows, count, weighted, ignore_index, smoothing, seed
):
    loss = Loss(dtype, reduction, rows, count, weighted, ignore_index, smoothing, seed)
    if reduction == "mean":
        loss.target[0] = 0  # a row that counts
    loss.check(backend, variant=seed)


@cases(["reduction"], [(each,) for each in REDUCTIONS], lambda reduction: reduction == "mean")
@every_backend()
def test_cross_entropy_of_more_rows_than_blocks_is_right(backend, reduction):
    Loss("float32", reduction, 5000, 3, weighted=True, ignore_index=1).check(backend, variant=3)


@every_kernel
def test_cross_entropy_without_its_gradient_is_the_same(backend, dtype):
    loss = Loss(dtype, "mean", 40, 50)
    assert loss.run(backend)[0] == loss.run(backend, wants_grad=False)[0]


@every_variant
@cases(["reduction"], [(each,) for each in REDUCTIONS], lambda reduction: reduction == "mean")
@every_backend()
def test_neither_threads_nor_their_order_change_a_bit_of_cross_entropy(backend, reduction, variant):
    loss = Loss("float32", reduction, 1100, 10, weighted=True)
    for one, other in zip(loss.run(backend), loss.run(backend, variant), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("rows", [0, 3])
@every_backend()
def test_the_mean_over_no_row_is_nan_and_has_no_gradient(backend, rows):
    loss = Loss("float32", "mean", rows, 4, ignore_index=2)
    loss.target[:] = 2
    value, grad = loss.run(backend)
    assert np.isnan(value)
    assert not grad.any()


@pytest.mark.parametrize(("rows", "at", "label"), [(5, 3, -1), (5, 3, 2**40), (3000, 2000, 4)])
@every_backend(INSTRUCTION_SETS)  # on CUDA an assertion fails
def test_a_label_out_of_bounds_is_found_and_nothing_is_written(backend, rows, at, label):
    loss = Loss("float32", "mean", rows, 4)
    loss.target[[at, rows - 1]] = label
    value, grad = loss.run(backend, variant=2, wrong=at)
    assert np.isnan(value).all()
    assert np.isnan(grad).all()


# ---- one step of an optimizer

MOMENTUM = {"states": 1, "momentum": 0.75}
ADAM = {"kind": 1, "states": 2, "momentum": 0.75, "undamped": 0.25, "momentum_square": 0.875}
ADAM |= {"undamped_square": 0.125, "eps": 0.01, "kept": 1, "inverse_root": 2.5}
STEPS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.25},
    "maximize": {"maximize": True, "weight_decay": 0.25},
    "first momentum": {**MOMENTUM, "undamped": 0.5, "first": True},
    "momentum": {**MOMENTUM, "undamped": 1},
    "dampening": {**MOMENTUM, "undamped": 0.5, "weight_decay": 0.25},
    "nesterov": {**MOMENTUM, "undamped": 1, "weight_decay": 0.25, "nesterov": True},
    "first nesterov": {**MOMENTUM, "undamped": 1, "nesterov": True, "first": True},
    "adam": ADAM,
    "adam of little past": {**ADAM, "momentum": 0.25, "undamped": 0.75, "weight_decay": 0.25},
    "amsgrad": {**ADAM, "states": 3, "kept": 0.75, "maximize": True},
}


class Step:
    """A step of tensors of some sizes, drawn by a seed; guard bands of other lengths move their alignment."""

    def __init__(
        self,
        dtype: str,
        sizes: list[int],
        seed: int = 0,
        guard: int = 64,
        in_memory: bool = False,
        **options: float,
    ):
        self.dtype, self.options = dtype, {"kind": 0, "states": 0, "rate": 0.5, **options}
        self.in_memory = in_memory
        random = np.random.default_rng(seed)

        def draw(is_square: bool = False) -> list[Buffer]:
            values = [random.standard_normal(size) for size in sizes]
            return [Buffer(dtype, v.shape, np.square(v) if is_square else v, guard) for v in values]

        self.params, self.grads = draw(), draw()
        self.states = [draw(is_square=kind > 0) for kind in range(self.options["states"])]
        if options.get("first"):  # not read: as it is when it has just been allocated
            self.states = [[Buffer(dtype, (size,), None, guard) for size in sizes]]

    def written(self) -> list[list[Buffer]]:
        """The parameters, and each kind of state."""
        return [self.params, *self.states]

    def run(self, backend: ctypes.CDLL, variant: int = 0) -> None:
        of_tensor = {name: self.options[name] for name in ("rate", "inverse_root") if name in self.options}
        rest = {name: value for name, value in self.options.items() if name not in of_tensor}
        optimizer = Optimizer(dtype=DTYPES.index(self.dtype), **rest)
        updates = (Update * len(self.params))()
        for index, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            updates[index] = Update(param.pointer, grad.pointer, size=param.size, **of_tensor)
            for kind, tensors in enumerate(self.states):
                updates[index].states[kind] = tensors[index].pointer
        if self.in_memory:  # each has its own there, and what is told of it here is no longer right
            numbers = (Numbers * len(self.params))(*[Numbers(optimizer, **of_tensor)] * len(self.params))
            for update, own in zip(updates, numbers, strict=True):
                at = ctypes.c_void_p.from_buffer(update, Update.rate.offset)
                at.value = ctypes.addressof(own)
            told = {name: self.options[name] for name in ("kind", "states")}
            optimizer = Optimizer(dtype=optimizer.dtype, in_memory=True, momentum=9, **told)
        error = backend.optimize(
            ctypes.byref(optimizer), updates, ctypes.c_int64(len(updates)), ctypes.c_uint(variant)
        )
        assert error == 0, f"error {error}"

    def check(self, backend: ctypes.CDLL, variant: int = 0) -> None:
        before = [[t.float64() for t in tensors] for tensors in (self.params, self.grads, *self.states)]
        self.run(backend, variant)
        for tensors, *values in zip(zip(*self.written(), strict=True), *before, strict=True):
            for tensor, (expected, size) in zip(tensors, self.expected(*values), strict=True):
                error = 8 * ROUNDING["float32"] * size + ROUNDING[self.dtype] * np.abs(expected)
                assert (np.abs(tensor.float64() - expected) <= 1.01 * error + UNDERFLOW[self.dtype]).all()

    def expected(self, w: np.ndarray, g: np.ndarray, *states: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """The parameter and its state after the step, each with the sum of the sizes of its terms."""
        o = {"momentum": 0, "undamped": 0, "weight_decay": 0} | self.options
        g = (-g if o.get("maximize") else g) + o["weight_decay"] * w
        size = np.abs(g) + 2 * o["weight_decay"] * np.abs(w)
        if o["kind"] == 1:
            m = o["momentum"] * states[0] + o["undamped"] * g
            v = o["momentum_square"] * states[1] + o["undamped_square"] * g * g
            m_size, v_size = np.abs(states[0]) + size, v + o["undamped_square"] * size * size
            u = np.maximum(v, states[2]) if len(states) > 2 else v
            root = np.sqrt(u) * o["inverse_root"] + o["eps"]
            # An error of v is one of its root, which divides; no smaller than eps, so the step is that sure.
            change = o["rate"] * (m_size / root + np.abs(m) / root * (1 + v_size / np.maximum(u, 1e-30)))
            after = o["kept"] * w - o["rate"] * m / root
            return [(after, np.abs(w) + change), (m, m_size), (v, v_size), (u, v_size + u)][: 1 + len(states)]
        m, m_size = g, size
        if states:
            if not o.get("first"):
                m_size = np.abs(o["momentum"] * states[0]) + size
                m = o["momentum"] * states[0] + o["undamped"] * g
            g = g + o["momentum"] * m if o.get("nesterov") else m
            size = size + m_size
        after = (w - o["rate"] * g, np.abs(w) + o["rate"] * size)
        return [after, (m, m_size)][: 1 + len(states)]


@cases(
    ["backend", "dtype", "name"],
    [(*kernel, name) for kernel in KERNELS for name in STEPS],
    lambda backend, dtype, name: (
        backend in QUICK
        and (name in ("nesterov", "amsgrad") or (dtype == "float32" and backend in (BEST, "cuda")))
    ),
)
def test_a_step_of_an_optimizer_is_right(backend, dtype, name):
    Step(dtype, [500, 0, 1, 9000, 67], **STEPS[name]).check(backend)


@cases(
    ["backend", "dtype", "name"],
    [("cuda", dtype, name) for dtype in DTYPES for name in STEPS],
    lambda _, dtype, name: dtype == "float32" and name in ("nesterov", "amsgrad"),
)
def test_a_step_whose_numbers_are_in_memory_is_right(backend, dtype, name):
    Step(dtype, [500, 0, 1, 9000, 67], in_memory=True, **STEPS[name]).check(backend)


@every_sweep
@every_kernel
@settings(max_examples=25, deadline=None, database=None)
@given(
    options=st.sampled_from(list(STEPS.values())),
    sizes=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([1024, 4097])), max_size=6),
    guard=st.integers(57, 64),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_step_of_any_sizes_and_alignment_is_right(backend, dtype, sweep, options, sizes, guard, seed):
    Step(dtype, sizes, seed, guard, **options).check(backend, variant=seed)


@every_backend()
def test_a_step_of_more_tensors_than_a_launch_takes_is_right(backend):
    Step("float32", [*range(60), *[0] * 70, *range(60)], **STEPS["amsgrad"]).check(backend)


@every_variant
@every_kernel
def test_neither_the_number_of_threads_nor_their_order_changes_a_bit_of_a_step(backend, dtype, variant):
    steps = [Step(dtype, [100, 7, 3000], **STEPS["nesterov"]) for _ in range(2)]
    steps[0].run(backend)
    steps[1].run(backend, variant)
    for ones, others in zip(*(step.written() for step in steps), strict=True):
        for one, other in zip(ones, others, strict=True):
            assert (one.elements == other.elements).all()


@every_backend()
def test_without_weight_decay_an_infinite_parameter_stays_infinite(backend):
    step = Step("float32", [20])
    step.params[0].elements[:] = np.inf
    step.run(backend)
    assert (step.params[0].float64() == np.inf).all()


# ---- gradients made no longer than a norm


class Clipped:
    """Gradients of some sizes, drawn by a seed; guard bands of other lengths move their alignment."""

    def __init__(self, dtype: str, sizes: list[int], seed: int = 0, guard: int = 64, scale: float = 1):
        self.dtype, self.norm = dtype, Buffer(dtype, ())
        random = np.random.default_rng(seed)
        values = [scale * random.standard_normal(size) for size in sizes]
        self.grads = [Buffer(dtype, value.shape, value, guard) for value in values]

    def values(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(grad.float64() for grad in self.grads)])

    def run(self, backend: ctypes.CDLL, max_norm: float, variant: int = 0, only_finite: bool = False) -> None:
        clip = Clip(DTYPES.index(self.dtype), max_norm, only_finite, self.norm.pointer)
        gradients = (Gradient * len(self.grads))(*((grad.pointer, grad.size) for grad in self.grads))
        arguments = ctypes.byref(clip), gradients, ctypes.c_int64(len(gradients))
        workspace = Buffer("float32", (backend.clip_workspace(*arguments) // 4,))
        error = backend.clip(*arguments, ctypes.c_void_p(workspace.pointer), ctypes.c_uint(variant))
        assert error == 0, f"error {error}: {complaint(backend)}"
        workspace.check_bands()

    def check(self, backend: ctypes.CDLL, max_norm: float, variant: int = 0) -> None:
        before = self.values()
        norm = np.linalg.norm(before)
        self.run(backend, max_norm, variant)
        expected = min(1, max_norm / (norm + 1e-6)) * before
        for actual, right in ((self.norm.float64(), norm), (self.values(), expected)):
            error = (ROUNDING[self.dtype] + 2 * ROUNDING["float32"]) * np.abs(right)
            assert (np.abs(actual - right) <= 1.01 * error + UNDERFLOW[self.dtype]).all()


@cases(["max_norm"], [(0.5,), (1e6,)], lambda max_norm: max_norm < 1)
@every_kernel
def test_gradients_are_clipped_by_the_norm_of_all(backend, dtype, max_norm):
    Clipped(dtype, [500, 0, 1, 9000, 67]).check(backend, max_norm)


@every_sweep
@every_kernel
@settings(max_examples=25, deadline=None, database=None)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([1024, 4097])), max_size=6),
    guard=st.integers(57, 64),
    max_norm=st.one_of(st.just(0.0), st.floats(1e-3, 100)),  # whose factor is not subnormal
    seed=st.integers(0, 2**32 - 1),
)
def test_gradients_of_any_sizes_and_alignment_are_clipped(
    backend, dtype, sweep, sizes, guard, max_norm, seed
):
    Clipped(dtype, sizes, seed, guard).check(backend, max_norm, variant=seed)


@pytest.mark.parametrize("scale", [1e-30, 1e-44, 1e30])
@every_backend()
def test_no_square_of_a_gradient_overflows_or_vanishes(backend, scale):
    Clipped("float32", [1000, 70], scale=scale).check(backend, scale)


@every_backend()
def test_more_gradients_than_a_launch_takes_are_clipped_together(backend):
    Clipped("float32", [*range(160), *[0] * 170, *range(160)]).check(backend, 1)


@every_variant
@every_kernel
def test_neither_the_number_of_threads_nor_their_order_changes_a_bit_of_a_norm(backend, dtype, variant):
    runs = [Clipped(dtype, [100, 7, 30000]) for _ in range(2)]
    runs[0].run(backend, 1)
    runs[1].run(backend, 1, variant)
    for one, other in zip([*runs[0].grads, runs[0].norm], [*runs[1].grads, runs[1].norm], strict=True):
        assert (one.elements == other.elements).all()


@pytest.mark.parametrize(("value", "only_finite"), [(np.inf, False), (np.nan, True), (3e38, True)])
@every_backend()
def test_a_norm_that_is_not_finite_changes_gradients_only_where_it_may(backend, value, only_finite):
    clipped = Clipped("float32", [20, 3000])
    clipped.grads[0].elements[:2] = value  # 3e38 twice is more than float32 holds
    before = clipped.values()
    clipped.run(backend, 1, only_finite=only_finite)
    assert not np.isfinite(clipped.norm.float64())
    with np.errstate(invalid="ignore"):
        expected = before if only_finite else before / np.linalg.norm(before)
    np.testing.assert_allclose(clipped.values(), expected, rtol=1e-6, atol=1e-45)


# ---- the checks checked


@pytest.mark.slow
@pytest.mark.parametrize("build", [f"{name} sanitized" for name in BACKENDS])
def test_address_sanitizer_finds_nothing(builds, build):
    name = build.split()[0]
    result = subprocess.run([builds[build], name], capture_output=True, text=True)
    if result.returncode == 2:
        pytest.skip(f"this processor has no {name}")
    assert result.returncode == 0, result.stdout + result.stderr


def network(backend, dtype, batch, sizes):
    """The arguments of a forward pass whose hidden layers are the backend's own, and their buffers."""
    layers = [Layer(backend, dtype, "relu", (batch, n, k), seed=n) for k, n in itertools.pairwise(sizes)]
    y = Buffer(dtype, (batch, sizes[-1]))
    ends = [(layers[0].x_memory, None), *[(None, None)] * (len(layers) - 2), (None, y)]
    return [layer.forward_arguments(*end) for layer, end in zip(layers, ends, strict=True)], (layers, y)


def check_product(broken):
    Layer(broken, "bfloat16", "relu", (70, 70, 140)).check()


def check_split(broken):
    layer = Layer(broken, "bfloat16", "relu", (30, 5, 1100))
    layer.assert_forward(layer.forward())


def check_chain(broken):
    arguments, _buffers = network(broken, "bfloat16", 70, (20, 70, 30))
    run(broken, 0, *arguments)


def check_cross_entropy(broken):
    Loss("float32", "mean", 20, 40, smoothing=0.1).check(broken)  # two sums follow one another


CHECKS = {"product.cuh": check_product, "tensor_core.cuh": check_product, "splits.cuh": check_split}


def check_passes(broken):
    broken.use(b"cuda library")
    Layer(broken, "bfloat16", "relu", (70, 70, 140)).check()


CHECKS |= {"chain.cuh": check_chain, "across.cuh": check_cross_entropy, "elementwise.cuh": check_passes}


@pytest.mark.slow
@pytest.mark.parametrize("build", BROKEN)
def test_a_broken_kernel_is_noticed(builds, build):
    broken = loaded(builds[build], "cuda")
    file, *_, said = BROKEN[build]
    with pytest.raises(AssertionError):
        CHECKS[file](broken)
    assert said in complaint(broken)
    assert bool(said) == bool(complaint(broken))


# The kinds of products in kernels.h, and whose they are.
FORWARD, DW, DX, CHAIN_FORWARD, CHAIN_BACKWARD = range(5)
BY_TABLE, OURS, THE_LIBRARYS = range(3)


class Measured(ctypes.Structure):
    _fields_ = [("architecture", ctypes.c_int), ("dtype", ctypes.c_int), ("reduced", ctypes.c_bool)]
    _fields_ += [(name, ctypes.c_int) for name in ("kind", "size", "owner")]


@pytest.fixture
def with_table(builds):
    """The CUDA backend with a table of whose products are whose; the emulator's architecture is 90."""
    library = loaded(builds["cuda"], "cuda")
    library.owner_of.argtypes = [*[ctypes.c_int] * 3, ctypes.c_double]
    rows = [
        Measured(90, DTYPES.index("bfloat16"), False, FORWARD, 30, OURS),
        Measured(90, DTYPES.index("float32"), True, FORWARD, 20, THE_LIBRARYS),
        Measured(90, DTYPES.index("float32"), False, DW, 20, THE_LIBRARYS),
        Measured(80, DTYPES.index("bfloat16"), False, DX, 30, OURS),
    ]
    library.use_table((Measured * len(rows))(*rows), ctypes.c_int64(len(rows)))
    yield library
    library.use(b"cuda")


@pytest.mark.parametrize(
    ("kind", "dtype", "reduced", "operations", "owner"),
    [
        (FORWARD, "bfloat16", False, 2.0**30, OURS),  # from a power of two
        (FORWARD, "bfloat16", True, 2.0**31 - 1, OURS),  # to the next; TF32 is of float32 alone
        (FORWARD, "bfloat16", False, 2.0**31, THE_LIBRARYS),  # what the table does not know
        (FORWARD, "float16", False, 2.0**30, THE_LIBRARYS),
        (DX, "bfloat16", False, 2.0**30, THE_LIBRARYS),  # known of another architecture
        (FORWARD, "float32", True, 2.0**20, THE_LIBRARYS),
        (FORWARD, "float32", False, 2.0**20, OURS),
        (CHAIN_BACKWARD, "float32", False, 0.999e8, OURS),
        (CHAIN_BACKWARD, "float32", False, 1e8, THE_LIBRARYS),
        (DW, "float32", False, 0.0, OURS),
    ],
)
def test_a_table_tells_whose_a_product_is(with_table, kind, dtype, reduced, operations, owner):
    assert with_table.owner_of(kind, DTYPES.index(dtype), reduced, operations) == owner


def test_a_products_owner_computes_it(with_table):
    calls = with_table.calls_of_library
    calls.restype = ctypes.c_int64
    for shape, expected in [((370, 370, 370), 3), ((64, 64, 64), 0)]:
        before = calls()
        Layer(with_table, "float32", "tanh", shape).check()
        assert calls() - before == expected


def test_dz_that_a_kernel_has_formed_is_summed_where_dW_is_the_librarys(with_table):
    check_network(with_table, "float32", 40, (130, 140, 30), NETWORK_ACTIVATIONS["relu"])


@pytest.mark.parametrize(("K", "blocks"), [(256, 2 * 2), (254, 4 * 4)])  # of 128 x 128, or rows are no packs
def test_a_product_takes_the_tiles_with_which_it_is_sooner_through(builds, K, blocks):
    layer = Layer(loaded(builds["cuda"], "cuda"), "bfloat16", "relu", (250, 248, K))
    layer.assert_forward(layer.forward())
    assert layer.backend.launches == [blocks]


@pytest.mark.parametrize(
    ("activation", "forward", "backward"),
    [("identity", 0, 1), ("relu", 1, 1), ("gelu", 1, 1)],
)
def test_around_the_librarys_products_are_no_more_passes_than_torchs(builds, activation, forward, backward):
    library = loaded(builds["cuda library"], "cuda library")
    layer = Layer(library, "bfloat16", activation, (600, 70, 40))
    for call, expected in ((layer.forward, forward), (layer.backward, backward)):
        call()
        assert len(library.launches) == expected


@pytest.mark.parametrize(("sizes", "expected"), [((64,) * 5, 1), ((7, 128, 128, 3), 1), ((64, 129, 8), 2)])
@cases(["dtype"], [(dtype,) for dtype in DTYPES], lambda dtype: dtype == "bfloat16")
def test_the_layers_of_a_narrow_network_are_one_launch(builds, dtype, sizes, expected):
    library = loaded(builds["cuda"], "cuda")
    arguments, _buffers = network(library, dtype, 40, sizes)
    run(library, 0, *arguments)
    assert len(library.launches) == expected


@every_backend(["cuda"])
def test_what_is_infinite_in_a_chain_makes_no_nan_beyond_its_columns(backend):
    arguments, (layers, y) = network(backend, "float32", 5, (3, 1, 4))
    layers[0].x_memory.elements[:3] = np.inf, 0, 0
    layers[0].weight_memory.elements[0] = 1  # of the only unit, which is infinite in the first row then
    run(backend, 0, *arguments)
    assert len(backend.launches) == 1
    assert not np.isnan(y.float64()).any()


# ---- what a launch needs of its GPU

# Of the emulator, by number; the first is the one that all other tests have.
GPUS = ["sm_90", "sm_80", "sm_86", "sm_120", "sm_90, of code for sm_80", "sm_90, of CUDA 12.2"]
GPUS += ["sm_86, of kernels with shared variables"]
WITHOUT_CODE = len(GPUS)
NO_KERNEL_IMAGE = 209


@pytest.fixture
def on_gpu(builds):
    """Makes one of the emulator's GPUs the current one and returns the library."""
    library = loaded(builds["cuda"], "cuda")

    def choose(number: int) -> ctypes.CDLL:
        assert library.set_device(number) == 0
        return library

    yield choose
    choose(0)
    library.last_error()


@cases(["dtype"], [(dtype,) for dtype in [*DTYPES, "tf32"]], lambda dtype: dtype == "float32")
def test_every_product_has_the_shared_memory_that_it_needs_on_the_gpu_of_least(on_gpu, dtype):
    def results(library: ctypes.CDLL) -> list[np.ndarray]:
        results = []
        for shape in [(250, 248, 256), (65, 67, 33)]:  # of large tiles and small
            layer = Layer(library, "float32" if dtype == "tf32" else dtype, "tanh", shape)
            layer.reduced = dtype == "tf32"
            results += [layer.forward(), *layer.backward().values()]
        return results

    for other, first in zip(results(on_gpu(len(GPUS) - 1)), results(on_gpu(0)), strict=True):
        assert (other == first).all()


# But for the last: chains have no variables there.
@cases(
    ["gpu", "dtype"], itertools.product(range(len(GPUS[:-1])), DTYPES), lambda _, dtype: dtype == "float32"
)
def test_chains_of_few_and_of_many_layers_follow_one_another_on_every_gpu(on_gpu, gpu, dtype):
    for sizes in [(20, 60, 30), (64,) * 6, (20, 60, 30), (20, 128, 30), (100,) * 5]:
        check_network(on_gpu(gpu), dtype, 40, sizes, NETWORK_ACTIVATIONS["relu"])


def test_a_gpu_that_there_is_no_code_for_is_known_as_one_and_nobody_else_sees_the_error(on_gpu):
    library = on_gpu(1)
    for _ in range(2):  # and once it is known
        assert [bool(library.runs_on(gpu)) for gpu in range(WITHOUT_CODE + 1)] == [True] * len(GPUS) + [False]
    assert library.device() == 1
    assert library.last_error() == 0
    layer = Layer(on_gpu(WITHOUT_CODE), "float32", "relu", (3, 5, 7))
    with pytest.raises(AssertionError, match=f"error {NO_KERNEL_IMAGE}"):  # what a launch there would give
        layer.forward()


KILOBYTE = 1 << 10
COOPERATIVE, EARLY = 2, 6
INVALID_VALUE, INVALID_CONFIGURATION, TOO_LARGE, NOT_SUPPORTED = 1, 9, 720, 801
MOST_SHARED = {"sm_90": 227, "sm_80": 163, "sm_86": 99, "sm_120": 99}
LAUNCHES = [
    ("sm_90", {}, 0),
    ("sm_90", {"blocks": 0}, INVALID_CONFIGURATION),
    ("sm_90", {"threads": 1024}, 0),
    ("sm_90", {"threads": 1025}, INVALID_CONFIGURATION),
    ("sm_90", {"shared": 48 * KILOBYTE}, 0),
    ("sm_90", {"shared": 48 * KILOBYTE + 1}, INVALID_VALUE),
    *((gpu, {"shared": most * KILOBYTE, "asked": most * KILOBYTE}, 0) for gpu, most in MOST_SHARED.items()),
    *((gpu, {"asked": most * KILOBYTE + 1}, -1) for gpu, most in MOST_SHARED.items()),
    ("sm_90", {"parameters": 4097}, INVALID_VALUE),
    ("sm_90", {"attribute": COOPERATIVE, "threads": 1024, "blocks": 16}, 0),  # on 8 multiprocessors
    ("sm_90", {"attribute": COOPERATIVE, "threads": 1024, "blocks": 17}, TOO_LARGE),
    ("sm_86", {"attribute": COOPERATIVE, "threads": 1024, "blocks": 9}, TOO_LARGE),
    ("sm_86", {"attribute": COOPERATIVE, "shared": 49 * KILOBYTE, "asked": 99 * KILOBYTE, "blocks": 16}, 0),
    (
        "sm_86",
        {"attribute": COOPERATIVE, "shared": 50 * KILOBYTE, "asked": 99 * KILOBYTE, "blocks": 9},
        TOO_LARGE,
    ),
    ("sm_90", {"attribute": EARLY}, 0),
    ("sm_80", {"attribute": EARLY}, NOT_SUPPORTED),
    ("sm_90, of CUDA 12.2", {"attribute": EARLY}, NOT_SUPPORTED),
    ("sm_90, of code for sm_80", {"attribute": EARLY}, 719),  # in which no thread waits
    ("sm_90", {"attribute": 4}, INVALID_VALUE),
]


@pytest.mark.parametrize(("gpu", "how", "error"), LAUNCHES, ids=str)
def test_the_emulator_refuses_the_launches_that_a_gpu_does(on_gpu, gpu, how, error):
    library = on_gpu(GPUS.index(gpu))
    how = {"blocks": 1, "threads": 32, "shared": 0, "asked": 0, "parameters": 4096, "attribute": 0} | how
    blocks, threads, shared, asked, parameters, attribute = how.values()
    sizes = ctypes.c_int64(blocks), threads, ctypes.c_int64(shared), ctypes.c_int64(asked)
    assert library.attempt(*sizes, parameters, attribute) == error


class Traffic(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("bytes", "sectors", "requests", "waits")]


@pytest.fixture
def traffic(builds, monkeypatch):
    """Tells what the kernels of a call ask of memory: of shared memory, and of all buffers made meanwhile."""
    ranges: list[tuple[int, int]] = []
    begin = Buffer.__init__

    def traced(buffer: Buffer, *arguments: object, **rest: object) -> None:
        begin(buffer, *arguments, **rest)
        address = buffer.memory.ctypes.data
        ranges.append((address, address + buffer.memory.nbytes))
        pairs = (ctypes.c_size_t * 2 * len(ranges))(*ranges)
        library.count_traffic(pairs, ctypes.c_int64(len(ranges)), None)

    def count(call: Callable[[ctypes.CDLL], object], name: str = "cuda") -> Traffic:
        nonlocal library
        library, result = loaded(builds["cuda"], name), Traffic()
        ranges.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Buffer, "__init__", traced)
            call(library)
        library.count_traffic(None, ctypes.c_int64(0), ctypes.byref(result))
        library.use(b"cuda")
        return result

    library = None
    return count


every_math = pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
PRODUCTS = {"forward": [], "dx": ["grad_x"], "dW": ["grad_weight", "grad_bias"]}
every_product = pytest.mark.parametrize("product", PRODUCTS)


def compute(library, product, dtype, shape, activation="relu"):
    layer = Layer(library, dtype.replace("tf32", "float32"), activation, shape)
    layer.reduced = dtype == "tf32"
    layer.backward(wanted=PRODUCTS[product]) if PRODUCTS[product] else layer.forward()


@every_product
@every_math
@pytest.mark.parametrize("shape", [(64, 64, 256), (250, 248, 256)], ids=str)  # of small tiles and of large
def test_a_warp_uses_the_sectors_that_it_asks_for(traffic, product, dtype, shape):
    counted = traffic(lambda library: compute(library, product, dtype, shape))
    assert counted.bytes >= 0.9 * 32 * counted.sectors > 0


@every_product
@every_math
@cases(["rows"], [(64,), (256,)], lambda rows: rows == 64)  # of small tiles and of large
@pytest.mark.parametrize("odd", [0, 1])  # copies of 16 bytes, and of 4 or an element
def test_no_access_of_a_product_waits_for_a_bank(traffic, product, dtype, rows, odd):
    K = 128 + odd
    shape = {"forward": (rows, rows, K), "dx": (rows, K, rows), "dW": (K, rows, rows)}[product]
    counted = traffic(lambda library: compute(library, product, dtype, shape, "identity"))
    assert counted.requests > counted.waits == 0


@every_math
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_chain_uses_its_sectors_and_waits_for_no_bank(traffic, dtype, width, direction):
    stored, reduced, sizes = dtype.replace("tf32", "float32"), dtype == "tf32", (width,) * 3

    def call(library: ctypes.CDLL) -> None:
        if direction == "backward":
            return check_network(library, stored, 70, sizes, NETWORK_ACTIVATIONS["relu"], reduced)
        arguments, _buffers = network(library, stored, 70, sizes)
        for layer in arguments:
            layer.reduced = reduced
        run(library, 0, *arguments)

    counted = traffic(call)
    assert counted.bytes >= 0.9 * 32 * counted.sectors > 0
    assert counted.requests > counted.waits == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "call",
    [
        lambda library, dtype: compute(library, "forward", dtype, (40, 256, 8)),
        lambda library, dtype: compute(library, "dx", dtype, (40, 256, 8), "silu"),
        lambda library, dtype: compute(library, "dW", dtype, (300, 72, 8)),
        lambda library, dtype: Loss(dtype, "mean", 10, 320).run(library),
        lambda library, dtype: Loss(dtype, "sum", 3, 2048, True, smoothing=0.1).run(library),
        lambda library, dtype: Clipped(dtype, [5000, 3000]).run(library, 0.5),
        lambda library, dtype: Step(dtype, [5000, 3000], **STEPS["amsgrad"]).run(library),
    ],
    ids=["g", "dz", "dz and db", "loss", "loss of many classes", "clip", "update"],
)
def test_a_pass_uses_its_sectors_and_waits_for_no_bank(traffic, call, dtype):
    counted = traffic(lambda library: call(library, dtype), "cuda library")
    assert counted.bytes >= 0.9 * 32 * counted.sectors > 0
    assert counted.waits == 0
