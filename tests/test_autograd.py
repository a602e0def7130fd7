"""Differentiation, transformation, tracing and autocast of every op: all as for torch's own operations."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from reference import ACTIVATIONS, KINDS, gradients, layer, leaves
from reference import chain as stock_chain
from reference import linear as stock
from reference import network as stock_network
from torch import func, nn
from torch.autograd import forward_ad, functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastmlp
from fastmlp.activations import resolved
from fastmlp.functional import cross_entropy, linear, network

NOT_TWICE = {"hardsigmoid"}  # has no second derivative in torch
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Op(NamedTuple):
    """A function of differentiable tensors, ours and torch's, and what makes the tensors for a batch."""

    ours: Callable
    stock: Callable
    tensors: Callable


def linear_op(activation):
    def make(batch=(4,), dtype=torch.float32):
        return layer(*batch, 3, dtype=dtype)

    return Op(lambda *t: linear(*t, activation), lambda *t: stock(*t, activation), make)


def network_op(*activations):
    def make(batch=(4,), dtype=torch.float32):
        return leaves((*batch, 3), (5, 3), (4, 5), (2, 4), (5,), None, (2,), dtype=dtype)

    def of(f):
        return lambda x, *t: f(x, list(t[:3]), list(t[3:]), activations)

    return Op(of(network), of(stock_network), make)


def loss_op(batch=(6,), **options):
    if "weight" in options:
        options = options | {"weight": torch.rand(4, generator=torch.Generator().manual_seed(0))}

    def make(batch=batch, dtype=torch.float32):
        return leaves((*batch, 4), dtype=dtype, scale=3)

    def of(f):
        return lambda z: f(z, torch.arange(len(z)) % 4 if z.dim() == 2 else torch.tensor(2), **options)

    return Op(of(cross_entropy), of(F.cross_entropy), make)


OPS = {f"linear, {activation}": linear_op(activation) for activation in KINDS}
OPS |= {"network": network_op("silu", "tanh", None)}
OPS |= {"loss": loss_op(), "loss of each row": loss_op(reduction="none", label_smoothing=0.1)}
OPTIONS = [{"reduction": "sum"}, {"weight": True}, {"ignore_index": 1}, {"label_smoothing": 0.2}]
OPTIONS += [{"weight": True, "ignore_index": 1, "label_smoothing": 0.2, "reduction": "none"}]
LOSSES = {str(options): loss_op(**options) for options in OPTIONS}
LOSSES |= {f"one row of {options}": loss_op((), **options) for options in ({}, OPTIONS[-1])}

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def assert_same(op, call, **tolerance):
    """Call(ours) is call(stock)."""
    tolerance = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True} | tolerance
    torch.testing.assert_close(call(op.ours), call(op.stock), **tolerance)


def present(tensors):
    return [t for t in tensors if t is not None]


# ---- derivatives


@pytest.mark.parametrize("op", [*OPS.values(), *LOSSES.values()], ids=[*OPS, *LOSSES])
def test_the_first_three_derivatives_are_stocks(op):
    x, *rest = op.tensors()

    def derivatives(f):
        value, found = f(x.tanh(), *rest).square().sum(), []
        for _ in range(3):
            found += torch.autograd.grad(value, present([x, *rest]), create_graph=True)
            value = sum(gradient.square().sum() for gradient in found[-len(present([x, *rest])) :])
        return found

    assert_same(op, derivatives, rtol=1e-3, atol=1e-3)


def test_a_loss_of_ignored_rows_alone_has_stocks_second_derivative():
    (z,), target = leaves((6, 4)), torch.full((6,), -100)

    def second(f):
        (first,) = torch.autograd.grad(f(z, target), z, create_graph=True)
        return first, torch.autograd.grad(first.sum(), z)[0]

    torch.testing.assert_close(second(cross_entropy), second(F.cross_entropy), equal_nan=True)


@every_activation
def test_first_and_second_derivatives_of_the_composite_path_are_right(activation):
    arguments = layer(2, 2, 3, dtype=torch.float64)

    def function(*tensors):
        return linear(*tensors, activation)

    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)
    if activation not in NOT_TWICE:
        assert torch.autograd.gradgradcheck(function, arguments)


@every_activation
def test_the_backward_op_is_differentiated_by_all_that_it_reads(activation):
    (name, parameters), rand = resolved(activation), partial(torch.randn, dtype=torch.float64)
    arguments = [rand(4, 2), rand(4, 3), rand(5, 3), rand(2, 5), rand(4, 5), rand(4, 2)]

    def function(grad_y, x, first, last, hidden, y):
        layers = [first, last], [hidden, y], [name, "tanh"], parameters
        return torch.ops.fastmlp.network_backward(grad_y, x, *layers, [0, 1, 2, 3, 4])

    if activation not in NOT_TWICE:
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in arguments])


def test_a_result_changed_in_place_is_found_out_in_backward():
    x, weight, bias = layer(4, 3)
    y = linear(x, weight, bias, "tanh")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_op
def test_forward_mode_gives_stocks_tangent(op):
    tensors = [t if t is None else t.detach() for t in op.tensors()]

    def tangent(f):
        with forward_ad.dual_level():
            duals = [t if t is None else forward_ad.make_dual(t, t.cos()) for t in tensors]
            return forward_ad.unpack_dual(f(*duals)).tangent

    assert_same(op, tangent)


@every_op
@pytest.mark.parametrize("grad", [True, False])
def test_function_transforms_give_stocks_results(op, grad):
    tensors = tuple(t if t is None else t.detach().requires_grad_(grad) for t in op.tensors())
    every = tuple(i for i, t in enumerate(tensors) if t is not None)

    def only(f, *chosen):
        """F of the chosen tensors alone."""

        def partly(*given):
            return f(*(given[chosen.index(i)] if i in chosen else t for i, t in enumerate(tensors)))

        return partly, tuple(tensors[i] for i in chosen)

    def transformed(f):
        def loss(*tensors):
            return f(*tensors).square().sum()

        of_all, given = only(f, *every)
        loss_of_all, _ = only(loss, *every)
        arguments = tuple(range(len(every)))
        stacked = tuple(torch.stack([t, 2 * t]) for t in given)
        return (
            func.grad(loss_of_all, arguments)(*given),
            func.jvp(of_all, given, tuple(t.cos() for t in given)),
            func.jacrev(of_all, arguments)(*given),
            func.jacfwd(of_all, arguments)(*given),
            func.hessian(loss_of_all)(*given),
            func.vmap(of_all)(*stacked),
            func.vmap(func.grad(loss_of_all, arguments))(*stacked),
            [  # an ensemble: of the weights alone, say
                func.vmap(of_one)(torch.stack([t, 2 * t])) for of_one, (t,) in (only(f, i) for i in every)
            ],
        )

    assert_same(op, transformed)


def test_per_sample_gradients_are_stocks():
    (z,), target = leaves((6, 4)), torch.arange(6) % 4
    x, weight, bias = layer(6, 3)

    def per_sample(f, loss):
        def of_sample(weight, bias, x, target):
            return loss(f(x, weight, bias, "silu"), target)

        return (
            func.vmap(loss)(z, target),
            func.vmap(func.grad(loss))(z, target),
            func.vmap(func.grad(of_sample, (0, 1)), (None, None, 0, 0))(weight, bias, x, target),
        )

    torch.testing.assert_close(per_sample(linear, cross_entropy), per_sample(stock, F.cross_entropy))


@every_op
def test_backward_can_be_batched(op):
    tensors = op.tensors()

    def batched(f):
        y = f(*tensors)
        cotangents = torch.eye(y.numel()).reshape(-1, *y.shape)
        return torch.autograd.grad(y, present(tensors), cotangents, is_grads_batched=True)

    assert_same(op, batched)


def chains(*sizes):
    """A network of ours, and the same of torch's own modules."""
    stocks = stock_chain(*sizes, activation=nn.Tanh)
    ours = fastmlp.MLP(*sizes, activation="tanh")
    with torch.no_grad():
        for a, b in zip(stocks.parameters(), ours.parameters(), strict=True):
            a.copy_(b)
    return ours, stocks


def test_vectorized_jacobians_and_hessians_of_a_model_are_stocks():
    ours, stocks = chains(3, 5, 4, 2)
    x = torch.randn(4, 3, requires_grad=True)

    def vectorized(model):
        return (
            functional.jacobian(model, x, vectorize=True),
            functional.hessian(lambda x: model(x).square().sum(), x, vectorize=True),
        )

    torch.testing.assert_close(vectorized(ours), vectorized(stocks))


@pytest.mark.parametrize(
    "frozen", [[], ["0"], ["0", "1"], ["x"], ["x", "0.weight"], ["1.weight", "2.bias"]], ids=str
)
def test_gradients_of_gradients_reach_what_the_first_did_not_keep(frozen):
    ours, stocks = chains(3, 5, 4, 2)

    def second(model):
        x = torch.ones(2, 6, 3).requires_grad_("x" not in frozen)
        linears = [module for module in model if isinstance(module, nn.Linear)]
        for i, module in enumerate(linears):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(not {str(i), f"{i}.{name}"} & set(frozen))
        wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
        first = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), wanted)

    torch.testing.assert_close(second(ours), second(stocks), rtol=1e-4, atol=1e-5)


# ---- what is kept for backward


def saved(call):
    """What the graph keeps: the tensors, in the order of saving."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


def described(kept, names):
    """Each by the argument that it is, transposed or not, or else by its shape."""
    names = {t.data_ptr(): name for name, t in names.items()}
    return [(names.get(t.data_ptr(), ""), *t.shape, *t.stride()) for t in kept]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_keep_what_stocks_keep_whatever_requires_a_gradient(depth, activation, bias):
    x, weights = torch.randn(3, 4), [torch.randn(4, 4) for _ in range(depth)]
    biases = [torch.randn(4) for _ in range(depth)] if bias else []
    tensors = [x, *weights, *biases]
    names = {str(i): t for i, t in enumerate(tensors)}

    def stocks():
        h = x
        for i, weight in enumerate(weights):
            h = stock(h, weight, biases[i] if bias else None, activation if i + 1 < depth else None)

    for needed in product([False, True], repeat=len(tensors)):
        for t, need in zip(tensors, needed, strict=True):
            t.requires_grad_(need)
        ours = saved(lambda: fastmlp.functional.mlp(x, weights, biases or None, activation))
        assert described(ours, names) == described(saved(stocks), names), needed


@every_activation
def test_a_layer_keeps_what_stocks_keeps_whatever_requires_a_gradient(activation):
    tensors = layer(4, 3)
    names = {str(i): t for i, t in enumerate(tensors)}
    for needed in product([False, True], repeat=3):
        for t, need in zip(tensors, needed, strict=True):
            t.requires_grad_(need)
        kept = [described(saved(lambda f=f: f(*tensors, activation)), names) for f in (linear, stock)]
        assert kept[0] == kept[1], needed


def test_the_loss_keeps_no_more_bytes_than_stocks():
    z, target = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 5
    losses = fastmlp.functional.cross_entropy, F.cross_entropy
    ours, stocks = (sum(t.nbytes for t in saved(lambda f=f: f(z, target))) for f in losses)
    assert ours <= stocks


WRITTEN = {
    "a bias": (lambda x, weight, bias, y: bias, ()),
    "the input of a frozen layer": (lambda x, weight, bias, y: x, ("weight", "bias")),
    "the input, where biases alone are trained": (lambda x, weight, bias, y: x, ("x", "weight")),
    "the weight, where the input has no gradient": (lambda x, weight, bias, y: weight, ("x",)),
}


@pytest.mark.parametrize(("choose", "frozen"), WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize(
    "f", [linear, lambda *a: fastmlp.functional.mlp(a[0], [a[1], torch.eye(5)], [a[2], a[2]])]
)
def test_what_backward_does_not_read_may_be_written_before_it(f, choose, frozen):
    x, weight, bias = (
        t.requires_grad_(name not in frozen)
        for name, t in zip(("x", "weight", "bias"), layer(4, 3), strict=True)
    )
    y = f(x, weight, bias)
    wanted = [t for t in (x, weight, bias) if t.requires_grad]
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    with torch.no_grad():
        choose(x, weight, bias, y).mul_(3)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), wanted), expected)


def test_a_loss_whose_logits_are_written_before_backward_is_differentiated_as_stocks():
    target = torch.tensor([0, 2, 1, 0])

    def gradient(loss):
        x = torch.ones(4, 3, requires_grad=True)
        z = x * torch.arange(3.0)
        value = loss(z, target)
        z.detach().zero_()
        return torch.autograd.grad(value, x)

    torch.testing.assert_close(gradient(fastmlp.functional.cross_entropy), gradient(F.cross_entropy))


class Own(nn.Module):
    """A model with a forward of its own."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias), nn.Linear(6, 6, bias)
        self.flatten = nn.Flatten(0)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return torch.tanh(self.second(x))


class OwnAndMore(Own):
    """A model that ends by what is no layer, and saves nothing."""

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.flatten(x)


def chain_of_two(bias):
    return nn.Sequential(nn.Linear(6, 6, bias), nn.ReLU(), nn.Linear(6, 6, bias), nn.Tanh())


@pytest.mark.parametrize("watched", ["first", "then", "never"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [chain_of_two, Own, OwnAndMore])
def test_a_checkpoint_may_take_stocks_operations_one_time_and_ours_the_other(make, watched, bias):
    def gradients(fuse):
        torch.manual_seed(0)
        model = make(bias)
        x = torch.randn(6, 6, requires_grad=True)
        model = fuse(model)
        counter = FlopCounterMode(display=False)  # its hooks are global: every module is called by itself
        with counter if watched == "first" else nullcontext():
            y = checkpoint(model, x, use_reentrant=False)
        with counter if watched == "then" else nullcontext():
            y.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    torch.testing.assert_close(gradients(fastmlp.fuse), gradients(lambda model: model))


# ---- the dispatcher


@pytest.mark.parametrize(
    "key", ["CPU", "Meta", "CompositeExplicitAutograd", "FuncTorchBatched", "Batched", "Autograd"]
)
@pytest.mark.parametrize("op", ["network", "network_backward"])
def test_forward_and_backward_have_kernels_for_every_dispatch_key(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmlp::{op}", key)


def test_a_torch_function_mode_sees_torchs_functions_and_a_device_as_a_context_is_none():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    ours = fastmlp.MLP(3, 5, 2)
    sequential = fastmlp.fuse(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    for model, expected in (
        (ours, [F.linear, torch.relu, F.linear]),
        (sequential, [F.linear, F.relu]),
        (fastmlp.fuse(nn.Linear(3, 5)), [F.linear]),
    ):
        seen = []
        with Seen():
            model(torch.ones(2, 3))
        assert [f for f in seen if f in (F.linear, torch.relu, F.relu)] == expected
    with torch.device("cpu"), torch.autograd.profiler.profile() as profile:
        ours(torch.ones(2, 3))
    assert "fastmlp::network" in {event.name for event in profile.function_events}


@every_op
def test_inference_mode_gives_the_same_bits(op):
    tensors = op.tensors()
    with torch.inference_mode():
        y = op.ours(*tensors)
    assert y.is_inference()
    assert torch.equal(y, op.ours(*tensors))


CASTS = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64, torch.bfloat16)]
CASTS += [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(
    ("dtype", "cast", "name"),
    [
        *((*CASTS[0], name) for name in OPS),
        *((*cast, name) for cast in CASTS[1:] for name in ("network", "loss")),
    ],
    ids=str,
)
def test_autocast_casts_as_for_stock(instruction_set, dtype, cast, name):
    op = OPS[name]
    tensors = op.tensors(dtype=dtype)
    with torch.autocast("cpu", dtype=cast):
        ours, theirs = (gradients(f(*tensors), *tensors) for f in (op.ours, op.stock))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


# ---- tracing


def x(*shape, grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def one_layer(*shape, grad=False, activation="silu"):
    name, parameters = resolved(activation)
    return x(*shape, grad=grad), [x(5, shape[-1], grad=grad)], [x(5, grad=grad)], [name], parameters


def two_layers(grad=False):
    """Input, weights and biases of a network with one hidden layer."""
    return x(4, 3, grad=grad), [x(5, 3, grad=grad), x(2, 5, grad=grad)], [x(5, grad=grad), x(2, grad=grad)]


def backward(activation, wanted):
    z, weights, _, names, parameters = one_layer(4, 3, activation=activation)
    return x(4, 5), z, weights, [x(4, 5)], names, parameters, wanted


TARGET = torch.arange(6) % 4
WEIGHT = torch.ones(4)
ADAM = [0.1, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0]
SGD = [0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]
NUMBERS = fastmlp._C.count_up_numbers("adam", ADAM, [0], [torch.zeros(())], False)
CALLS = [  # of every op: each kind of shape, of activation, of option that tells what comes out
    *(
        ("network", one_layer(*shape, grad=grad))
        for shape, grad in [((4, 3), True), ((4, 3), False), ((2, 2, 3), True), ((3,), True), ((0, 3), True)]
    ),
    ("network", one_layer(4, 3, grad=True, activation="tanh")),
    ("network", one_layer(4, 3, grad=True, activation=None)),
    ("network", (*two_layers(grad=True), ["tanh", "elu"], [2.0])),
    ("network_forward", (*two_layers(), ["tanh", "elu"], [2.0])),
    ("network_forward", one_layer(2, 2, 3)),
    *(("network_backward", backward("silu", wanted)) for wanted in ([0, 1, 2], [1, 2], [0])),
    *(("network_backward", backward(activation, [0, 1, 2])) for activation in ("tanh", None)),
    (
        "network_backward",
        (x(4, 2), *two_layers()[:2], [x(4, 5), x(4, 2)], ["elu", "tanh"], [2.0], [0, 1, 2, 3, 4]),
    ),
    ("cross_entropy", (x(6, 4, grad=True), TARGET)),
    ("cross_entropy", (x(6, 4), TARGET, WEIGHT, "none", 1, 0.2)),
    ("cross_entropy", (x(6, 4, grad=True), TARGET, WEIGHT, "none", 1, 0.2)),
    ("cross_entropy", (x(2, 4, 3, grad=True), TARGET.view(2, 3), None, "sum")),
    ("cross_entropy", (x(0, 4, grad=True), TARGET[:0], None, "sum")),
    ("cross_entropy", (x(4, grad=True), TARGET[0])),
    ("cross_entropy_forward", (x(6, 4), TARGET, None, "mean", -100, 0.0)),
    ("cross_entropy_forward", (x(6, 4), TARGET, WEIGHT, "none", 1, 0.2)),
    ("why_not_fused", (x(4, 3, grad=True), x(5, 3, grad=True))),
    ("why_not_fused", (x(4, 3), x(5, 3))),
    ("optimize_", ("sgd", [x(4, 3), x(5)], [x(4, 3), x(5)], [x(4, 3), x(5)], [], SGD)),
    (
        "optimize_",
        ("adam", [x(4, 3)], [x(4, 3)], [x(4, 3), x(4, 3).abs()], [torch.zeros(())], ADAM),
    ),
    (
        "optimize_by_numbers_",
        ("adam", [x(4, 3)], [x(4, 3)], [x(4, 3), x(4, 3).abs()], NUMBERS),
    ),
    ("clip_grad_norm_", ([x(4, 3), x(5)], 0.5)),
    (
        "train_step_",
        (
            *(x(6, 3), TARGET, [x(5, 3), x(5), x(4, 5)], [torch.empty(0)] * 3, [], torch.empty(0).byte()),
            *([1, 0], ["tanh", "identity"], [], "cross_entropy", True, None, None, -100, 0.0),
            *("sgd", [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 3, [1] * 3, [], torch.empty(()), 1.0),
        ),
    ),
]
NOT_TRACED = ("test_schema",)  # what a step changes is nothing that a graph could hold
NO_TENSOR = ("test_schema", "test_autograd_registration", "test_faketensor")  # in the result, that is
CHECKS = {"why_not_fused": NO_TENSOR}
CHECKS |= dict.fromkeys(("optimize_", "optimize_by_numbers_", "clip_grad_norm_", "train_step_"), NOT_TRACED)


def test_every_op_is_checked():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastmlp::")}
    assert registered == {f"fastmlp::{name}" for name, _ in CALLS}


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[f"{op}, {i}" for i, (op, _) in enumerate(CALLS)])
def test_every_op_passes_opcheck(op, arguments):
    checks = {"test_utils": CHECKS[op]} if op in CHECKS else {}
    torch.library.opcheck(getattr(torch.ops.fastmlp, op).default, arguments, **checks)


COMPILED = {
    "linear, silu": (OPS["linear, silu"], "network"),
    "network": (OPS["network"], "network"),
    "loss": (OPS["loss"], "cross_entropy"),
}


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("op", "name"), COMPILED.values(), ids=COMPILED)
def test_compile_traces_one_graph_and_trains_as_stock(op, name, dynamic):
    from torch._dynamo.backends.common import aot_autograd

    x, *rest = op.tensors()
    targets = []

    def compiler(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def run(f):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x: f(x, *rest).square().sum(),
            fullgraph=True,
            dynamic=dynamic,
            backend=aot_autograd(fw_compiler=compiler),
        )
        inputs = [torch.randn(batch, x.shape[-1], requires_grad=True) for batch in (6, 5, 3)]
        return [torch.autograd.grad(compiled(x), present([x, *rest])) for x in inputs]

    def seeded(f):
        torch.manual_seed(0)
        return run(f)

    assert_same(op, seeded)
    assert getattr(torch.ops.fastmlp, f"{name}_forward").default in targets
    assert name == "cross_entropy" or torch.ops.fastmlp.network_backward.default in targets


def test_compiled_autograd_gives_stocks_gradient():
    op = network_op("silu", "tanh", None)
    tensors = op.tensors()

    def found(f):
        with torch._dynamo.config.patch(compiled_autograd=True):
            loss = cross_entropy if f is op.ours else F.cross_entropy
            torch.compile(lambda: loss(f(*tensors), torch.tensor([0, 1, 1, 0])).backward(), backend="eager")()
        kept = [t.grad for t in present(tensors)]
        for t in present(tensors):
            t.grad = None
        return kept

    assert_same(op, found)
