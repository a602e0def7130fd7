"""The modules: torch.nn.Linear in everything but the speed, and training that follows stock's."""

import pytest
import torch
from reference import MODULES, chain
from torch import nn

import fastmlp


def test_a_layer_is_a_linear_of_the_same_initial_values_and_state():
    torch.manual_seed(0)
    stock = nn.Linear(7, 5)
    torch.manual_seed(0)
    ours = fastmlp.LinearReLU(7, 5)
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    nn.Linear(7, 5).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", MODULES)
def test_a_layer_computes_linear_and_activation(activation, bias):
    layer, x = fastmlp.Linear(7, 5, bias, activation=activation), torch.randn(3, 7)
    expected = MODULES[activation]()(nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), expected)


def test_arguments_are_those_of_linear():
    layer = fastmlp.LinearReLU(7, 5, False, device="meta", dtype=torch.float64)
    assert layer.bias is None
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize(
    "make", [lambda a: fastmlp.Linear(7, 5, activation=a), lambda a: fastmlp.MLP(7, 5, 3, activation=a)]
)
def test_an_unknown_activation_is_a_value_error(make):
    with pytest.raises(
        ValueError, match=r"activation: expected 'relu', 'leaky_relu', .*'hardsigmoid' or None, got 'sine'"
    ):
        make("sine")


@pytest.mark.parametrize(
    "activation", [("elu", 1.0, 2.0), ("relu", 0.5), nn.PReLU(), nn.Sequential(nn.ReLU())], ids=str
)
def test_an_activation_that_the_kernels_do_not_know_is_a_value_error(activation):
    with pytest.raises(ValueError, match="activation: expected"):
        fastmlp.Linear(7, 5, activation=activation)


GIVEN = {
    nn.ReLU(inplace=True): "relu",
    nn.LeakyReLU(0.2): ("leaky_relu", 0.2),
    nn.ReLU6(): "relu6",
    nn.Hardtanh(-0.5, 2): ("hardtanh", -0.5, 2.0),
    nn.ELU(2): ("elu", 2.0),
    nn.CELU(0.5): ("celu", 0.5),
    nn.SELU(): "selu",
    nn.Sigmoid(): "sigmoid",
    nn.Tanh(): "tanh",
    nn.Softplus(2, 5): ("softplus", 2.0, 5.0),
    nn.SiLU(): "silu",
    nn.GELU(): "gelu",
    nn.GELU("tanh"): "gelu_tanh",
    nn.Mish(): "mish",
    nn.Hardswish(): "hardswish",
    nn.Hardsigmoid(): "hardsigmoid",
    nn.Identity(): None,
}


@pytest.mark.parametrize(("module", "activation"), GIVEN.items(), ids=str)
def test_an_activation_may_be_given_as_a_module(module, activation):
    model, x = fastmlp.MLP(7, 5, 3, activation=module), torch.randn(2, 7)
    assert model[0].activation == activation
    torch.testing.assert_close(model[0](x), module(nn.functional.linear(x, *model[0].parameters())))
    again = fastmlp.MLP(7, 5, 3, activation=activation)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("sizes", [(), (7,)])
def test_an_mlp_of_less_than_two_sizes_is_a_value_error(sizes):
    with pytest.raises(ValueError, match="sizes: expected at least in_features and out_features"):
        fastmlp.MLP(*sizes)


def test_printing_shows_the_activation():
    assert str(fastmlp.Linear(7, 5)) == "Linear(in_features=7, out_features=5, bias=True)"
    assert (
        str(fastmlp.LinearReLU(7, 5))
        == "LinearReLU(in_features=7, out_features=5, bias=True, activation='relu')"
    )


def test_an_mlp_is_a_sequential_of_layers_with_activations_between():
    model = fastmlp.MLP(7, 5, 4, 3, activation="sigmoid", bias=False)
    assert isinstance(model, nn.Sequential)
    assert [layer.activation for layer in model] == ["sigmoid", "sigmoid", None]
    assert list(model.state_dict()) == ["0.weight", "1.weight", "2.weight"]


EDITS = {
    "a slice": lambda m: m[:-1],
    "another slice": lambda m: m[::2],
    "a sum": lambda m: m + nn.Sequential(nn.Linear(3, 3)),
    "a product": lambda m: m[1:3] * 2,
    "an insertion": lambda m: m.insert(1, nn.Identity()),
    "an extension": lambda m: m.extend([nn.Linear(3, 2), nn.Tanh()]),
    "a removal": lambda m: (m.pop(3), m)[1],
    "a deletion": lambda m: (m.__delitem__(slice(1, 3)), m)[1],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_mlp_is_edited_as_a_sequential_is(edit):
    model, x = fastmlp.MLP(3, 3, 3, 3, 3), torch.randn(2, 3)
    torch.manual_seed(0)
    expected = edit(nn.Sequential(*model))
    torch.manual_seed(0)
    edited = edit(model)
    assert isinstance(edited, nn.Sequential)
    assert list(edited.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(edited(x), expected(x))


def test_parts_of_an_mlp_can_be_swapped_hooked_and_parametrized():
    model, x, seen = fastmlp.MLP(7, 5, 3), torch.randn(2, 7), []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    model[1] = nn.Linear(5, 2)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    y = model(x)
    y.sum().backward()
    assert y.shape == (2, 2)
    assert seen[0].min() >= 0
    assert model[0].parametrizations.weight.original0.grad is not None


# What a step computes, test_optim.py shows, and what an activation does, test_linear.py.
@pytest.mark.parametrize(
    ("activation", "momentum"),
    [
        ("relu", 0.9),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("sigmoid", 0), ("tanh", 0.9)]),
    ],
)
def test_two_hundred_steps_of_sgd_follow_stocks(instruction_set, activation, momentum):
    torch.manual_seed(0)
    stock, ours = (
        chain(100, 50, 10, activation=MODULES[activation]),
        fastmlp.MLP(100, 50, 10, activation=activation),
    )
    with torch.no_grad():
        for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
            b.copy_(a)
    centres, generator = torch.randn(10, 100), torch.Generator().manual_seed(1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=momentum) for m in (stock, ours)]
    curves = [[], []]
    for _ in range(200):
        target = torch.randint(10, (32,), generator=generator)
        x = centres[target] + torch.randn(32, 100, generator=generator)
        for model, optimizer, curve in zip((stock, ours), optimizers, curves, strict=True):
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    assert curves[1][-1] < 0.9 * curves[1][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-4)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
