"""fastmlp.CrossEntropyLoss against torch's own: values, gradients of any order, labels, tracing, errors."""

import copy
import itertools
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

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


def gradients(function, input, target, grad_loss=None, **options):
    """The loss, and its gradient."""
    loss = function(input, target, **options)
    grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss
    return loss, torch.autograd.grad(loss, input, grad_loss)[0]


def assert_as_stock(input, target, grad_loss=None, rtol=1e-5, atol=5e-6, **options):
    ours, theirs = (
        gradients(f, input, target, grad_loss, **options) for f in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def is_fused(loss):
    return "CrossEntropyFunction" in loss.grad_fn.name()


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


def pytorchs_examples():
    """The arguments of the module and of its call that PyTorch tests nn.CrossEntropyLoss with."""
    if find_spec("expecttest") is None:  # PyTorch's tests need it
        return []
    from torch.testing._internal.common_modules import module_db

    module = next(m for m in module_db if m.name == "nn.CrossEntropyLoss")
    inputs = module.module_inputs_func(module, "cpu", torch.float32, True, True)
    return [pytest.param(i.constructor_input, i.forward_input, id=i.desc) for i in inputs]


@pytest.mark.parametrize(("constructor", "forward"), pytorchs_examples())
def test_pytorchs_own_examples_give_stocks_results(instruction_set, constructor, forward):
    results = []
    for make in (fastmlp.CrossEntropyLoss, nn.CrossEntropyLoss):
        arguments = [t.detach().requires_grad_(t.requires_grad) for t in forward.args]
        loss = make(*constructor.args, **constructor.kwargs)(*arguments, **forward.kwargs)
        leaves = [t for t in arguments if t.requires_grad]
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*results, equal_nan=True)


@every_reduction
def test_one_row_may_come_without_a_batch(instruction_set, reduction):
    input, target = logits(7), torch.tensor(3)
    assert is_fused(cross_entropy(input, target, reduction=reduction))
    assert_as_stock(input, target, reduction=reduction)
    assert_as_stock(input, target, reduction=reduction, ignore_index=3)


@pytest.mark.parametrize("count", [2, 10, 1000])
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_error_is_within_one_and_a_half_of_stocks(instruction_set, count, size, label_smoothing):
    input, target = logits(2000, count).detach().mul(size).requires_grad_(), classes(2000, count)
    options = {"reduction": "sum", "label_smoothing": label_smoothing}
    exact = gradients(F.cross_entropy, input.detach().double().requires_grad_(), target, **options)
    ours, theirs = (gradients(f, input, target, **options) for f in (cross_entropy, F.cross_entropy))
    for mine, stocks, right in zip(ours, theirs, exact, strict=True):
        rounding = 2.0**-23 * right.norm()
        assert (mine - right).norm() <= 1.5 * (stocks - right).norm() + rounding


@every_reduction
def test_bfloat16_comes_closer_to_the_exact_result_than_stock(instruction_set, reduction):
    input, target = logits(300, 20, dtype=torch.bfloat16), classes(300, 20)
    exact = gradients(F.cross_entropy, input.detach().double().requires_grad_(), target, reduction=reduction)
    ours, theirs = (
        gradients(f, input, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy)
    )
    assert is_fused(ours[0])
    for mine, stocks, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == stocks.dtype == torch.bfloat16
        assert (mine - right).norm() <= (stocks - right).norm()


SPECIAL = [0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@every_reduction
@pytest.mark.parametrize("count", [3, 20])
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


@every_reduction
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_batch_of_ignored_rows_has_stocks_loss_and_no_gradient(instruction_set, reduction, label_smoothing):
    input, target = logits(6, 5), torch.full((6,), -100)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_as_stock(input, target, **options)
    assert not gradients(cross_entropy, input, target, **options)[1].any()


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
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(gradients(cross_entropy, input, target, weight=weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


# ---- labels that are no classes


@every_reduction
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("label", [-1, 5, 2**40])
@pytest.mark.parametrize("rows", [6, 3000])
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


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"weight": True},
    {"ignore_index": 1},
    {"label_smoothing": 0.2},
    {"weight": True, "ignore_index": 1, "label_smoothing": 0.2},
    {"weight": True, "ignore_index": 1, "label_smoothing": 0.2, "reduction": "none"},
]
DEFAULTS = {"weight": None, "reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0}
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def complete(options, count):
    return options | ({"weight": torch.rand(count)} if "weight" in options else {})


@every_option
@pytest.mark.parametrize("shape", [(6, 4), (4,)], ids=str)
def test_second_and_third_derivatives_are_stocks(options, shape):
    options = complete(options, 4)
    input, target = logits(*shape), torch.arange(6) % 4 if len(shape) == 2 else torch.tensor(2)

    def derivatives(f):
        value, found = f(input.tanh(), target, **options).square().sum(), []
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, input, create_graph=True)
            found.append(gradient)
            value = gradient.square().sum()
        return found

    torch.testing.assert_close(derivatives(cross_entropy), derivatives(F.cross_entropy), rtol=1e-4, atol=1e-5)


def test_ignored_batches_have_stocks_second_derivative():
    input, target = logits(6, 4), torch.full((6,), -100)

    def second(f):
        (first,) = torch.autograd.grad(f(input, target), input, create_graph=True)
        return first, torch.autograd.grad(first.sum(), input)[0]

    torch.testing.assert_close(second(cross_entropy), second(F.cross_entropy), equal_nan=True)


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


def test_forward_mode_gives_stocks_tangent():
    input, target = logits(6, 5).detach(), classes(6, 5)

    def tangent(f):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(input, torch.ones_like(input).cumsum(1))
            return forward_ad.unpack_dual(f(dual, target)).tangent

    torch.testing.assert_close(tangent(cross_entropy), tangent(F.cross_entropy))


@pytest.mark.parametrize("grad", [True, False])
def test_function_transforms_give_stocks_results(grad):
    input, target = logits(6, 5).requires_grad_(grad), classes(6, 5)

    def transformed(f):
        func = torch.func
        return (
            func.grad(f)(input, target),
            func.vmap(f)(input, target),
            func.vmap(func.grad(f))(input, target),
            func.jacrev(lambda input: f(input, target, reduction="none"))(input),
            func.hessian(f)(input, target),
        )

    torch.testing.assert_close(transformed(cross_entropy), transformed(F.cross_entropy))


def test_many_gradients_at_once_are_stocks():
    input, target = logits(6, 5), classes(6, 5)

    def batched(f):
        loss = f(input, target, reduction="none")
        return torch.autograd.grad(loss, input, torch.eye(6), is_grads_batched=True)

    torch.testing.assert_close(batched(cross_entropy), batched(F.cross_entropy))


# ---- the dispatcher


@every_option
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3)], ids=str)
def test_the_op_passes_opcheck(shape, grad, options):
    input, target = logits(*shape).requires_grad_(grad), torch.randint(4, shape[:1] + shape[2:])
    options = DEFAULTS | complete(options, 4)
    torch.library.opcheck(torch.ops.fastmlp.cross_entropy.default, (input, target, *options.values()))


@pytest.mark.parametrize("shape", [(0, 4), (4,)], ids=str)
def test_the_op_passes_opcheck_with_an_empty_batch_and_without_one(shape):
    input, target = logits(*shape), torch.randint(4, shape[:-1])
    torch.library.opcheck(torch.ops.fastmlp.cross_entropy.default, (input, target, None, "sum"))


@every_option
def test_the_forward_op_passes_opcheck(options):
    arguments = logits(6, 4).detach(), classes(6, 4), *(DEFAULTS | complete(options, 4)).values()
    torch.library.opcheck(torch.ops.fastmlp.cross_entropy_forward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_traces_one_graph_and_trains_as_stock(dynamic):
    from torch._dynamo.backends.common import aot_autograd

    targets = []
    weight, input, target = torch.randn(5, 7, requires_grad=True), torch.randn(6, 7), classes(6, 5)

    def compiler(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def run(f):
        compiled = torch.compile(
            lambda x, t: f(F.linear(x, weight), t, label_smoothing=0.1),
            fullgraph=True,
            dynamic=dynamic,
            backend=aot_autograd(fw_compiler=compiler),
        )
        return [torch.autograd.grad(compiled(input[:n], target[:n]), weight) for n in (6, 5, 3)]

    torch.testing.assert_close(run(cross_entropy), run(F.cross_entropy))
    assert torch.ops.fastmlp.cross_entropy_forward.default in targets


def test_compiled_autograd_gives_stocks_gradient():
    input, target = logits(6, 5), classes(6, 5)

    def gradient(f):
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda: f(input, target).backward(), backend="eager")()
        found, input.grad = input.grad, None
        return found

    torch.testing.assert_close(gradient(cross_entropy), gradient(F.cross_entropy))


def test_inference_mode_gives_the_same_bits():
    input, target = logits(6, 5), classes(6, 5)
    with torch.inference_mode():
        loss = cross_entropy(input, target)
    assert loss.is_inference()
    assert torch.equal(loss, cross_entropy(input, target))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_casts_as_for_stock(dtype, cast):
    input, target = logits(6, 5, dtype=dtype), classes(6, 5)
    with torch.autocast("cpu", dtype=cast):
        ours, theirs = (gradients(f, input, target) for f in (cross_entropy, F.cross_entropy))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs)


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
