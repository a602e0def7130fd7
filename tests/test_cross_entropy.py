"""fastmlp.CrossEntropyLoss against torch's own: values, gradients, labels, errors."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import gradients, is_fused
from torch import nn

import fastmlp
from fastmlp.functional import cross_entropy

REDUCTIONS = ["mean", "sum", "none"]
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def logits(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).mul(3).detach().requires_grad_()


def classes(rows, count):
    return torch.randint(count, (rows,))


def results(function, input, target, grad_loss=None, **options):
    """The loss, and its gradient."""
    return gradients(function(input, target, **options), input, grad=grad_loss)


def assert_as_stock(input, target, grad_loss=None, rtol=1e-5, atol=5e-6, **options):
    ours, theirs = (results(f, input, target, grad_loss, **options) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


# ---- values


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.one_of(st.integers(0, 9), st.sampled_from([64, 500])),
    count=st.one_of(st.integers(1, 40), st.sampled_from([100, 257, 1000])),
    weighted=st.booleans(),
    ignored=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_shape_and_option_gives_the_loss_and_gradient_of_stock(
    instruction_set, rows, count, weighted, ignored, reduction, label_smoothing
):
    input, target = logits(rows, count), classes(rows, count)
    options = {
        "weight": torch.rand(count) if weighted else None,
        "ignore_index": 0 if ignored else -100,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    assert is_fused(cross_entropy(input, target, **options))
    assert_as_stock(input, target, **options)
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy(input, target, **options),
            F.cross_entropy(input, target, **options),
            equal_nan=True,
        )


@every_reduction
def test_one_row_may_come_without_a_batch(instruction_set, reduction):
    input, target = logits(7), torch.tensor(3)
    assert is_fused(cross_entropy(input, target, reduction=reduction))
    assert_as_stock(input, target, reduction=reduction)
    assert_as_stock(input, target, reduction=reduction, ignore_index=3)


@pytest.mark.parametrize(
    ("count", "size", "label_smoothing"),
    [(2, 1.0, 0.1), (2, 30.0, 0.0), (10, 1.0, 0.0), (10, 30.0, 0.1), (1000, 1.0, 0.1), (1000, 30.0, 0.0)],
)
def test_error_is_within_one_and_a_half_of_stocks(instruction_set, count, size, label_smoothing):
    input, target = logits(2000, count).detach().mul(size).requires_grad_(), classes(2000, count)
    options = {"reduction": "sum", "label_smoothing": label_smoothing}
    exact = results(F.cross_entropy, input.detach().double().requires_grad_(), target, **options)
    ours, theirs = (results(f, input, target, **options) for f in (cross_entropy, F.cross_entropy))
    for mine, stocks, right in zip(ours, theirs, exact, strict=True):
        rounding = 2.0**-23 * right.norm()
        assert (mine - right).norm() <= 1.5 * (stocks - right).norm() + rounding


@every_reduction
def test_bfloat16_comes_closer_to_the_exact_result_than_stock(instruction_set, reduction):
    input, target = logits(300, 20, dtype=torch.bfloat16), classes(300, 20)
    exact = results(F.cross_entropy, input.detach().double().requires_grad_(), target, reduction=reduction)
    ours, theirs = (results(f, input, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
    assert is_fused(ours[0])
    for mine, stocks, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == stocks.dtype == torch.bfloat16
        assert (mine - right).norm() <= (stocks - right).norm()


SPECIAL = [0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize(
    ("count", "reduction", "label_smoothing"),
    [(3, "none", 0.1), (20, "mean", 0.0), (20, "sum", 0.1), (20, "none", 0.0)],
)
def test_nan_and_infinity_come_out_as_stocks(instruction_set, count, reduction, label_smoothing):
    special = torch.tensor(list(itertools.product(SPECIAL, repeat=3)))
    input = torch.randn(len(special), count)
    input[:, [0, count // 2, count - 1]] = special
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    for target in (0, count // 2, 1):
        assert_as_stock(input.clone().requires_grad_(), torch.full((len(special),), target), **options)
    for row in input:  # a reduction over all would be NaN alone
        assert_as_stock(row[None].clone().requires_grad_(), torch.tensor([count - 1]), **options)


def test_large_logits_overflow_nothing(instruction_set):
    input, target = logits(6, 20).detach().mul(1e30).requires_grad_(), classes(6, 20)
    assert_as_stock(input, target)
    assert cross_entropy(input, target).isfinite()


@pytest.mark.parametrize(("reduction", "label_smoothing"), [("mean", 0.0), ("mean", 0.1), ("none", 0.1)])
def test_a_batch_of_ignored_rows_has_stocks_loss_and_no_gradient(instruction_set, reduction, label_smoothing):
    input, target = logits(6, 5), torch.full((6,), -100)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_as_stock(input, target, **options)
    assert not results(cross_entropy, input, target, **options)[1].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("above", [math.inf, math.nan])
def test_ignored_rows_have_no_gradient_where_it_is_not_finite(above, label_smoothing):
    gradients = []
    for function in (cross_entropy, torch.nn.functional.cross_entropy):
        input = logits(3, 5).detach().requires_grad_()
        loss = function(input, torch.tensor([1, -100, 2]), label_smoothing=label_smoothing)
        loss.backward(torch.tensor(above))
        gradients.append(input.grad.isfinite())
    assert torch.equal(gradients[0].any(1), gradients[1].any(1))


@every_reduction
def test_an_empty_batch_has_stocks_loss(instruction_set, reduction):
    assert_as_stock(logits(0, 5), classes(0, 5), reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_targets_whose_weights_are_all_zero_give_stocks_nan(instruction_set, label_smoothing, others):
    weight = torch.tensor([0.0, 0.0, others, others, others])
    assert_as_stock(logits(6, 5), classes(6, 2), weight=weight, label_smoothing=label_smoothing)


@every_reduction
def test_the_gradient_of_the_loss_is_passed_on(instruction_set, reduction):
    input, target = logits(6, 5), classes(6, 5)
    grad_loss = torch.randn(6) if reduction == "none" else torch.tensor(-0.7)
    assert_as_stock(input, target, grad_loss, reduction=reduction)


LAYOUTS = {
    "transposed": lambda: torch.randn(7, 6).t(),
    "a slice of columns": lambda: torch.randn(6, 20)[:, 3:10],
    "every other row": lambda: torch.randn(12, 7)[::2],
    "one row expanded": lambda: torch.randn(1, 7).expand(6, 7),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_may_lie_in_memory_in_any_way(instruction_set, layout):
    input, target = LAYOUTS[layout]().requires_grad_(), classes(12, 7)[::2]
    assert is_fused(cross_entropy(input, target))
    assert_as_stock(input, target, weight=torch.rand(14)[::2])


@pytest.mark.parametrize(("rows", "count"), [(3000, 10), (700, 1000)])
def test_the_number_of_threads_changes_no_bit(instruction_set, rows, count):
    input, target, weight = logits(rows, count), classes(rows, count), torch.rand(count)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs.append(results(cross_entropy, input, target, weight=weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# ---- labels that are no classes


@pytest.mark.parametrize(
    ("rows", "label", "grad", "reduction"),
    [(6, -1, True, "mean"), (6, 5, False, "none"), (6, 2**40, True, "sum"), (3000, 5, True, "mean")],
)
def test_a_label_out_of_bounds_is_stocks_error(instruction_set, rows, label, grad, reduction):
    input, target = logits(rows, 5).requires_grad_(grad), classes(rows, 5)
    target[rows // 2] = label
    for function in (cross_entropy, F.cross_entropy):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds."):
            function(input, target, reduction=reduction)


def test_a_label_out_of_bounds_leaves_everything_as_it_is():
    input, target = logits(6, 5), torch.tensor([0, 1, 2, 3, 4, 9])
    before = input.clone(), target.clone()
    with pytest.raises(IndexError):
        cross_entropy(input, target)
    assert torch.equal(input, before[0])
    assert torch.equal(target, before[1])
    assert input.grad is None
    assert_as_stock(input, classes(6, 5))


# ---- derivatives


@pytest.mark.parametrize("change", [lambda g: g, lambda g: g.mul_(2)], ids=["kept", "changed in place"])
def test_a_retained_graph_gives_the_same_gradient_again_whatever_became_of_the_first(change):
    input, target = logits(6, 5), classes(6, 5)
    loss = cross_entropy(input, target)
    (first,) = torch.autograd.grad(loss, input, retain_graph=True)
    expected = first.clone()
    change(first)
    assert torch.equal(torch.autograd.grad(loss, input)[0], expected)


def test_gradients_add_up_in_grad():
    input, target = logits(6, 5), classes(6, 5)
    loss = cross_entropy(input, target)
    loss.backward(retain_graph=True)
    once = input.grad.clone()
    loss.backward()
    torch.testing.assert_close(input.grad, 2 * once)


def test_a_graph_that_was_used_up_is_stocks_error():
    input, target = logits(6, 5), classes(6, 5)
    loss = cross_entropy(input, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_inference_mode_gives_the_same_bits():
    input, target = logits(6, 5), classes(6, 5)
    with torch.inference_mode():
        loss = cross_entropy(input, target)
    assert loss.is_inference()
    assert torch.equal(loss, cross_entropy(input, target))


def test_meta_tensors_have_a_shape_and_nothing_else():
    loss = cross_entropy(logits(6, 5).to("meta"), classes(6, 5).to("meta"), reduction="none")
    assert loss.is_meta
    assert loss.shape == (6,)


# ---- what the kernels do not cover


class Subclass(torch.Tensor):
    pass


UNCOVERED = {
    "class probabilities": lambda: (logits(6, 5), torch.rand(6, 5), {}),
    "more dimensions": lambda: (logits(6, 5, 2), torch.randint(5, (6, 2)), {}),
    "one row with one label of one dimension": lambda: (logits(5), torch.tensor([2]), {}),
    "float64": lambda: (logits(6, 5, dtype=torch.float64), classes(6, 5), {}),
    "float16": lambda: (logits(6, 5, dtype=torch.float16), classes(6, 5), {}),
    "labels of a byte": lambda: (logits(6, 5), classes(6, 5).byte(), {}),
    "no classes": lambda: (logits(0, 0), classes(0, 1), {}),
    "negative label smoothing": lambda: (logits(6, 5), classes(6, 5), {"label_smoothing": -0.1}),
    "logits of a subclass": lambda: (logits(6, 5).as_subclass(Subclass), classes(6, 5), {}),
    "labels of a subclass": lambda: (logits(6, 5), classes(6, 5).as_subclass(Subclass), {}),
    "sum by its old name": lambda: (logits(6, 5), classes(6, 5), {"size_average": False}),
    "none by its old name": lambda: (logits(6, 5), classes(6, 5), {"reduce": False}),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("case", UNCOVERED)
def test_what_the_kernels_do_not_cover_is_torchs_own(case):
    input, target, options = UNCOVERED[case]()
    ours, theirs = cross_entropy(input, target, **options), F.cross_entropy(input, target, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert type(ours) is type(theirs)
    assert not is_fused(ours)


WRONG = {
    "an unknown reduction": lambda: (logits(6, 5), classes(6, 5), {"reduction": "median"}),
    "another batch": lambda: (logits(6, 5), classes(5, 5), {}),
    "labels of int32": lambda: (logits(6, 5), classes(6, 5).int(), {}),
    "labels of float": lambda: (logits(6, 5), classes(6, 5).float(), {}),
    "a weight of another size": lambda: (logits(6, 5), classes(6, 5), {"weight": torch.rand(4)}),
    "a weight of another dtype": lambda: (logits(6, 5), classes(6, 5), {"weight": torch.rand(5).double()}),
    "a weight that asks for a gradient": lambda: (
        logits(6, 5),
        classes(6, 5),
        {"weight": torch.rand(5, requires_grad=True)},
    ),
    "label smoothing above 1": lambda: (logits(6, 5), classes(6, 5), {"label_smoothing": 1.1}),
    "a label where there is no class": lambda: (logits(3, 0), classes(3, 1), {}),
    "integer logits": lambda: (torch.zeros(6, 5, dtype=torch.int64), classes(6, 5), {}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise_stocks_error(case):
    input, target, options = WRONG[case]()
    errors = []
    for function in (cross_entropy, F.cross_entropy):
        with pytest.raises(Exception) as raised:  # noqa: PT011  which one is what is compared
            function(input, target, **options).sum().backward()
        errors.append((raised.type, str(raised.value).splitlines()[0]))
    assert errors[0] == errors[1]


# ---- the module


def test_the_module_is_torchs_own_in_all_but_the_kernel():
    weight = torch.rand(5)
    ours, stock = (
        m.CrossEntropyLoss(weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
        for m in (fastmlp, nn)
    )
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert repr(ours) == repr(stock)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    input, target = logits(6, 5), classes(6, 5)
    assert is_fused(ours(input=input, target=target))
    torch.testing.assert_close(ours(input, target), stock(input, target))
    torch.testing.assert_close(copy.deepcopy(ours)(input, target), stock(input, target))


def test_training_follows_stocks():
    losses = []
    for package in (fastmlp, nn):
        torch.manual_seed(0)
        model, criterion = fastmlp.MLP(20, 30, 5), package.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        input, target = torch.randn(64, 20), classes(64, 5)
        for _ in range(50):
            optimizer.zero_grad()
            loss = criterion(model(input), target)
            loss.backward()
            optimizer.step()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
