"""Differentiation, transformation and tracing: all as for torch's own operations."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fastmlp.functional import COMPOSITES, linear

ACTIVATIONS = [None, *COMPOSITES]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def stock(x, weight, bias=None, activation=None):
    z = F.linear(x, weight, bias)
    return z if activation is None else COMPOSITES[activation](z)


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
    assert torch.autograd.gradgradcheck(function, arguments)


@every_activation
def test_second_derivatives_of_the_fused_path_are_stocks(activation):
    x, weight, bias = layer(4, 3)

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
            func.hessian(loss)(x, weight, bias),
        )

    assert_same(transformed)


# ---- the dispatcher


@every_activation
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (3,), (0, 3)], ids=str)
def test_the_forward_op_passes_opcheck(shape, activation, grad):
    arguments = [t.detach().requires_grad_(grad) for t in layer(*shape)]
    torch.library.opcheck(torch.ops.fastmlp.linear.default, (*arguments, activation or "identity"))


@every_activation
@pytest.mark.parametrize("mask", [(True, True, True), (False, True, True), (True, False, False)], ids=str)
def test_the_backward_op_passes_opcheck(activation, mask):
    x, weight, bias = (t.detach() for t in layer(4, 3))
    y = linear(x, weight, bias, activation)
    torch.library.opcheck(
        torch.ops.fastmlp.linear_backward.default,
        (torch.ones_like(y), x, weight, y, activation or "identity", mask),
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
    assert torch.ops.fastmlp.linear.default in targets
    assert torch.ops.fastmlp.linear_backward.default in targets
