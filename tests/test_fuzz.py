"""Random forwards, and random changes between their calls: fused as stock, in all that can be observed.

Each case is a small program: a module's class, and what is done with the model between calls. It runs twice,
stock and fused, and every output, gradient, error and side effect is compared. A mismatch is shrunk, and
printed as the program that shows it.
"""

import linecache
import sys
import textwrap
import traceback
import types

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import fastmlp

HEAD = """
import copy, pickle, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

LOG, ACT, GAIN = [], torch.relu, 1.0

def NOTE(name):
    if name[:2] == 'fc':
        LOG.append(name)

def SEEN(m, a, y):
    LOG.append(type(m).__name__)

def scaled(x):
    LOG.append("scaled")
    return x * GAIN

class Mean(nn.Module):
    "Keeps a running mean, and subtracts it."
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.fc = nn.Linear(6, 6)
    def forward(self, x):
        with torch.no_grad():
            self.mean += x.mean(0).reshape(-1)[:1]
        return x - self.mean

class Exchanges(nn.Module):
    "Changes its owner while that runs."
    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]
    def forward(self, x):
        owner = self.owner[0]
        owner.count += 1
        owner.fc2, owner.fc1 = owner._modules.get("fc1"), owner._modules.get("fc2")
        with torch.no_grad():
            owner.fc3.weight.mul_(0.9)
        return x + owner.count

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(6, 6), nn.ReLU()
    def forward(self, x):
        return self.act(self.linear(x))

class Residual(Block):
    def forward(self, x):
        return x + super().forward(x)

class Own(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))

class Square(nn.Module):
    def forward(self, x):
        return x @ x.T + torch.eye(6)

class Base(nn.Module):
    count, factor, held = 0, 1.5, staticmethod(torch.tanh)

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.wide = nn.Linear(6, 7)
        self.relu, self.tanh, self.quick, self.gelu = nn.ReLU(), nn.Tanh(), nn.ReLU(inplace=True), nn.GELU()
        self.drop, self.id = nn.Dropout(0.3), nn.Identity()
        self.same, self._Net__own = self.fc1, nn.Linear(6, 6)
        self.norm, self.mean, self.exchanges = nn.LayerNorm(6), Mean(), Exchanges(self)
        self.seq = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6))
        self.own = Own(nn.Linear(6, 6), nn.ReLU())
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.mixed = nn.ModuleList([nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 6)])
        self.mixed.append(nn.Dropout(0.2))
        self.blocks = nn.ModuleList([Block(), Residual()])
        self.by_name = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Tanh()})
        self.none, self.some, self.act = None, nn.Linear(6, 6), torch.relu
        self.flag = True
        self.scale = nn.Parameter(torch.ones(6))

    @property
    def prop(self):
        self.count += 1
        with torch.no_grad():
            self.fc1.weight.mul_(0.9)
        return self.fc2

    def encode(self, x):
        h = torch.relu(self.fc1(x))
        return self.fc3(h)

    def forward(self, x, k=1.0):
        x = self.fc3(torch.tanh(self.fc2(x)))
        return x * k
"""

LAYERS = [
    "self.fc1",
    "self.fc2",
    "self.fc3",
    "self.same",
    "self.seq",
    "self.some",
    "self.layers[0]",
    "self.layers[-1]",
    "self.blocks[0]",
    "self.by_name['a']",
    "self.__own",
]
ACTS = [
    "torch.relu",
    "torch.tanh",
    "torch.sigmoid",
    "F.relu",
    "F.tanh",
    "torch.nn.functional.relu",
    "ACT",
    "self.act",
    "self.relu",
    "self.tanh",
    "self.quick",
    "self.id",
    "self.drop",
    "torch.relu_",
    "self.held",
]
OTHERS = [
    "self.norm",
    "self.mean",
    "self.exchanges",
    "self.prop",
    "self.encode",
    "scaled",
    "self.gelu",
    "self.own",
    "self.blocks[1]",
    "F.gelu",
    "torch.abs",
    "self.none",
    "self.wide",
    "self.missing",
    "super().forward",
    "x.add",
    "(lambda t: self.fc2(t) + x.sum())",
    "self.mean.fc",
]
METHODS = ["relu", "tanh", "sigmoid", "relu_", "sigmoid_", "abs", "clone"]
FORMS = [
    "F.relu({}, inplace=True)",
    "F.relu({}, False)",
    "F.dropout({}, 0.5, self.training)",
    "({}).view(-1, 6)",
    "F.dropout({}, p=0.2, training=False)",
    "F.gelu({}, approximate='tanh')",
    "({} + GAIN)",
    "self.fc1(\n{})",
]

callables = st.one_of(
    st.sampled_from(LAYERS), st.sampled_from(LAYERS), st.sampled_from(ACTS), st.sampled_from(OTHERS)
)


@st.composite
def expressions(draw, name, least=1):
    text = name
    for _ in range(draw(st.integers(least, 4))):
        kind = draw(st.integers(0, 9))
        if kind == 0:
            text = (
                f"{text}.{draw(st.sampled_from(METHODS))}()" if text != name or draw(st.booleans()) else text
            )
        elif kind == 1:
            text = draw(st.sampled_from(FORMS)).format(text)
        else:
            text = f"{draw(callables)}({text})"
    return text


SIDE = [
    "self.count += 1",
    "type(self).count += 1",
    "self.__class__.factor += 0.5",
    "LOG.append(type(self).__name__)",
    "LOG.append(f'{tuple(x.shape)} {self.training}')",
    "x = x * self.factor",
    "x = x + self.mean.mean",
    "x += 1",
    "b, n = x.size()",
    "if x.dim() in {3, 4}: x = x * 2",
    "x = {2: x, 3: x * 2}.get(x.dim())",
    "if str(x.device) == 'cpu': x = x * 0.5",
    "if self.count > 2: return x",
    "LOG.append(self.fc1 is self.same)",
    "LOG.append(self.fc1 == self.same)",
    "LOG.append((lambda: float(x.detach().sum()) > 0.1)())",
    "LOG.append(isinstance(self, Base))",
    "LOG.append(sum(p.numel() for p in self.parameters()))",
    "x = x @ self.fc1.weight",
    "x = x * abs(self.scale)",
    "x = x + k",
    "self.keep = x",
    "x = sum([f(x) for f in self.layers])",
    "x = sum([self.fc2(x) for _ in range(2)])",
    "y = x",
    "x = x + y",
    "self.by_name.pop('b', None)",
]


@st.composite
def statements(draw, depth=0, loop=None):
    kind = draw(st.integers(0, 13 if depth < 2 else 5))
    if kind <= 3:
        return "x = " + draw(expressions("x"))
    if kind == 4:
        return draw(st.sampled_from(SIDE))
    if kind == 5:
        first, second = draw(expressions("x")), draw(expressions("h"))
        end = draw(
            st.sampled_from(["x = {}", "h = {}\nx = h", "x = x + {}", "h = {}\nx = torch.relu(h) + h"])
        )
        return f"h = {first}\n" + end.format(second)
    inner = textwrap.indent("\n".join(draw(st.lists(statements(depth + 1), min_size=1, max_size=3))), "    ")
    if kind == 6:
        test = draw(
            st.sampled_from(
                [
                    "self.none is not None",
                    "self.some is not None",
                    "self.training",
                    "not self.flag",
                    "self.count % 2",
                    "self.some is None",
                ]
            )
        )
        return f"if {test}:\n{inner}"
    if kind == 7:
        return f"if self.flag:\n{inner}\nelse:\n    x = x - 1"
    if kind == 8:
        return f"with torch.no_grad():\n{inner}"
    if kind == 9:
        end = draw(
            st.sampled_from(
                [
                    "except RuntimeError:\n    x = x * 2",
                    "finally:\n    LOG.append(float(x.detach().sum()) > 0.1)",
                    "except Exception as e:\n    LOG.append(type(e).__name__)\n    x = x + 1",
                ]
            )
        )
        return f"try:\n{inner}\n{end}"
    items = draw(
        st.sampled_from(
            [
                "self.layers",
                "self.mixed",
                "self.blocks",
                "self.seq",
                "self.own",
                "self.by_name.values()",
                "self.layers[:1]",
                "reversed(self.layers)",
                "enumerate(self.layers)",
            ]
        )
    )
    if items.startswith("enumerate"):
        return f"for i, f in {items}:\n    x = f(x) if i else torch.relu(f(x))"
    body = draw(
        st.sampled_from(
            [
                "x = f(x)",
                "x = torch.relu(f(x))",
                "x = f(x)\nx = self.relu(x)",
                "x = x + f(x)",
                "x = F.relu(f(x))\nself.count += 1",
                "x = self.fc2(f(x)).relu()",
            ]
        )
    )
    after = draw(st.sampled_from(["", "", "\nLOG.append(type(f).__name__)"]))
    return f"for f in {items}:\n{textwrap.indent(body, '    ')}{after}"


BEFORE = [
    "global GAIN\nGAIN = 1.5",
    "keep = lambda: x",
    "keep = lambda: self.fc1",
    "def other():\n    nonlocal self\n    self.count += 1\n    self = self.same and self\nother()",
    "self, x = self, x * 2",
    "'text'",
    "locals()",
]


@st.composite
def forwards(draw):
    lines = draw(st.lists(statements(), min_size=0, max_size=5))
    end = draw(st.sampled_from(["x", "{}", "{}", "{}", "({}, x)", "{{'y': {}}}", "{} * 2"]))
    lines.append("return " + end.format(draw(expressions("x"))))
    if draw(st.integers(0, 9)) == 0:
        lines.insert(0, draw(st.sampled_from(BEFORE)))
    return "class Net(Base):\n    def forward(self, x, k=1.0):\n" + textwrap.indent("\n".join(lines), " " * 8)


CHANGES = [
    "m.eval()",
    "m.train()",
    "m.fc1, m.fc2 = m.fc2, m.fc1",
    "m.fc2 = nn.Sequential(nn.Linear(6, 6), nn.Tanh())",
    "m.fc2 = nn.GELU()",
    "m.fc1 = None",
    "del m.fc2",
    "m.fc1.register_forward_hook(lambda _, a, y: y * 2)",
    "m.fc2.register_forward_pre_hook(lambda _, a: (LOG.append('pre'), (a[0] * 2,))[1])",
    "m.fc1.register_forward_hook(lambda _, a, y: setattr(m, 'fc3', nn.Identity()))",
    "m.fc1.register_full_backward_hook(lambda _, a, b: (a[0] * 2,))",
    "m.register_forward_hook(lambda _, a, y: LOG.append(type(y).__name__))",
    "m.fc1.forward = lambda x: x * 3",
    "m.forward = lambda x: x * 3",
    "m.act = torch.tanh",
    "m.act = lambda x: x * 2",
    "m.flag = False",
    "m.flag = 1",
    "m.none, m.some = nn.Linear(6, 6), None",
    "m.layers.append(nn.ReLU())",
    "m.layers[0] = nn.Sigmoid()",
    "m.mixed.insert(1, nn.Linear(6, 6))",
    "m.blocks[0].act = nn.Tanh()",
    "m.blocks.append(nn.Dropout(0.5))",
    "m.seq.append(Mean())",
    "m.seq[1] = nn.Identity()",
    "m.drop.p = 2.0",
    "m.relu.inplace = True",
    "m.fc1.weight.data.mul_(2)",
    "m.fc1.weight = nn.Parameter(torch.ones(6, 6))",
    "m.fc1.bias = None",
    "m.fc3.requires_grad_(False)",
    "prune.l1_unstructured(m.fc1, 'weight', 0.5)",
    "parametrizations.weight_norm(m.fc2)",
    "parametrize.register_parametrization(m, 'scale', nn.ReLU())",
    "m.double()",
    "ACT = torch.tanh",
    "ACT = scaled",
    "del ACT",
    "GAIN = 2.0",
    "relu = abs = len = lambda x: x * 7",
    "Net.factor = 2.0",
    "type(m).factor = 3.0",
    "type(m).held = staticmethod(torch.relu)",
    "Net.fc2 = property(lambda self: (LOG.append('fc2'), self.fc1)[1])",
    "Base.relu = property(lambda self: (LOG.append('relu'), self.fc3.weight.data.mul_(2), torch.tanh)[2])",
    "Net.__getattr__ = lambda self, name: (NOTE(name), Base.__getattr__(self, name))[1]",
    "Net.__getattribute__ = lambda self, name: (NOTE(name), Base.__getattribute__(self, name))[1]",
    "Net.__call__ = lambda self, *a: (LOG.append('call'), Base.__call__(self, *a))[1]",
    "Net.forward = lambda self, x, k=1.0: self.fc3(torch.relu(x))",
    "type(m).forward = lambda self, x, k=1.0: self.fc3(torch.tanh(x))",
    "Base.forward = lambda self, x, k=1.0: x * k",
    "Base.encode = lambda self, x: self.fc2(x)",
    "Block.forward = lambda self, x: self.linear(x)",
    "Net.forward.__defaults__ = (3.0,)",
    "Net.forward.__code__ = (lambda self, x, k=1.0: self.fc2(x)).__code__",
    "m = copy.deepcopy(m)",
    "m = copy.copy(m)",
    "m = pickle.loads(pickle.dumps(m))",
    "m.__class__ = Base",
    "m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()})",
    "PATCH(F, 'relu', torch.tanh)",
    "PATCH(torch, 'relu', torch.abs)",
    "PATCH(nn.Linear, 'forward', lambda self, x: x * 2)",
    "PATCH(nn.ReLU, 'forward', lambda self, x: x * 2)",
    "PATCH(nn.Module, '__call__', lambda self, *a: self.forward(*a))",
    "PATCH(nn.Module, 'fc1', property(lambda self: torch.tanh))",
    "PATCH(torch.Tensor, 'relu', torch.abs)",
    "HANDLES.append(nn.modules.module.register_module_forward_hook(SEEN))",
]
CALLS = [
    "m(X)",
    "m(X)",
    "m(X)",
    "m(X, 2.0)",
    "m(X, k=0.5)",
    "m(X[0])",
    "m(X[None])",
    "m(X[:, :5])",
    "m(X.double())",
    "m()",
    "m(None)",
    "m((X, X))",
    "m(X[:0])",
    "m(x=X)",
]

programs = st.tuples(
    forwards(),
    st.lists(
        st.tuples(st.lists(st.sampled_from(CHANGES), max_size=2), st.sampled_from(CALLS)),
        min_size=1,
        max_size=4,
    ),
)


def observed(name, source, rounds, fused):
    """All that a program shows: what each call returns, or raises and where, and what it leaves behind."""
    module = sys.modules[name] = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    undo, seen = [], []

    def patch(holder, key, value):
        had = key in vars(holder)
        undo.append((holder, key, had, vars(holder).get(key)))
        setattr(holder, key, value)

    space = vars(module)
    space.update(PATCH=patch, HANDLES=[])
    try:
        exec(compile(source, file, "exec", dont_inherit=True), space)
        torch.default_generator.manual_seed(0)
        model = space["Net"]()
        space["m"] = fastmlp.fuse(model) if fused else model
        for changes, call in rounds:
            for change in changes:
                torch.default_generator.manual_seed(1)
                seen.append(attempt(change, space, file))
            torch.default_generator.manual_seed(2)
            space["X"] = torch.randn(6, 6).requires_grad_()
            torch.default_generator.manual_seed(3)
            seen.append(attempt(f"Y = {call}", space, file))
            if seen[-1] is None:
                seen.append(results(space))
            m = space["m"]
            seen.append([*map(str, space["LOG"])])
            own = vars(m)
            seen.append(
                (own.get("count"), own.get("keep"), space["Net"].count, space["Net"].factor, space["GAIN"])
            )
            seen.append({key: value.clone() for key, value in m.state_dict().items()})
    finally:
        for holder, key, had, value in reversed(undo):
            if had:
                setattr(holder, key, value)
            else:
                delattr(holder, key)
        for handle in space["HANDLES"]:
            handle.remove()
        del sys.modules[name], linecache.cache[file]
    return seen


def attempt(statement, space, file):
    """None, or what was raised, and the line of the program that raised it or called what did."""
    try:
        exec(statement, space)
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
        ]
        return type(error).__name__, lines[:1]
    return None


def results(space):
    y, m, x = space["Y"], space["m"], space["X"]
    tensors = [
        t
        for t in (y.values() if isinstance(y, dict) else y if isinstance(y, tuple) else [y])
        if isinstance(t, torch.Tensor)
    ]
    total = sum((t.double().square().sum() for t in tensors), torch.zeros(()).double())
    wanted = [t for t in (x, *m.parameters()) if t.requires_grad]
    if not total.requires_grad or not total.isfinite():
        return type(y).__name__, tensors
    try:
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    except Exception as error:  # of a hook, too
        return type(y).__name__, tensors, type(error).__name__
    return type(y).__name__, tensors, list(gradients)


def compared(ours, theirs, program):
    def same(a, b):
        if isinstance(b, torch.Tensor):
            assert type(a) is type(b)
            torch.testing.assert_close(
                a,
                b,
                rtol=1e-3,
                atol=1e-3 * float(1 + b.detach().abs().nan_to_num(0, 0, 0).max()) if b.numel() else 1,
                equal_nan=True,
            )
        elif isinstance(b, (list, tuple)):
            assert type(a) is type(b)
            assert len(a) == len(b), (a, b)
            for each, other in zip(a, b, strict=True):
                same(each, other)
        elif isinstance(b, dict):
            assert list(a) == list(b)
            same(list(a.values()), list(b.values()))
        else:
            assert a == b, (a, b)

    same(ours, theirs)


def tried(programs_count):
    """Runs a test with so many programs."""
    return settings(
        max_examples=programs_count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        database=None,
    )


def check(program):
    forward, rounds = program
    source = HEAD + "\n" + forward + "\n"
    note(forward + "\n\n" + "\n".join(line for changes, call in rounds for line in [*changes, call]))
    theirs, ours = (observed(name, source, rounds, name == "fused") for name in ("stock", "fused"))
    compared(ours, theirs, program)


@tried(100)
@given(programs)
def test_any_forward_does_what_stock_does_whatever_is_changed_between_calls(program):
    check(program)


@pytest.mark.slow
@tried(2000)
@given(programs)
def test_so_does_every_one_of_many_more_forwards(program):
    check(program)
