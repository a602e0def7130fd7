"""A forward is rewritten in its source: its own code runs at every call, and runs of layers are one op."""

import copy
import functools
import gc
import linecache
import sys
import traceback
import types
import weakref
from abc import ABCMeta

import pytest
import torch
import torch.nn.functional as F
from test_fuse import Net, Ops, assert_same, inputs
from torch import nn
from torch.nn.utils import parametrize

import fastmlp
from fastmlp.rewrite import Refused, rewrite


@pytest.fixture
def ops():
    """The activations of the layers of each op during the test."""
    with Ops() as mode:
        yield mode.seen


class Parts(Net):
    """Parts for forwards to use."""

    def __init__(self):
        super().__init__()
        self.mid, self.same = nn.Linear(9, 9), None
        self.relu, self.drop, self.norm = nn.ReLU(), nn.Dropout(), nn.LayerNorm(9)
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.mixed = nn.ModuleList([nn.Linear(12, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 12)])
        self.none = None


# ---- what runs as one op


class Statements(Parts):
    def forward(self, x):
        x = self.fc1(x)
        x = torch.relu(x)
        x = self.fc2(x)
        return x


class ManyNames(Parts):
    def forward(self, x):
        a = self.fc1(x)
        b = F.relu(a)
        c = self.mid(b)
        d = F.relu(c)
        out = self.fc2(d)
        return out


class OverLines(Parts):
    def forward(self, x):
        return self.fc2(
            torch.relu(
                self.fc1(x),
            )
        )


class Reshapes(Parts):
    def forward(self, x):
        x = x.view(-1, 12)
        x = F.relu(self.fc1(x), inplace=True)
        return self.fc2(x)


class FunctionsArguments(Parts):
    def forward(self, x):
        x = F.relu(self.fc1(x), inplace=True)
        x = F.dropout(x, p=0.5, training=self.training)
        return self.fc2(x)


class Loop(Parts):
    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.fc1(x)


class LoopOfTwo(Parts):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = self.relu(x)
        x = self.fc1(x)
        return x


class Optional(Parts):
    def forward(self, x):
        x = self.fc1(x)
        if self.none is not None:
            x = self.none(x)
        if self.relu is not None:
            x = self.relu(x)
        return self.fc2(x)


class Indexed(Parts):
    def forward(self, x):
        return self.fc1(torch.relu(self.layers[-1](torch.relu(self.layers[0](x)))))


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.activation = nn.Linear(inputs, outputs), nn.ReLU()

    def forward(self, x):
        return self.activation(self.linear(x))


class Blocks(nn.Module):
    """As in rtdl_revisiting_models."""

    def __init__(self):
        super().__init__()
        self.blocks, self.output = nn.ModuleList([Block(12, 9), Block(9, 9)]), nn.Linear(9, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        if self.output is not None:
            x = self.output(x)
        return x


class Counts(Parts):
    calls = 0

    def forward(self, x):
        self.calls += 1
        type(self).calls += 1
        with torch.enable_grad():
            x = self.fc1(x)
            x = torch.relu(x)
        return self.fc2(x) if x.dim() in {2, 3} else None


class Parent(Net):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class InAnExpression(Parts):
    def forward(self, x):
        return {"y": x.sum() + self.fc2(torch.relu(self.fc1(x)))}["y"]


class Walrus(Parts):
    def forward(self, x):
        if (y := self.fc2(torch.relu(self.fc1(x)))).dim() == 2:
            return y


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return 2 * function(self, x)

    return wrapper


class Wrapped(Parts):
    @doubled
    @doubled
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Private(Parts):
    """Python calls its attribute _Private__act."""

    def __init__(self):
        super().__init__()
        self.__act = nn.ReLU()

    def forward(self, x):
        x = self.fc1(x)
        x = self.__act(x)
        return self.fc2(x)


class Comprehends(Parts):
    def forward(self, x):
        x = torch.cat([self.fc1(each) for each in x.split(1)])
        x = torch.relu(x)
        x = self.mid(x)
        return self.fc2(torch.relu(x))


class Tries(Parts):
    def forward(self, x):
        try:
            x = self.fc1(x)
            x = torch.relu(x)
            x = self.fc2(x)
        finally:
            self.seen = x.shape
        return x


ONE_OP = {
    Statements: [("relu", None)],
    ManyNames: [("relu", "relu", None)],
    OverLines: [("relu", None)],
    Reshapes: [("relu", None)],
    FunctionsArguments: [("relu", None)],
    Loop: [("relu", "relu", None)],
    LoopOfTwo: [("relu", "relu", None)],
    Optional: [("relu", None)],
    Indexed: [("relu", "relu", None)],
    Blocks: [("relu", "relu", None)],
    Counts: [("relu",), (None,)],
    Parent: [("relu", None), ("relu", None)],
    InAnExpression: [("relu", None)],
    Walrus: [("relu", None)],
    Tries: [("relu", None)],
    Wrapped: [("relu", None)],
    Private: [("relu", None)],
    Comprehends: [(None,), (None,), (None,), (None,), (None,), ("relu", None)],
}


@pytest.mark.parametrize("make", ONE_OP, ids=lambda make: make.__name__)
def test_a_run_of_layers_is_one_op(make, ops):
    stock, x = make().eval(), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    assert_same(ours, stock, x)
    ops.clear()
    ours(x)
    assert ops == ONE_OP[make]


def test_what_is_no_layer_is_called_between_two_ops(ops):
    class Normalizes(Parts):
        def forward(self, x):
            x = torch.relu(self.fc1(x))
            x = self.norm(x)
            x = torch.tanh(self.mid(x))
            return self.fc2(x)

    stock, x = Normalizes(), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    assert_same(ours, stock, x)
    ops.clear()
    ours(x)
    assert ops == [("relu",), ("tanh", None)]


# ---- a forward that is a part of another's chain


class TanhFirst(nn.Module):
    """A chain, which begins by an activation."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(torch.tanh(x))


class Counting(TanhFirst):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fc(torch.tanh(x))


def test_a_chain_within_a_chain_is_in_its_op_until_a_part_is_hooked(ops):
    stock, x = nn.Sequential(nn.Linear(12, 12), TanhFirst()), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    assert_same(ours, stock, x)
    ops.clear()
    ours(x)
    assert ops == [("tanh", None)]
    for model in (ours, stock):
        model[1].fc.register_forward_hook(lambda module, args, y: 2 * y)
    assert_same(ours, stock, x)  # which takes the tanh once


def test_what_a_forward_does_besides_a_chain_it_does_within_another_too():
    model = fastmlp.fuse(nn.Sequential(nn.Linear(12, 12), Counting(), nn.Linear(12, 4)))
    for _ in range(3):
        model(inputs())
    assert model[1].calls == 3


# ---- what happens during a call happens when it does


class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.mean += x.mean()
        return x - self.mean


class Subtracts(Parts):
    def __init__(self):
        super().__init__()
        self.running = RunningMean()

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = self.running(x)
        return self.fc2(x) + self.running.mean


class Exchanges(nn.Module):
    """Exchanges the layers of another module while that runs."""

    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, x):
        owner = self.owner[0]
        owner.mid, owner.fc2, owner.other = owner.norm, owner.other, owner.fc2
        return x


class Exchanged(Parts):
    def __init__(self):
        super().__init__()
        self.other, self.exchange = nn.Linear(9, 4), Exchanges(self)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = self.exchange(x)
        x = self.mid(x)
        return self.fc2(x)


class ExchangedInOneExpression(Exchanged):
    def forward(self, x):
        return self.fc2(self.exchange(torch.relu(self.fc1(x))))


class Property(Parts):
    """A property that changes a weight is read before or after the layer, as is written."""

    @property
    def act(self):
        with torch.no_grad():
            self.fc1.weight.mul_(2)
        return torch.relu


class PropertyBetween(Property):
    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)


class PropertyBefore(Property):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class OneModuleOfTwoNames(Parts):
    def forward(self, x):
        self.same = self.fc1
        x = self.same(x)
        return self.fc2(torch.relu(x)) * (2 if self.same == self.fc1 else 1)


class ExchangedInAMethod(Exchanged):
    def encode(self, x):
        x = self.exchange(x)
        return self.mid(x)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        return self.fc2(self.encode(x)).relu()


class Pops(Parts):
    def __init__(self):
        super().__init__()
        self.named = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.ReLU()})

    def forward(self, x):
        x = torch.relu(self.named["a"](x))
        if len(self.named) > 1:
            self.named.pop("b")
        return self.fc2(torch.relu(self.fc1(x))) * len(self.named)


class Prints(Parts):
    def forward(self, x):
        label = f"{x.dim()} {x.device} {type(self).__name__} {self.__class__.__name__}"
        x = torch.relu(self.fc1(x))
        return self.fc2(x) * {2: 1, 3: 2}[x.dim()] * (str(x.device) == "cpu") * len(label)


class OwnClass(Parts):
    def forward(self, x):
        return super(self.__class__, self).forward(x)


class LayersThatEndWithinASequential(Parts):
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 9))

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = self.seq(x)
        return self.fc2(x)


DURING = [LayersThatEndWithinASequential, Subtracts, Exchanged, ExchangedInOneExpression, ExchangedInAMethod]
DURING += [PropertyBetween, PropertyBefore, OneModuleOfTwoNames, Pops, Prints, OwnClass]


@pytest.mark.parametrize("make", DURING, ids=lambda make: make.__name__)
def test_what_changes_during_a_call_is_seen_when_it_has_changed(make):
    stock, x = make(), torch.randn(5, 12)
    ours = fastmlp.fuse(copy.deepcopy(stock))
    for model in (ours, stock):
        if isinstance(model, Exchanged):
            model.exchange.owner[0] = model
    for _ in range(3):
        y, expected = ours(x), stock(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.state_dict(), stock.state_dict())
        y.sum().backward()
        expected.sum().backward()
    for own, right in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(own.grad, right.grad, rtol=1e-4, atol=1e-3)


def test_a_wrong_number_of_values_to_unpack_is_an_error_still():
    class Unpacks(Parts):
        def forward(self, x):
            batch, _ = x.size()
            return self.fc2(torch.relu(self.fc1(x))) * batch

    model = fastmlp.fuse(Unpacks())
    assert model(torch.ones(2, 12)).shape == (2, 4)
    with pytest.raises(ValueError, match="too many values to unpack"):
        model(torch.ones(2, 3, 12))


# ---- names that mean something else by now


ACT = torch.relu


class Names(Parts):
    factor = 1.0

    def forward(self, x, shift=0.0):
        x = ACT(self.fc1(x))
        x = F.relu(self.mid(x))
        return self.fc2(x) * self.factor + shift


REBOUND = {
    "a global variable": lambda patch, cls: patch.setitem(globals(), "ACT", torch.tanh),
    "a function of torch's": lambda patch, cls: patch.setattr(F, "relu", torch.tanh),
    "what a function of torch's calls": lambda patch, cls: patch.setattr(torch, "relu", torch.tanh),
    "a class's forward": lambda patch, cls: patch.setattr(
        nn.Linear, "forward", lambda self, x: F.linear(x, -self.weight)
    ),
    "the call of every module": lambda patch, cls: patch.setattr(
        nn.Module, "__call__", lambda self, x: self.forward(x) * 2
    ),
    "an attribute of the class": lambda patch, cls: setattr(cls, "factor", 3.0),
    "a property added later": lambda patch, cls: setattr(cls, "mid", property(lambda self: torch.abs)),
    "defaults": lambda patch, cls: setattr(cls.forward, "__defaults__", (5.0,)),
    "forward": lambda patch, cls: setattr(cls, "forward", lambda self, x: self.fc2(torch.tanh(self.fc1(x)))),
    "the code of forward": lambda patch, cls: setattr(
        cls.forward, "__code__", (lambda self, x, shift=0.0: self.fc2(torch.abs(self.fc1(x)))).__code__
    ),
}  # fmt: skip


def another_names():
    """The class, anew: what is changed in it stays in it."""
    forward = types.FunctionType(Names.forward.__code__, globals(), "forward", (0.0,))
    return type("Names", (Parts,), {"forward": forward, "factor": 1.0})


@pytest.mark.parametrize("through", ["the class", "type(model)"])
@pytest.mark.parametrize("change", REBOUND)
def test_names_mean_at_each_call_what_they_mean_then(monkeypatch, change, through):
    cls = another_names()
    stock, x = cls(), inputs()
    ours = fastmlp.fuse(copy.deepcopy(stock))
    before = ours(x)
    torch.testing.assert_close(before, stock(x))
    REBOUND[change](monkeypatch, cls if through == "the class" else type(ours))
    torch.testing.assert_close(ours(x), stock(x))
    assert not torch.allclose(ours(x), before)


def test_the_forward_of_a_parent_may_be_replaced():
    class Base(Parts):
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    class Child(Base):
        def forward(self, x):
            return super().forward(x) * 2

    model, x = fastmlp.fuse(Child()), inputs()
    model(x)
    Base.forward = lambda self, x: self.fc2(torch.tanh(self.fc1(x)))
    torch.testing.assert_close(model(x), 2 * model.fc2(torch.tanh(model.fc1(x))))


def test_an_emptied_variable_of_an_enclosing_function_is_an_error():
    act = torch.relu

    class Encloses(Parts):
        def forward(self, x):
            return self.fc2(act(self.fc1(x)))  # noqa: F821

    model, x = fastmlp.fuse(Encloses()), inputs()
    model(x)
    del act
    with pytest.raises(NameError, match="act"):
        model(x)


@pytest.mark.parametrize("change", [lambda m: setattr(m, "fc1", None), lambda m: delattr(m, "fc1")])
def test_what_is_not_there_raises_what_stock_raises(change):
    errors = []
    for model in (Statements(), fastmlp.fuse(Statements())):
        change(model)
        with pytest.raises((TypeError, AttributeError)) as caught:
            model(inputs())
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


# ---- errors


@pytest.mark.parametrize("make", [Statements, ManyNames, OverLines, Loop, Optional], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: (setattr(m, "fc2", nn.Linear(8, 4)), m.layers.insert(1, nn.Linear(8, 12))),
        lambda m: (setattr(m, "fc2", None), m.layers.insert(1, None)),
        lambda m: (setattr(m, "fc2", nn.Flatten(7)), m.layers.insert(1, nn.Flatten(7))),
    ],
    ids=["a layer", "nothing", "another module"],
)
def test_an_error_comes_from_the_line_that_it_comes_from(make, change):
    lines = []
    for model in (make(), fastmlp.fuse(make())):
        change(model)
        with pytest.raises((RuntimeError, TypeError, IndexError)) as caught:
            model(inputs())
        frames = traceback.extract_tb(caught.value.__traceback__)
        lines.append([frame.lineno for frame in frames if frame.filename == __file__][1:])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1


# ---- the class


def test_a_fused_class_has_the_name_of_the_original_and_prints_as_fused():
    model = fastmlp.fuse(Statements())
    assert type(model).__name__ == type(model).__qualname__ == "Statements"
    assert model.__class__ is Statements
    assert model._get_name() == "FusedStatements"
    assert type(model).forward is Statements.forward


def test_what_is_written_to_a_fused_class_is_written_to_the_original():
    class Own(Parts):
        def forward(self, x):
            type(self).calls += 1
            return self.fc2(torch.relu(self.fc1(x)))

        calls = 0

    models = [fastmlp.fuse(Own()), Own()]
    for model in models:
        model(inputs())
    assert Own.calls == 2
    del type(models[0]).calls
    assert not hasattr(Own, "calls")


def test_parametrizing_a_fused_linear_leaves_the_class_of_linears_alone():
    before, layer = dict(vars(nn.Linear)), fastmlp.fuse(nn.Linear(12, 4))
    parametrize.register_parametrization(layer, "weight", nn.ReLU())
    assert dict(vars(nn.Linear)) == before
    torch.testing.assert_close(
        layer(torch.ones(2, 12)), F.linear(torch.ones(2, 12), layer.weight, layer.bias)
    )


def test_classes_made_of_a_fused_one_are_made_as_of_the_original():
    made = []

    class Registered(Parts):
        def __init_subclass__(cls, tag=None):
            made.append((cls.__name__, tag))

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    model = fastmlp.fuse(Registered())
    model.register_parameter("gain", nn.Parameter(torch.ones(2)))
    assert not made
    cls = type("Sub", (type(model),), {}, tag=1)
    parametrize.register_parametrization(model, "gain", nn.ReLU())
    assert made == [("Sub", 1), ("ParametrizedRegistered", None)]
    stock, x = Registered(), inputs()
    other = cls()
    other.load_state_dict(stock.state_dict())
    torch.testing.assert_close(other(x), stock(x))


@pytest.mark.parametrize("base", [type, ABCMeta])
def test_a_metaclass_that_keeps_a_list_of_its_classes_sees_none_of_ours(base):
    made = []

    class Meta(base):
        def __new__(cls, *args):
            made.append(args[0])
            return super().__new__(cls, *args)

        def __init__(cls, *args):
            made.append(args[0])
            super().__init__(*args)

    class Own(Parts, metaclass=Meta):
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    model, x = fastmlp.fuse(Own()), inputs()
    assert made == ["Own", "Own"]
    assert isinstance(model, Own)
    torch.testing.assert_close(model(x), model.fc2(torch.relu(model.fc1(x))))


def test_classes_and_models_that_go_leave_nothing():
    def made():
        class Own(Parts):
            def forward(self, x):
                return self.fc2(torch.relu(self.fc1(x)))

        class Chain(nn.Sequential):
            pass

        for model in (Own(), Chain(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))):
            fastmlp.fuse(model)
            copy.deepcopy(model)(inputs())
            yield weakref.ref(type(model))
            yield weakref.ref(Own)

    references = [reference for _ in range(3) for reference in made()]
    gc.collect()
    assert not any(reference() for reference in references)


def test_a_sequential_that_iterates_or_is_called_in_its_own_way_is_called_so():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(self._modules.values())

    class Doubles(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x) * 2

    class Own(Parts):
        def __init__(self):
            super().__init__()
            self.a, self.b = Backwards(nn.ReLU(), nn.Linear(12, 12)), Doubles(nn.Linear(12, 12))

        def forward(self, x):
            x = self.a(x)
            x = self.b(x)
            return self.fc2(torch.relu(self.fc1(x)))

    stock, x = Own(), inputs()
    assert_same(fastmlp.fuse(copy.deepcopy(stock)), stock, x)


# ---- what is left as it is


def decorated(function):
    def wrapper(self, x):
        return function(self, x)

    return wrapper


class Decorated(Parts):
    @decorated
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


COUNTS = {}


def counted(function):
    COUNTS[function] = 0

    @functools.wraps(function)
    def wrapper(self, x):
        COUNTS[function] += 1
        return function(self, x)

    return wrapper


class Counted(Parts):
    @counted
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Locals(Parts):
    def forward(self, x):
        x = torch.relu(self.fc1(x))
        return self.fc2(locals()["x"])


class Generates(Parts):
    def forward(self, x):
        yield self.fc2(torch.relu(self.fc1(x)))


namespace = {"Parts": Parts, "torch": torch}
exec(
    "class WithoutSource(Parts):\n    def forward(self, x): return self.fc2(torch.relu(self.fc1(x)))",
    namespace,
)

LEFT = {
    "a decorated forward": (Decorated, "is another function, wrapper: it may be decorated"),
    "one whose decorator knows it": (Counted, "is decorated by wrapper, which may do more than to call it"),
    "one that looks at its variables": (Locals, "uses locals, which may see its variables"),
    "a generator": (Generates, "is a generator"),
    "one without a source": (namespace["WithoutSource"], "has no source that can be found"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_forward_whose_source_does_not_tell_what_runs_is_left_alone(name):
    make, words = LEFT[name]
    model = fastmlp.fuse(make())
    assert type(model) is make
    assert fastmlp.why_not_fused(model) == f"(itself): its forward {words}"
    assert model.fc1._get_name() == "FusedLinear"


SOURCE = """
import torch

def forward(self, x):
    return self.fc2(torch.relu(self.fc1(x)))
"""


def from_file(path, source):
    path.write_text(source)
    linecache.checkcache(str(path))
    namespace = {}
    exec(compile(source, str(path), "exec", dont_inherit=True), namespace)
    return namespace["forward"]


def test_a_file_that_has_been_edited_since_is_not_what_runs(tmp_path):
    path = tmp_path / "model.py"
    forward = from_file(path, SOURCE)
    rewrite(forward)
    path.write_text(SOURCE.replace("torch.relu", "torch.tanh"))
    with pytest.raises(Refused, match="is not what its source says"):
        rewrite(forward)


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations\n" + SOURCE,
        SOURCE + "\nx = '\\d'\n",
        SOURCE.replace("import", "\n\nimport"),
    ],
    ids=["a future", "a warning", "other lines"],
)
def test_a_rewritten_function_has_the_flags_and_lines_of_the_original(tmp_path, source, recwarn):
    forward = from_file(tmp_path / "model.py", source)
    recwarn.clear()
    function = rewrite(forward).function
    assert function.__code__.co_firstlineno == forward.__code__.co_firstlineno
    assert function.__code__.co_flags == forward.__code__.co_flags
    assert function.__code__.co_filename == forward.__code__.co_filename
    assert function.__globals__ is forward.__globals__
    assert function.__dict__ is forward.__dict__
    assert not recwarn


def test_importing_and_fusing_leave_the_users_module_as_it_is():
    before = dict(globals())
    fastmlp.fuse(Statements())(inputs())
    after = {name: value for name, value in globals().items() if name not in before}
    assert not after
    assert sys.modules[__name__].Statements.forward is before["Statements"].forward


# ---- training steps


class Prefix(Parts):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2:
            x = x * 2
        x = torch.relu(self.fc1(x))
        return self.fc2(x)


@pytest.mark.parametrize("make", [Prefix, Blocks, LoopOfTwo, Optional, OverLines], ids=lambda m: m.__name__)
def test_a_training_step_runs_what_comes_before_the_chain(make):
    torch.manual_seed(0)
    model, loss = make().eval(), nn.MSELoss()
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    step = fastmlp.TrainStep(model, loss, optimizers[0])
    for _ in range(4):
        x, target = torch.randn(5, 12), torch.rand(5, 9 if make is LoopOfTwo else 4)
        value = loss(other(x), target)
        optimizers[1].zero_grad()
        value.backward()
        optimizers[1].step()
        torch.testing.assert_close(step(x, target), value.detach())
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    assert getattr(model, "calls", 0) == getattr(other, "calls", 0)


def test_a_training_step_trains_parameters_before_the_chain_too():
    class Scales(Parts):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(12))

        def forward(self, x):
            x = x * self.scale
            return self.fc2(torch.relu(self.fc1(x)))

    model, loss = Scales(), nn.MSELoss()
    other, x, target = copy.deepcopy(model), torch.randn(5, 12), torch.rand(5, 4)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    step(x, target)
    loss(other(x), target).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(model.scale, torch.ones(12))
