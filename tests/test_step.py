"""TrainStep leaves behind what the standard loop leaves behind, in parameters, optimizer and habits."""

import copy
import pickle
import re
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import ACTIVATIONS
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
    "bce": nn.BCEWithLogitsLoss(),
    "bce weighted": nn.BCEWithLogitsLoss(
        torch.tensor([1.0, 0.5, 2.0]), pos_weight=torch.tensor([3.0, 0.0, 1.0])
    ),
}


def batch_for(loss, batch, features, outputs):
    x = torch.randn(batch, features)
    if isinstance(loss, nn.CrossEntropyLoss):
        return x, torch.randint(outputs, (batch,))
    return x, torch.rand(batch, outputs)


def standard_step(model, loss, optimizer, x, target):
    value = loss(model(x), target)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


def stock(*sizes, activation=nn.ReLU):
    layers = [part for k, n in pairwise(sizes) for part in (nn.Linear(k, n), activation())]
    return nn.Sequential(*layers[:-1])


def assert_same_training(model, loss, batches, steps=3, lr=0.1, kind=torch.optim.SGD, **options):
    """The step against the loop, both in float32 from the same start."""
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (kind(m.parameters(), lr=lr, **options) for m in (model, other))
    step = fastmlp.TrainStep(model, loss, optimizer)
    for index in range(steps):
        x, target = batches(index)
        value, expected = step(x, target), standard_step(other, loss, other_optimizer, x, target)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for own, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(optimizer.state_dict(), other_optimizer.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_and_option_trains_as_in_the_standard_loop(instruction_set, loss, options):
    torch.manual_seed(0)
    scale = 0.01 if loss.reduction == "sum" else 0.1
    assert_same_training(stock(9, 20, 3), loss, lambda _: batch_for(loss, 12, 9, 3), lr=scale, **options)


@pytest.mark.parametrize("batch", [1, 2, 70, 300, 1100, 2100])
@pytest.mark.parametrize("sizes", [(7, 3), (33, 65, 10, 3), (300, 400, 150, 3)], ids=str)
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
    for _ in range(500):
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


class Subclass(torch.Tensor):
    pass


class Model(nn.Module):
    def forward(self, x):
        return x


hooked = nn.Sequential(nn.Linear(3, 2))
hooked.register_forward_hook(lambda *_: None)
shared = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Softsign()), TypeError, "module 1: .* Softsign"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()), TypeError, "module 1: .* Dropout"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), TypeError, "module 0: .* ReLU"),
        (Model(), TypeError, "itself.* Model"),
        (nn.Sequential(), TypeError, "nn.Linear or more, got none"),
        (hooked, ValueError, "no hooks"),
        (nn.Sequential(shared, nn.ReLU(), shared), ValueError, "share no parameters"),
        (nn.Sequential(nn.Linear(3, 2).double()), ValueError, "float32 .*float64"),
        (nn.Sequential(nn.Linear(3, 2), None), TypeError, "got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_is_no_chain_is_refused_by_name(model, error, words):
    parameters = [nn.Parameter(torch.ones(1))]
    with pytest.raises(error, match=words):
        fastmlp.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(parameters, lr=0.1))


def test_losses_and_optimizers_that_do_not_fit_are_refused():
    model = stock(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"loss: .*L1Loss"):
        fastmlp.TrainStep(model, nn.L1Loss(), sgd)
    with pytest.raises(ValueError, match="reduction"):
        fastmlp.TrainStep(model, nn.MSELoss(reduction="none"), sgd)
    with pytest.raises(TypeError, match=r"optimizer: expected SGD, Adam or AdamW, .* got RMSprop"):
        fastmlp.TrainStep(model, nn.MSELoss(), torch.optim.RMSprop(model.parameters()))


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (lambda model, loss, sgd: sgd.register_step_pre_hook(lambda *_: None), "optimizer: .* step hooks"),
        (lambda model, loss, sgd: loss.register_forward_hook(lambda *_: None), "loss: .* no hooks"),
        (lambda model, loss, sgd: model[0].bias.register_hook(lambda _: None), "parameters without hooks"),
        (
            lambda model, loss, sgd: model[0].weight.register_post_accumulate_grad_hook(lambda _: None),
            "parameters without hooks",
        ),
    ],
    ids=["optimizer", "loss", "gradient", "accumulated"],
)
def test_hooks_that_no_step_would_call_are_refused_with_nothing_changed(hook, words):
    model, loss = stock(5, 3), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fastmlp.TrainStep(model, loss, sgd)
    hook(model, loss, sgd)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        step(torch.randn(4, 5), torch.randint(3, (4,)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2,), (4, 3), (3, 1), (0,)], ids=str)
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_of_bce_that_differ_within_a_batch_are_refused(name, shape):
    model, loss = stock(5, 3), nn.BCEWithLogitsLoss(**{name: torch.ones(shape)})
    with pytest.raises(ValueError, match=rf"loss: expected {name} of shape \[3\]"):
        fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))


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


def double(*arguments):
    return 2 * arguments[-1]


REFUSED = {
    "dropout": (TypeError, "module 1: .* Dropout", lambda m, _: m.insert(1, nn.Dropout())),
    "an unknown activation": (
        TypeError,
        "module 1: .* Softsign",
        lambda m, _: setattr(m, "1", nn.Softsign()),
    ),
    "a forward on a child": (
        ValueError,
        "module 0: .* forward set",
        lambda m, _: setattr(m[0], "forward", double),
    ),
    "a forward hook": (ValueError, "module 0: .* hooks", lambda m, _: m[0].register_forward_hook(double)),
    "a pre-hook": (ValueError, "module 1: .* hooks", lambda m, _: m[1].register_forward_pre_hook(double)),
    "a backward hook": (
        ValueError,
        "module 2: .* hooks",
        lambda m, _: m[2].register_full_backward_hook(double),
    ),
    "a hook on the model": (ValueError, "itself.* hooks", lambda m, _: m.register_forward_hook(double)),
    "no reduction": (
        ValueError,
        "reduction='mean' or 'sum', got 'none'",
        lambda _, loss: setattr(loss, "reduction", "none"),
    ),
    "a patched layer": (TypeError, "torch's own Linear", lambda m, _: patch(nn.Linear)),
    "a patched loss": (TypeError, "loss: .* other methods", lambda m, _: patch(nn.MSELoss)),
    "shared memory": (
        ValueError,
        "share no memory",
        lambda m, _: setattr(m[4].weight, "data", m[2].weight.data),
    ),
    "half precision": (RuntimeError, "contiguous float32", lambda m, _: m.bfloat16()),
    "none of the parameters": (ValueError, "among its own, got none", lambda m, _: renew(m)),
    "nothing to train": (RuntimeError, "requires a gradient, got none", lambda m, _: m.requires_grad_(False)),
}


def patch(cls):
    cls.forward = double  # pytest's monkeypatch sets it back


def renew(model):
    for index in (0, 2, 4):
        model[index] = nn.Linear(9, 9)


@pytest.mark.parametrize(("error", "words", "change"), REFUSED.values(), ids=REFUSED)
def test_what_no_step_would_follow_is_refused_with_the_reason(monkeypatch, error, words, change):
    for cls in (nn.Linear, nn.MSELoss):
        monkeypatch.setattr(cls, "forward", cls.forward)
    model, loss = stock(9, 9, 9, 9, activation=nn.Tanh), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    data = batch_for(loss, 4, 9, 9)
    step(*data)
    change(model, loss)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        step(*data)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


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


@pytest.mark.parametrize("of_momentum", [False, True], ids=["parameters", "momentum"])
def test_what_may_not_be_written_raises_before_anything_is_changed(of_momentum):
    loss = nn.MSELoss()
    with torch.inference_mode(not of_momentum):
        model = stock(5, 9, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if of_momentum:
        with torch.inference_mode():
            optimizer.state[model[2].bias]["momentum_buffer"] = torch.zeros(3)
    before = [p.detach().clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()] if of_momentum else []
    with pytest.raises(RuntimeError, match=r"made outside of torch\.inference_mode"):
        fastmlp.TrainStep(model, loss, optimizer)(*batch_for(loss, 4, 5, 3))
    assert all(map(torch.equal, model.parameters(), before))
    assert versions == [p._version for p in model.parameters() if of_momentum]


def test_the_versions_of_parameters_and_momenta_tell_of_a_step():
    model, loss = stock(5, 3), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step, data = fastmlp.TrainStep(model, loss, optimizer), batch_for(loss, 4, 5, 3)
    step(*data)
    changed = [*model.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    versions = [t._version for t in changed]
    step(*data)
    assert all(t._version > version for t, version in zip(changed, versions, strict=True))


def test_an_input_in_the_memory_of_a_weight_is_refused():
    model, loss = stock(3, 3), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="share no memory with one another, nor with input"):
        step(model[0].weight.detach()[1:], torch.ones(2, 3))


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


@pytest.mark.parametrize("pos_weight", [torch.ones(4), torch.ones(3, dtype=torch.double)], ids=str)
def test_weights_of_bce_that_no_longer_fit_raise_before_anything_is_changed(pos_weight):
    model, loss = stock(5, 3), nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    loss.pos_weight = pos_weight
    with pytest.raises(RuntimeError, match=r"pos_weight: expected float32 on the CPU of shape \[3\]"):
        step(*batch_for(loss, 4, 5, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("x", "target", "error", "words"),
    [
        (torch.ones(4, 6), torch.zeros(4, dtype=torch.long), RuntimeError, "input: expected shape"),
        (torch.ones(4, 5).double(), torch.zeros(4, dtype=torch.long), RuntimeError, "input: .*float32"),
        (torch.ones(4, 5), torch.zeros(3, dtype=torch.long), RuntimeError, "target: expected shape"),
        (torch.ones(4, 5), torch.zeros(4), RuntimeError, "target: expected Long"),
        (torch.ones(4, 5), torch.tensor([0, 1, 3, 0]), IndexError, "target: .*got 3 in row 2"),
        (torch.ones(4, 5), torch.tensor([0, 1, -1, 0]), IndexError, "target: .*got -1 in row 2"),
        (torch.ones(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.long), RuntimeError, "no gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_raises_before_anything_is_changed(x, target, error, words):
    model = stock(5, 9, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        step(x, target)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state_dict()["state"]


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
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
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
    "clipping": ("max_grad_norm", lambda step: setattr(step, "max_grad_norm", 1.0)),
    "accumulating": ("accumulate", lambda step: setattr(step, "accumulate", 2)),
    "processes": ("process_group", lambda step: setattr(step, "process_group", object())),
    "an optimizer": (
        "optimizer: .* got RMSprop",
        lambda step: setattr(step, "optimizer", torch.optim.RMSprop(step.model.parameters())),
    ),
    "an option of the optimizer": (
        "optimizer: .* differentiable=False",
        lambda step: step.optimizer.param_groups[0].update(differentiable=True),
    ),
    "a hook on the optimizer": (
        "optimizer: .* step hooks",
        lambda step: step.optimizer.register_step_pre_hook(lambda *_: None),
    ),
    "a loss": ("loss: .* got L1Loss", lambda step: setattr(step, "loss", nn.L1Loss())),
    "a reduction": ("loss: .* got 'none'", lambda step: setattr(step.loss, "reduction", "none")),
    "a hook on the loss": ("loss: .* no hooks", lambda step: step.loss.register_forward_hook(double)),
    "weights of the loss": (
        r"loss: expected weight of shape \[3\]",
        lambda step: setattr(step, "loss", nn.BCEWithLogitsLoss(torch.ones(4, 3))),
    ),
    "a module": ("module 1: .* got Softsign", lambda step: setattr(step.model, "1", nn.Softsign())),
    "a hook on a module": ("module 2: .* no hooks", lambda step: step.model[2].register_forward_hook(double)),
    "a hook on a parameter": (
        "parameters without hooks",
        lambda step: step.model[0].weight.register_hook(lambda _: None),
    ),
    "float64": ("float32 parameters .* torch.float64", lambda step: step.model.double()),
    "nothing to train": ("requires a gradient", lambda step: step.model.requires_grad_(False)),
}


@pytest.mark.parametrize(("words", "change"), REASONS.values(), ids=REASONS)
def test_a_step_tells_why_it_is_not_one_call(words, change):
    model, loss = stock(5, 9, 3), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    change(step)
    reason = fastmlp.why_not_fused(step)
    assert re.search(words, reason)
    assert fastmlp.why_not_fused(step, *batch_for(loss, 4, 5, 3)) == reason
    kinds = f"Sequential, {type(step.loss).__name__}, {type(step.optimizer).__name__}"
    assert repr(step) == f"TrainStep({kinds}), in the standard loop: {reason}"


def test_a_step_tells_of_autocast_and_of_global_hooks():
    model, loss = stock(5, 3), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.autocast("cpu"):
        assert fastmlp.why_not_fused(step) == "autocast is enabled on cpu"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert fastmlp.why_not_fused(step) == "there are hooks for all modules"
    finally:
        handle.remove()
    assert fastmlp.why_not_fused(step) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, target: (x.double(), target), "input: expected a float32 tensor"),
        (lambda x, target: (x[:, 1:], target), "input: expected shape"),
        (lambda x, target: (x.requires_grad_(), target), "requires no gradient"),
        (lambda x, target: (x, target[1:]), "target: expected shape"),
        (lambda x, target: (x.as_subclass(Subclass), target), "tensor type of its own, Subclass"),
    ],
    ids=["dtype", "shape", "gradient", "target", "subclass"],
)
def test_a_step_tells_what_of_a_batch_it_does_not_take(change, words):
    model, loss = stock(5, 3), nn.MSELoss()
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert words in fastmlp.why_not_fused(step, *change(*batch_for(loss, 4, 5, 3)))


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
