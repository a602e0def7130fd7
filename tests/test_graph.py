"""TrainStep's CUDA graphs, without a GPU: a stand-in records torch's operations in place of kernels.

Like a GPU it computes nothing while it captures, and afterwards reads and writes the memory of that moment.
"""

import copy
import itertools
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_step import SGD_OPTIONS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmlp
from fastmlp import graph as graph_module

SIZES = (5, 9, 3)
LOSSES = {
    "cross_entropy": nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 2.0]), label_smoothing=0.1),
    "fastmlp's": fastmlp.CrossEntropyLoss(),
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
        with torch.no_grad():
            for call, arguments, options, results in self.calls:
                made = tensors(call(*arguments, **options))
                for kept, new in zip(
                    results, made, strict=False
                ):  # there are none of what writes to arguments
                    kept.copy_(new)


class Capture(TorchDispatchMode):
    """In place of torch.cuda.graph."""

    made = 0

    def __init__(self, graph, stream, capture_error_mode):
        super().__init__()
        self.graph = graph
        Capture.made += 1

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        options = kwargs or {}
        if call._schema.is_mutable:
            self.graph.calls.append((call, args, options, []))
            return args[0] if call._schema.returns else None
        result = call(*args, **options)
        if call.is_view:
            return result
        self.graph.calls.append((call, args, options, tensors(result)))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for *_, results in self.graph.calls:
            for result in results:
                result.detach().fill_(torch.nan if result.is_floating_point() else -1)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": RecordedGraph,
        "graph": Capture,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Capture, "made", 0)
    monkeypatch.setattr(fastmlp.step, "_CAPTURED", {"cpu"})


class Twins:
    """A step that captures, as on a GPU, and the standard loop beside it, from the same start."""

    def __init__(self, loss=LOSSES["cross_entropy"], kind=torch.optim.SGD, **options):
        torch.manual_seed(0)
        self.loss = copy.deepcopy(loss)
        self.model, self.optimizer = self.made(kind, options)
        self.other, self.other_optimizer = self.made(kind, options)
        self.other.load_state_dict(self.model.state_dict())
        self.step = fastmlp.TrainStep(self.model, self.loss, self.optimizer)

    def made(self, kind, options):
        model = fastmlp.MLP(*SIZES)
        return model, kind(model.parameters(), **{"lr": 0.1, **options})

    @property
    def optimizers(self):
        return self.optimizer, self.other_optimizer

    def batch(self, size=8):
        x = torch.randn(size, SIZES[0])
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return x, torch.randint(SIZES[-1], (size,))
        return x, torch.rand(size, SIZES[-1])

    def train(self, *sizes):
        """A step of both on each of some batches, which must leave the same behind; the losses of ours."""
        values = []
        for size in sizes:
            x, target = self.batch(size)
            values.append(self.step(x, target))
            value = self.loss(self.other(x), target)
            self.other_optimizer.zero_grad()
            value.backward()
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
    ("kind", "options", "name"),
    [
        (kind, options, name)
        for (kind, options), name in zip(
            itertools.product(["torch", "fastmlp"], SGD_OPTIONS), itertools.cycle(LOSSES), strict=False
        )
    ],
    ids=str,
)
def test_a_graph_trains_as_the_standard_loop_does(kind, options, name):
    loss, kind = LOSSES[name], torch.optim.SGD if kind == "torch" else fastmlp.SGD
    Twins(loss, kind, **options).train(*[8] * 6)
    assert Capture.made == 1


def test_every_shape_of_batch_has_its_graph():
    Twins(momentum=0.9).train(*[8, 8, 3] * 4)
    assert Capture.made == 2


def test_a_shape_too_many_has_none(monkeypatch):
    monkeypatch.setattr(graph_module, "MOST", 1)
    Twins().train(*[8, 3] * 3)
    assert Capture.made == 1


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
    assert Capture.made == 1


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
    assert Capture.made == 1


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.5), ("weight_decay", 0.1), ("maximize", True)])
def test_a_changed_option_takes_effect(name, value):
    twins = Twins(momentum=0.9)
    twins.train(*[8] * 4)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0][name] = value
    twins.train(*[8] * 4)
    assert Capture.made == 2


def test_options_that_change_at_every_call_are_not_captured():
    twins = Twins(momentum=0.9)
    for index in range(5):
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["momentum"] = 0.9 - 0.1 * index
        twins.train(8)
    assert Capture.made == 0


@pytest.mark.parametrize("is_trained", [True, False])
def test_parameters_that_have_moved_are_those_that_are_used(is_trained):
    twins = Twins(momentum=0.9)
    weights = [model[0].weight.requires_grad_(is_trained) for model in (twins.model, twins.other)]
    twins.train(*[8] * 4)
    for weight in weights:
        weight.data = 2 * weight.data
    twins.train(*[8] * 4)
    assert Capture.made == 2


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
    assert Capture.made == 2


def test_weights_of_the_loss_are_read_at_each_call():
    twins = Twins(LOSSES["bce"])
    for index in range(5):
        twins.loss.pos_weight.fill_(index)
        twins.train(8)
    assert Capture.made == 1
    twins.loss.pos_weight = torch.full((3,), 0.5)
    twins.train(8)


def test_frozen_parameters_stay_as_they_are():
    twins = Twins(momentum=0.9)
    for model in (twins.model, twins.other):
        model[0].weight.requires_grad_(False)
    before = twins.model[0].weight.clone()
    twins.train(*[8] * 5)
    assert torch.equal(twins.model[0].weight, before)
    assert Capture.made == 1


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
    assert Capture.made == 0


def test_what_does_not_fit_raises_each_time_and_changes_nothing():
    twins = Twins(momentum=0.9)
    before = copy.deepcopy(twins.model.state_dict())
    for _ in range(3):
        with pytest.raises(RuntimeError):
            twins.step(torch.randn(8, SIZES[0] + 1), torch.randint(SIZES[-1], (8,)))
    torch.testing.assert_close(twins.model.state_dict(), before, rtol=0, atol=0)
    assert not twins.optimizer.state_dict()["state"]
