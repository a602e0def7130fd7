"""TrainStep's CUDA graphs, without a GPU: a stand-in records torch's operations in place of kernels.

Like a GPU it computes nothing while it captures, and afterwards reads and writes the memory of that moment.
"""

import copy
import itertools
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_step import OPTIONS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmlp
from fastmlp import graph as graph_module

SIZES = (5, 9, 3)
LOSSES = {
    "cross_entropy": nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 2.0]), label_smoothing=0.1),
    "fastmlp's": fastmlp.CrossEntropyLoss(),
    "a function": F.cross_entropy,
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 0.5, 2.0])),
}


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for other in Capture.graphs:
            if other is not self and other.pool == self.pool:
                other.overwrite()
        with torch.no_grad():
            for call, arguments, options, results in self.calls:
                made = tensors(call(*arguments, **options))
                for kept, new in zip(
                    results, made, strict=False
                ):  # there are none of what writes to arguments
                    kept.copy_(new)

    def overwrite(self):
        for *_, results in self.calls:
            for result in results:
                result.detach().fill_(torch.nan if result.is_floating_point() else -1)


class Capture(TorchDispatchMode):
    """In place of torch.cuda.graph."""

    graphs: ClassVar = []

    def __init__(self, graph, pool, stream, capture_error_mode):
        super().__init__()
        self.graph, self.stream = graph, stream
        graph.pool = pool
        Capture.graphs.append(graph)

    def __enter__(self):
        Streams.current = self.stream
        return super().__enter__()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        options = kwargs or {}
        if call._schema.is_mutable and call is not torch.ops.fastmlp.clip_grad_norm_.default:
            self.graph.calls.append((call, args, options, []))
            return args[0] if isinstance(args[0], torch.Tensor) else True
        result = call(*args, **options)
        if call.is_view:
            return result
        self.graph.calls.append((call, args, options, tensors(result)))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.graph.overwrite()


class Streams:
    """In place of torch.cuda's streams: which is current."""

    current = None

    @staticmethod
    def made(device):
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    @staticmethod
    def within(stream):
        before, Streams.current = Streams.current, stream
        try:
            yield
        finally:
            Streams.current = before


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    pools = itertools.count()
    stand_ins = {
        "CUDAGraph": RecordedGraph,
        "graph": Capture,
        "graph_pool_handle": lambda: (0, 1 + next(pools)),
        "Stream": Streams.made,
        "current_stream": lambda device: Streams.current,
        "stream": Streams.within,
        "is_current_stream_capturing": lambda: False,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Capture, "graphs", [])
    monkeypatch.setattr(Streams, "current", Streams.made(None))
    monkeypatch.setattr(fastmlp.step, "_CAPTURED", {"cpu"})
    monkeypatch.setattr(fastmlp.step._C, "train_step", lambda *_: NotImplemented)  # of more than one launch


_train_step = fastmlp.step._C.train_step


def captures():
    return len(Capture.graphs)


class Twins:
    """A step that captures, as on a GPU, and the standard loop beside it, from the same start."""

    def __init__(
        self, loss=LOSSES["cross_entropy"], kind=torch.optim.SGD, sizes=SIZES, max_norm=None, **options
    ):
        torch.manual_seed(0)
        self.loss, self.sizes, self.max_norm = copy.deepcopy(loss), sizes, max_norm
        self.model, self.optimizer = self.made(kind, options)
        self.other, self.other_optimizer = self.made(kind, options)
        self.other.load_state_dict(self.model.state_dict())
        self.step = fastmlp.TrainStep(self.model, self.loss, self.optimizer, max_grad_norm=max_norm)

    def made(self, kind, options):
        model = fastmlp.MLP(*self.sizes)
        return model, kind(model.parameters(), **{"lr": 0.1, **options})

    @property
    def optimizers(self):
        return self.optimizer, self.other_optimizer

    def batch(self, size=8):
        x = torch.randn(size, self.sizes[0])
        if self.loss is F.cross_entropy or isinstance(self.loss, nn.CrossEntropyLoss):
            return x, torch.randint(self.sizes[-1], (size,))
        return x, torch.rand(size, self.sizes[-1])

    def set(self, **options):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.update(options)

    def train(self, *sizes):
        """A step of both on each of some batches, which must leave the same behind; the losses of ours."""
        values = []
        for size in sizes:
            x, target = self.batch(size)
            values.append(self.step(x, target))
            value = self.loss(self.other(x), target)
            self.other_optimizer.zero_grad()
            value.backward()
            if self.max_norm is not None:
                norm = nn.utils.clip_grad_norm_(self.other.parameters(), self.max_norm)
                torch.testing.assert_close(self.step.grad_norm, norm)
            self.other_optimizer.step()
            torch.testing.assert_close(values[-1], value.detach(), rtol=1e-5, atol=1e-6)
            self.assert_same()
        return values

    def assert_same(self):
        options = {"rtol": 1e-4, "atol": 1e-6}
        for own, right in zip(self.model.parameters(), self.other.parameters(), strict=True):
            torch.testing.assert_close(own, right, **options)
            torch.testing.assert_close(own.grad, right.grad, **options)
        states = (optimizer.state_dict()["state"] for optimizer in self.optimizers)
        torch.testing.assert_close(*states, **options)


@pytest.mark.parametrize(
    ("library", "options", "name"),
    [
        (library, options, name)
        for (library, options), name in zip(
            itertools.product(["torch", "fastmlp"], OPTIONS), itertools.cycle(LOSSES), strict=False
        )
    ],
    ids=str,
)
def test_a_graph_trains_as_the_standard_loop_does(library, options, name):
    kind = options.get("kind", torch.optim.SGD)
    kind = kind if library == "torch" else getattr(fastmlp, kind.__name__)
    Twins(LOSSES[name], **{**options, "kind": kind}).train(*[8] * 6)
    assert captures() == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_a_graph_clips(kind, max_norm):
    options = {"eps": 1e-3} if kind is torch.optim.Adam else {"momentum": 0.9}
    twins = Twins(kind=kind, max_norm=max_norm, **options)
    twins.train(*[8] * 4)
    first = twins.step.grad_norm
    before = first.item()
    twins.train(*[8] * 2)
    assert first == before != twins.step.grad_norm
    assert captures() == 1
    twins.max_norm = twins.step.max_grad_norm = 0.01
    twins.train(*[8] * 3)


def test_what_is_one_launch_needs_no_graph(monkeypatch):
    monkeypatch.setattr(fastmlp.step._C, "train_step", _train_step)
    twins = Twins()
    for index in range(3):
        batch = twins.batch()
        if index == 2:  # what comes to the layers is a module's that is none of theirs
            twins.step.model = nn.Sequential(nn.Softmax(1), *twins.model)
        twins.step(*batch)
        assert "in one call" in repr(twins.step)
    assert captures() == 0


def test_every_shape_of_batch_has_its_graph_in_the_memory_of_all():
    Twins(momentum=0.9).train(*[8, 8, 3] * 4, 3, 8, 3)
    assert captures() == 2
    assert len({graph.pool for graph in Capture.graphs}) == 1


def test_memory_of_graphs_that_are_no_more_is_not_asked_for():  # torch takes no pool twice
    twins = Twins()
    twins.train(*[8] * 3)
    twins.model[0].bias.requires_grad_(False)
    twins.other[0].bias.requires_grad_(False)
    twins.model[0].bias.grad = twins.other[0].bias.grad = None
    twins.train(*[8] * 3)
    assert len({graph.pool for graph in Capture.graphs}) == 2


def test_the_shape_that_was_used_least_recently_goes(monkeypatch):
    monkeypatch.setattr(graph_module, "MOST", 2)
    twins = Twins()
    twins.train(8, 8, 3, 3, 8)
    assert captures() == 2
    twins.train(5, 8, 8, 5)
    assert captures() == 3
    twins.train(3, 3)
    assert captures() == 4


@pytest.fixture
def failing(monkeypatch):
    """Captures that fail as in torch, whose stream then stays the current one."""

    def end(self, *exception):
        Capture.finish(self, *exception)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Capture, "finish", Capture.__exit__, raising=False)
    monkeypatch.setattr(Capture, "__exit__", end)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_shape_whose_capture_fails_stays_the_loop(monkeypatch, failing, kind):
    twins = Twins(kind=kind, **({"eps": 1e-3} if kind is torch.optim.Adam else {"momentum": 0.9}))
    current = Streams.current
    with pytest.warns(UserWarning, match=r"\[8, 5\].*out of memory") as warned:
        twins.train(*[8] * 5)
    assert len(warned) == captures() == 1
    assert warned[0].filename == __file__
    assert Streams.current is current
    assert "out of memory" in fastmlp.why_not_fused(twins.step)
    monkeypatch.setattr(Capture, "__exit__", Capture.finish)
    twins.train(*[3, 8] * 3)
    assert captures() == 2


def test_what_no_kernel_covers_is_the_loop(recwarn):
    twins = Twins(sizes=(5, 5, 3), momentum=0.9)
    twins.train(*[8] * 4)
    for model in (twins.model, twins.other):  # the same memory, differently laid out
        model[0].weight.data = model[0].weight.data.t()
    twins.train(*[8] * 4)
    assert "do not cover" in fastmlp.why_not_fused(twins.step)
    assert captures() == 1
    assert not recwarn.list


def test_the_losses_of_earlier_calls_stay():
    values = Twins().train(*[8] * 6)
    assert len({value.item() for value in values}) == 6


@pytest.mark.parametrize(
    "form",
    [float, torch.tensor, lambda lr: torch.tensor([lr])],
    ids=["number", "tensor", "tensor of one element"],
)
def test_the_learning_rate_may_change_at_every_call(form):
    twins = Twins(momentum=0.9)
    for index in range(6):
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["lr"] = form(0.1 / (1 + index))
        twins.train(8)
    assert captures() == 1


def test_a_scheduler_does_not_warn():
    twins = Twins()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(twins.optimizer, 0.5)
    data = twins.batch()
    for _ in range(3):
        twins.step(*data)
    twins.optimizer._opt_called = False
    twins.step(*data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_groups_have_options_of_their_own():
    twins = Twins()
    for optimizer in twins.optimizers:
        weight, *others = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = others
        optimizer.add_param_group({"params": [weight], "lr": 0.5, "momentum": 0.9})
    twins.train(*[8] * 5)
    assert captures() == 1


NUMBERS = {
    "sgd": (
        torch.optim.SGD,
        [
            {"momentum": 0.5},
            {"dampening": 0.3},
            {"weight_decay": 0.1},
            {"maximize": True},
            {"dampening": 0, "nesterov": True},
        ],
    ),
    "adam": (
        torch.optim.Adam,
        [{"betas": (0.5, 0.7)}, {"eps": 0.1}, {"weight_decay": 0.1}, {"decoupled_weight_decay": True}],
    ),
}


@pytest.mark.parametrize(("kind", "changes"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_may_change_at_every_call(kind, changes):
    twins = Twins(kind=kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {"eps": 1e-3}))
    twins.train(*[8] * 3)
    for change in changes:
        twins.set(**change)
        twins.train(8)
    assert captures() == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_schedule_of_learning_rate_and_momentum_leaves_the_graph(kind):
    twins = Twins(kind=kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {"eps": 1e-3}))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9) for optimizer in twins.optimizers
    ]
    for _ in range(8):
        twins.train(8)
        for schedule in schedules:
            schedule.step()
    assert captures() == 1


@pytest.mark.parametrize("change", [{"momentum": 0}, {"momentum": 0.5}], ids=str)
def test_another_kernel_is_captured_anew(change):
    twins = Twins(momentum=0.0 if change["momentum"] else 0.9)
    twins.train(*[8] * 4)
    twins.set(**change)
    twins.train(*[8] * 4)
    assert captures() == 2


def test_what_a_state_lacks_is_made_by_the_loop():
    twins = Twins(kind=torch.optim.Adam, eps=1e-3)
    twins.train(*[8] * 4)
    for optimizer in twins.optimizers:
        optimizer.state.clear()
    twins.train(*[8] * 4)
    assert captures() == 2


def test_a_step_takes_the_optimizer_and_the_loss_that_it_has_now():
    twins = Twins(momentum=0.9)
    twins.train(*[8] * 4)
    twins.step.loss = twins.loss = nn.CrossEntropyLoss(reduction="sum")
    twins.train(*[8] * 3)
    twins.optimizer, twins.other_optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.01) for model in (twins.model, twins.other)
    )
    twins.step.optimizer = twins.optimizer
    twins.train(*[8] * 3)


@pytest.mark.parametrize("is_trained", [True, False])
def test_parameters_that_have_moved_are_those_that_are_used(is_trained):
    twins = Twins(momentum=0.9)
    weights = [model[0].weight.requires_grad_(is_trained) for model in (twins.model, twins.other)]
    twins.train(*[8] * 4)
    for weight in weights:
        weight.data = 2 * weight.data
    twins.train(*[8] * 4)
    assert captures() == 2


def test_parameters_that_take_the_place_of_others_have_their_gradients():
    twins = Twins()
    twins.train(*[8] * 3)
    before = twins.model[0].weight
    twins.model[0].weight = nn.Parameter(before.data)
    parameters = twins.optimizer.param_groups[0]["params"]
    parameters[:] = twins.model.parameters()
    twins.train(*[8] * 3)


def test_momenta_that_a_checkpoint_has_replaced_are_those_that_are_used():
    twins = Twins(momentum=0.9)
    twins.train(*[8] * 4)
    for optimizer in twins.optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins.train(*[8] * 4)
    assert captures() == 2


def test_weights_of_the_loss_are_read_at_each_call():
    twins = Twins(LOSSES["bce"])
    for index in range(5):
        twins.loss.pos_weight.fill_(index)
        twins.train(8)
    assert captures() == 1
    twins.loss.pos_weight = torch.full((3,), 0.5)
    twins.train(8)


def test_frozen_parameters_stay_as_they_are():
    twins = Twins(momentum=0.9)
    for model in (twins.model, twins.other):
        model[0].weight.requires_grad_(False)
    before = twins.model[0].weight.clone()
    twins.train(*[8] * 5)
    assert torch.equal(twins.model[0].weight, before)
    assert captures() == 1


def test_a_later_backward_through_the_old_parameters_raises_as_in_torch():
    twins = Twins()
    twins.train(*[8] * 3)
    y = twins.model(torch.randn(4, SIZES[0]))
    twins.train(8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


HOOKS = {
    "optimizer": lambda twins, hook: twins.optimizer.register_step_post_hook(hook),
    "loss": lambda twins, hook: twins.loss.register_forward_hook(hook),
    "parameter": lambda twins, hook: twins.model[0].weight.register_hook(hook),
    "accumulated": lambda twins, hook: twins.model[0].weight.register_post_accumulate_grad_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_are_called_at_every_step(register):
    twins, calls = Twins(), []
    twins.train(*[8] * 3)
    data = twins.batch()
    register(twins, lambda *_: calls.append(None))
    for _ in range(2):
        twins.step(*data)
    assert len(calls) == 2


def test_autocast_and_captures_of_the_users_own_have_the_loop(monkeypatch):
    twins = Twins()
    data = twins.batch()
    with torch.autocast("cpu"):
        for _ in range(3):
            twins.step(*data)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(3):
        twins.step(*data)
    assert captures() == 0


def test_what_does_not_fit_raises_each_time_and_changes_nothing():
    twins = Twins(momentum=0.9)
    before = copy.deepcopy(twins.model.state_dict())
    for _ in range(3):
        with pytest.raises(RuntimeError):
            twins.step(torch.randn(8, SIZES[0] + 1), torch.randint(SIZES[-1], (8,)))
    torch.testing.assert_close(twins.model.state_dict(), before, rtol=0, atol=0)
    assert not twins.optimizer.state_dict()["state"]
