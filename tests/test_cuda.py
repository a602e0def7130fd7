"""The CUDA backend through torch, on a GPU: every value of each parameter, and as slow tests all together."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import cases
from test_run import OPTIONS as RUN_OPTIONS
from test_run import assert_same, run_by_calls, step_of

import fastmlp

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(fastmlp.build_info()["cuda"] is None, reason="fastmlp is built without CUDA"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the largest element
SHAPES = [(1, 1, 1), (3, 5, 7), (64, 500, 784), (64, 10, 500), (65, 67, 33), (1000, 30, 17)]
SHAPES += [(2048, 1024, 1024), (4096, 512, 2048), (1000, 1001, 1003), (65536, 64, 64)]  # large tiles, splits
ACTIVATIONS = {
    "identity": (lambda z: z, lambda y: torch.ones_like(y)),
    "relu": (torch.relu, lambda y: (y > 0).double()),
    "sigmoid": (torch.sigmoid, lambda y: y * (1 - y)),
    "tanh": (torch.tanh, lambda y: 1 - y * y),
}


@pytest.fixture(params=fastmlp.products.OWNERS[:2])
def owner(request):
    """Runs the test with products that are all the kernels' own, and all the library's."""
    fastmlp.products.choose(request.param)
    yield request.param
    fastmlp.products.choose("table")


both_owners = pytest.mark.usefixtures("owner")


def inputs(shape, dtype=torch.float32, device="cuda"):
    """x, weight and bias that ask for gradients, and grad_y; z is of the order of 1."""
    M, N, K = shape
    torch.manual_seed(0)
    sizes = [(M, K), (N, K), (N,), (M, N)]
    tensors = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    tensors[1] /= max(K, 1) ** 0.5
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]


def results(parameters, grad_y, activation):
    """The output and the three gradients."""
    y = fastmlp.functional.linear(*parameters, None if activation == "identity" else activation)
    return [y.detach(), *torch.autograd.grad(y, parameters, grad_y)]


def assert_right(actual, parameters, grad_y, activation):
    x, weight, bias = (tensor.detach().double() for tensor in parameters)
    function, slope = ACTIVATIONS[activation]
    dz = grad_y.double() * slope(actual[0].double())
    expected = [function(x @ weight.T + bias), dz @ weight, dz.T @ x, dz.sum(0)]
    for ours, right in zip(actual, expected, strict=True):
        tolerance = TOLERANCE[ours.dtype] * right.abs().max().item()
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=tolerance)


def covering(*lists):
    """So few of the product of the lists that each value is in one."""
    longest = max(map(len, lists))
    return [tuple(values[i % len(values)] for values in lists) for i in range(longest)]


def product_of(names, *lists):
    """All together, of which those of `covering` are quick."""
    chosen = covering(*lists)
    return cases(names, itertools.product(*lists), lambda *case: case in chosen, ids=str)


@both_owners
@product_of(["dtype", "activation", "shape"], [*TOLERANCE], [*ACTIVATIONS], SHAPES)
def test_output_and_gradients_are_right(dtype, activation, shape):
    parameters, grad_y = inputs(shape, dtype)
    assert_right(results(parameters, grad_y, activation), parameters, grad_y, activation)


@pytest.fixture
def matmul():
    """The settings of torch's products; the precision of float32 is put back. It is no plain attribute."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


@both_owners
@pytest.mark.parametrize("shape", [(64, 500, 784), (2048, 1024, 1024), (1000, 1001, 1003)], ids=str)
def test_float32_is_multiplied_as_tf32_where_torchs_setting_asks_for_it(shape, matmul, monkeypatch):
    parameters, grad_y = inputs(shape)
    exact = results(parameters, grad_y, "relu")
    matmul.fp32_precision = "tf32"
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-3)
    actual = results(parameters, grad_y, "relu")
    assert_right(actual, parameters, grad_y, "relu")
    assert not torch.equal(actual[0], exact[0])


@both_owners
@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_sizes_of_zero_work_as_in_torch(shape):
    parameters, grad_y = inputs(shape)
    y = torch.nn.functional.linear(*parameters)
    expected = [y.detach(), *torch.autograd.grad(y, parameters, grad_y)]
    for ours, stock in zip(results(parameters, grad_y, "identity"), expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=0)


def test_more_blocks_than_fit_in_a_grid_row_work():
    parameters, grad_y = inputs((65536 * 64 + 1, 1, 1))
    x, weight, bias = parameters
    y = fastmlp.functional.linear(x, weight, bias)
    torch.testing.assert_close(y, x * weight + bias)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    torch.testing.assert_close(grad_x, grad_y * weight)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: x[:, 3:36],
    "expanded": lambda x: x[0, :33].expand(65, 33),
    "3-d": lambda x: x[:, :33].reshape(5, 13, 33),
}


@both_owners
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout_work(layout):
    x = LAYOUTS[layout](torch.randn(65, 40, device="cuda"))
    (_, weight, bias), _ = inputs((1, 67, x.shape[-1]))
    y = fastmlp.functional.linear(x, weight, bias, activation="relu")
    torch.testing.assert_close(
        y, torch.relu(torch.nn.functional.linear(x, weight, bias)), rtol=1e-4, atol=1e-4
    )


@both_owners
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_run_gives_the_same_bits(dtype):
    parameters, grad_y = inputs((5000, 130, 70), dtype)
    runs = [results(parameters, grad_y, "tanh") for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(
    ("shape", "reason"), [((64, 64, 64), None), ((2048, 1024, 1024), "torch's library")], ids=str
)
def test_one_is_told_whose_products_are_the_librarys(shape, reason, request):
    request.addfinalizer(lambda: fastmlp.products.choose("table"))
    fastmlp._C.use_products("table", [])
    (x, weight, bias), _ = inputs(shape)
    told = fastmlp.functional.why_composite(x, weight, bias)
    assert told is None if reason is None else reason in told


def test_work_goes_to_the_current_stream():
    parameters, grad_y = inputs((64, 500, 784))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)  # a kernel on another stream would read the inputs before they change
        with torch.no_grad():
            for tensor in parameters:
                tensor.mul_(2)
        actual = results(parameters, grad_y, "relu")
        torch.cuda.current_stream().synchronize()
    assert_right(actual, parameters, grad_y, "relu")


@both_owners
def test_a_cuda_graph_captures_forward_and_backward():
    parameters, grad_y = inputs((64, 500, 784))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(parameters, grad_y, "sigmoid")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = results(parameters, grad_y, "sigmoid")
    with torch.no_grad():
        parameters[0].mul_(0.5)
    graph.replay()
    assert_right(actual, parameters, grad_y, "sigmoid")


@both_owners
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device_work():
    parameters, grad_y = inputs((64, 10, 500), device="cuda:1")
    actual = results(parameters, grad_y, "relu")
    assert {tensor.device.index for tensor in actual} == {1}
    assert_right(actual, parameters, grad_y, "relu")


NETWORKS = [(784, 500, 300, 10), (64, 64, 64, 64, 16), (7, 128, 9, 100, 5)]


@both_owners
@product_of(["dtype", "batch", "sizes"], [*TOLERANCE], [1, 65, 65536], NETWORKS)
def test_a_whole_network_gives_what_its_layers_give_one_by_one(dtype, batch, sizes):
    model = fastmlp.MLP(*sizes, activation="tanh", device="cuda", dtype=dtype)
    x = torch.randn(batch, sizes[0], device="cuda", dtype=dtype, requires_grad=True)
    expected = x
    for layer in model:
        expected = layer(expected)
    leaves = [x, *model.parameters()]
    assert torch.equal(model(x), expected)
    for ours, right in zip(
        torch.autograd.grad(model(x).sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.equal(ours, right)


ADAM = {"Adam": {"lr": 0.1}, "amsgrad": {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "maximize": True}}
SGD = {
    "plain": {"lr": 0.1},
    "tensor lr": {"lr": torch.tensor(0.1)},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True},
}


def trained(kind, options, dtype=torch.float32, device="cuda", steps=4):
    """Parameters and momentum buffers after some steps, by an optimizer of that kind."""
    torch.manual_seed(0)
    shapes = [(500, 784), (500,), (3, 5), (), (0,), *[(7,)] * 70]
    params = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    memory = torch.randn(11, dtype=dtype, device=device)
    params.append(memory[1:].requires_grad_())  # begins at no multiple of 16 bytes
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = kind(params, **options)
    for _ in range(steps):
        optimizer.step()
    states = [value.to(device) for state in optimizer.state.values() for value in state.values()]
    return [param.detach() for param in params] + states


every_option = pytest.mark.parametrize(
    ("kind", "options"),
    [("SGD", each) for each in SGD.values()] + [("Adam", each) for each in ADAM.values()],
    ids=[*SGD, *ADAM],
)


@every_option
def test_steps_are_those_of_torch(kind, options):
    ours, stock = (trained(getattr(module, kind), options) for module in (fastmlp, torch.optim))
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_option
@cases(["dtype"], [(torch.bfloat16,), (torch.float16,)], lambda dtype: dtype == torch.bfloat16, ids=str)
def test_a_step_in_half_precision_is_that_of_torchs_fused_kernel(dtype, kind, options):
    ours = trained(getattr(fastmlp, kind), options, dtype, steps=2)
    stock = trained(getattr(torch.optim, kind), {**options, "fused": True}, dtype, steps=2)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_cuda_graph_captures_no_step_of_adam_that_counts_on_the_host():
    params = [torch.ones(3, device="cuda", requires_grad=True)]
    params[0].grad = torch.ones_like(params[0])
    optimizer = fastmlp.Adam(params)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_a_learning_rate_on_the_gpu_takes_torchs_path():
    options = {"lr": torch.tensor(0.1, device="cuda"), "momentum": 0.9}
    for ours, stock in zip(trained(fastmlp.SGD, options), trained(torch.optim.SGD, options), strict=True):
        assert torch.equal(ours, stock)


def test_parameters_on_two_devices_are_all_updated():
    params = [torch.ones(3, device=device, requires_grad=True) for device in ("cpu", "cuda")]
    for param in params:
        param.grad = torch.ones_like(param)
    fastmlp.SGD(params, lr=1.0).step()
    assert all(param.eq(0).all() for param in params)


def test_a_cuda_graph_captures_a_step():
    params = [torch.ones(1000, device="cuda", requires_grad=True)]
    params[0].grad = torch.ones_like(params[0])
    optimizer = fastmlp.SGD(params, lr=0.25, momentum=0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()  # w = 0.75, m = 1
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()  # m = 1.5
    assert params[0].eq(0.375).all()


# ---- clipping


def clipped(clip, max_norm, dtype=torch.float32, value=None, **options):
    """The norm of some gradients, and these once they are clipped."""
    torch.manual_seed(0)
    shapes = [(500, 784), (), (0,), *[(7,)] * 200]
    params = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    if value is not None:
        params[0].grad[1, 3] = value
    params.append(torch.empty(10, dtype=dtype, device="cuda"))
    params[-1].grad = torch.randn(11, dtype=dtype, device="cuda")[1:]  # begins at no multiple of 16 bytes
    return [clip(params, max_norm, **options), *(param.grad for param in params)]


@product_of(["dtype", "max_norm", "value"], [*TOLERANCE], [0.5, 1e6], [None, torch.inf, torch.nan])
def test_clipped_gradients_are_those_of_torch(dtype, max_norm, value):
    clips = (fastmlp.clip_grad_norm_, torch.nn.utils.clip_grad_norm_)
    for ours, stock in zip(*(clipped(clip, max_norm, dtype, value) for clip in clips), strict=True):
        torch.testing.assert_close(ours, stock, rtol=3 * TOLERANCE[dtype], atol=1e-6, equal_nan=True)


def test_every_run_of_clipping_gives_the_same_bits():
    assert all(map(torch.equal, *(clipped(fastmlp.clip_grad_norm_, 0.5) for _ in range(2))))


def test_clipping_raises_for_a_norm_that_is_not_finite_where_that_is_an_error():
    clipped(fastmlp.clip_grad_norm_, 0.5, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="is non-finite"):
        clipped(fastmlp.clip_grad_norm_, 0.5, value=torch.inf, error_if_nonfinite=True)


def test_clipping_does_not_wait_for_the_device():
    clipped(fastmlp.clip_grad_norm_, 0.5)
    param = torch.ones(1000, device="cuda")
    param.grad = torch.ones_like(param)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastmlp.clip_grad_norm_([param], 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_captures_clipping():
    param = torch.ones(4, device="cuda")
    param.grad = torch.ones_like(param)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fastmlp.clip_grad_norm_([param], 4.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = fastmlp.clip_grad_norm_([param], 4.0)
    param.grad.fill_(4.0)
    graph.replay()
    assert norm == 8
    torch.testing.assert_close(param.grad, torch.full_like(param, 2.0))


# ---- cross-entropy


LOSS_SHAPES = [(64, 10), (5000, 3), (33, 1500), (0, 4)]


@product_of(
    ["dtype", "shape", "reduction", "label_smoothing"],
    [*TOLERANCE],
    LOSS_SHAPES,
    ["mean", "sum", "none"],
    [0.0, 0.1],
)
def test_cross_entropy_and_its_gradient_are_right(dtype, shape, reduction, label_smoothing):
    logits = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    target = torch.randint(shape[1], shape[:1], device="cuda")
    weight = torch.rand(shape[1], device="cuda", dtype=dtype)
    options = {"reduction": reduction, "ignore_index": 1, "label_smoothing": label_smoothing}
    loss = fastmlp.functional.cross_entropy(logits, target, weight, **options)
    assert "CrossEntropyFunction" in loss.grad_fn.name()
    grad_loss = torch.rand_like(loss)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, target, weight.double(), **options)
    actual = [loss.detach(), *torch.autograd.grad(loss, logits, grad_loss)]
    right = [expected.detach(), *torch.autograd.grad(expected, exact, grad_loss.double())]
    for ours, stocks in zip(actual, right, strict=True):
        largest = stocks.abs().nan_to_num().max().item() if stocks.numel() else 0  # the mean of none is NaN
        tolerance = TOLERANCE[dtype] * largest
        torch.testing.assert_close(ours.double(), stocks, rtol=0, atol=tolerance, equal_nan=True)


def test_every_run_of_cross_entropy_gives_the_same_bits():
    logits, target = torch.randn(50000, 10, device="cuda"), torch.randint(10, (50000,), device="cuda")
    runs = [
        torch.ops.fastmlp.cross_entropy_forward(logits, target, None, "mean", -100, 0.0) for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


def test_a_cuda_graph_captures_cross_entropy():
    logits = torch.randn(64, 10, device="cuda", requires_grad=True)
    target = torch.randint(10, (64,), device="cuda")

    def gradient(function):
        return torch.autograd.grad(function(logits, target), logits)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient(fastmlp.functional.cross_entropy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = gradient(fastmlp.functional.cross_entropy)
    with torch.no_grad():
        logits.mul_(2)
    graph.replay()
    torch.testing.assert_close(actual, gradient(F.cross_entropy))


def test_autocast_computes_cross_entropy_in_float32():
    logits = torch.randn(64, 10, device="cuda", dtype=torch.float16, requires_grad=True)
    with torch.autocast("cuda"):
        loss = fastmlp.functional.cross_entropy(logits, torch.zeros(64, dtype=torch.int64, device="cuda"))
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.float16


def test_a_label_out_of_bounds_fails_an_assertion_on_the_device():
    # In a process of its own: the device is of no more use to it.
    code = (
        "import torch, fastmlp; target = torch.tensor([0, 10], device='cuda'); "
        "fastmlp.functional.cross_entropy(torch.zeros(2, 10, device='cuda'), target).item()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


# ---- whole steps, as CUDA graphs

STEP_LOSSES = {
    "cross_entropy": torch.nn.CrossEntropyLoss(label_smoothing=0.1),
    "fastmlp's": fastmlp.CrossEntropyLoss(),
    "mse": torch.nn.MSELoss(),
    "bce": torch.nn.BCEWithLogitsLoss(pos_weight=torch.rand(10)),
}


class Twins:
    """A step and the standard loop beside it, from the same start; and how many graphs were captured.

    Unless asked for it, the step is not one launch, which it would be for networks of this size.
    """

    def __init__(
        self,
        monkeypatch,
        loss=STEP_LOSSES["cross_entropy"],
        device="cuda",
        kind="SGD",
        sizes=(30, 70, 10),
        max_norm=None,
        is_one_launch=False,
        **options,
    ):
        self.is_one_launch = is_one_launch
        if not is_one_launch:
            monkeypatch.setattr(fastmlp.step._C, "train_step", lambda *_: NotImplemented)
        self.captures, self.pools, self.device = 0, set(), torch.device(device)
        self.max_norm = max_norm
        self.loss = copy.deepcopy(loss).to(device)
        self.model = fastmlp.MLP(*sizes, device=device)
        self.other = copy.deepcopy(self.model)
        options = {"lr": 0.1, **options}
        self.optimizer = getattr(fastmlp, kind)(self.model.parameters(), **options)
        self.other_optimizer = getattr(torch.optim, kind)(self.other.parameters(), **options)
        self.optimizers = self.optimizer, self.other_optimizer
        self.step = fastmlp.TrainStep(self.model, self.loss, self.optimizer, max_grad_norm=max_norm)
        graph = torch.cuda.graph

        def counted(*arguments, **options):
            self.captures += 1
            self.pools.add(options.get("pool"))
            return graph(*arguments, **options)

        monkeypatch.setattr(torch.cuda, "graph", counted)

    def train(self, *sizes):
        """A step of both on each of some batches, which must leave the same behind; the losses of ours."""
        values = []
        for size in sizes:
            x, target = torch.randn(size, 30, device=self.device), torch.rand(size, 10, device=self.device)
            if isinstance(self.loss, torch.nn.CrossEntropyLoss):
                target = target.argmax(1)
            values.append(self.step(x, target))
            value = self.loss(self.other(x), target)
            self.other_optimizer.zero_grad()
            value.backward()
            if self.max_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(self.other.parameters(), self.max_norm)
                torch.testing.assert_close(self.step.grad_norm, norm)
            self.other_optimizer.step()
            torch.testing.assert_close(values[-1], value.detach(), rtol=1e-5, atol=1e-6)
            for own, right in zip(self.model.parameters(), self.other.parameters(), strict=True):
                torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-6)
                if not self.is_one_launch:
                    torch.testing.assert_close(own.grad, right.grad, rtol=1e-4, atol=1e-6)
        if self.is_one_launch:
            assert "in one call" in repr(self.step)
        return values


STEP_OPTIONS = [{}, SGD["nesterov"], SGD["dampening"]]  # an eps that keeps Adam from steps of rounding alone
STEP_OPTIONS += [
    {"kind": "Adam", "amsgrad": True, "lr": 0.01, "eps": 1e-3},
    {"kind": "AdamW", "lr": 0.01, "eps": 1e-3},
]


@product_of(["name", "options"], [*STEP_LOSSES], STEP_OPTIONS)
def test_a_step_trains_as_the_standard_loop_does(monkeypatch, name, options):
    loss = STEP_LOSSES[name]
    twins = Twins(monkeypatch, loss, **options)
    values = twins.train(*[64] * 8)
    assert twins.captures == 1
    assert len({value.item() for value in values}) == 8


@product_of(
    ["name", "options", "sizes"],
    [*STEP_LOSSES],
    STEP_OPTIONS,
    [(30, 70, 10), (30, 64, 64, 10), (30, 17, 33, 64, 10), (30, 500, 10)],
)
def test_a_small_step_is_one_launch(monkeypatch, name, options, sizes):
    twins = Twins(monkeypatch, STEP_LOSSES[name], sizes=sizes, is_one_launch=True, **options)
    twins.train(64, 64, 1, 17, 64, 128)
    assert twins.captures == 0


@product_of(["kind", "max_norm"], ["SGD", "Adam"], [0.05, 1e6])
def test_a_step_of_one_launch_clips(monkeypatch, kind, max_norm):
    options = {"eps": 1e-3} if kind == "Adam" else {}
    Twins(monkeypatch, kind=kind, max_norm=max_norm, is_one_launch=True, **options).train(*[64] * 5)


@product_of(["sizes"], [(784, 500, 10), (17, 256, 256, 6), (8, 64, 64, 4)])
def test_every_run_of_a_step_of_one_launch_gives_the_same_bits(sizes):
    def trained():
        torch.manual_seed(0)
        model = fastmlp.MLP(*sizes, device="cuda")
        step = fastmlp.TrainStep(model, torch.nn.CrossEntropyLoss(), fastmlp.Adam(model.parameters()))
        x, target = torch.randn(64, sizes[0], device="cuda"), torch.randint(sizes[-1], (64,), device="cuda")
        values = [step(x, target) for _ in range(100)]
        assert "in one call" in repr(step)
        return [*values, *(p.detach() for p in model.parameters())]

    assert all(map(torch.equal, trained(), trained()))


def test_a_step_has_a_graph_for_every_shape_of_batch(monkeypatch):
    twins = Twins(monkeypatch, momentum=0.9)
    twins.train(*[64, 64, 17] * 4)
    assert twins.captures == 2
    assert len(twins.pools) == 1


def test_a_step_keeps_the_shapes_that_were_used_last(monkeypatch):
    monkeypatch.setattr(fastmlp.graph, "MOST", 1)
    twins = Twins(monkeypatch, momentum=0.9)
    twins.train(*[64, 64, 17, 17, 17] * 3)
    assert twins.captures == len(twins.pools) == 5


@product_of(["kind"], ["SGD", "AdamW"])
def test_a_step_takes_numbers_that_change_at_every_call(monkeypatch, kind):
    options = {"momentum": 0.9} if kind == "SGD" else {"eps": 1e-3}
    twins = Twins(monkeypatch, kind=kind, **options)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9) for optimizer in twins.optimizers
    ]
    for index in range(8):
        for optimizer, schedule in zip(twins.optimizers, schedules, strict=True):
            optimizer.param_groups[0]["weight_decay"] = 0.1 * (index // 2)
            if index:
                schedule.step()
        twins.train(64)
    assert twins.captures == 1


@product_of(["kind", "max_norm"], ["SGD", "Adam"], [0.05, 1e6])
def test_a_step_clips_in_its_graph(monkeypatch, kind, max_norm):
    twins = Twins(monkeypatch, kind=kind, max_norm=max_norm, **({"eps": 1e-3} if kind == "Adam" else {}))
    twins.train(*[64] * 5)
    first = twins.step.grad_norm
    before = first.item()
    twins.train(64)
    assert first == before != twins.step.grad_norm
    assert twins.captures == 1


def test_a_step_whose_capture_fails_stays_the_loop(monkeypatch):
    twins, network = Twins(monkeypatch, kind="Adam", eps=1e-3), fastmlp.graph.functional.network

    def waiting(*arguments):
        y = network(*arguments)
        if torch.cuda.is_current_stream_capturing() and len(y) == 64:
            y.sum().item()  # which no capture allows
        return y

    monkeypatch.setattr(fastmlp.graph.functional, "network", waiting)
    current = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="stays the standard loop") as warned:
        twins.train(*[64] * 6)
    assert len(warned) == twins.captures == 1
    assert torch.cuda.current_stream() == current
    twins.train(*[17, 64] * 4)
    assert twins.captures == 2
    assert "graph" not in repr(twins.step)
    twins.train(17)
    assert "graph" in repr(twins.step)


def test_a_step_finds_parameters_that_are_laid_out_anew(monkeypatch):
    twins = Twins(monkeypatch, sizes=(30, 30, 10), momentum=0.9)
    twins.train(*[64] * 4)
    for model in (twins.model, twins.other):
        model[0].weight.data = model[0].weight.data.t()
    twins.train(*[64] * 4)


def test_a_step_that_counts_on_the_gpu_is_the_loop(monkeypatch):
    twins = Twins(monkeypatch, kind="Adam", fused=True, eps=1e-3)
    twins.train(*[64] * 4)
    assert twins.captures == 0
    assert "counts its steps on the GPU" in fastmlp.why_not_fused(twins.step)


@product_of(["kind", "is_one_launch"], ["SGD", "Adam"], [False, True])
def test_a_step_does_not_wait_for_the_device(monkeypatch, kind, is_one_launch):
    twins = Twins(monkeypatch, kind=kind, is_one_launch=is_one_launch)
    data = torch.randn(64, 30, device="cuda"), torch.randint(10, (64,), device="cuda")
    for _ in range(4):
        twins.step(*data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        twins.step(*data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_finds_parameters_and_momenta_that_have_moved(monkeypatch):
    twins = Twins(monkeypatch, momentum=0.9)
    twins.train(*[64] * 4)
    twins.model[0].weight.data = twins.model[0].weight.data.clone()
    twins.train(*[64] * 4)
    twins.optimizer.load_state_dict(copy.deepcopy(twins.optimizer.state_dict()))
    twins.train(*[64] * 4)
    assert twins.captures == 3


def test_a_step_is_captured_while_a_graph_of_the_model_is_alive(monkeypatch):
    twins = Twins(monkeypatch)
    y = twins.model(torch.randn(3, 30, device="cuda"))
    twins.train(*[64] * 4)
    assert twins.captures == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_step_may_be_captured_in_a_graph_of_the_users_own(monkeypatch):
    twins = Twins(monkeypatch, is_one_launch=True)
    x, target = torch.randn(64, 30, device="cuda"), torch.randint(10, (64,), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        twins.step(x, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = twins.step(x, target)
    assert twins.captures == 1  # the user's
    graph.replay()
    first = value.clone()
    graph.replay()
    assert value < first


ROWS = 16 * 150 + 5  # of more steps than one launch has; the last batch is short
ORDERS = {
    "in their order": lambda: None,
    "an order": lambda: torch.randperm(ROWS),
    "an order on the GPU": lambda: torch.randint(ROWS, (ROWS,), device="cuda"),
}


@product_of(["name", "order"], [*RUN_OPTIONS], [*ORDERS])
def test_a_run_of_few_launches_trains_to_the_bit_as_its_steps_do(monkeypatch, name, order):
    torch.manual_seed(0)
    model, loss = fastmlp.MLP(30, 70, 10, device="cuda"), torch.nn.CrossEntropyLoss()
    step, other = (step_of(m, loss, **RUN_OPTIONS[name]) for m in (model, copy.deepcopy(model)))
    data = torch.randn(ROWS, 30, device="cuda"), torch.randint(10, (ROWS,), device="cuda")
    numbers = ORDERS[order]()
    expected = run_by_calls(other, *data, batch_size=16, order=numbers)
    assert "in one call" in repr(other)
    monkeypatch.setattr(fastmlp.TrainStep, "__call__", None)
    losses = step.run(*data, batch_size=16, order=numbers)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    assert_same(step, other)


def test_a_run_of_few_launches_takes_the_rates_that_it_is_given(monkeypatch):
    torch.manual_seed(0)
    model, loss = fastmlp.MLP(30, 70, 10, device="cuda"), torch.nn.MSELoss()
    step, other = (step_of(m, loss, **RUN_OPTIONS["decay"]) for m in (model, copy.deepcopy(model)))
    data = torch.randn(ROWS, 30, device="cuda"), torch.randn(ROWS, 10, device="cuda")
    rates = torch.linspace(0.1, 0.0, -(-ROWS // 16), dtype=torch.float64)

    def set_rate(number):
        other.optimizer.param_groups[0]["lr"] = rates[number].item()

    set_rate(0)
    expected = run_by_calls(
        other, *data, batch_size=16, after=lambda number: set_rate(min(number + 1, len(rates) - 1))
    )
    monkeypatch.setattr(fastmlp.TrainStep, "__call__", None)
    losses = step.run(*data, batch_size=16, rates=rates)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


@product_of(["order"], ["in their order", "an order"])
def test_a_run_of_steps_that_are_graphs_trains_as_its_steps_do(monkeypatch, order):
    monkeypatch.setattr(fastmlp.step._C, "train_step", lambda *_: NotImplemented)
    torch.manual_seed(0)
    model, loss = fastmlp.MLP(30, 70, 10, device="cuda"), torch.nn.CrossEntropyLoss()
    step, other = (step_of(m, loss, **RUN_OPTIONS["momentum"]) for m in (model, copy.deepcopy(model)))
    data = torch.randn(ROWS, 30, device="cuda"), torch.randint(10, (ROWS,), device="cuda")
    numbers = ORDERS[order]()
    losses = step.run(*data, batch_size=16, order=numbers)
    expected = run_by_calls(other, *data, batch_size=16, order=numbers)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    assert_same(step, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_another_than_the_current_device_works(monkeypatch):
    twins = Twins(monkeypatch, device="cuda:1", momentum=0.9)
    twins.train(*[64] * 5)
    assert twins.captures == 1
