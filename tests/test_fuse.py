"""fuse changes the class of modules and nothing else; whatever its owner does, the numbers are stock's."""

import copy
import inspect
import io
import pickle
import random
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastmlp


class Net(nn.Module):
    """The reference network, as tutorials write it."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(12, 9)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x):
        x = x.view(-1, 12)
        return self.fc2(torch.relu(self.fc1(x)))


def sequential():
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


MODELS = {"sequential": sequential, "forward": Net, "linear": lambda: nn.Linear(12, 4)}


def inputs(*shape):
    return torch.randn(*(shape or (5, 12)), requires_grad=True)


def results(model, *args):
    """The output and all gradients."""
    y = model(*args)
    wanted = [t for t in (*args, *model.parameters()) if t.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)


def assert_same(ours, theirs, *args):
    torch.testing.assert_close(results(ours, *args), results(theirs, *args), rtol=1e-4, atol=1e-4)


class Ops(TorchDispatchMode):
    """Notes the activations of the layers of each op that computes some."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.fastmlp.network.default, torch.ops.fastmlp.network_forward.default):
            self.seen.append(tuple(None if name == "identity" else name for name in args[3]))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def ops():
    """What Ops notes during the test."""
    with Ops() as mode:
        yield mode.seen


# ---- what is fused


MODULES = {
    nn.LeakyReLU(0.3, inplace=True): "leaky_relu",
    nn.ReLU6(): "relu6",
    nn.Hardtanh(-0.5, 0.25): "hardtanh",
    nn.ELU(0.5): "elu",
    nn.CELU(2.0): "celu",
    nn.SELU(): "selu",
    nn.Softplus(2.0, 1.0): "softplus",
    nn.SiLU(inplace=True): "silu",
    nn.GELU(): "gelu",
    nn.GELU(approximate="tanh"): "gelu_tanh",
    nn.Mish(): "mish",
    nn.Hardswish(): "hardswish",
    nn.Hardsigmoid(): "hardsigmoid",
    nn.ELU(-0.5): None,
    nn.Softplus(-1.0): None,
}


@pytest.mark.parametrize(("module", "name"), MODULES.items(), ids=str)
def test_an_activation_is_in_the_op_of_its_layers(ops, module, name):
    stock, x = nn.Sequential(nn.Linear(12, 9), module, nn.Linear(9, 4), module), inputs()
    assert_same(fastmlp.fuse(copy.deepcopy(stock)), stock, x)
    ops.clear()
    fastmlp.fuse(stock)(x)
    assert ops == ([(name, name)] if name else [(None,), (None,)])


FUNCTIONS = {
    "F.leaky_relu(x)": "leaky_relu",
    "F.leaky_relu(x, 0.3, inplace=True)": "leaky_relu",
    "F.leaky_relu(x, inplace=False, negative_slope=0.3)": "leaky_relu",
    "F.elu_(x)": "elu",
    "F.hardtanh(x, -0.5, 0.25)": "hardtanh",
    "F.softplus(x, beta=2.0, threshold=1.0)": "softplus",
    "F.gelu(x, approximate='tanh')": "gelu_tanh",
    "torch.celu(x, alpha=2.0)": "celu",
    "torch.selu(x)": "selu",
    "F.silu(x, True)": "silu",
    "F.mish(x)": "mish",
    "F.elu(x, -0.5)": None,
    "F.leaky_relu(x, inplace=1)": None,
}


@pytest.mark.parametrize(("call", "name"), FUNCTIONS.items())
def test_a_function_with_arguments_is_in_the_op_of_its_layer(ops, tmp_path, call, name):
    source = f"def forward(self, x):\n    x = self.fc1(x)\n    x = {call}\n    return self.fc2(x)\n"
    path = tmp_path / "model.py"
    path.write_text(source)
    namespace = {"F": F, "torch": torch}
    exec(compile(source, str(path), "exec"), namespace)
    stock, x = type("Own", (Net,), {"forward": namespace["forward"]})(), inputs()
    assert_same(fastmlp.fuse(copy.deepcopy(stock)), stock, x)
    ops.clear()
    fastmlp.fuse(stock)(x)
    assert ops == ([(name, None)] if name else [(None,), (None,)])


EXCHANGED = [(F, "linear"), (F, "relu"), (F, "dropout"), (torch, "relu"), (torch, "relu_")]
EXCHANGED += [(torch, "sigmoid"), (torch, "tanh")]


@pytest.mark.parametrize(("holder", "name"), EXCHANGED, ids=[name for _, name in EXCHANGED])
def test_a_function_that_has_been_exchanged_in_torch_is_called(monkeypatch, holder, name):
    activations = [nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Tanh(), nn.Dropout()]
    layers = [part for activation in activations for part in (nn.Linear(12, 12), activation)]
    model, function, seen = fastmlp.fuse(nn.Sequential(*layers)), getattr(holder, name), []
    monkeypatch.setattr(holder, name, lambda *args, **kwargs: seen.append(name) or function(*args, **kwargs))
    model(inputs())
    assert seen


def test_an_activation_that_has_been_exchanged_in_torch_is_the_other(monkeypatch, ops):
    model, x = fastmlp.fuse(nn.Sequential(nn.Linear(12, 9), nn.ELU())), inputs()
    assert ops == []
    monkeypatch.setattr(F, "elu", lambda input, *_: torch.tanh(input))
    torch.testing.assert_close(model(x), torch.tanh(model[0](x)))


class Method(Net):
    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class CallsMethod(Net):
    def forward(self, x):
        return self.fc2(F.tanh(self.fc1(x)))  # which calls Tensor.tanh


@pytest.mark.parametrize(("make", "name"), [(Method, "relu"), (CallsMethod, "tanh")])
def test_a_method_that_has_been_exchanged_is_called(monkeypatch, make, name):
    model, seen = fastmlp.fuse(make()), []
    monkeypatch.setattr(torch.Tensor, name, lambda self: seen.append(name) or torch.sigmoid(self))
    model(inputs())
    assert seen == [name]


class Function(Net):
    def forward(self, x):
        return torch.sigmoid(self.fc2(F.relu(self.fc1(x), inplace=True)))


class SharedActivation(Net):
    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(self.fc2(self.act(self.fc1(x))))


class HeldFunction(Net):
    def __init__(self):
        super().__init__()
        self.act = torch.tanh

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Lists(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.fc2(self.hidden(x))

    def hidden(self, x):
        return self.fc1(x).tanh()


class Inherited(Net):
    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        return super().forward(x) * 2


class Residual(Net):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.register_buffer("shift", torch.ones(12))

    def forward(self, x):
        y = x + F.relu(self.inner(x)) * self.scale
        y += self.shift
        return self.fc2(torch.sigmoid(self.fc1(y)))


class Two(Net):
    def forward(self, x, y):
        return self.fc2(torch.relu(self.fc1(x + y))), {"y": y}


class FunctionalDropout(Net):
    def forward(self, x):
        return self.fc2(F.dropout(torch.relu(self.fc1(x)), 0.5, self.training))


class SubclassOfSequential(nn.Sequential):
    pass


class Keyword(Net):
    def forward(self, x, *, factor=2):
        return self.fc2(torch.relu(self.fc1(x))) * factor


class Attributes(Net):
    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class OldSuper(Net):
    def forward(self, x):
        return super(OldSuper, self).forward(x) * OldSuper.factor  # noqa: UP008

    factor = 2


class ReadsItsClass(Net):
    factor = 2

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x))) * __class__.factor


FUSED = {
    "a Sequential": (sequential, [("relu", None)]),
    "a Linear": (lambda: nn.Linear(12, 4), [(None,)]),
    "a subclass of Sequential": (lambda: SubclassOfSequential(*sequential()), [("relu", None)]),
    "activations at the end": (
        lambda: nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4), nn.Sigmoid()),
        [("tanh", "sigmoid")],
    ),
    "two kinds of activation": (
        lambda: nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)),
        [("tanh", "relu", None)],
    ),
    "layers with and without bias": (
        lambda: nn.Sequential(nn.Linear(12, 9, bias=False), nn.ReLU(), nn.Linear(9, 4)),
        [("relu", None)],
    ),
    "nested Sequentials": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(12, 9)), nn.Sequential(nn.ReLU(), nn.Linear(9, 4))),
        [("relu", None)],
    ),
    "an Identity between": (
        lambda: nn.Sequential(nn.Linear(12, 9), nn.Identity(), nn.ReLU(), nn.Identity(), nn.Linear(9, 4)),
        [("relu", None)],
    ),
    "a Flatten between": (
        lambda: nn.Sequential(nn.Linear(12, 9), nn.Flatten(), nn.ReLU(), nn.Linear(9, 4)),
        [(None,), (None,)],
    ),
    "an in-place ReLU": (
        lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)),
        [("relu", None)],
    ),
    "other modules between": (
        lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 4), nn.Softsign()),
        [("relu",), (None,)],
    ),
    "parts of fastmlp's": (
        lambda: nn.Sequential(fastmlp.LinearReLU(12, 9), fastmlp.MLP(9, 9, 4)),
        [("relu", "relu", None)],
    ),
    "torch.relu in forward": (Net, [("relu", None)]),
    ".relu() in forward": (Method, [("relu", None)]),
    "F.relu in place, in forward": (Function, [("relu", "sigmoid")]),
    "a shared activation module": (SharedActivation, [("tanh", "tanh")]),
    "a function that the module holds": (HeldFunction, [("tanh", None)]),
    "lists and methods": (Lists, [("relu", "relu"), ("tanh", None)]),
    "super().forward": (Inherited, [("relu", None)]),
    "an argument by keyword alone, with a default": (Keyword, [("relu", None)]),
    "a class with a __getattr__": (Attributes, [("relu", None)]),
    "super() with arguments": (OldSuper, [("relu", None)]),
    "its own class": (ReadsItsClass, [("relu", None)]),
    "a residual connection": (Residual, [("relu",), ("sigmoid", None)]),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_gives_the_values_and_gradients_of_stock(name, ops):
    make, expected = FUSED[name]
    stock, x = make(), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    assert_same(ours, stock, x)
    ops.clear()
    ours(x)
    assert ops == expected
    assert fastmlp.why_not_fused(ours, x) is None


@pytest.mark.parametrize("make", [Net, sequential])
def test_what_is_fused_is_one_node_of_autograd(make):
    assert "NetworkFunction" in fastmlp.fuse(make())(inputs()).grad_fn.name()


def test_several_inputs_and_outputs_are_understood(ops):
    stock, x, y = Two(), inputs(), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(ours(x, y), stock(x, y))
    assert ops == [("relu", None)]


@pytest.mark.parametrize("shape", [(12,), (2, 3, 12), (0, 12)])
def test_any_number_of_dimensions_gives_stocks_results(shape):
    stock = nn.Sequential(nn.Linear(12, 9), nn.Dropout(), nn.ReLU(), nn.Linear(9, 4)).eval()
    assert_same(fastmlp.fuse(copy.deepcopy(stock)), stock, inputs(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "batch",
    [
        lambda dtype: torch.randn(12, dtype=dtype),
        lambda dtype: torch.randn(5, 12, dtype=dtype),
        lambda dtype: torch.randn(5, 20, dtype=dtype)[::2, 3:15],
        lambda dtype: torch.randn(12, 5, dtype=dtype).t(),
        lambda dtype: torch.randn(2, 3, 12, dtype=dtype).transpose(0, 1),
        lambda dtype: torch.randn(0, 12, dtype=dtype),
    ],
    ids=["one row", "rows", "rows apart", "columns", "3 dimensions", "no rows"],
)
def test_a_call_that_nobody_sees_computes_the_same_bits_as_the_op(batch, dtype):
    model, x = fastmlp.fuse(sequential()).to(dtype), batch(dtype)
    with torch.inference_mode():
        unseen = model(x)
        assert unseen.is_inference()
        with torch.autograd.profiler.profile() as profile:
            profiled = model(x)
        with Ops() as mode:
            seen = model(x)
    assert "fastmlp::network" in {event.name for event in profile.function_events}
    assert mode.seen == [("relu", None)]
    assert torch.equal(unseen, profiled)
    assert torch.equal(unseen, seen)


@pytest.mark.parametrize(
    ("parts", "is_found"),
    [
        ([nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)], True),
        (
            [nn.Flatten(), nn.Linear(12, 9), nn.GELU(), nn.Dropout().eval(), nn.Linear(9, 4), nn.Identity()],
            True,
        ),
        ([fastmlp.MLP(12, 9, 4), torch.tanh, nn.Sequential(nn.Linear(4, 4)), F.relu], True),
        ([fastmlp.fuse(Net()), fastmlp.fuse(nn.Sequential(nn.LeakyReLU(0.2)))], True),
        ([nn.Flatten(2), nn.Linear(12, 9)], False),
        ([nn.Linear(12, 9), nn.Flatten(), nn.Linear(9, 4)], False),
        ([nn.Linear(12, 9), nn.Dropout()], False),
        ([nn.Linear(12, 9), nn.BatchNorm1d(9)], False),
        ([nn.Linear(12, 9), nn.ReLU(), nn.ReLU()], False),
        ([nn.Flatten()], False),
    ],
)
def test_the_short_way_is_for_layers_alone_and_else_does_nothing(parts, is_found):
    x, ops = inputs(), Ops()
    with ops, torch.no_grad():
        y = fastmlp._C.apply(fastmlp.layers.KNOWN, parts, x)
    assert (y is not NotImplemented) == is_found == (len(ops.seen) == 1)
    if is_found:
        torch.testing.assert_close(y, nn.Sequential(*map(Called, parts))(x))


class Called(nn.Module):
    """A callable as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_flatten_between_layers_flattens():
    stock = nn.Sequential(nn.Linear(12, 9), nn.Flatten(), nn.ReLU(), nn.Linear(27, 4))
    assert_same(fastmlp.fuse(copy.deepcopy(stock)), stock, inputs(5, 3, 12))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 4)), FunctionalDropout],
    ids=["module", "function"],
)
def test_dropout_counts_as_nothing_in_eval_mode_alone(make, ops):
    stock, x = make(), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    for mode, expected in ((False, [("relu", None)]), (True, [("relu",), (None,)])) * 2:
        ops.clear()
        torch.manual_seed(0)
        y = ours.train(mode)(x)
        assert ops == expected
        torch.manual_seed(0)
        torch.testing.assert_close(y, stock.train(mode)(x))


def test_an_mlp_stays_what_it_is():
    model = fastmlp.fuse(fastmlp.MLP(7, 5, 3))
    assert type(model) is fastmlp.MLP
    assert [type(layer) for layer in model] == [fastmlp.Linear] * 2
    assert fastmlp.why_not_fused(model) is None


def test_fusing_twice_changes_nothing_more_and_fuses_what_was_added():
    model = fastmlp.fuse(sequential())
    cls = type(model)
    model.append(sequential())
    fastmlp.fuse(model)
    assert type(model) is cls
    assert type(model[3]) is cls


def test_an_output_that_is_used_twice_is_not_fused_away(ops):
    class Twice(Net):
        def forward(self, x):
            z = self.fc1(x)
            return self.fc2(torch.relu(z)) + z.sum()

    stock, x = Twice(), inputs()
    assert_same(fastmlp.fuse(copy.deepcopy(stock)), stock, x)
    assert all("relu" not in op for op in ops)


def test_an_activation_after_a_write_in_place_sees_what_was_written():
    class Writes(Net):
        def forward(self, x):
            z = self.fc1(x)
            x.add_(1)
            y = torch.relu(z)
            y += 1
            return self.fc2(y), x

    stock = Writes()
    ours, x = fastmlp.fuse(copy.deepcopy(stock)), torch.randn(5, 12)
    torch.testing.assert_close(ours(x.clone()), stock(x.clone()))


def test_an_input_is_added_to_in_place_where_forward_does_that():
    class InPlace(Net):
        def forward(self, x):
            x += 1
            return self.fc2(torch.relu(self.fc1(x)))

    x = torch.zeros(5, 12)
    fastmlp.fuse(InPlace())(x)
    assert torch.equal(x, torch.ones(5, 12))


def test_a_mask_is_written_to_in_place_where_forward_does_that():
    class Masks(Net):
        def forward(self, x, mask):
            mask &= x > 0
            return self.fc2(torch.relu(self.fc1(x * mask)))

    mask = torch.ones(5, 12, dtype=torch.bool)
    fastmlp.fuse(Masks())(-torch.ones(5, 12), mask)
    assert not mask.any()


def test_a_module_that_registers_its_subclasses_registers_none():
    registry = []

    class Registered(Net):
        def __init_subclass__(cls):
            registry.append(cls)

    class Own(Registered):
        pass

    fastmlp.fuse(Own())(torch.randn(2, 12))
    assert registry == [Own]


# ---- what is kept


@pytest.mark.parametrize("name", MODELS)
def test_parameters_state_modes_and_types_are_kept(name):
    model = MODELS[name]().double().eval().requires_grad_(False)
    before = list(model.named_parameters()), list(model.state_dict()), list(model.modules()), type(model)
    fused = fastmlp.fuse(model)
    assert fused is model
    assert all(a[1] is b[1] for a, b in zip(model.named_parameters(), before[0], strict=True))
    assert list(model.state_dict()) == before[1]
    assert all(a is b for a, b in zip(model.modules(), before[2], strict=True))
    assert isinstance(model, before[3])
    assert not model.training
    assert not any(p.requires_grad or p.dtype != torch.float64 for p in model.parameters())


def test_layers_that_their_parent_runs_stay_plain_linears():
    for model in (fastmlp.fuse(sequential()), fastmlp.fuse(Net())):
        assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [nn.Linear] * 2


def test_a_copy_is_fused_where_the_model_is_to_stay():
    model = sequential()
    copied = fastmlp.fuse(model, inplace=False)
    assert type(model) is nn.Sequential
    assert type(copied) is not nn.Sequential
    assert copied[0].weight is not model[0].weight


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_made_before_trains_as_stock(name):
    torch.manual_seed(0)
    model, data = MODELS[name](), torch.randn(5, 5, 12)
    other = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (model, other)]
    fastmlp.fuse(model)
    for x in data:
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_shared_modules_and_shared_weights_stay_shared():
    layer = nn.Linear(6, 6)
    stock = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 6))
    stock[4].weight = layer.weight
    ours = fastmlp.fuse(copy.deepcopy(stock))
    assert ours[0] is ours[2]
    assert ours[4].weight is ours[0].weight
    assert_same(ours, stock, inputs(3, 6))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "oldest pickle": lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_are_fused_too_and_can_be_unfused(name, duplicate, ops):
    stock, x = MODELS[name](), inputs()
    model = duplicate(fastmlp.fuse(copy.deepcopy(stock)))
    torch.testing.assert_close(model(x), stock(x))
    assert len(ops) == 1
    fastmlp.unfuse(model)
    assert str(model) == str(stock)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in stock.modules()]


def test_a_module_with_a_pickle_of_its_own_is_restored_unfused():
    model = pickle.loads(pickle.dumps(fastmlp.fuse(OwnPickle())))
    assert type(model) is OwnPickle


class OwnPickle(Net):
    def __reduce__(self):
        return type(self), ()


def test_printing_shows_what_is_fused():
    assert str(fastmlp.fuse(sequential())).startswith("FusedSequential(\n  (0): Linear(")
    assert str(fastmlp.fuse(Net())).startswith("FusedNet(\n  (fc1): Linear(")
    assert str(fastmlp.fuse(nn.Linear(3, 2))) == "FusedLinear(in_features=3, out_features=2, bias=True)"


def test_the_signature_of_forward_stays():
    assert list(inspect.signature(fastmlp.fuse(Inherited()).forward).parameters) == ["x", "mask"]


@pytest.mark.parametrize("function", [fastmlp.fuse, fastmlp.unfuse, fastmlp.why_not_fused])
def test_what_is_no_module_is_a_type_error(function):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module.*, got list"):
        function([nn.Linear(3, 2)])


@pytest.mark.parametrize("make", [sequential, Net])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype_gives_stocks_results(make, dtype):
    stock = make()
    ours, x = fastmlp.fuse(copy.deepcopy(stock)).to(dtype), torch.randn(5, 12, dtype=dtype)
    torch.testing.assert_close(ours(x), stock.to(dtype)(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("make", [sequential, Net])
def test_autocast_casts_as_for_stock(make):
    stock, x = make(), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x), stock(x), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("make", [sequential, Net])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_seen(make, assign):
    stock, x = make(), inputs()
    ours = fastmlp.fuse(make())
    ours.load_state_dict(stock.state_dict(), assign=assign)
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("make", [sequential, Net])
def test_replicas_without_parameters_compute_with_their_plain_tensors(make):
    model, x = fastmlp.fuse(make()), inputs()

    def replica(module):  # as torch.nn.parallel.replicate makes them
        own = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(own, name, parameter.clone())
        for name, child in module._modules.items():
            own._modules[name] = replica(child)
        return own

    torch.testing.assert_close(replica(model)(x), model(x))


@pytest.mark.parametrize("make", [sequential, Net, Residual])
def test_compile_function_transforms_and_functional_calls_give_stocks_results(make):
    stock, x = make(), torch.randn(5, 12)
    ours = fastmlp.fuse(copy.deepcopy(stock))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stock(x))

    def per_sample(model):
        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), x)

    torch.testing.assert_close(per_sample(ours), per_sample(stock), rtol=1e-4, atol=1e-5)


def test_several_threads_may_fuse_and_compute_at_once():
    class Powers(Net):
        power = 1

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x))) * self.power

    stock, x, wrong = Powers(), torch.randn(5, 12), []

    def work():
        own, right = fastmlp.fuse(copy.deepcopy(stock)), copy.deepcopy(stock)
        for own.power in range(5):
            right.power = own.power
            if not torch.allclose(own(x), right(x), atol=1e-5):
                wrong.append(own.power)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what its owner does with the model afterwards


class Options(Net):
    """Reads much that may change."""

    scale: float = 2.0

    def __init__(self):
        super().__init__()
        self.power, self.sizes, self.act, self.skip = 1, (1, 12), torch.relu, None
        self.drop = nn.Dropout(0.0)
        self.register_buffer("shift", torch.ones(12))
        self.register_parameter("gain", None)

    def forward(self, x):
        x = x.view(-1, self.sizes[1]) + self.shift
        if self.gain is not None:
            x = x * self.gain
        for _ in range(self.power):
            x = x * self.scale
        y = self.fc2(self.drop(self.act(self.fc1(x))))
        if self.skip is not None:
            y = y + self.skip(x)
        if self.training:
            y = y + 1
        return self.last(y)

    def last(self, y):
        return y * GLOBAL


GLOBAL = 3


def set_power(model):
    model.power = 3


CHANGES = {
    "an attribute": set_power,
    "an attribute of another type": lambda m: setattr(m, "sizes", [1, 12]),
    "an attribute of the class, on the module": lambda m: setattr(m, "scale", 0.5),
    "a held function": lambda m: setattr(m, "act", torch.tanh),
    "a held function, by one of Python": lambda m: setattr(m, "act", lambda x: x * 2),
    "a method": lambda m: setattr(m, "last", lambda y: y - 1),
    "a module where there was none": lambda m: setattr(m, "skip", nn.Linear(12, 4)),
    "a parameter where there was none": lambda m: setattr(m, "gain", nn.Parameter(torch.full((12,), 2.0))),
    "a buffer": lambda m: setattr(m, "shift", torch.zeros(12)),
    "eval": lambda m: m.eval(),
    "eval of a child": lambda m: m.drop.eval(),
    "another activation": lambda m: setattr(m, "drop", nn.Tanh()),
    "another layer": lambda m: setattr(m, "fc2", nn.Sequential(nn.Linear(9, 3), nn.GELU(), nn.Linear(3, 4))),
    "a forward set on a child": lambda m: setattr(m.fc1, "forward", lambda x: x[:, :9]),
    "a forward set on the module": lambda m: setattr(m, "forward", lambda x: x * 2),
    "a forward hook": lambda m: m.fc1.register_forward_hook(lambda module, args, y: y * 2),
    "a forward pre-hook": lambda m: (
        m.fc2.register_forward_pre_hook(lambda module, args: args[0] * 2) and None
    ),
    "a backward hook": lambda m: m.fc1.register_full_backward_hook(lambda m, a, b: (a[0] * 2,)),
    "a hook on the module": lambda m: m.register_forward_hook(lambda module, args, y: y * 2),
    "pruning": lambda m: prune.l1_unstructured(m.fc1, "weight", 0.5),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.fc1),
    "old weight_norm": lambda m: nn.utils.weight_norm(m.fc1),
    "frozen parameters": lambda m: m.fc1.requires_grad_(False),
    "new data": lambda m: m.fc1.weight.data.mul_(2),
    "a new parameter": lambda m: setattr(m.fc1, "weight", nn.Parameter(torch.ones(9, 12))),
    "a weight that is a plain tensor": lambda m: (
        delattr(m.fc1, "weight"),
        setattr(m.fc1, "weight", torch.ones(9, 12)),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fusing_give_the_numbers_that_they_give_stock(change, training):
    stock = Options().train(training)
    ours, x = fastmlp.fuse(copy.deepcopy(stock)), inputs()
    assert_same(ours, stock, x)
    torch.manual_seed(0)
    CHANGES[change](ours)
    torch.manual_seed(0)
    CHANGES[change](stock)
    for _ in range(2):
        assert_same(ours, stock, x)


def test_a_global_variable_that_forward_reads_may_change(monkeypatch):
    stock = Options()
    ours, x = fastmlp.fuse(copy.deepcopy(stock)), inputs()
    monkeypatch.setitem(globals(), "GLOBAL", 5)
    assert_same(ours, stock, x)


def test_another_forward_of_the_class_is_called(monkeypatch):
    class Own(Net):
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    model, x = fastmlp.fuse(Own()), inputs()
    monkeypatch.setattr(Own, "forward", lambda self, x: self.fc2(torch.tanh(self.fc1(x))))
    torch.testing.assert_close(model(x), model.fc2(torch.tanh(model.fc1(x))))


def test_another_forward_of_a_class_that_is_known_is_called(monkeypatch):
    model, x = fastmlp.fuse(sequential()), inputs()
    y = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: torch.tanh(x))
        torch.testing.assert_close(model(x), model[2](torch.tanh(model[0](x))))
    assert torch.equal(model(x), y)


def test_a_property_is_read_anew():
    class Own(Net):
        half = 0.5

        @property
        def scale(self):
            return self.half

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x))) * self.scale

    model, x = fastmlp.fuse(Own()), inputs()
    y = model(x)
    model.half = 1.0
    torch.testing.assert_close(model(x), 2 * y)


def test_a_variable_of_an_enclosing_function_may_change(ops):
    factor = 1.0

    class Enclosed(Net):
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x))) * factor

    model, x = fastmlp.fuse(Enclosed()), inputs()
    first, factor = model(x), 2.0
    torch.testing.assert_close(model(x), 2 * first)
    assert ops == [("relu", None)] * 2


def test_a_layer_more_in_a_list_is_run():
    stock = Lists()
    ours, x = fastmlp.fuse(copy.deepcopy(stock)), inputs()
    for model in (ours, stock):
        torch.manual_seed(0)
        model.layers.append(nn.Linear(12, 12))
    assert_same(ours, stock, x)


def test_both_modes_stay_fused_once_they_have_run(ops):
    model, x = fastmlp.fuse(FunctionalDropout()), inputs()
    for mode in (True, False) * 20:
        model.train(mode)(x)
    ops.clear()
    model(x)
    assert ops == [("relu", None)]


def test_an_attribute_that_changes_at_every_call_gives_the_right_numbers():
    stock = Options()
    ours, x = fastmlp.fuse(copy.deepcopy(stock)), inputs()
    for ours.scale in range(20):
        stock.scale = ours.scale
        assert_same(ours, stock, x)


@pytest.mark.parametrize("make", [sequential, Net])
def test_global_hooks_see_every_module(make):
    model, seen = fastmlp.fuse(make()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(inputs())
    finally:
        handle.remove()
    assert set(seen) == set(model.modules())


def test_other_arguments_are_passed_on_as_they_are():
    stock = Inherited()
    ours, x = fastmlp.fuse(copy.deepcopy(stock)), inputs()
    mask = torch.rand(12)
    torch.testing.assert_close(ours(x, mask), stock(x, mask))
    torch.testing.assert_close(ours(x, mask=mask), stock(x, mask=mask))
    torch.testing.assert_close(ours(x=x), stock(x))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ours()


def test_another_kind_of_tensor_takes_the_original_forward(ops):
    class Kind(torch.Tensor):
        pass

    model = fastmlp.fuse(Net())
    assert type(model(torch.randn(5, 12).as_subclass(Kind))) is Kind
    assert not ops


# ---- the call


@pytest.fixture
def forwards(monkeypatch):
    """Notes each forward of fastmlp's that runs in Python: all ask whether they are being compiled."""
    seen, asked = [], torch.compiler.is_dynamo_compiling
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: seen.append(None) or asked())
    return seen


CALLED = {
    "a Sequential": lambda: fastmlp.fuse(sequential()),
    "a subclass of Sequential": lambda: fastmlp.fuse(SubclassOfSequential(*sequential())),
    "a Linear": lambda: fastmlp.fuse(nn.Linear(12, 4)),
    "a Linear of fastmlp's": lambda: fastmlp.Linear(12, 4, activation="gelu"),
    "a LinearReLU": lambda: fastmlp.LinearReLU(12, 4, bias=False),
    "an MLP": lambda: fastmlp.MLP(12, 9, 4),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLED)
def test_a_call_goes_past_python_where_nobody_can_tell(forwards, name, mode):
    model, x = CALLED[name](), inputs()
    with mode():
        y = model(x)
        assert not forwards
        expected = model.forward(x)
    assert forwards
    assert torch.equal(y, expected)
    assert y.requires_grad == expected.requires_grad == (mode is torch.enable_grad)


@contextmanager
def removed(handle):
    """A hook for a while."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def python_profile(set_profile):
    set_profile(lambda *_: None)
    try:
        yield
    finally:
        set_profile(None)


class Sees(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def exchanged(holder, name, value):
    """An attribute for a while."""
    patch = pytest.MonkeyPatch()
    patch.setattr(holder, name, value, raising=False)
    return removed(SimpleNamespace(remove=patch.undo))


CALL_IMPL = nn.Module._call_impl
WATCHERS = {
    "a hook": lambda m: removed(m.register_forward_hook(lambda *_: None)),
    "a hook before, with keywords": lambda m: removed(
        m.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    ),
    "a hook of backward": lambda m: removed(m.register_full_backward_hook(lambda *_: None)),
    "a hook before backward": lambda m: removed(m.register_full_backward_pre_hook(lambda *_: None)),
    "a hook of all modules": lambda m: removed(
        nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    ),
    "a forward of its own": lambda m: exchanged(m, "forward", m.forward),
    "another call": lambda m: exchanged(nn.Module, "__call__", lambda self, x: CALL_IMPL(self, x)),
    "what the call calls": lambda m: exchanged(nn.Module, "_call_impl", lambda self, x: CALL_IMPL(self, x)),
    "what the module's call calls": lambda m: exchanged(m, "_call_impl", m._call_impl),
    "a compiled call": lambda m: exchanged(m, "_compiled_call_impl", m.forward),
    "a profiler of Python": lambda m: python_profile(sys.setprofile),
    "a debugger of Python": lambda m: python_profile(sys.settrace),
    "a profiler of torch": lambda m: torch.autograd.profiler.profile(),
    "a mode": lambda m: Sees(),
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("name", ["a Sequential", "an MLP"])
def test_a_call_that_somebody_watches_is_nn_modules(forwards, name, watcher):
    model, x = CALLED[name](), inputs()
    y = model(x)
    with WATCHERS[watcher](model):
        torch.testing.assert_close(model(x), y)
    assert forwards
    fastmlp.fuse(model)  # another call has slowed down all of them
    forwards.clear()
    assert torch.equal(model(x), y)
    assert not forwards


def test_arguments_of_other_kinds_are_passed_on():
    model, x = fastmlp.fuse(sequential()), inputs()
    torch.testing.assert_close(model(input=x), model(x))
    for arguments in ((), (x, x)):
        with pytest.raises(TypeError, match="positional argument"):
            model(*arguments)
    with pytest.raises(TypeError, match="must be Tensor"):
        model([1.0])


def test_a_call_that_is_traced_is_nn_modules(forwards):
    model, x = fastmlp.fuse(sequential()).requires_grad_(False), torch.randn(5, 12)
    with pytest.warns((DeprecationWarning, FutureWarning), match="trace"):
        traced = torch.jit.trace(lambda x: model(x), x, check_trace=False)
    assert forwards
    torch.testing.assert_close(traced(x), model(x))


@torch.no_grad()
def test_an_output_in_small_memory_can_grow_and_be_shared_as_any():
    y = fastmlp.fuse(sequential())(inputs())
    expected = y.clone()
    assert y.data_ptr() % 64 == 0
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    assert torch.equal(y.resize_(100, 4)[:5], expected)
    assert torch.equal(y.share_memory_()[:5], expected)


def test_a_class_derived_from_ours_is_called_as_nn_modules_are():
    class Own(fastmlp.MLP):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = Own(12, 9, 4), inputs()
    assert torch.equal(model(x), 2 * fastmlp.MLP.forward(model, x))


def test_the_attribute_call_stays_nn_modules():
    model, x = fastmlp.fuse(sequential()), inputs()
    assert type(model).__call__ is nn.Module.__call__
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


# ---- what forwards do besides


class Holder:
    value = 1


class Changes(Net):
    def __init__(self):
        super().__init__()
        self.calls, self.things, self.plain = 0, [1, 2], torch.ones(12)

    def forward(self, x):
        return self.body(torch.relu(self.fc1(x)), x)


def beside(body):
    """A test case of a body: what happens in forward beside the layers."""
    BESIDE[body.__name__] = type(
        "Beside", (Changes,), {"body": lambda self, y, x: body(self, self.fc2(y), x)}
    )
    return body


BESIDE = {}
SEEN, HOLDER, TENSOR = [], Holder(), torch.ones(4)


@beside
def counts_its_calls(self, y, x):
    self.calls += 1
    return y


@beside
def writes_an_item(self, y, x):
    y[0] = 1
    return y


@beside
def counts_globally(self, y, x):
    global COUNT
    COUNT = 1
    return y


@beside
def appends_to_a_global_list(self, y, x):
    SEEN.append(y)
    return y


@beside
def reads_an_object(self, y, x):
    return y * HOLDER.value


@beside
def uses_a_global_tensor(self, y, x):
    return y + TENSOR


@beside
def uses_a_tensor_that_is_no_buffer(self, y, x):
    return y + self.plain.sum()


@beside
def reads_a_list(self, y, x):
    return y * self.things[0]


@beside
def has_a_with_block(self, y, x):
    with torch.no_grad():
        return y * 2


@beside
def has_a_try_block(self, y, x):
    try:
        return y * float(x)
    except (TypeError, ValueError):
        return y


@beside
def asks_for_the_type(self, y, x):
    return y if isinstance(x, torch.Tensor) else x


@beside
def asks_for_the_exact_type(self, y, x):
    return y if type(x) is torch.Tensor else x


@beside
def prints(self, y, x):
    print(y)
    return y


@beside
def asks_for_the_grad_mode(self, y, x):
    return y if torch.is_grad_enabled() else y * 2


@beside
def asks_for_autocast(self, y, x):
    return y if torch.is_autocast_enabled() else y * 2


@beside
def takes_a_random_number(self, y, x):
    return y * random.random()


@beside
def takes_a_random_tensor(self, y, x):
    return y + torch.rand(4)


@beside
def makes_a_constant(self, y, x):
    return y + torch.tensor(1.0)


@beside
def branches_on_values(self, y, x):
    return y if x.sum() > 0 else -y


@beside
def branches_on_the_shape(self, y, x):
    return y if x.shape[0] > 3 else -y


@beside
def loops_over_the_batch(self, y, x):
    return torch.stack([row * 1 for row in y])


@beside
def asks_whether_there_is_a_gradient(self, y, x):
    return y if x.grad is None else y * 2


@beside
def asks_whether_a_result_is_none(self, y, x):
    return x if y is None else y


@beside
def compares_identities(self, y, x):
    return y if x is y else y * 2


@beside
def matches_a_pattern(self, y, x):
    match x:
        case [first, *_]:
            return y + first
    return y


@beside
def imports(self, y, x):
    import math

    return y * math.pi


@beside
def has_a_mutable_default(self, y, x, seen=SEEN):
    return y


@beside
def asks_for_an_attribute(self, y, x):
    return y if hasattr(x, "shape") else y * 2


@beside
def looks_for_an_attribute(self, y, x):
    return y * getattr(self, "missing", 2)


@beside
def looks_for_an_attribute_of_a_value(self, y, x):
    return y * getattr(x, "tag", 2)


@beside
def asks_in_a_nested_function(self, y, x):
    return (lambda t: y if t.grad is None else y * 2)(x)


@beside
def calls_super_where_its_class_is_not_known(self, y, x):
    return y + super(Changes, self).forward(x).sum()


@beside
def asks_for_its_parameters(self, y, x):
    return y + sum(p.sum() for p in self.parameters())


@beside
def makes_a_module(self, y, x):
    return torch.nn.ReLU()(y)


@beside
def reads_an_attribute_of_its_class(self, y, x):
    return y * Changes.factor


Changes.factor = 2


@pytest.mark.parametrize("name", BESIDE)
def test_what_a_forward_does_besides_it_does_itself(name, ops):
    stock = BESIDE[name]()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    assert fastmlp.why_not_fused(ours) is None
    for x in (torch.ones(5, 12), -torch.ones(2, 12)):
        results = []
        for model in (ours, stock):
            torch.manual_seed(0)
            random.seed(0)
            results.append(model(x.clone()))
        torch.testing.assert_close(*results)
    assert ours.calls == stock.calls
    assert ("relu",) in ops


def test_a_module_that_is_hooked_parametrized_or_no_linear_is_named():
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    model[0].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model[1])
    model[2].forward = lambda x: x
    fastmlp.fuse(model)
    assert fastmlp.why_not_fused(model) == (
        "0: has hooks\n1: is a ParametrizedLinear, not an nn.Linear\n2: has a forward set on it"
    )
    assert [m._get_name() for m in model] == ["Linear", "ParametrizedLinear", "Linear", "FusedLinear"]


def test_a_script_module_is_left_alone():
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        scripted = torch.jit.script(sequential())
    model = fastmlp.fuse(nn.Sequential(scripted, nn.Linear(4, 4)))
    assert type(model[0]) is type(scripted)
    assert fastmlp.why_not_fused(model) == "0: is a ScriptModule"
    assert model(inputs()).shape == (5, 4)


def test_a_model_that_is_not_fused_yet_says_so():
    assert fastmlp.why_not_fused(Net()) == "(itself): fastmlp.fuse has not been applied"
    assert fastmlp.why_not_fused(nn.Conv2d(1, 1, 1)) is None


def test_inputs_that_the_kernels_do_not_cover_are_named_by_layer():
    model = fastmlp.fuse(Net().double())
    words = "the CPU kernels cover float32 and bfloat16"
    assert fastmlp.why_not_fused(model, torch.ones(2, 12).double()) == f"fc1: {words}\nfc2: {words}"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_asking_why_changes_neither_the_model_nor_the_random_numbers():
    model = fastmlp.fuse(nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout()))
    before, x, state = copy.deepcopy(model.state_dict()), inputs(), torch.get_rng_state()
    assert fastmlp.why_not_fused(model, x) is None
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# ---- unfuse


def structure(model):
    """All that a model is made of, down to the tensors' addresses."""
    return [
        (name, type(module), module.training, module.__dict__.keys(), *map(id, module.parameters()))
        for name, module in model.named_modules()
    ]


CLASSES = [  # whose classes are made in different ways
    *("a Sequential", "a Linear", "a subclass of Sequential", "nested Sequentials", "parts of fastmlp's"),
    *("torch.relu in forward", "lists and methods", "super().forward", "a class with a __getattr__"),
]


@pytest.mark.parametrize("make", [FUSED[name][0] for name in CLASSES], ids=CLASSES)
def test_unfusing_restores_the_model_exactly(make):
    model = make()
    before = structure(model)
    model(inputs())
    fastmlp.fuse(model)(inputs())
    assert fastmlp.unfuse(model) is model
    assert structure(model) == before


def test_what_was_done_while_fused_stays_when_unfused():
    model, x = fastmlp.fuse(nn.ModuleList([nn.Linear(12, 4)])), inputs()
    nn.utils.parametrizations.weight_norm(model[0])
    y = model[0](x)
    fastmlp.unfuse(model)
    assert type(model[0]).__name__ == "ParametrizedLinear"
    torch.testing.assert_close(model[0](x), y)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0](x), y)


def test_an_unfused_model_can_be_scripted():
    model, x = fastmlp.unfuse(fastmlp.fuse(Net())), inputs()
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))


# ---- TrainStep


class Reshaped(Net):
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1) / 2)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.net = nn.Sequential(nn.Linear(12, 9), nn.Tanh())
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.net(self.flatten(x)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", [Net, Method, Reshaped, Nested, Function, sequential])
def test_a_training_step_takes_every_model_that_is_one_chain(make, fused):
    torch.manual_seed(0)
    model, loss = make(), nn.MSELoss()
    other = copy.deepcopy(model)
    if fused:
        fastmlp.fuse(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    step = fastmlp.TrainStep(model, loss, optimizers[0])
    for _ in range(3):
        x, target = torch.randn(5, 12) if make is sequential else torch.randn(5, 3, 4), torch.rand(5, 4)
        value = loss(other(x.flatten(1) if make in (Method, Function) else x), target)
        optimizers[1].zero_grad()
        value.backward()
        optimizers[1].step()
        torch.testing.assert_close(
            step(x.flatten(1) if make in (Method, Function) else x, target), value.detach()
        )
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_training_step_sees_what_a_forward_reads():
    class Scaled(Net):
        scale = 1.0

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x * self.scale)))

    model, loss = Scaled(), nn.MSELoss()
    x, target = torch.randn(5, 12), torch.rand(5, 4)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.0))
    first = step(x, target)
    model.scale = 3.0
    assert step(x, target) != first
    torch.testing.assert_close(step(x, target), loss(model(x), target).detach())


# ---- any model


class Branch(nn.Module):
    """x plus what its parts make of x, or that alone."""

    def __init__(self, body, act, adds):
        super().__init__()
        self.body, self.head, self.act, self.adds = body, nn.Linear(6, 6), act, adds

    def forward(self, x):
        y = self.act(self.head(self.body(x)))
        return x + y if self.adds else y


LEAVES = st.sampled_from(
    [
        lambda: nn.Linear(6, 6),
        lambda: nn.Linear(6, 6, bias=False),
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        nn.Sigmoid,
        nn.Tanh,
        nn.GELU,
        nn.Identity,
        nn.Flatten,
        lambda: nn.Dropout(0.5),
        lambda: nn.LayerNorm(6),
    ]
)


def trees(parts):
    return st.one_of(
        st.lists(parts, max_size=6).map(lambda makes: lambda: nn.Sequential(*(make() for make in makes))),
        st.tuples(parts, st.sampled_from([nn.ReLU, nn.Tanh]), st.booleans()).map(
            lambda made: lambda: Branch(made[0](), made[1](), made[2])
        ),
    )


@settings(max_examples=150, deadline=None)
@given(make=st.recursive(LEAVES, trees, max_leaves=12), train=st.booleans(), seed=st.integers(0, 9))
def test_any_model_gives_stocks_values_and_gradients_and_is_restored_exactly(make, train, seed):
    torch.manual_seed(seed)
    stock = make().train(train)
    ours, x = copy.deepcopy(stock), torch.randn(3, 6, requires_grad=True)
    before = structure(ours)
    fastmlp.fuse(ours)

    def run(model):
        torch.manual_seed(seed)
        y = model(x * 1)  # not the leaf itself, which an in-place ReLU may not change
        wanted = [x, *model.parameters()]
        return y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)

    try:
        expected = run(stock)
    except RuntimeError:  # an in-place ReLU of what another activation has saved
        assume(False)
    torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-4)
    assert structure(fastmlp.unfuse(ours)) == before
