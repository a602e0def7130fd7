"""The whole network as one op: the same as its layers one by one, in all that can be asked of it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import ACTIVATIONS, gradients, is_fused
from reference import mlp as stock
from reference import network as stock_network

import fastmlp
from fastmlp.functional import mlp


def network(leading, sizes, bias=True, dtype=torch.float32):
    """Leaves that require a gradient: x, the weights, the biases."""
    x = torch.randn(*leading, sizes[0])
    weights = [torch.randn(n, k) / max(k, 1) ** 0.5 for k, n in pairwise(sizes)]
    biases = [torch.randn(n) for n in sizes[1:]] if bias else []
    make = [t.to(dtype).requires_grad_() for t in (x, *weights, *biases)]
    return make[0], make[1 : 1 + len(weights)], make[1 + len(weights) :]


def results(function, x, weights, biases, activation):
    """Y, and the gradients of whatever requires one."""
    return gradients(function(x, weights, biases, activation), x, *weights, *biases)


def assert_same(call, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(call(mlp), call(stock), rtol=rtol, atol=atol)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 9), max_size=2),
    sizes=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_network_gives_the_values_and_gradients_of_stock(
    instruction_set, leading, sizes, bias, activation
):
    arguments = [*network(leading, sizes, bias), activation]
    assert is_fused(mlp(*arguments))
    assert_same(lambda f: results(f, *arguments))
    with torch.no_grad():
        assert_same(lambda f: f(*arguments))


def nodes(y):
    """The names of the autograd nodes that have made y, but for those of leaves."""
    names, stack = [], [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node.name() != "torch::autograd::AccumulateGrad":
            names.append(node.name().split("::")[-1])
            stack += [below for below, _ in node.next_functions]
    return names


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 9), max_size=2),
    sizes=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    layers=st.lists(st.tuples(st.booleans(), st.sampled_from(ACTIVATIONS)), min_size=5, max_size=5),
)
def test_any_mix_of_activations_and_biases_is_one_node_with_the_values_and_gradients_of_stock(
    instruction_set, leading, sizes, layers
):
    x, weights, biases = network(leading, sizes)
    biases = [bias if has else None for bias, (has, _) in zip(biases, layers, strict=False)]
    activations = [activation for _, activation in layers][: len(weights)]
    arguments = x, weights, biases, activations
    y = fastmlp.functional.network(*arguments)
    (name,) = nodes(y)
    assert "NetworkFunction" in name
    ours, stocks = (gradients(z, x, *weights, *biases) for z in (y, stock_network(*arguments)))
    torch.testing.assert_close(ours, stocks, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(fastmlp.functional.network(*arguments), y)


@pytest.mark.parametrize("batch", [1, 64, 300])
def test_a_network_large_enough_for_every_thread_is_right(instruction_set, batch):
    arguments = [*network([batch], [100, 300, 200, 10]), "tanh"]
    assert_same(lambda f: results(f, *arguments), atol=1e-4)


def test_the_network_gives_the_bits_of_its_layers_one_by_one(instruction_set):
    model, x = fastmlp.MLP(100, 300, 200, 10, activation="tanh"), torch.randn(130, 100, requires_grad=True)
    y, leaves = x, [x, *model.parameters()]
    for layer in model:
        y = layer(y)
    assert torch.equal(model(x), y)
    both = zip(*(torch.autograd.grad(out.sum(), leaves) for out in (model(x), y)), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def test_the_number_of_threads_changes_no_bit(instruction_set):
    arguments = [*network([130], [100, 300, 200, 10]), "relu"]
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs.append(results(mlp, *arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (4,), (5, 6), (0, 3), (2, 5)])
def test_gradients_are_computed_where_they_are_asked_for(wanted):
    x, weights, biases = network([6], [7, 5, 4, 3])
    for i, tensor in enumerate((x, *weights, *biases)):
        tensor.requires_grad_(i in wanted)
    assert_same(lambda f: results(f, x, weights, biases, "sigmoid"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_the_kernels_do_not_cover_is_computed_layer_by_layer(dtype):
    arguments = [*network([4], [5, 4, 3], dtype=dtype), "relu"]
    assert not is_fused(mlp(*arguments))
    assert_same(lambda f: results(f, *arguments), 1e-2, 1e-2)


ODD = {
    "a bias of one element": lambda w, b: b.__setitem__(0, torch.randn(1)),
    "a bias of no dimension": lambda w, b: b.__setitem__(1, torch.randn(())),
    "a bias for each row": lambda w, b: b.__setitem__(0, torch.randn(4, 5)),
    "a vector for a weight": lambda w, b: (
        w.__setitem__(2, torch.randn(6)),
        b.clear(),
    ),
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_broadcast_is_computed_as_stocks(change, grad):
    x, weights, biases = network([4], [7, 5, 6, 3])
    change(weights, biases)
    arguments = [x, weights, biases, "tanh"]
    with torch.set_grad_enabled(grad):
        assert_same(lambda f: f(*arguments))
    if grad:
        assert_same(lambda f: results(f, *arguments))
    meta = mlp(x.to("meta"), [w.to("meta") for w in weights], [b.to("meta") for b in biases], "tanh")
    assert meta.shape == stock(*arguments).shape


@pytest.mark.parametrize("name", ["input", "weight"])
@pytest.mark.parametrize("f", [fastmlp.functional.linear, lambda x, weight: mlp(x, [weight])])
def test_none_for_a_tensor_is_stocks_type_error(f, name):
    arguments = {"input": torch.ones(2, 3), "weight": torch.ones(4, 3)} | {name: None}
    with pytest.raises(TypeError) as theirs:
        F.linear(*arguments.values())
    with pytest.raises(TypeError) as ours:
        f(*arguments.values())
    assert str(ours.value) == str(theirs.value)


def test_a_transposed_weight_is_computed_layer_by_layer():
    x, weights, biases = network([4], [5, 4, 3])
    weights[1] = torch.randn(4, 3, requires_grad=True).t()
    assert_same(lambda f: results(f, x, weights, biases, "relu"))


ERRORS = {
    "no weights": (lambda x, w, b: (x, [], []), "weights: expected one for each layer, got none"),
    "too few biases": (
        lambda x, w, b: (x, w, b[:1]),
        "biases: expected 2, as many as weights, got 1",
    ),
    "an input that does not fit": (
        lambda x, w, b: (x[:, :4], w, b),
        r"input: expected shape \[..., 5\].*got \[4, 4\]",
    ),
    "layers that do not fit": (
        lambda x, w, b: (x, [w[0], w[1][:, :3]], b),
        r"weights\[1\]: expected shape \[\*, 4\].*\[3, 3\]",
    ),
    "a bias that does not fit": (
        lambda x, w, b: (x, w, [b[0], b[0]]),
        r"biases\[1\]: expected shape \[3\].*got \[4\]",
    ),
    "a dtype that does not fit": (
        lambda x, w, b: (x, [w[0], w[1].double()], b),
        r"weights\[1\]: expected dtype Float",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_raise_an_error_that_names_them(case):
    change, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=message):
        mlp(*change(*network([4], [5, 4, 3])))


def test_an_unknown_activation_is_a_value_error():
    with pytest.raises(ValueError, match=r"activation: expected .* got 'sine'"):
        mlp(*network([4], [5, 4, 3]), "sine")


# ---- the module


def is_one_op(model, x):
    (name, *others) = nodes(model(x))
    return "NetworkFunction" in name and not others


def test_an_mlp_is_one_op():
    assert is_one_op(fastmlp.MLP(7, 5, 3), torch.randn(2, 7))
    assert is_one_op(fastmlp.MLP(7, 5, 3, bias=False), torch.randn(2, 7))
    assert is_one_op(fastmlp.MLP(7, 5, 4, 3, activation="tanh").train(), torch.randn(2, 7))


LAYERS = {
    "another activation": lambda model: setattr(model[0], "activation", None),
    "an activation at the end": lambda model: setattr(model[1], "activation", "relu"),
    "a layer without bias": lambda model: model.__setitem__(0, fastmlp.LinearReLU(7, 5, bias=False)),
    "one more layer": lambda model: model.append(fastmlp.Linear(3, 2, activation="sigmoid")),
}


@pytest.mark.parametrize("change", LAYERS)
def test_an_mlp_whose_layers_were_changed_is_one_op_still(change):
    model, x = fastmlp.MLP(7, 5, 3), torch.randn(2, 7)
    LAYERS[change](model)
    assert is_one_op(model, x)
    expected = x
    for layer in model:
        expected = layer(expected)
    assert torch.equal(model(x), expected)


CHANGES = {
    "another module": lambda model: model.__setitem__(1, torch.nn.Softsign()),
    "one more module": lambda model: model.append(torch.nn.Softsign()),
    "a forward hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "a forward pre-hook": lambda model: model[0].register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda model: model[0].register_full_backward_hook(lambda *_: None),
    "a parametrization": lambda model: torch.nn.utils.parametrizations.weight_norm(model[0]),
    "pruning": lambda model: __import__("torch.nn.utils.prune").nn.utils.prune.random_unstructured(
        model[0], "weight", 0.5
    ),
    "a forward of its own": lambda model: setattr(
        model[0], "forward", lambda x: x.cos() @ torch.ones(7, 5, requires_grad=True)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_mlp_whose_parts_were_changed_runs_them_one_by_one(change):
    model, x = fastmlp.MLP(7, 5, 3), torch.randn(2, 7)
    CHANGES[change](model)
    assert not is_one_op(model, x)
    expected = x
    for layer in model:
        expected = layer(expected)
    assert torch.equal(model(x), expected)


def test_a_global_hook_sees_every_layer():
    model, seen = fastmlp.MLP(7, 5, 3), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(2, 7))
    finally:
        handle.remove()
    assert seen == [model[0], model[1], model]


def test_an_optimizers_and_a_users_own_changes_to_parameters_are_seen():
    model, x = fastmlp.MLP(7, 5, 3), torch.randn(2, 7)
    before = model(x)
    model[1].bias.data += 1
    torch.testing.assert_close(model(x), before + 1)
