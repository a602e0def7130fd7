"""Training steps of CUDA's in one launch, on the emulator, against torch in float64; how they are shared out.

The emulator runs all blocks of the launch in turn, from barrier to barrier. It fails a launch in which two of
them touch the same memory with no barrier between, and runs them in several orders.
"""

import ctypes
import itertools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_kernels import ACTIVATIONS, CrossEntropy, Numbers, Optimizer, Row

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
]
FLAGS += ["-DFASTMLP_EMULATE", "-DFASTMLP_BARRIER=0"]
LOSSES = ["cross_entropy", "mse", "l1", "smooth_l1", "huber", "bce_with_logits"]
LEARNING_RATE = 0.05

# Edits of step.cuh that leave out what orders blocks or threads, which the emulator must call a race.
TOGETHER, ALONE = "grid.synchronize();", "__syncthreads();"
BROKEN = {
    "a hidden layer reads what is not there yet": (f"if (l > 0) {TOGETHER}", ALONE),
    "the last layer reads what is not there yet": (
        f"load_columns();\n    {TOGETHER}", f"load_columns();\n{ALONE}"
    ),
    "backward does not wait for the last layer": (f"else {TOGETHER}", f"else {ALONE}"),
    "dz of other units is not there yet": ("l > 1) grid.wait();", f"l > 1) {ALONE}"),
    "dz of its own units is not there yet": ("l == 1) __syncthreads();", "l == 1);"),
    "weights change before others have copied their columns": (
        "l > 0) backward(l);", f"l > 0) load_columns(), ({ALONE[:-1]}), backward(l);"
    ),
    "what each block finds is not there yet": ("if (a.repeats) __syncthreads();", "if (a.repeats);"),
    "the first layer has one place": ("l == 0 && step % 2 ?", "false ?"),
    "the last weight has one place": ("(step % 2 * p.N4 + n)", "n"),
    "the norm is not whole": (f"= own;\n    {TOGETHER}", f"= own;\n{ALONE}"),
    "rows change while others read them": (f"worker.load_rows();\n    {ALONE}", "worker.load_rows();"),
}  # fmt: skip


class Pointwise(ctypes.Structure):
    _fields_ = [("N", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("target", "weight", "pos_weight")]
    _fields_ += [("bound", ctypes.c_float), ("mean", ctypes.c_bool)]


class Step(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("layers", "weights", "biases")]
    _fields_ += [("loss", ctypes.c_int), ("cross_entropy", CrossEntropy), ("pointwise", Pointwise)]
    _fields_ += [("gradient", ctypes.c_void_p), ("value", ctypes.c_void_p), ("max_norm", ctypes.c_double)]
    _fields_ += [("norm", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("steps", "x_step", "target_step", "numbers_step")]


class Request(ctypes.Structure):
    _fields_ = [("layers", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("widths", "activations", "params", "states", "trained")]
    _fields_ += [("optimizer", Optimizer), ("rate", ctypes.c_float), ("inverse_root", ctypes.c_float)]
    _fields_ += [("numbers", ctypes.c_void_p), ("step", Step)]
    _fields_ += [("multiprocessors", ctypes.c_int), ("order", ctypes.c_uint), ("at_once", ctypes.c_int64)]
    _fields_ += [("repeats", ctypes.c_bool)]


def build(output: Path, root: Path = ROOT) -> ctypes.CDLL:
    compiled = output.with_suffix(".o")
    # The emulator stands in for the library of -fsanitize=thread, which therefore is not linked.
    source = [
        "-fsanitize=thread",
        f"-I{root / 'tests'}",
        "-c",
        root / "tests/step_driver.cpp",
        "-o",
        compiled,
    ]
    for arguments in (source, [compiled, "-o", output]):
        subprocess.run(["g++", *FLAGS, *map(str, arguments)], check=True, capture_output=True, text=True)
    library = ctypes.CDLL(str(output))
    library.train.restype = library.plan.restype = ctypes.c_int64
    library.activations.restype = library.complaint.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("step") / "step.so")


class Training:
    """Some steps of a network drawn by a seed, by the kernel and by torch in float64."""

    def __init__(
        self,
        M=9,
        widths=(7, 20, 12, 5),
        activations=("relu", "tanh", "identity"),
        loss="cross_entropy",
        options=None,
        kind=torch.optim.SGD,
        steps=3,
        max_norm=0.0,
        weighted=False,
        bias=True,
        mean=True,
        frozen=(),
        smoothing=0.1,
        gap=0,
    ):
        random = np.random.default_rng(0)
        self.M, self.widths, self.activations, self.loss, self.steps = M, widths, activations, loss, steps
        self.kind, self.max_norm, self.mean, self.smoothing = kind, max_norm, mean, smoothing
        self.options = {"lr": LEARNING_RATE, **(options or {})}
        self.ldx = widths[0] + gap
        self.x = random.standard_normal((steps, M, self.ldx)).astype(np.float32)
        C = widths[-1]
        if loss == "cross_entropy":
            self.target = random.integers(0, C, (steps, M))
            self.target[:, 1::5] = -100
        else:
            self.target = random.standard_normal((steps, M, C)).astype(np.float32)
        self.weight = random.random(C).astype(np.float32) + 0.5 if weighted else None
        self.pos_weight = random.random(C).astype(np.float32) if weighted else None
        self.params = []
        for K, N in itertools.pairwise(widths):
            self.params.append((random.standard_normal((N, K)) / K**0.5).astype(np.float32))
            self.params.append(random.standard_normal(N).astype(np.float32) if bias else None)
        self.trained = [p is not None and i not in frozen for i, p in enumerate(self.params)]

    def optimizer(self, count: int) -> tuple[Optimizer, float, float]:
        """What a kernel is to know of the optimizer, of the step that is the count's."""
        o = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "amsgrad": False}
        o |= {"maximize": False, "betas": (0.9, 0.999), "eps": 1e-8, **self.options}
        if self.kind is torch.optim.SGD:
            row = Optimizer(
                0, 0, int(o["momentum"] != 0), o["weight_decay"], o["momentum"], 1 - o["dampening"]
            )
            row.nesterov, row.first, row.kept = o["nesterov"], count == 1, 1
            row.maximize = o["maximize"]
            return row, o["lr"], 0.0
        first, second = o["betas"]
        row = Optimizer(1, 0, 2 + o["amsgrad"], o["weight_decay"], first, 1 - first)
        row.momentum_square, row.undamped_square, row.eps, row.kept = second, 1 - second, o["eps"], 1
        if self.kind is torch.optim.AdamW:
            row.kept, row.weight_decay = 1 - o["lr"] * o["weight_decay"], 0
        return row, o["lr"] / (1 - first**count), 1 / (1 - second**count) ** 0.5

    def by_kernel(self, kernel, multiprocessors=4, order=0, in_memory=True, at_once=None, repeats=False):
        """Parameters and states after the steps, the values and the last norm."""
        optimizer, rate, root = self.optimizer(1)
        params = [p if p is None else p.copy() for p in self.params]
        states = [
            [np.full_like(p, np.nan if self.kind is torch.optim.SGD else 0) if k < optimizer.states else None
             for k in range(3)] if p is not None else [None] * 3
            for p in params
        ]  # fmt: skip
        self.alive = [
            np.array(self.widths, np.int64),
            (Row * len(self.activations))(*[self.row(kernel, name) for name in self.activations]),
            pointers(params),
            pointers(itertools.chain(*states)),
            np.array(self.trained),
        ]
        values, norm = (np.full(size, np.nan, np.float32) for size in (self.steps, 1))
        is_class = self.loss == "cross_entropy"
        request = Request(len(self.activations), *map(address, self.alive), optimizer, rate, root)
        if in_memory:
            told = [Numbers(*self.optimizer(1 + step)) for step in range(self.steps) for _ in params]
            self.alive.append((Numbers * len(told))(*told))
            request.numbers = address(self.alive[-1])
            request.optimizer = Optimizer(optimizer.kind, 0, optimizer.states, 9, 9, 9, in_memory=True)
        C = self.widths[-1]
        request.step = Step(
            loss=LOSSES.index(self.loss),
            cross_entropy=CrossEntropy(
                0, 1 if self.mean else 2, self.M, C, None, address(self.target), address(self.weight), -100,
                self.smoothing,
            ),
            pointwise=Pointwise(
                C, address(self.target), address(self.weight), address(self.pos_weight), 0.75, self.mean
            ),
            value=address(values),
            max_norm=self.max_norm,
            norm=address(norm),
            steps=self.steps,
            x_step=self.M * self.ldx,
            target_step=self.M * (1 if is_class else C),
            numbers_step=len(params),
        )  # fmt: skip
        request.multiprocessors, request.order = multiprocessors, order
        request.at_once, request.repeats = at_once or self.steps, repeats
        error = kernel.train(
            ctypes.byref(request), ctypes.c_int64(self.M), ctypes.c_void_p(address(self.x)),
            ctypes.c_int64(self.ldx),
        )  # fmt: skip
        assert error == 0, f"error {error}: {kernel.complaint().decode()}"
        kept = [s for p, s in zip(self.trained, states, strict=True) if p]
        results = [p for p in params if p is not None]
        results += [s for own in kept for s in own if s is not None]
        return [*results, values, *([norm] if self.max_norm else [])]

    def row(self, kernel, name: str) -> Row:
        g = ACTIVATIONS[name]
        kinds = kernel.activations().decode().split()
        return Row(kinds.index(g.row), (ctypes.c_float * 3)(*g.parameters))

    def by_torch(self):
        def double(array):
            return None if array is None else torch.from_numpy(array).double()

        params = [double(p) for p in self.params]
        trained = [
            p.requires_grad_() for p, is_trained in zip(params, self.trained, strict=True) if is_trained
        ]
        optimizer = self.kind(trained, **self.options)
        reduction = {"reduction": "mean" if self.mean else "sum"}
        losses = {
            "cross_entropy": lambda y, t: F.cross_entropy(
                y, t, double(self.weight), label_smoothing=self.smoothing, **reduction
            ),
            "mse": lambda y, t: F.mse_loss(y, t, **reduction),
            "l1": lambda y, t: F.l1_loss(y, t, **reduction),
            "smooth_l1": lambda y, t: F.smooth_l1_loss(y, t, beta=0.75, **reduction),
            "huber": lambda y, t: F.huber_loss(y, t, delta=0.75, **reduction),
            "bce_with_logits": lambda y, t: F.binary_cross_entropy_with_logits(
                y, t, double(self.weight), pos_weight=double(self.pos_weight), **reduction
            ),
        }
        values, norms = [], []
        for step in range(self.steps):
            y = double(self.x[step, :, : self.widths[0]])
            for layer, name in enumerate(self.activations):
                weight, bias = params[2 * layer : 2 * layer + 2]
                y = ACTIVATIONS[name].torch(F.linear(y, weight, bias))
            target = torch.from_numpy(self.target[step])
            value = losses[self.loss](y, target if target.dtype == torch.int64 else target.double())
            optimizer.zero_grad()
            value.backward()
            if self.max_norm:
                norms.append(torch.nn.utils.clip_grad_norm_(trained, self.max_norm).item())
            optimizer.step()
            values.append(value.item())
        names = {torch.optim.SGD: ["momentum_buffer"]}.get(
            self.kind, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        )
        states = [optimizer.state[p][name] for p in trained for name in names if name in optimizer.state[p]]
        results = [p.detach().numpy() for p in params if p is not None] + [s.numpy() for s in states]
        return [*results, np.array(values), *([np.array(norms[-1:])] if self.max_norm else [])]

    def check(self, kernel, **how):
        for ours, right in zip(self.by_kernel(kernel, **how), self.by_torch(), strict=True):
            np.testing.assert_allclose(ours, right, rtol=2e-4, atol=2e-6)


def address(array) -> int | None:
    if array is None:
        return None
    return array.ctypes.data if isinstance(array, np.ndarray) else ctypes.addressof(array)


def pointers(arrays) -> ctypes.Array:
    values = [address(array) for array in arrays]
    return (ctypes.c_void_p * len(values))(*values)


ADAM = {"kind": torch.optim.Adam, "options": {"eps": 1e-3}}
CASES = {
    "cross-entropy": {},
    "weights of classes": {"weighted": True},
    "a sum": {"mean": False, "smoothing": 0.0},
    "mse": {"loss": "mse"},
    "l1": {"loss": "l1", "mean": False},
    "smooth l1": {"loss": "smooth_l1"},
    "huber": {"loss": "huber"},
    "bce": {"loss": "bce_with_logits"},
    "bce of weights": {"loss": "bce_with_logits", "weighted": True},
    "two layers": {"widths": (9, 17, 3), "activations": ("silu", "identity")},
    "four layers": {
        "widths": (5, 18, 9, 24, 2), "activations": ("gelu", "relu", "silu", "tanh"), "loss": "mse"
    },
    "aligned": {"M": 16, "widths": (8, 16, 32, 4)},
    "gaps between rows": {"widths": (8, 16, 4), "activations": ("tanh", "identity"), "gap": 3},
    "one row": {"M": 1, "loss": "mse"},
    "many rows": {"M": 70, "widths": (6, 20, 3), "activations": ("relu", "sigmoid"), "loss": "mse"},
    "long sums": {"M": 5, "widths": (150, 9, 4), "activations": ("relu", "identity")},
    "many classes": {"M": 5, "widths": (9, 16, 70), "activations": ("relu", "identity")},
    "no bias": {"bias": False},
    "nesterov": {"options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}},
    "dampening": {"options": {"momentum": 0.9, "dampening": 0.5, "maximize": True}},
    "adam": ADAM,
    "amsgrad": {"kind": torch.optim.Adam, "options": {"eps": 1e-3, "amsgrad": True, "weight_decay": 0.1}},
    "adamw": {"kind": torch.optim.AdamW, "options": {"eps": 1e-3, "weight_decay": 0.1}},
    "clipped": {"max_norm": 0.05, **ADAM},
    "hardly clipped": {"max_norm": 1e6},
    "frozen": {"frozen": (0, 3), "max_norm": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_steps_in_one_launch_are_those_of_torch(kernel, case):
    Training(**CASES[case]).check(kernel)


@pytest.mark.parametrize(
    "case", ["cross-entropy", "weights of classes", "bce", "adam", "frozen", "many rows", "two layers"]
)
def test_it_changes_no_bit_that_each_block_does_all_of_the_last_layer(kernel, case):
    training = Training(**CASES[case])
    for order in range(3):
        how = {"multiprocessors": 3, "order": order}
        pairs = zip(
            training.by_kernel(kernel, **how), training.by_kernel(kernel, repeats=True, **how), strict=True
        )
        assert all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("case", ["cross-entropy", "two layers", "four layers", "adam", "many rows"])
def test_neither_the_number_of_blocks_nor_their_order_changes_a_bit(kernel, case):
    training = Training(**CASES[case])
    alone = training.by_kernel(kernel, multiprocessors=1)
    for multiprocessors, order in [(2, 1), (5, 0), (5, 1), (5, 2), (3, 3)]:
        for one, other in zip(alone, training.by_kernel(kernel, multiprocessors, order), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("case", ["cross-entropy", "mse", "nesterov", "adam", "clipped"])
@pytest.mark.parametrize("at_once", [1, 2])
def test_steps_of_one_launch_are_to_the_bit_those_of_several(kernel, case, at_once):
    training = Training(**CASES[case])
    pairs = zip(training.by_kernel(kernel), training.by_kernel(kernel, at_once=at_once), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_numbers_that_stay_need_no_memory(kernel, options):
    Training(options=options).check(kernel, in_memory=False)


# ---- how it is shared out


def plan(kernel, batch, *widths, clips=False, multiprocessors=132, shared_kilobytes=227):
    """Blocks, the units of a block by hidden layer, and the predicted microseconds."""
    units, time = (ctypes.c_int64 * (len(widths) - 2))(), ctypes.c_double()
    shape = ctypes.c_int64(batch), (ctypes.c_int64 * len(widths))(*widths), ctypes.c_int64(len(widths) - 1)
    barrier = ctypes.c_double(1.2)
    gpu = ctypes.c_int64(multiprocessors), ctypes.c_int64(shared_kilobytes << 10), barrier
    blocks = kernel.plan(*shape, clips, *gpu, units, ctypes.byref(time))
    return blocks, [*units], time.value


@pytest.mark.parametrize(
    ("shape", "blocks", "units"),
    [
        ((1, 8, 64, 64, 4), 1, [64, 64]),  # barriers would take longer than the work
        ((64, 784, 500, 10), 63, [8]),  # more blocks would each read all of x
        ((64, 17, 256, 256, 6), 64, [4, 4]),
        ((4096, 17, 256, 256, 6), 0, None),  # of products large enough for other kernels
        ((64, 784, 10), 0, None),  # without a hidden layer
        ((64, *[64] * 10), 0, None),
        ((0, 17, 256, 6), 0, None),
    ],
    ids=str,
)
def test_a_small_step_is_one_launch_and_its_size_decides_of_how_many_blocks(kernel, shape, blocks, units):
    actual, own, _ = plan(kernel, *shape)
    assert actual == blocks
    assert units is None or own == units


@pytest.mark.parametrize(("multiprocessors", "most"), [(132, 132), (16, 16), (1, 1)])
def test_all_blocks_have_a_multiprocessor(kernel, multiprocessors, most):
    assert 0 < plan(kernel, 16, 17, 64, 32, 6, multiprocessors=multiprocessors)[0] <= most


def test_weights_have_to_fit_in_shared_memory(kernel):
    assert plan(kernel, 4, 1024, 1024, 10, multiprocessors=32, shared_kilobytes=227)[0] > 0
    assert plan(kernel, 4, 1024, 1024, 10, multiprocessors=32, shared_kilobytes=64)[0] == 0


# ---- the checks checked


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The kernel with each of the edits, compiled at once."""
    folder = tmp_path_factory.mktemp("broken")

    def broken_kernel(number: int, name: str) -> ctypes.CDLL:
        root = folder / str(number)
        shutil.copytree(ROOT / "csrc", root / "csrc")
        (root / "tests").mkdir()
        for file in ("step_driver.cpp", "cuda_emulator.h"):
            shutil.copy(ROOT / "tests" / file, root / "tests")
        path, (old, new) = root / "csrc/cuda/step.cuh", BROKEN[name]
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        return build(root / "step.so", root)

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(broken_kernel, number, name) for number, name in enumerate(BROKEN)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_barrier_that_is_missing_is_noticed(broken, name):
    library = broken[name].result()
    case = {"widths": (7, 20, 24, 5), "max_norm": 0.1 if "norm" in name else 0.0}
    repeats = "each block" in name or "last weight" in name
    if "last weight" in name:
        case = {"widths": (7, 24, 5), "activations": ("relu", "identity")}
    for order in range(3):
        with pytest.raises(AssertionError, match="a race"):
            Training(**case).by_kernel(library, order=order, repeats=repeats)
