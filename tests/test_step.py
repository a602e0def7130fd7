"""TrainStep leaves behind what the standard loop leaves behind, in parameters, optimizer and habits."""

import copy
import itertools
import math
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import ACTIVATIONS
from reference import chain as stock
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

import fastmlp

SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.5, "dampening": 0.3, "maximize": True},
]
OPTIONS = [  # with an eps that keeps Adam from making steps of gradients that are but rounding
    *SGD_OPTIONS,
    {"kind": torch.optim.Adam, "weight_decay": 0.1, "eps": 1e-3},
    {"kind": torch.optim.Adam, "betas": (0.3, 0.5), "amsgrad": True, "maximize": True, "eps": 1e-3},
    {"kind": torch.optim.AdamW, "weight_decay": 0.1, "eps": 1e-3},
]
LOSSES = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 2.0]), ignore_index=1, label_smoothing=0.1),
    "summed": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "mse summed": nn.MSELoss(reduction="sum"),
    "l1": nn.L1Loss(),
    "smooth_l1": nn.SmoothL1Loss(beta=0.25),
    "huber summed": nn.HuberLoss(reduction="sum", delta=0.25),
    "bce": nn.BCEWithLogitsLoss(),
    "bce weighted": nn.BCEWithLogitsLoss(
        torch.tensor([1.0, 0.5, 2.0]), pos_weight=torch.tensor([3.0, 0.0, 1.0])
    ),
}


# The ways through the threads, with one of the options; and each option, with a small batch.
BATCHES = [(300, OPTIONS[3]), (1100, OPTIONS[6]), *((8, options) for options in OPTIONS)]
every_batch_and_option = pytest.mark.parametrize(("batch", "options"), BATCHES, ids=str)


def batch_for(loss, batch, features, outputs):
    x = torch.randn(batch, features)
    if isinstance(loss, nn.CrossEntropyLoss):
        return x, torch.randint(outputs, (batch,))
    return x, torch.rand(batch, outputs)


def standard_step(model, loss, optimizer, x, target, max_grad_norm=None):
    value = loss(model(x), target)
    optimizer.zero_grad()
    value.backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return value.detach()


def assert_same_training(
    model, loss, batches, steps=3, lr=0.1, kind=torch.optim.SGD, max_grad_norm=None, loss_of=None, **options
):
    """The step against the loop, both in float32 from the same start; the step.

    `loss_of`: makes the loss of a model, which it then sees; else `loss` is it.
    """
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (kind(m.parameters(), lr=lr, **options) for m in (model, other))
    loss, other_loss = (loss_of(m) if loss_of else loss for m in (model, other))
    step = fastmlp.TrainStep(model, loss, optimizer, max_grad_norm=max_grad_norm)
    for index in range(steps):
        x, target = batches(index)
        torch.manual_seed(index)  # for dropout
        value = step(x, target)
        torch.manual_seed(index)
        expected = standard_step(other, other_loss, other_optimizer, x, target, max_grad_norm)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for own, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(optimizer.state_dict(), other_optimizer.state_dict(), rtol=1e-4, atol=1e-5)
    return step


# What an optimizer makes of a gradient does not depend on the loss: each option with one, each loss with one.
@pytest.mark.parametrize(
    ("name", "options"),
    [*itertools.product(["smoothed"], OPTIONS), *zip(LOSSES, itertools.cycle(OPTIONS), strict=False)],
    ids=str,
)
def test_every_loss_and_option_trains_as_in_the_standard_loop(instruction_set, name, options):
    torch.manual_seed(0)
    loss = LOSSES[name]
    scale = 0.01 if loss.reduction == "sum" else 0.1
    step = assert_same_training(
        stock(9, 20, 3), loss, lambda _: batch_for(loss, 12, 9, 3), lr=scale, **options
    )
    assert fastmlp.why_not_fused(step) is None


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        *itertools.product([(33, 65, 10, 3)], [1, 2, 70, 300, 1100, 2100]),
        *itertools.product([(7, 3)], [1, 300, 2100]),
        *itertools.product([(300, 400, 150, 3)], [1, 70, 1100]),
        ((1100, 20, 3), 1),  # rows of W longer than a block
    ],
    ids=str,
)
def test_every_way_through_the_threads_trains_as_in_the_standard_loop(instruction_set, sizes, batch):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss()
    assert_same_training(stock(*sizes), loss, lambda _: batch_for(loss, batch, sizes[0], 3), momentum=0.9)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_of_bce_that_expand_to_the_outputs_train_as_in_the_standard_loop(name, shape):
    torch.manual_seed(0)
    loss = nn.BCEWithLogitsLoss(**{name: 3 * torch.rand(shape)})
    assert_same_training(stock(9, 20, 3), loss, lambda _: batch_for(loss, 12, 9, 3))


def test_weights_of_bce_are_read_at_each_call():
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))

    def batches(index):
        loss.pos_weight.fill_(index)
        return batch_for(loss, 12, 9, 3)

    assert_same_training(stock(9, 20, 3), loss, batches)


def test_bce_of_outputs_with_leading_dimensions_trains_as_in_the_standard_loop():
    loss = nn.BCEWithLogitsLoss(torch.tensor([1.0, 2.0, 3.0]))
    assert_same_training(stock(9, 20, 3), loss, lambda _: (torch.randn(4, 5, 9), torch.rand(4, 5, 3)))


def distance_to_a_kink(model, loss, batches, kind=torch.optim.SGD, **options):
    """The least |z| that a ReLU sees in these steps: rounding may carry one over 0, to another gradient."""
    model, loss, least = copy.deepcopy(model).double(), copy.deepcopy(loss).double(), [math.inf]
    for module in model:
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(
                lambda _, z: least.extend(z[0].detach().abs().flatten().tolist())
            )
    optimizer = kind(model.parameters(), **options)
    for x, target in batches:
        standard_step(
            model, loss, optimizer, x.double(), target.double() if target.is_floating_point() else target
        )
    return min(least)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    batch=st.integers(0, 40),
    activation=st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Tanh]),
    options=st.sampled_from(OPTIONS),
    name=st.sampled_from(["summed", "mse summed", "bce"]),
)
def test_any_network_trains_as_in_the_standard_loop(instruction_set, sizes, batch, activation, options, name):
    loss = LOSSES[name]
    if batch == 0 and loss.reduction == "mean":
        batch = 1
    model = stock(*sizes, activation=activation)
    batches = [batch_for(loss, batch, sizes[0], sizes[-1]) for _ in range(2)]
    assume(distance_to_a_kink(model, loss, batches, lr=0.01, **options) > 1e-5)
    assert_same_training(model, loss, batches.__getitem__, steps=2, lr=0.01, **options)


def test_the_batch_may_change_from_call_to_call():
    loss = nn.CrossEntropyLoss()
    assert_same_training(stock(5, 9, 3), loss, lambda i: batch_for(loss, (64, 17, 1)[i], 5, 3), momentum=0.9)


def test_training_stays_with_the_loop_in_float64_for_many_steps():
    torch.manual_seed(0)
    model, loss = stock(8, 16, 4), nn.CrossEntropyLoss()
    exact = copy.deepcopy(model).double()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.05))
    optimizer = torch.optim.SGD(exact.parameters(), lr=0.05)
    for _ in range(200):
        x, target = batch_for(loss, 16, 8, 4)
        step(x, target)
        standard_step(exact, loss, optimizer, x.double(), target)
    for own, right in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [130, 1500])
def test_the_number_of_threads_changes_no_bit(instruction_set, batch):
    torch.manual_seed(0)
    model, loss = stock(100, 300, 50, 10), nn.CrossEntropyLoss()
    data = batch_for(loss, batch, 100, 10)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            own = copy.deepcopy(model)
            step = fastmlp.TrainStep(own, loss, torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9))
            values = [step(*data) for _ in range(3)]
            results.append([*values, *own.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- models


def test_an_mlp_a_flatten_nested_sequentials_and_identities_are_understood():
    loss = nn.CrossEntropyLoss()
    model = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(12, 9, bias=False), nn.Tanh()),
        nn.Identity(),
        fastmlp.MLP(9, 5, 3),
    )
    assert_same_training(model, loss, lambda _: (torch.randn(6, 3, 4), torch.randint(3, (6,))))


def test_an_activation_at_the_end_is_understood():
    loss = nn.MSELoss()
    model = nn.Sequential(fastmlp.LinearReLU(4, 6), nn.Linear(6, 2), nn.Sigmoid())
    assert_same_training(model, loss, lambda _: batch_for(loss, 5, 4, 2))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation_trains_as_in_the_standard_loop(instruction_set, activation):
    loss, model = nn.MSELoss(), nn.Sequential(*fastmlp.MLP(4, 6, 5, activation=activation), nn.Linear(5, 2))
    model[1].activation = activation
    assert_same_training(model, loss, lambda _: batch_for(loss, 5, 4, 2))


@pytest.mark.parametrize("frozen", [["0.weight"], ["2.bias"], ["0.weight", "0.bias"], ["2.weight", "2.bias"]])
def test_frozen_parameters_stay_as_they_are(frozen):
    loss, model = nn.CrossEntropyLoss(), stock(5, 9, 3)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: model.get_parameter(name).clone() for name in frozen}
    assert_same_training(model, loss, lambda _: batch_for(loss, 8, 5, 3), momentum=0.9)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in frozen)


def test_each_group_has_its_own_options_and_unknown_parameters_stay():
    loss, model = nn.CrossEntropyLoss(), stock(5, 9, 3)
    other = copy.deepcopy(model)

    def optimizer(m):
        groups = [{"params": [m[0].weight], "lr": 0.5}, {"params": [m[2].bias], "momentum": 0.9}]
        return torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)

    step, other_optimizer = fastmlp.TrainStep(model, loss, optimizer(model)), optimizer(other)
    for _ in range(3):
        data = batch_for(loss, 8, 5, 3)
        step(*data)
        standard_step(other, loss, other_optimizer, *data)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


def test_an_optimizer_may_have_the_parameters_in_another_order():
    torch.manual_seed(0)

    def reverse(params, **options):
        *others, last = reversed([*params])
        return torch.optim.SGD([{"params": others}, {"params": [last], "lr": 0.5}], **options)

    loss = nn.CrossEntropyLoss()
    step = assert_same_training(stock(5, 9, 3), loss, lambda _: batch_for(loss, 8, 5, 3), kind=reverse)
    assert fastmlp.why_not_fused(step) is None


def test_parameters_have_counts_of_their_own():
    torch.manual_seed(0)
    loss, late = nn.CrossEntropyLoss(), []

    def kind(params, **options):
        params = [*params]
        late.append(params[1].requires_grad_(False))
        return torch.optim.Adam(params, **options)

    def batches(index):
        if index == 2:
            for p in late:
                p.requires_grad_()
        return batch_for(loss, 8, 5, 3)

    assert_same_training(stock(5, 9, 3), loss, batches, kind=kind, eps=1e-3)


class Subclass(torch.Tensor):
    pass


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(15, 3)

    def forward(self, x):
        return self.head(torch.relu(self.embedding(x.abs().long() % 5).flatten(1)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(x + torch.relu(self.fc1(x)))


def hooked():
    model = stock(5, 9, 3)
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    return model


def tied():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(5, 3))


TRAINED = "what comes to its last layers requires a gradient"
NO_CHAINS = {
    "another activation": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Softsign()), "does not end by a chain"),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(), nn.Linear(9, 3)), TRAINED),
    "a norm": (lambda: nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)), TRAINED),
    "a hook": (hooked, TRAINED),
    "an embedding": (Embedded, TRAINED),
    "a residual": (Residual, TRAINED),
    "a layer twice": (tied, "share no memory"),
    "a convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 1, 3), nn.Flatten()),
        "end by",
    ),
}


@pytest.mark.parametrize(("make", "words"), NO_CHAINS.values(), ids=NO_CHAINS)
@pytest.mark.parametrize("loss", [nn.MSELoss(), lambda y, t: (y - t).square().mean()], ids=["mse", "own"])
def test_a_model_that_is_no_chain_trains_as_in_the_standard_loop_and_tells_why(make, words, loss):
    torch.manual_seed(0)
    step = assert_same_training(make(), loss, lambda _: (torch.randn(8, 5), torch.randn(8, 3)))
    assert words in fastmlp.why_not_fused(step)
    assert repr(step).endswith(f"in the standard loop: {fastmlp.why_not_fused(step)}")


CHAINS = {
    "what trains nothing": lambda: nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.ReLU(), *stock(5, 9, 3)),
    "dropout of the input": lambda: nn.Sequential(nn.Dropout(0.2), *stock(5, 9, 3)),
    "a frozen trunk": lambda: nn.Sequential(Residual().requires_grad_(False), *stock(3, 9, 3)),
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_what_comes_before_the_layers_runs_as_it_is(make):
    torch.manual_seed(0)
    step = assert_same_training(make(), nn.MSELoss(), lambda _: (torch.randn(8, 5), torch.randn(8, 3)))
    assert fastmlp.why_not_fused(step) is None


@pytest.mark.parametrize(
    "argument",
    [{"model": 3}, {"loss": 3}, {"optimizer": 3}, {"max_grad_norm": 0.0}, {"accumulate": 0}],
    ids=str,
)
def test_an_argument_that_is_none_is_refused_by_name(argument):
    model = stock(3, 2)
    given = {
        "model": model,
        "loss": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters()),
    } | argument
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(argument))}: expected"):
        fastmlp.TrainStep(**given)


def test_a_strict_step_raises_instead_of_being_the_loop_with_nothing_changed():
    model, loss = Residual(), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), strict=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"strict: .* {TRAINED}"):
        step(torch.randn(8, 5), torch.randn(8, 3))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# ---- around a loss of one's own


def penalised(model):
    return lambda y, t: (y - t).square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters())


def calls_again(model):
    return lambda y, t: (y - t).square().mean() + model(t.new_ones(2, 5)).square().mean()


def differentiates(model):
    def loss(y, t):
        slopes = torch.autograd.grad(y.sum(), list(model.parameters()), create_graph=True)
        return (y - t).square().mean() + sum(slope.square().sum() for slope in slopes)

    return loss


OTHER_WAYS = "by other ways than the model's output"
OWN_LOSSES = {
    "a power": (lambda model: lambda y, t: (y - t).square().mean(), "loss: the kernels know"),
    "written in place": (lambda model: lambda y, t: y.sub_(t).abs().mean(), "loss: the kernels know"),
    "of a part": (lambda model: lambda y, t: y[:3, 1].exp().sum(), "loss: the kernels know"),
    "with a hook": (
        lambda model: lambda y, t: (y.register_hook(lambda g: 2 * g), (y - t).abs().mean())[1],
        "loss: the kernels know",
    ),
    "of classes with weights of their own": (
        lambda model: lambda y, t: nn.functional.cross_entropy(y, t.softmax(1)),
        "loss: the kernels know",
    ),
    "a penalty of weights": (penalised, OTHER_WAYS),
    "a second call of the model": (calls_again, OTHER_WAYS),
    "a gradient in the loss": (differentiates, OTHER_WAYS),
}


@pytest.mark.parametrize(
    ("name", "max_grad_norm"),
    [*((name, None) for name in OWN_LOSSES), ("a power", 0.05), ("a penalty of weights", 0.05)],
)
def test_any_loss_trains_as_in_the_standard_loop(name, max_grad_norm):
    loss_of, words = OWN_LOSSES[name]
    torch.manual_seed(0)
    step = assert_same_training(
        stock(5, 9, 3, activation=nn.SiLU),
        None,
        lambda _: (torch.randn(8, 5), torch.randn(8, 3)),
        kind=torch.optim.Adam,
        eps=1e-3,
        max_grad_norm=max_grad_norm,
        loss_of=loss_of,
    )
    assert words in fastmlp.why_not_fused(step)
    assert ("in two calls" in repr(step)) == (words != OTHER_WAYS)


@every_batch_and_option
def test_every_option_and_batch_trains_around_a_loss(instruction_set, batch, options):
    torch.manual_seed(0)
    assert_same_training(
        nn.Sequential(*stock(9, 20, 3, activation=nn.GELU), nn.Sigmoid()),
        lambda y, t: (y - t).square().mean(),
        lambda _: (torch.randn(batch, 9), torch.rand(batch, 3)),
        **options,
    )


def test_a_loss_takes_several_targets_and_may_return_more_than_the_loss():
    model, other = (stock(5, 9, 3) for _ in range(2))
    other.load_state_dict(model.state_dict())

    def loss(y, target, weight):
        return (weight * (y - target).square()).mean(), y.detach(), "more"

    x, target, weight = torch.randn(8, 5), torch.randn(8, 3), torch.rand(3)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    value, y, more = step(x, target, weight)
    expected = standard_step(
        other, lambda y, t: loss(y, t, weight)[0], torch.optim.SGD(other.parameters(), lr=0.1), x, target
    )
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad
    assert (y.shape, more) == ((8, 3), "more")
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


def writes_weight(model):
    def loss(y, t):
        with torch.no_grad():
            model[2].weight.mul_(2)
        return (y - t).square().mean()

    return loss


FAILING = {
    "no gradient": (lambda model: lambda y, t: (y.detach() - t).mean(), "does not require grad"),
    "no scalar": (lambda model: lambda y, t: y - t, "only for scalar outputs"),
    "a weight written meanwhile": (writes_weight, "modified by an inplace operation"),
    "an error": (lambda model: lambda y, t: y + t.new_ones(7, 7), "must match the size"),
}


@pytest.mark.parametrize(("loss_of", "words"), FAILING.values(), ids=FAILING)
def test_what_the_loop_refuses_of_a_loss_raises_as_there_with_no_step_taken(loss_of, words):
    model = stock(5, 9, 3)
    step = fastmlp.TrainStep(model, loss_of(model), torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(RuntimeError, match=words):
        step(torch.randn(8, 5), torch.randn(8, 3))
    torch.testing.assert_close(model[0].state_dict(), before, rtol=0, atol=0)


def test_a_loss_that_does_not_see_the_output_changes_nothing():
    model, free = stock(5, 3), torch.ones(1, requires_grad=True)
    step = fastmlp.TrainStep(model, lambda y, t: free.sum(), torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    assert step(torch.randn(8, 5), None) == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_parameters_of_a_loss_are_trained_with_the_models():
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, y, t):
            return (self.scale * y - t).square().mean()

    model, loss = stock(5, 9, 3), Scaled()
    other, other_loss = copy.deepcopy((model, loss))
    optimizer, other_optimizer = (
        torch.optim.SGD([*m.parameters(), *own.parameters()], lr=0.1)
        for m, own in ((model, loss), (other, other_loss))
    )
    step = fastmlp.TrainStep(model, loss, optimizer)
    for _ in range(3):
        x, target = torch.randn(8, 5), torch.randn(8, 3)
        torch.testing.assert_close(
            step(x, target), standard_step(other, other_loss, other_optimizer, x, target)
        )
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.scale, other_loss.scale)


OPTIMIZERS = {
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "foreach": lambda params, lr: torch.optim.Adam(params, lr=lr, eps=1e-3, foreach=True),
    "fused": lambda params, lr: torch.optim.SGD(params, lr=lr, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_trains_as_in_the_standard_loop(kind):
    torch.manual_seed(0)
    assert_same_training(
        stock(5, 9, 3), nn.MSELoss(), lambda _: (torch.randn(8, 5), torch.randn(8, 3)), lr=0.01, kind=kind
    )


def test_lbfgs_asks_for_the_loss_as_often_as_it_likes():
    torch.manual_seed(0)
    model, loss = stock(5, 9, 3), nn.MSELoss()
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (torch.optim.LBFGS(m.parameters(), lr=0.1) for m in (model, other))
    step = fastmlp.TrainStep(model, loss, optimizer)

    def closure():
        other_optimizer.zero_grad()
        value = loss(other(x), target)
        value.backward()
        return value

    for _ in range(2):
        x, target = torch.randn(8, 5), torch.randn(8, 3)
        torch.testing.assert_close(step(x, target), other_optimizer.step(closure).detach())
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def test_lbfgs_takes_the_mean_of_all_processes_gradients(monkeypatch):
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(distributed, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(
        distributed, "all_reduce", lambda grad, group: grad.mul_(6)
    )  # the other has 5 times ours
    model, loss = stock(5, 3), nn.MSELoss()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=1)
    step = fastmlp.TrainStep(model, loss, optimizer, process_group="both")
    x, target = torch.randn(8, 5), torch.randn(8, 3)
    loss(model(x), target).backward()
    expected = [3 * p.grad for p in model.parameters()]
    step(x, target)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_an_optimizers_own_zero_grad_is_called_in_the_loop():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    optimizer.zero_grad = lambda: calls.append(len(calls))
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    for _ in range(2):
        step(torch.randn(5, 4), torch.randn(5, 3))
    assert calls == [0, 1]
    assert step.reason().startswith("model: ")


def test_torchs_optimizer_updates_by_our_kernel_in_the_loop_and_stays_torchs():
    model = Residual()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which wraps the step
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    with torch.profiler.profile() as profile:
        step(torch.randn(8, 5), torch.randn(8, 3))
    assert "fastmlp::optimize_" in {event.name for event in profile.events()}
    assert type(optimizer) is torch.optim.Adam
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


# ---- every call sees model, loss and optimizer as they are


class Net(nn.Module):
    """A forward of its own, which reshapes its input first."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 9), nn.Linear(9, 3)

    def forward(self, x):
        x = x.view(-1, 5)
        return self.fc2(torch.relu(self.fc1(x)))


FOLLOWED = {
    "an exchanged head": (lambda: stock(5, 9, 3), lambda m: setattr(m, "2", nn.Linear(9, 3))),
    "an exchanged activation": (lambda: stock(5, 9, 3), lambda m: setattr(m, "1", nn.Tanh())),
    "a layer put in": (lambda: stock(5, 9, 3), lambda m: m.insert(2, nn.Linear(9, 9))),
    "a layer taken out": (lambda: stock(5, 9, 9, 3), lambda m: (m.pop(2), m.pop(2))),
    "an identity put in": (lambda: stock(5, 9, 3), lambda m: m.insert(1, nn.Identity())),
    "dropout in eval mode": (
        lambda: stock(5, 9, 3),
        lambda m: (m.insert(1, nn.Dropout()), m.eval()),
    ),
    "an exchanged child of a forward": (Net, lambda m: setattr(m, "fc2", nn.Linear(9, 3))),
    "a bias taken out": (lambda: stock(5, 9, 3), lambda m: setattr(m[0], "bias", None)),
}


@pytest.mark.parametrize(("make", "change"), FOLLOWED.values(), ids=FOLLOWED)
def test_a_model_changed_between_calls_is_trained_as_it_is(make, change):
    torch.manual_seed(0)
    model, loss = make(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step, data = fastmlp.TrainStep(model, loss, optimizer), batch_for(loss, 8, 5, 3)
    step(*data)
    change(model)
    known = {p for group in optimizer.param_groups for p in group["params"]}
    if added := [p for p in model.parameters() if p not in known]:
        optimizer.add_param_group({"params": added})
    other = copy.deepcopy(model)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        value, expected = step(*data), standard_step(other, loss, other_optimizer, *data)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def twice(module, args, y):
    return 2 * y


def patch(cls, forward):
    cls.forward = forward  # pytest's monkeypatch sets it back


def renew(model):
    for index in (0, 2, 4):
        model[index] = nn.Linear(9, 9)


LOOPED = {
    "dropout": (TRAINED, lambda m, _: m.insert(1, nn.Dropout())),
    "an unknown activation": (TRAINED, lambda m, _: setattr(m, "1", nn.Softsign())),
    "a forward on a child": (TRAINED, lambda m, _: setattr(m[2], "forward", lambda x: 2 * x)),
    "a forward hook": (TRAINED, lambda m, _: m[0].register_forward_hook(twice)),
    "a pre-hook": (TRAINED, lambda m, _: m[1].register_forward_pre_hook(lambda _, args: (2 * args[0],))),
    "a backward hook": (TRAINED, lambda m, _: m[2].register_full_backward_hook(lambda m, x, y: (2 * x[0],))),
    "a hook on the model": ("end by a chain", lambda m, _: m.register_forward_hook(twice)),
    "a hook on a parameter": ("has hooks", lambda m, _: m[0].weight.register_hook(lambda grad: 2 * grad)),
    "a patched layer": (
        "end by a chain",
        lambda m, _: patch(nn.Linear, lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias)),
    ),
    "a patched loss": ("loss: the", lambda m, _: patch(nn.MSELoss, lambda self, y, t: (y - t).abs().mean())),
    "a hook on the loss": ("loss: the", lambda m, loss: loss.register_forward_hook(twice)),
    "shared memory": ("share no memory", lambda m, _: setattr(m[4].weight, "data", m[2].weight.data)),
    "none of the parameters": ("trains none", lambda m, _: renew(m)),
    "double precision": ("do not cover", lambda m, _: m.double()),
    "a forward on the loss": (
        "loss: the",
        lambda m, loss: setattr(loss, "forward", lambda y, t: ((y - t) * t).abs().mean()),
    ),
}


@pytest.mark.parametrize(("words", "change"), LOOPED.values(), ids=LOOPED)
def test_what_the_kernels_do_not_know_is_done_as_the_loop_does_it_from_the_next_call_on(
    monkeypatch, words, change
):
    for cls in (nn.Linear, nn.MSELoss):
        monkeypatch.setattr(cls, "forward", cls.forward)
    torch.manual_seed(0)
    model, loss = stock(9, 9, 9, 9, activation=nn.Tanh), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step, data = fastmlp.TrainStep(model, loss, optimizer), batch_for(loss, 4, 9, 9)
    step(*data)
    assert fastmlp.why_not_fused(step) is None
    other, other_loss, other_optimizer = copy.deepcopy((model, loss, optimizer))
    for own in ((model, loss), (other, other_loss)):
        torch.manual_seed(0)
        change(*own)
    data = [t.to(model[0].weight.dtype) for t in data]
    for index in range(2):
        torch.manual_seed(index)
        value = step(*data)
        torch.manual_seed(index)
        expected = standard_step(other, other_loss, other_optimizer, *data)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    assert words in fastmlp.why_not_fused(step)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_a_step_raises_as_backward_does(mode):
    model, loss = stock(5, 3), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with mode(), pytest.raises(RuntimeError, match="expected gradients to be enabled"):
        step(*batch_for(loss, 4, 5, 3))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_under_autocast_a_step_is_the_loop_under_autocast():
    torch.manual_seed(0)
    model, loss = stock(5, 9, 3), nn.CrossEntropyLoss()
    other = copy.deepcopy(model)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    data = batch_for(loss, 8, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, logits = step(*data), other(data[0])
        expected = loss(logits, data[1])
    torch.testing.assert_close(value, expected.detach(), rtol=1e-2, atol=1e-2)
    exact = loss(other(data[0]), data[1])
    assert (value - expected).abs() < (value - exact).abs()


def test_global_hooks_see_every_module_of_a_step():
    model, loss, seen = stock(5, 9, 3), nn.MSELoss(), []
    other = copy.deepcopy(model)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    data = batch_for(loss, 8, 5, 3)
    step(*data)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    standard_step(other, loss, optimizer, *data)
    hook = nn.modules.module.register_module_forward_hook(lambda module, _, y: seen.append(module))
    try:
        step(*data)
    finally:
        hook.remove()
    assert seen == [*model, model, loss]
    standard_step(other, loss, optimizer, *data)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


RENAMED = {
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "weight_norm": (weight_norm, remove_weight_norm),
    "parametrized": (
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize(("apply", "remove"), RENAMED.values(), ids=RENAMED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parameters_are_taken_by_name_whatever_order_a_layer_has_them_in(apply, remove):
    model, loss = stock(5, 9, 3), nn.CrossEntropyLoss()
    apply(model[0])
    remove(model[0])
    assert list(model[0]._parameters) == ["bias", "weight"]
    assert_same_training(model, loss, lambda _: batch_for(loss, 8, 5, 3), momentum=0.9)


def test_what_may_not_be_written_raises_before_anything_is_changed():
    loss = nn.MSELoss()
    with torch.inference_mode():
        model = stock(5, 9, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"(?i)inference tensor"):
        fastmlp.TrainStep(model, loss, optimizer)(*batch_for(loss, 4, 5, 3))
    assert all(map(torch.equal, model.parameters(), before))


def test_the_versions_of_parameters_and_momenta_tell_of_a_step():
    model, loss = stock(5, 3), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step, data = fastmlp.TrainStep(model, loss, optimizer), batch_for(loss, 4, 5, 3)
    step(*data)
    changed = [*model.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    versions = [t._version for t in changed]
    step(*data)
    assert all(t._version > version for t, version in zip(changed, versions, strict=True))


def test_an_input_in_the_memory_of_a_weight_is_read_before_that_changes():
    model, loss = stock(3, 3), nn.MSELoss()
    other = copy.deepcopy(model)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    step(model[0].weight.detach()[1:], torch.ones(2, 3))
    standard_step(
        other,
        loss,
        torch.optim.SGD(other.parameters(), lr=0.1),
        other[0].weight.detach()[1:].clone(),
        torch.ones(2, 3),
    )
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
@pytest.mark.parametrize("make", [lambda: stock(5, 9, 3), Net], ids=["sequential", "forward"])
def test_a_copy_of_a_step_trains_its_own_model(make, copied):
    model, loss = make(), nn.CrossEntropyLoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    data = batch_for(loss, 8, 5, 3)
    step(*data)
    other = copied(step)
    step(*data)
    assert not torch.equal(next(other.model.parameters()), next(model.parameters()))
    other(*data)
    torch.testing.assert_close(other.model.state_dict(), model.state_dict(), rtol=0, atol=0)


# ---- bad input changes nothing


LONG = torch.long
MISFITS = {
    "features": (torch.ones(4, 6), torch.zeros(4, dtype=LONG), RuntimeError),
    "dtype": (torch.ones(4, 5).double(), torch.zeros(4, dtype=LONG), RuntimeError),
    "batch": (torch.ones(4, 5), torch.zeros(3, dtype=LONG), ValueError),
    "no classes": (torch.ones(4, 5), torch.zeros(4), RuntimeError),
    "too large a class": (torch.ones(4, 5), torch.tensor([0, 1, 3, 0]), IndexError),
    "a negative class": (torch.ones(4, 5), torch.tensor([0, 1, -1, 0]), IndexError),
    "no tensor": ([1.0] * 5, torch.zeros(4, dtype=LONG), TypeError),
}


@pytest.mark.parametrize(("x", "target", "error"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_raises_as_in_the_loop_before_anything_is_changed(x, target, error):
    model = stock(5, 9, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        step(x, target)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("change", ["half precision", "nothing to train", "no reduction"])
def test_what_the_loop_refuses_raises_with_nothing_changed(change):
    model, loss = stock(5, 9, 3), nn.MSELoss(reduction="none" if change == "no reduction" else "mean")
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    model.to(torch.bfloat16 if change == "half precision" else torch.float32)
    model.requires_grad_(change != "nothing to train")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        step(*batch_for(loss, 4, 5, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_input_with_a_gradient_gets_it():
    model, loss = stock(5, 9, 3), nn.MSELoss()
    other = copy.deepcopy(model)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    x, target = batch_for(loss, 4, 5, 3)
    own = x.clone().requires_grad_()
    step(own, target)
    standard_step(other, loss, torch.optim.SGD(other.parameters(), lr=0.1), x.requires_grad_(), target)
    torch.testing.assert_close(own.grad, x.grad)


def test_nan_and_infinity_spread_as_in_the_standard_loop():
    loss, model = nn.CrossEntropyLoss(), stock(4, 6, 3)
    other = copy.deepcopy(model)
    x, target = batch_for(loss, 5, 4, 3)
    x[2, 1] = torch.nan
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    value = step(x, target)
    standard_step(other, loss, torch.optim.SGD(other.parameters(), lr=0.1), x, target)
    assert value.isnan()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), equal_nan=True)


def test_targets_whose_weights_are_all_zero_give_the_loops_nan():
    loss, model = nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 2.0]), label_smoothing=0.1), stock(4, 6, 3)
    other, x, target = copy.deepcopy(model), torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    value = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))(x, target)
    standard_step(other, loss, torch.optim.SGD(other.parameters(), lr=0.1), x, target)
    assert value.isnan()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), equal_nan=True)


# ---- habits


def test_checkpoints_taken_between_calls_load_into_the_standard_loop_and_back():
    torch.manual_seed(0)
    loss, model = nn.CrossEntropyLoss(), stock(5, 9, 3)
    other = copy.deepcopy(model)
    optimizers = [fastmlp.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other)]
    step = fastmlp.TrainStep(model, loss, optimizers[0])
    for index in range(6):
        data = batch_for(loss, 8, 5, 3)
        standard_step(other, loss, optimizers[1], *data)
        if index % 2:
            step(*data)
            continue
        resumed = stock(5, 9, 3)
        resumed.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
        optimizer.load_state_dict(optimizers[0].state_dict())
        standard_step(resumed, loss, optimizer, *data)
        model.load_state_dict(resumed.state_dict())
        optimizers[0].load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


def test_a_learning_rate_scheduler_sets_the_next_step_and_does_not_warn():
    model, loss = stock(3, 2), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    step, data = fastmlp.TrainStep(model, loss, optimizer), batch_for(loss, 4, 3, 2)
    step(*data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    before = copy.deepcopy(model.state_dict())
    step(*data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_later_backward_through_the_old_parameters_raises_as_in_torch():
    model, loss = stock(3, 4, 2), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    y = model(torch.randn(4, 3))
    step(*batch_for(loss, 4, 3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_are_left_as_they_are():
    model, loss = stock(3, 2), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    step(*batch_for(loss, 4, 3, 2))
    assert all(p.grad is None for p in model.parameters())


@every_batch_and_option
def test_clipping_is_part_of_the_call(instruction_set, batch, options):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss()
    step = assert_same_training(
        stock(9, 20, 3), loss, lambda _: batch_for(loss, batch, 9, 3), max_grad_norm=0.1, **options
    )
    assert fastmlp.why_not_fused(step) is None


def test_clipping_gives_what_clip_grad_norm_gives():
    torch.manual_seed(0)
    loss, model = nn.CrossEntropyLoss(), stock(5, 9, 3)
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, other))
    step = fastmlp.TrainStep(model, loss, optimizer, max_grad_norm=0.1)
    for _ in range(3):
        x, target = batch_for(loss, 8, 5, 3)
        step(x, target)
        other_optimizer.zero_grad()
        loss(other(x), target).backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        torch.testing.assert_close(step.grad_norm, norm)
        other_optimizer.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


def test_accumulating_over_calls_is_one_step_of_their_mean():
    torch.manual_seed(0)
    loss, model = nn.CrossEntropyLoss(), stock(5, 9, 3)
    other = copy.deepcopy(model)
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=4)
    x, target = batch_for(loss, 32, 5, 3)
    for _ in range(2):
        for part in range(4):
            step(x[part * 8 : part * 8 + 8], target[part * 8 : part * 8 + 8])
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        standard_step(other, loss, optimizer, x, target)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


# ---- why a step is not one call


def test_a_step_that_is_one_call_has_no_reason_and_says_so():
    model, loss = stock(5, 9, 3), nn.CrossEntropyLoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.Adam(model.parameters()))
    assert fastmlp.why_not_fused(step) is None
    assert fastmlp.why_not_fused(step, *batch_for(loss, 4, 5, 3)) is None
    assert repr(step) == "TrainStep(Sequential, CrossEntropyLoss, Adam), in one call"


REASONS = {
    "accumulating": ("accumulate: ", lambda step: setattr(step, "accumulate", 2)),
    "an optimizer": (
        "optimizer: .* not RMSprop",
        lambda step: setattr(step, "optimizer", torch.optim.RMSprop(step.model.parameters())),
    ),
    "an option of the optimizer": (
        "optimizer: it is differentiable",
        lambda step: step.optimizer.param_groups[0].update(differentiable=True),
    ),
    "a hook on the optimizer": (
        "optimizer: it has step hooks",
        lambda step: step.optimizer.register_step_pre_hook(lambda *_: None),
    ),
}


@pytest.mark.parametrize(("words", "change"), REASONS.values(), ids=REASONS)
def test_a_step_tells_why_it_is_the_loop(words, change):
    model, loss = stock(5, 9, 3), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    change(step)
    data = batch_for(loss, 4, 5, 3)
    reason = fastmlp.why_not_fused(step, *data)
    assert re.search(words, reason)
    try:
        step(*data)
    except RuntimeError:  # torch's differentiable SGD takes no leaf
        return
    assert fastmlp.why_not_fused(step) == reason
    kinds = f"Sequential, MSELoss, {type(step.optimizer).__name__}"
    assert repr(step) == f"TrainStep({kinds}), in the standard loop: {reason}"


def test_a_step_tells_of_autocast_and_of_who_is_to_see_the_modules():
    model, loss = stock(5, 3), nn.MSELoss()
    step, data = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters())), batch_for(loss, 4, 5, 3)
    with torch.autocast("cpu"):
        assert fastmlp.why_not_fused(step, *data) == "autocast is enabled on cpu"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hooks for all modules" in fastmlp.why_not_fused(step, *data)
    finally:
        handle.remove()
    assert "x itself" in fastmlp.why_not_fused(step, data[0].as_subclass(Subclass), data[1])
    assert fastmlp.why_not_fused(step, *data) is None


def test_asking_a_step_why_changes_nothing():
    model, loss = stock(5, 9, 3), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    before = copy.deepcopy(model.state_dict())
    fastmlp.why_not_fused(step, *batch_for(loss, 4, 5, 3))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not step.optimizer.state


# ---- several processes


@pytest.fixture(scope="module")
def left_by_two_processes(tmp_path_factory):
    """What distributed_driver.py saves: for each process, the parameters that each way to train leaves."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    folder = tmp_path_factory.mktemp("processes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    driver = Path(__file__).with_name("distributed_driver.py")
    result = subprocess.run([*torchrun, driver, folder], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", ["fused", "step"])
def test_processes_train_as_torchs_own_layers_do_under_distributed_data_parallel(left_by_two_processes, way):
    for process in left_by_two_processes:
        torch.testing.assert_close(process[way], process["stock"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["fused", "step"])
def test_every_process_has_the_same_parameters(left_by_two_processes, way):
    first, second = left_by_two_processes
    assert all(map(torch.equal, first[way], second[way]))
