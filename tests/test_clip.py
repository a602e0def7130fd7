"""fastmlp.clip_grad_norm_: the results and the habits of torch.nn.utils's, whichever path it takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmlp
from fastmlp import _C

SHAPES = [(500, 7), (500,), (), (0,), (3, 0, 2), (1,), (4, 3, 2, 5)]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
stock = nn.utils.clip_grad_norm_


def parameters(*shapes, dtype=torch.float32, seed=0, scale=1.0):
    """New parameters with gradients; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for param in made:
        gradient = scale * torch.randn(param.shape, dtype=torch.float64, generator=generator)
        param.grad = gradient.to(dtype)
    return made


def grads(params):
    return [param.grad for param in params if param.grad is not None]


def assert_same(make, *arguments, rtol=None, atol=None, **options):
    """What ours makes of the parameters, which torch's must make of them too: the norm, and the gradients."""
    (ours, mine), (stocks, theirs) = (
        (params := make(), clip(params, *arguments, **options)) for clip in (fastmlp.clip_grad_norm_, stock)
    )
    tolerance = {"rtol": rtol, "atol": atol, "equal_nan": True}
    torch.testing.assert_close(mine, theirs, **tolerance)
    for own, right in zip(grads(ours), grads(stocks), strict=True):
        torch.testing.assert_close(own, right, **tolerance)
    return mine


@pytest.fixture
def kernel_calls(monkeypatch):
    """Call by call, whether the kernel has done it."""
    calls = []
    function = _C.clip_grad_norm

    def recorded(*arguments):
        result = function(*arguments)
        calls.append(result is not NotImplemented)
        return result

    monkeypatch.setattr(_C, "clip_grad_norm", recorded)
    return calls


# ---- the kernel's path


@pytest.mark.parametrize("max_norm", [0.5, 1e4, 0, -1.0, torch.inf, torch.tensor(2.0), "3"], ids=str)
def test_norm_and_gradients_are_those_of_torch(instruction_set, kernel_calls, max_norm):
    norm = assert_same(lambda: parameters(*SHAPES), max_norm)
    assert kernel_calls == [True]
    assert (norm.shape, norm.requires_grad) == ((), False)


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_bfloat16_is_rounded_no_more_often_than_by_torch(instruction_set, kernel_calls, max_norm):
    ours, theirs = (parameters(*SHAPES, dtype=torch.bfloat16) for _ in range(2))
    exact = [grad.double() for grad in grads(ours)]
    right = torch.cat([grad.flatten() for grad in exact]).norm()
    norms = [clip(params, max_norm) for clip, params in ((fastmlp.clip_grad_norm_, ours), (stock, theirs))]
    assert kernel_calls == [True]
    assert norms[0].dtype == torch.bfloat16
    assert norms[0] == right.to(torch.bfloat16)
    for mine, others, grad in zip(grads(ours), grads(theirs), exact, strict=True):
        expected = grad * min(1, max_norm / (right.item() + 1e-6))
        assert (mine.double() - expected).norm() <= (others.double() - expected).norm()


@settings(max_examples=30, deadline=None, database=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=80),
    max_norm=st.floats(0, 100),
    seed=st.integers(0, 99),
)
def test_any_number_of_gradients_of_any_shape_is_clipped(shapes, max_norm, seed):
    assert_same(lambda: parameters(*shapes, seed=seed), max_norm)


@every_dtype
def test_the_number_of_threads_does_not_change_a_bit(instruction_set, dtype):
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = parameters((300, 301), (7,), (100, 999), dtype=dtype)
        results.append([fastmlp.clip_grad_norm_(params, 1.0), *grads(params)])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, *others in zip(*results, strict=True) for other in others)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_no_square_of_a_gradient_overflows_or_vanishes(instruction_set, scale):
    params = parameters((500, 7), (33,), scale=scale)
    exact = [grad.double() for grad in grads(params)]
    right = torch.cat([grad.flatten() for grad in exact]).norm()
    norm = fastmlp.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm.double(), right, rtol=1e-6, atol=0)
    for grad, given_grad in zip(grads(params), exact, strict=True):
        expected = given_grad * min(1, 1 / (right.item() + 1e-6))
        torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "value"), [((40,), torch.nan), ((300, 400), torch.inf), ((40,), -torch.inf)], ids=str
)
@every_dtype
def test_infinities_and_nan_spread_as_in_torch(instruction_set, kernel_calls, dtype, shape, value):
    def make():
        params = parameters((3,), shape, dtype=dtype)
        params[1].grad.view(-1)[33] = value
        return params

    norm = assert_same(make, 1.0)
    assert kernel_calls == [True]
    assert not norm.isfinite()


def test_a_bound_that_is_nan_makes_gradients_nan(kernel_calls):
    assert_same(lambda: parameters((3,)), torch.nan)
    assert kernel_calls == [True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_error_for_a_norm_that_is_not_finite_is_torchs_and_changes_nothing(kernel_calls, value):
    errors = []
    for clip in (fastmlp.clip_grad_norm_, stock):
        params = parameters((3,), (400,))
        params[1].grad[3] = value
        before = [grad.clone() for grad in grads(params)]
        versions = [grad._version for grad in grads(params)]
        with pytest.raises(RuntimeError, match="is non-finite") as error:
            clip(params, 1.0, error_if_nonfinite=True)
        errors.append(str(error.value))
        for grad, original in zip(grads(params), before, strict=True):
            torch.testing.assert_close(grad, original, rtol=0, atol=0, equal_nan=True)
        assert [grad._version for grad in grads(params)] == versions
    assert errors[0] == errors[1]
    assert kernel_calls == [False]


def test_a_finite_norm_is_no_error(kernel_calls):
    assert_same(lambda: parameters((3,), (400,)), 1.0, error_if_nonfinite=True)
    assert kernel_calls == [True]


def test_a_parameter_without_a_gradient_is_passed_over(kernel_calls):
    def make():
        params = parameters((3,), (4,), (5,))
        params[1].grad = None
        return params

    assert_same(make, 1.0)
    assert kernel_calls == [True]


GATHERED = {
    "a tuple": tuple,
    "a generator": lambda params: (param for param in params),
    "an iterator": iter,
    "a ParameterList": nn.ParameterList,
    "one tensor": lambda params: params[0],
}


@pytest.mark.parametrize("gathered", GATHERED.values(), ids=GATHERED)
def test_parameters_may_come_in_whatever_torch_takes_them_in(kernel_calls, gathered):
    ours, theirs = (parameters((3,), (4,), dtype=torch.float32) for _ in range(2))
    norms = fastmlp.clip_grad_norm_(gathered(ours), 1.0), stock(gathered(theirs), 1.0)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(grads(ours), grads(theirs))
    assert kernel_calls == [True]


def test_gradients_that_are_dense_in_any_order_of_dimensions_take_the_kernel(kernel_calls):
    def make():
        params = parameters((7, 5), (2, 3, 4))
        for param in params:
            param.grad = param.grad.transpose(0, 1).contiguous().transpose(0, 1)
        return params

    assert_same(make, 1.0)
    assert kernel_calls == [True]


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_autograd_notices_that_a_saved_gradient_has_changed(max_norm):
    (param,) = parameters((3,))
    factor = torch.ones(3, requires_grad=True)
    product = (factor * param.grad).sum()
    version = param.grad._version
    fastmlp.clip_grad_norm_([param], max_norm)
    assert param.grad._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_gradients_with_a_graph_of_their_own_are_clipped_outside_it(kernel_calls):
    def make():
        param = nn.Parameter(torch.tensor([1.0, 2.0]))
        param.pow(3).sum().backward(create_graph=True)
        return [param]

    with pytest.warns(UserWarning, match="create_graph"):
        norm = assert_same(make, 1.0)
    assert kernel_calls == [True]
    assert not norm.requires_grad


def test_gradients_in_inference_mode_are_clipped(kernel_calls):
    with torch.inference_mode():
        assert_same(lambda: parameters((3,), (4,)), 1.0)
    assert kernel_calls == [True]


def test_autocast_leaves_the_norm_its_dtype_as_torch_does(kernel_calls):
    with torch.autocast("cpu"):
        assert_same(lambda: parameters((3,), (4,), dtype=torch.bfloat16), 1.0)
    assert kernel_calls == [True]


# ---- torch's path


def sparse():
    (param,) = parameters((5, 3))
    param.grad = param.grad.to_sparse()
    return [param]


def strided():
    (param,) = parameters((6, 6))
    param.grad = param.grad.repeat(1, 2)[:, ::2]
    return [param]


def expanded():
    (param,) = parameters((6,))
    param.grad = torch.ones(1).expand(6)
    return [param]


def with_one_gradient():
    params = parameters((5,), (5,))
    params[1].grad = params[0].grad
    return params


class Subclass(torch.Tensor):
    """A tensor type of its own."""


def of_a_subclass():
    (param,) = parameters((5,))
    of_subclass = param.detach().as_subclass(Subclass)
    of_subclass.grad = param.grad
    return [of_subclass]


def with_a_gradient_of_a_subclass():
    (param,) = parameters((5,))
    param.grad = param.grad.as_subclass(Subclass)
    return [param]


UNCOVERED = {
    "float64": lambda: parameters((5,), dtype=torch.float64),
    "float16": lambda: parameters((5,), dtype=torch.float16),
    "complex": lambda: parameters((5,), dtype=torch.complex64),
    "mixed": lambda: parameters((5,)) + parameters((5,), dtype=torch.float64),
    "strided": strided,
    "with one gradient": with_one_gradient,
    "of a subclass": of_a_subclass,
    "with a gradient of a subclass": with_a_gradient_of_a_subclass,
    "none": list,
    "without gradients": lambda: [nn.Parameter(torch.ones(3))],
}


@pytest.mark.parametrize("make", UNCOVERED.values(), ids=UNCOVERED)
def test_what_the_kernel_does_not_cover_gets_the_bits_of_torch(kernel_calls, make):
    assert_same(make, 1.0, rtol=0, atol=0)
    assert kernel_calls == [False]


@pytest.mark.parametrize(
    "options",
    [{"norm_type": 1.0}, {"norm_type": "inf"}, {"norm_type": 0}, {"foreach": True}, {"foreach": False}],
    ids=str,
)
def test_another_norm_and_an_implementation_that_is_asked_for_are_torchs(kernel_calls, options):
    assert_same(lambda: parameters(*SHAPES[:3]), 1.0, rtol=0, atol=0, **options)
    assert kernel_calls == []


def of_another_mode():
    with torch.inference_mode():
        gradient = torch.ones(3)
    (param,) = parameters((3,))
    param.grad = gradient
    return [param]


WRONG = {
    "sparse": lambda clip: clip(sparse(), 1.0),
    "an expanded gradient": lambda clip: clip(expanded(), 1.0),
    "an inference tensor": lambda clip: clip(of_another_mode(), 1.0),
    "no tensors": lambda clip: clip([1], 1.0),
    "nothing to iterate": lambda clip: clip(1, 1.0),
    "a word for a bound": lambda clip: clip(parameters((3,)), "one"),
    "no bound": lambda clip: clip(parameters((3,)), None),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_torch_refuses_is_refused_with_its_words(call):
    errors = []
    for clip in (fastmlp.clip_grad_norm_, stock):
        with pytest.raises(Exception) as error:  # noqa: PT011
            call(clip)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_a_transform_of_torch_func_sees_torchs_operations(kernel_calls):
    def clipped(x):
        param = x.clone()
        param.grad = x.clone()
        return fastmlp.clip_grad_norm_([param], 1.0), param.grad

    norm, gradient = torch.func.functionalize(clipped)(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close((norm, gradient), (torch.tensor(5.0), torch.tensor([0.6, 0.8])))
    with pytest.raises(RuntimeError, match="forward gradient"):  # which torch does not clip
        torch.func.jvp(clipped, (torch.ones(2),), (torch.ones(2),))
    assert kernel_calls == [False, False]


def test_an_empty_generator_is_warned_of_as_by_torch():
    with pytest.warns(UserWarning, match="empty generator"):
        assert fastmlp.clip_grad_norm_((param for param in ()), 1.0) == 0


def test_a_compiled_call_is_torchs():
    torch._dynamo.reset()
    ours, theirs = (parameters((3,), (4,)) for _ in range(2))
    compiled = torch.compile(fastmlp.clip_grad_norm_, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ours, 1.0), stock(theirs, 1.0))
    assert all(map(torch.equal, grads(ours), grads(theirs)))


# ---- habits


class Ops(TorchDispatchMode):
    """The ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_all_gradients_are_clipped_by_one_op():
    with Ops() as ops:
        fastmlp.clip_grad_norm_(parameters((3,), (4,), (5, 6)), 1.0)
    assert [name for name in ops.names if "fastmlp" in name] == ["fastmlp.clip_grad_norm_.default"]
    assert not {name for name in ops.names if "norm" in name and "fastmlp" not in name}


def test_ours_may_take_the_place_of_torchs(monkeypatch):
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", fastmlp.clip_grad_norm_)
    params = parameters((3,), dtype=torch.float64)
    nn.utils.clip_grad_norm_(params, 0.5)
    torch.testing.assert_close(params[0].grad.norm().item(), 0.5, rtol=1e-5, atol=0)


def test_a_model_that_trains_with_clipped_gradients_learns_as_with_torchs(kernel_calls):
    models = []
    for clip in (fastmlp.clip_grad_norm_, stock):
        torch.manual_seed(0)
        model = fastmlp.MLP(8, 64, 64, 4)
        optimizer = fastmlp.Adam(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().sum().backward()
            clip(model.parameters(), 0.5)
            optimizer.step()
        models.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(*models)
    assert kernel_calls == [True] * 5
