"""TrainStep.run leaves behind, to the bit, what as many calls of the step leave behind."""

import _thread
import copy
import itertools
import signal
import threading
import time
import warnings

import pytest
import torch
from reference import chain as stock
from test_step import Embedded, batch_for
from torch import nn

import fastmlp

CROSS_ENTROPY, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
ADAM = {"kind": torch.optim.Adam, "lr": 0.01}
OPTIONS = {
    "SGD": {"kind": torch.optim.SGD, "lr": 0.1},
    "momentum": {"kind": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": ADAM,
    "decay": {"kind": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1},
    "clipping": {**ADAM, "max_grad_norm": 0.1},
}
ROWS = 23  # with a batch of 5, the last one is short
ORDERS = {
    "in their order": None,
    "a permutation": torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)),
    "repeated and left out": torch.tensor([3, 3, 0, 22, 7, 7, 7, 1, 22, 5, 4, 3]),
}


def step_of(model, loss, kind=torch.optim.SGD, lr=0.1, max_grad_norm=None, accumulate=1, **options):
    optimizer = kind(model.parameters(), lr=lr, **options)
    return fastmlp.TrainStep(model, loss, optimizer, max_grad_norm=max_grad_norm, accumulate=accumulate)


def run_by_calls(step, *data, batch_size, order=None, after=lambda number: None):
    """The losses of as many calls."""
    if order is None:
        batches = zip(*(t.split(batch_size) for t in data), strict=True)
    else:
        batches = ([t[rows] for t in data] for rows in order.split(batch_size))
    losses = []
    for number, batch in enumerate(batches):
        losses.append(step(*batch))
        after(number)
    return torch.stack([loss[0] if isinstance(loss, tuple) else loss for loss in losses])


def left_by(step):
    """All that a step leaves behind."""
    return step.model.state_dict(), step.optimizer.state_dict(), step.grad_norm


def assert_same(step, other):
    torch.testing.assert_close(left_by(step), left_by(other), rtol=0, atol=0)


def assert_same_run(make, loss, data, order=None, batch_size=5, runs=2, **options):
    """Runs against calls, from the same start; the step."""
    torch.manual_seed(0)
    model = make()
    step, other = (step_of(m, loss, **options) for m in (model, copy.deepcopy(model)))
    for seed in range(runs):
        torch.manual_seed(seed)  # for dropout
        losses = step.run(*data, batch_size=batch_size, order=order)
        torch.manual_seed(seed)
        expected = run_by_calls(other, *data, batch_size=batch_size, order=order)
        torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    assert_same(step, other)
    return step


@pytest.fixture
def only_in_one_call(monkeypatch):
    """Lets no step be taken by itself."""
    monkeypatch.setattr(fastmlp.TrainStep, "__call__", None)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_trains_as_its_steps_do(options, order):
    data = batch_for(CROSS_ENTROPY, ROWS, 9, 3)
    step = assert_same_run(lambda: stock(9, 20, 3), CROSS_ENTROPY, data, order, **options)
    assert fastmlp.why_not_fused(step) is None


LAYOUTS = {
    "pictures": (lambda: nn.Sequential(nn.Flatten(), *stock(12, 9, 3)), (ROWS, 3, 4), (ROWS, 3)),
    "sequences": (lambda: stock(12, 9, 3), (ROWS, 4, 12), (ROWS, 4, 3)),
}


@pytest.mark.parametrize("order", [None, ORDERS["a permutation"]], ids=["in their order", "a permutation"])
@pytest.mark.parametrize(("make", "x", "target"), LAYOUTS.values(), ids=LAYOUTS)
def test_rows_may_have_any_shape(make, x, target, order):
    assert_same_run(make, MSE, (torch.randn(x), torch.randn(target)), order)


def test_data_may_lie_with_gaps():
    assert_same_run(lambda: stock(5, 3), MSE, (torch.randn(5, ROWS).t(), torch.randn(ROWS, 6)[:, ::2]))


def test_large_batches_are_gathered_by_all_threads():
    data = batch_for(CROSS_ENTROPY, 700, 300, 10)
    assert_same_run(lambda: stock(300, 10), CROSS_ENTROPY, data, torch.randperm(700), batch_size=400, runs=1)


def test_steps_of_a_run_are_one_call(only_in_one_call):
    model = stock(9, 20, 3)
    step = step_of(model, CROSS_ENTROPY, **ADAM)
    losses = step.run(*batch_for(CROSS_ENTROPY, ROWS, 9, 3), batch_size=5, order=torch.randperm(ROWS))
    assert losses.shape == (5,)
    assert step.optimizer.state[model[0].weight]["step"] == 5
    assert repr(step).endswith("in one call")


def test_no_rows_are_no_steps():
    step = step_of(stock(5, 3), MSE)
    assert step.run(torch.ones(0, 5), torch.ones(0, 3), batch_size=4).shape == (0,)
    order = torch.ones(0, dtype=torch.long)
    assert step.run(torch.ones(2, 5), torch.ones(2, 3), batch_size=4, order=order).shape == (0,)


# ---- what is not one call


FALLBACKS = {
    "a loss of one's own": (lambda: stock(5, 9, 3), lambda y, t: (y - t).abs().mean(), {}),
    "a loss that returns more": (lambda: stock(5, 9, 3), lambda y, t: ((y - t).abs().mean(), "more"), {}),
    "another optimizer": (lambda: stock(5, 9, 3), MSE, {"kind": torch.optim.RMSprop}),
    "another model": (Embedded, MSE, {}),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(), nn.Linear(9, 3)), MSE, {}),
    "accumulating": (lambda: stock(5, 9, 3), MSE, {"accumulate": 2}),
}


@pytest.mark.parametrize("order", [None, ORDERS["a permutation"]], ids=["in their order", "a permutation"])
@pytest.mark.parametrize(("make", "loss", "options"), FALLBACKS.values(), ids=FALLBACKS)
def test_what_is_not_one_call_runs_step_by_step(make, loss, options, order):
    assert_same_run(make, loss, (torch.randn(ROWS, 5), torch.randn(ROWS, 3)), order, **options)


def test_a_loss_may_take_several_targets():
    data = torch.randn(ROWS, 5), torch.randn(ROWS, 3), torch.rand(ROWS, 3)
    assert_same_run(lambda: stock(5, 9, 3), lambda y, t, w: (w * (y - t).square()).mean(), data)


def test_losses_are_of_the_losses_dtype():
    data = torch.randn(ROWS, 5).double(), torch.randn(ROWS, 3).double()
    assert_same_run(lambda: stock(5, 9, 3).double(), MSE, data)


def test_data_in_the_memory_of_a_weight_is_read_as_steps_read_it():
    model = stock(5, 5)
    step, other = (step_of(m, MSE) for m in (model, copy.deepcopy(model)))
    target = torch.ones(5, 5)
    losses = step.run(step.model[0].weight.detach(), target, batch_size=2)
    expected = run_by_calls(other, other.model[0].weight.detach(), target, batch_size=2)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(left_by(step), left_by(other))


def test_a_run_in_a_compiled_function_trains_as_elsewhere():
    model = stock(5, 9, 3)
    step, other = (step_of(m, MSE) for m in (model, copy.deepcopy(model)))
    data = torch.randn(ROWS, 5), torch.randn(ROWS, 3)
    compiled = torch.compile(lambda *data: step.run(*data, batch_size=5), backend="eager")
    torch.testing.assert_close(compiled(*data), other.run(*data, batch_size=5), rtol=0, atol=0)
    assert_same(step, other)


def test_a_profiler_sees_every_step():
    step = step_of(stock(5, 9, 3), MSE)
    with torch.profiler.profile() as profile:
        step.run(torch.randn(ROWS, 5), torch.randn(ROWS, 3), batch_size=5)
    assert [event.name for event in profile.events()].count("fastmlp::train_step_") == 5


# ---- rates and callbacks


@pytest.mark.parametrize("options", [OPTIONS["momentum"], OPTIONS["decay"]], ids=["momentum", "decay"])
def test_rates_are_those_that_a_scheduler_would_set(options, only_in_one_call):
    torch.manual_seed(0)
    model, data = stock(9, 20, 3), batch_for(CROSS_ENTROPY, ROWS, 9, 3)
    step, other = (step_of(m, CROSS_ENTROPY, **options) for m in (model, copy.deepcopy(model)))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(other.optimizer, 0.5)
    before, rates = step.optimizer.param_groups[0]["lr"], []

    def callback(number, loss):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a scheduler warns that sees no step
        expected = other.run(*data, batch_size=5, callback=callback)
    losses = step.run(*data, batch_size=5, rates=rates)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
    assert step.optimizer.param_groups[0]["lr"] == before
    assert other.optimizer.param_groups[0]["lr"] == before / 2**5


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_each_group_may_have_rates_of_its_own(kind):
    torch.manual_seed(0)
    model = stock(5, 9, 3)
    x, target = torch.randn(ROWS, 5), torch.randn(ROWS, 3)
    rates = 0.1 * torch.rand(5, 2, dtype=torch.float64)

    def step_of_groups(model):
        optimizer = kind([{"params": layer.parameters()} for layer in (model[0], model[2])], lr=1.0)
        return fastmlp.TrainStep(model, MSE, optimizer)

    def set_rates(number):
        for group, rate in zip(other.optimizer.param_groups, rates[number].tolist(), strict=True):
            group["lr"] = rate

    step, other = (step_of_groups(m) for m in (model, copy.deepcopy(model)))
    losses = step.run(x, target, batch_size=5, rates=rates)
    set_rates(0)
    expected = run_by_calls(other, x, target, batch_size=5, after=lambda n: n < 4 and set_rates(n + 1))
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
    assert [group["lr"] for group in step.optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize("loss", [MSE, lambda y, t: (y - t).square().mean()], ids=["one call", "two calls"])
def test_rates_of_groups_that_a_callback_adds_to_are_refused(loss):
    model = stock(5, 9, 3)
    groups = [{"params": [p]} for p in model[0].parameters()]
    step = fastmlp.TrainStep(model, loss, torch.optim.SGD(groups, lr=0.1))

    def add_group(number, value):
        step.optimizer.add_param_group({"params": model[2].parameters()})

    with pytest.raises(ValueError, match="rates: expected one for each of 3 groups, got 2"):
        step.run(
            torch.randn(6, 5), torch.randn(6, 3), batch_size=2, rates=torch.ones(3, 2), callback=add_group
        )


@pytest.mark.parametrize("loss", [MSE, lambda y, t: (y - t).square().mean()], ids=["one call", "two calls"])
def test_a_callback_is_told_of_each_step_and_may_stop_the_run(loss):
    class Stop(Exception):
        pass

    torch.manual_seed(0)
    model, seen = stock(5, 9, 3), []
    step, other = (step_of(m, loss, **ADAM) for m in (model, copy.deepcopy(model)))
    data = torch.randn(ROWS, 5), torch.randn(ROWS, 3)

    def callback(number, value):
        seen.append(value)
        assert len(seen) == number + 1
        if number == 2:
            raise Stop

    with pytest.raises(Stop):
        step.run(*data, batch_size=5, callback=callback)
    expected = run_by_calls(other, *(t[:15] for t in data), batch_size=5)
    torch.testing.assert_close(torch.stack(seen), expected, rtol=0, atol=0)
    assert_same(step, other)


def test_what_a_callback_changes_is_so_from_the_next_step_on():
    torch.manual_seed(0)
    model = stock(5, 9, 3)
    step, other = (step_of(m, MSE) for m in (model, copy.deepcopy(model)))
    data = torch.randn(ROWS, 5), torch.randn(ROWS, 3)

    def change(own, number):
        if number == 1:
            own.model[0].register_forward_hook(lambda module, args, y: 2 * y)
        if number == 2:
            own.model[2] = nn.Linear(9, 3, bias=False)
            nn.init.ones_(own.model[2].weight)
            own.optimizer.add_param_group({"params": own.model[2].parameters()})

    losses = step.run(*data, batch_size=5, callback=lambda number, loss: change(step, number))
    expected = run_by_calls(other, *data, batch_size=5, after=lambda number: change(other, number))
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    assert_same(step, other)


@pytest.fixture
def interrupts():
    """Ctrl-C as Python has it, also in a process of the background, which is begun without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_whole_steps(interrupts):
    torch.manual_seed(0)
    model = stock(5, 9, 3)
    step, other = (step_of(m, MSE, **ADAM) for m in (model, copy.deepcopy(model)))
    data = torch.randn(100, 5), torch.randn(100, 3)
    order = torch.arange(100).repeat(10_000)

    def interrupt():
        while not any(state["step"] > 10 for state in [*step.optimizer.state.values()]):
            time.sleep(0.001)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        step.run(*data, batch_size=1, order=order)
    counts = [int(state["step"]) for state in step.optimizer.state.values()]
    assert len({*counts}) == 1
    assert 0 < counts[0] < len(order)
    other.run(*data, batch_size=1, order=order[: counts[0]])
    assert_same(step, other)


def test_other_threads_go_on_meanwhile():
    step, order = step_of(stock(5, 9, 3), MSE), torch.zeros(20_000, dtype=torch.long)
    counts, is_done = itertools.count(), threading.Event()

    def count():
        while not is_done.is_set():
            next(counts)

    thread = threading.Thread(target=count)
    thread.start()
    step.run(torch.randn(1, 5), torch.randn(1, 3), batch_size=1, order=order)
    is_done.set()
    thread.join()
    assert next(counts) > 100


# ---- bad input changes nothing


X, TARGET = torch.ones(6, 5), torch.zeros(6, dtype=torch.long)
MISFITS = {
    "a row that is not there": ({"order": torch.tensor([0, 6])}, IndexError, "order: .* 0 to 5, got 6"),
    "a negative row": ({"order": torch.tensor([0, -1])}, IndexError, "order: .* got -1"),
    "rows that are no numbers": ({"order": torch.ones(3)}, TypeError, "order: .* int64"),
    "a list": ({"order": [0, 1]}, TypeError, "order: .* int64"),
    "rows of rows": ({"order": torch.zeros(2, 2, dtype=torch.long)}, ValueError, "order: expected shape"),
    "an empty batch": ({"batch_size": 0}, ValueError, "batch_size: .* got 0"),
    "fewer rates": ({"rates": [0.1]}, ValueError, r"rates: expected shape \[3\] or \[3, 1\]"),
    "rates of more groups": ({"rates": torch.ones(3, 2)}, ValueError, "rates: expected shape"),
    "a shorter target": ({"targets": [TARGET[:5]]}, ValueError, r"target 1: expected shape \[6, ...\]"),
    "a target of no rows": ({"targets": [torch.ones(())]}, ValueError, "target 1: expected shape"),
    "no tensor": ({"targets": [[0] * 6]}, TypeError, "target 1: expected a tensor, got list"),
}


@pytest.mark.parametrize(("given", "error", "words"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_raises_before_anything_is_changed(given, error, words):
    step = step_of(stock(5, 9, 3), CROSS_ENTROPY, **OPTIONS["momentum"])
    before = copy.deepcopy(left_by(step))
    targets, given = given.get("targets", [TARGET]), {k: v for k, v in given.items() if k != "targets"}
    with pytest.raises(error, match=f"^{words}"):
        step.run(X, *targets, **{"batch_size": 2} | given)
    torch.testing.assert_close(left_by(step), before, rtol=0, atol=0)


@pytest.mark.parametrize("order", [None, torch.arange(ROWS)], ids=["in their order", "by numbers"])
def test_a_class_that_is_none_raises_once_the_steps_before_have_been_taken(order):
    torch.manual_seed(0)
    model = stock(5, 9, 3)
    step, other = (step_of(m, CROSS_ENTROPY, **ADAM) for m in (model, copy.deepcopy(model)))
    x, target = batch_for(CROSS_ENTROPY, ROWS, 5, 3)
    target[17] = 3
    for own, run in (
        (step, step.run),
        (other, lambda *data, **options: run_by_calls(other, *data, **options)),
    ):
        with pytest.raises(IndexError, match=r"(?i)target"):
            run(x, target, batch_size=5, order=order)
        assert {int(state["step"]) for state in own.optimizer.state.values()} == {3}
    assert_same(step, other)


def test_where_gradients_are_off_a_run_raises_as_a_step_does():
    step = step_of(stock(5, 9, 3), CROSS_ENTROPY)
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected gradients to be enabled"):
        step.run(X, TARGET, batch_size=2)
