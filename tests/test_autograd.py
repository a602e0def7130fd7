"""Differentiation, transformation and tracing: all as for torch's own operations."""

from contextlib import nullcontext
from functools import partial
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from reference import ACTIVATIONS
from reference import linear as stock
from torch import nn
from torch.autograd import forward_ad, functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastmlp
from fastmlp.activations import resolved
from fastmlp.functional import linear

NOT_TWICE = {"hardsigmoid"}  # has no second derivative in torch
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)


def layer(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, (5, shape[-1]), (5,)]
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in sizes]


def assert_same(call):
    """Call(linear) is call(stock)."""
    torch.testing.assert_close(call(linear), call(stock), rtol=1e-4, atol=1e-4)


# ---- derivatives


@every_activation
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (3,)], ids=str)
def test_first_and_second_derivatives_of_the_composite_path_are_right(activation, shape):
    arguments = layer(*shape, dtype=torch.float64)

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


@every_activation
def test_second_derivatives_of_the_fused_path_are_stocks(activation):
    x, weight, bias = layer(4, 3)
    if activation in NOT_TWICE:
        pytest.skip("torch has none")

    def second(f):
        y = f(x, weight, bias, activation)
        first = torch.autograd.grad(y.square().sum(), (x, weight, bias), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))

    assert_same(second)


def test_third_derivatives_of_the_fused_path_are_stocks():
    x, weight, bias = layer(4, 3)

    def third(f):
        value = f(x, weight, bias, "tanh").square().sum()
        for _ in range(2):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(value, (x, weight, bias))

    assert_same(third)


def test_a_result_changed_in_place_is_found_out_in_backward():
    x, weight, bias = layer(4, 3)
    y = linear(x, weight, bias, "tanh")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_activation
def test_forward_mode_gives_stocks_tangent(activation):
    arguments = [t.detach() for t in layer(4, 3)]

    def tangent(f):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in arguments]
            return forward_ad.unpack_dual(f(*duals, activation)).tangent

    assert_same(tangent)


@every_activation
@pytest.mark.parametrize("grad", [True, False])
def test_function_transforms_give_stocks_results(activation, grad):
    x, weight, bias = (t.detach().requires_grad_(grad) for t in layer(4, 3))

    def transformed(f):
        def loss(x, weight, bias):
            return f(x, weight, bias, activation).square().sum()

        func = torch.func
        return (
            func.grad(loss, argnums=(0, 1, 2))(x, weight, bias),
            func.vmap(func.grad(loss, argnums=1), (0, None, None))(x, weight, bias),  # per sample
            func.vmap(loss, (0, None, None))(x, weight, bias),
            func.vmap(loss, (None, 0, None))(x, weight.expand(2, 5, 3), bias),  # an ensemble
            func.jvp(loss, (x, weight, bias), (x, weight, bias)),
            func.jacrev(f)(x, weight, bias, activation),
            func.jacfwd(f)(x, weight, bias, activation),
            () if activation in NOT_TWICE else func.hessian(loss)(x, weight, bias),
        )

    assert_same(transformed)


def network(*sizes, activation="tanh"):
    """A network of ours, and the same of torch's own modules."""
    torch.manual_seed(0)
    ours = fastmlp.MLP(*sizes, activation=activation)
    modules = {"relu": nn.ReLU, "tanh": nn.Tanh}
    layers = [part for k, n in pairwise(sizes) for part in (nn.Linear(k, n), modules[activation]())]
    stocks = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for a, b in zip(stocks.parameters(), ours.parameters(), strict=True):
            a.copy_(b)
    return ours, stocks


@pytest.mark.parametrize("sizes", [(3, 2), (3, 5, 2), (3, 5, 4, 2)], ids=str)
def test_backward_can_be_batched(sizes):
    x = torch.randn(4, 3)

    def batched(model):
        y = model(x.requires_grad_())
        cotangents = torch.eye(y.numel()).reshape(-1, *y.shape)
        arguments = [x, *model.parameters()]
        return (
            torch.autograd.grad(y, arguments, cotangents, is_grads_batched=True),
            functional.jacobian(model, x, vectorize=True),
            functional.hessian(lambda x: model(x).square().sum(), x, vectorize=True),
        )

    ours, stocks = network(*sizes)
    torch.testing.assert_close(batched(ours), batched(stocks))


def test_a_batched_backward_of_the_loss_is_stocks():
    z, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 0])

    def batched(loss):
        return torch.autograd.grad(
            loss(z, target, reduction="none"), z, torch.eye(4), is_grads_batched=True, retain_graph=True
        )

    torch.testing.assert_close(batched(fastmlp.functional.cross_entropy), batched(F.cross_entropy))


@pytest.mark.parametrize(
    "frozen", [[], ["0"], ["0", "1"], ["x"], ["x", "0.weight"], ["1.weight", "2.bias"]], ids=str
)
def test_gradients_of_gradients_reach_what_the_first_did_not_keep(frozen):
    ours, stocks = network(3, 5, 4, 2)

    def second(model):
        x = torch.ones(2, 6, 3).requires_grad_("x" not in frozen)
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
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


@pytest.mark.parametrize("watched_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_may_take_stocks_operations_one_time_and_ours_the_other(watched_first, bias):
    def gradients(fuse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6, bias), nn.ReLU(), nn.Linear(6, 6, bias), nn.Tanh())
        x = torch.randn(6, 6, requires_grad=True)
        model = fuse(model)
        counter = FlopCounterMode(display=False)  # its hooks are global: every module is called by itself
        with counter if watched_first else nullcontext():
            y = checkpoint(model, x, use_reentrant=False)
        with nullcontext() if watched_first else counter:
            y.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

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

    ours, _ = network(3, 5, 2, activation="relu")
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


def one_layer(x, weight, bias, activation):
    """The arguments of the op."""
    name, parameters = resolved(activation)
    return x, [weight], [bias], [name], parameters


@every_activation
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (3,), (0, 3)], ids=str)
def test_the_forward_op_passes_opcheck(shape, activation, grad):
    arguments = [t.detach().requires_grad_(grad) for t in layer(*shape)]
    torch.library.opcheck(torch.ops.fastmlp.network.default, one_layer(*arguments, activation))


@every_activation
@pytest.mark.parametrize("wanted", [[0, 1, 2], [1, 2], [0]], ids=str)
def test_the_backward_op_passes_opcheck(activation, wanted):
    arguments = one_layer(*(t.detach() for t in layer(4, 3)), activation)
    y, *z = torch.ops.fastmlp.network_forward(*arguments)
    x, weights, _, names, parameters = arguments
    torch.library.opcheck(
        torch.ops.fastmlp.network_backward.default,
        (torch.ones_like(y), x, weights, z or [y], names, parameters, wanted),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_traces_the_ops_in_one_graph_and_trains_as_stock(dynamic):
    x, weight, bias = layer(6, 7)
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def step(f):
        def loss(x):
            return f(f(x, weight, bias, "relu"), weight.t().contiguous()[:5, :5].contiguous()).square().mean()

        return torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")

    for batch in (6, 5, 3):
        assert_same(lambda f, batch=batch: torch.autograd.grad(step(f)(x[:batch]), (weight, bias)))

    from torch._dynamo.backends.common import aot_autograd

    torch.compile(
        lambda x: linear(x, weight, bias, "relu").sum(),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=backend),
    )(x).backward()
    assert torch.ops.fastmlp.network_forward.default in targets
    assert torch.ops.fastmlp.network_backward.default in targets
