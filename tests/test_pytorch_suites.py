"""PyTorch's own test material, tried on ours: what its suites try on nn.Linear, F.linear and F.cross_entropy.

The inputs come with torch; the generic tests that its suites run them through do not, and are written anew.
Every test tries one sample; the others, and other dtypes, are slow tests. The end of a test run tells how
many samples of each suite were tried.
"""

import copy
import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from reference import KINDS, gradients
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastmlp
from fastmlp.activations import COMPOSITES
from fastmlp.functional import cross_entropy, linear

pytest.importorskip("expecttest", reason="PyTorch's own test material needs it")

from torch.testing._internal import composite_compliance
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

MODULE, LOSS = (
    next(info for info in module_db if info.module_cls is cls) for cls in (nn.Linear, nn.CrossEntropyLoss)
)
INFOS = {info.name.removeprefix("nn.functional."): info for info in op_db}
FLOATS = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float64: 1e-9}


def first_quick(values):
    """The values of a parameter, slow but for the first."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]


every_activation = pytest.mark.parametrize("activation", first_quick(reversed(KINDS)), ids=str)
every_float = pytest.mark.parametrize("dtype", first_quick(FLOATS), ids=str)


@pytest.fixture
def activation():
    """That of the tests where it does not matter, which is not none, so that it may get lost."""
    return KINDS[-1]


def activated(z: Tensor, activation: str | None) -> Tensor:
    return z if activation is None else COMPOSITES[activation](z)


def assert_close(actual, expected, dtype=torch.float32):
    tolerance = TOLERANCES.get(dtype, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- ModuleInfo of nn.Linear


def module_inputs(dtype, requires_grad=True, training=True):
    return MODULE.module_inputs_func(MODULE, "cpu", dtype, requires_grad, training)


class Case(NamedTuple):
    """An input of the suite: a layer, and what it is called with."""

    make: Callable[..., fastmlp.Linear]
    args: tuple[object, ...]
    kwargs: dict[str, Tensor]
    reference: Callable[[fastmlp.Linear], Tensor]  # what the result should be

    @property
    def input(self) -> Tensor:
        return (*self.args, *self.kwargs.values())[0]

    def call(self, layer):
        return layer(*self.args, **self.kwargs)

    def call_on(self, layer, input):
        """Passes the input as the suite does: by position or by name."""
        return layer(**dict.fromkeys(self.kwargs, input)) if self.kwargs else layer(input)


@pytest.fixture(params=first_quick([torch.float32, torch.float64]), ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=first_quick(range(len(module_inputs(torch.float32)))))
def case(request, tried, dtype, activation):
    tried("ModuleInfo of nn.Linear")
    torch.manual_seed(0)
    sample = module_inputs(dtype)[request.param]
    constructor, forward = sample.constructor_input, sample.forward_input
    make = partial(fastmlp.Linear, *constructor.args, **constructor.kwargs, activation=activation)

    def reference(layer):
        return activated(sample.reference_fn(layer, *forward.args, **forward.kwargs), activation)

    return Case(make, forward.args, forward.kwargs, reference)


def test_the_suites_have_samples():
    assert len(module_inputs(torch.float32)) >= 3
    assert len(samples("linear", torch.float32)) >= 18
    assert len(samples("cross_entropy", torch.float32)) >= 10


class TestModule:
    """The generic tests of torch's test_modules.py."""

    @every_activation
    def test_forward(self, case, dtype, activation):
        layer = case.make(dtype=dtype)
        assert_close(case.call(layer), case.reference(layer), dtype)

    def test_the_default_dtype_is_that_of_the_parameters(self, case, dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            layer = case.make()
        finally:
            torch.set_default_dtype(before)
        assert_close(case.call(layer), case.reference(layer), dtype)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_factory_arguments_say_where_and_of_what_parameters_are_made(self, case, dtype, device):
        for parameter in case.make(device=device, dtype=dtype).parameters():
            assert (parameter.device.type, parameter.dtype) == (device, dtype)

    def test_initial_values_are_those_of_stock(self, case, dtype):
        parameters = []
        for kind in (case.make, partial(nn.Linear, *case.make.args, **stock_arguments(case.make))):
            torch.manual_seed(0)
            parameters.append(list(kind(dtype=dtype).parameters()))
        assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))

    def test_no_keyword_of_the_constructor_is_lost_in_the_representation(self, case, activation):
        text = repr(case.make())
        assert text.startswith("Linear(in_features=")
        assert (f"activation={activation!r}" in text) == (activation is not None)

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
    )
    def test_a_duplicate_computes_the_same(self, case, dtype, duplicate):
        layer = case.make(dtype=dtype)
        assert torch.equal(case.call(duplicate(layer)), case.call(layer))

    def test_a_state_dict_fits_another_layer_and_stock(self, case, dtype):
        layer, other = case.make(dtype=dtype), case.make(dtype=dtype)
        stock = nn.Linear(*case.make.args, **stock_arguments(case.make), dtype=dtype)
        stock.load_state_dict(layer.state_dict())
        other.load_state_dict(stock.state_dict())
        assert torch.equal(case.call(other), case.call(layer))

    @every_activation
    @pytest.mark.parametrize(("of_input", "of_parameters"), [(True, True), (True, False), (False, True)])
    def test_what_is_not_contiguous_gives_the_same(self, case, dtype, activation, of_input, of_parameters):
        layer, other = (case.make(dtype=dtype) for _ in range(2))
        other.load_state_dict(layer.state_dict())
        x = case.input.detach().clone().requires_grad_()
        strided = (apart(x) if of_input else x.detach()).requires_grad_()
        if of_parameters:
            for parameter in other.parameters():
                parameter.data = apart(parameter.data)
        results = [
            gradients(case.call_on(a, b), b, *a.parameters()) for a, b in ((layer, x), (other, strided))
        ]
        assert_close(results[1], results[0], dtype)

    @every_activation
    @pytest.mark.parametrize("dtype", [torch.float64], ids=str)
    def test_first_and_second_derivatives_are_right(self, case, dtype, activation):
        layer, x = case.make(dtype=dtype), case.input.detach().requires_grad_()
        names = list(dict(layer.named_parameters()))

        def function(x, *parameters):
            args, kwargs = ((), dict.fromkeys(case.kwargs, x)) if case.kwargs else ((x,), {})
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), args, kwargs)

        assert gradcheck(function, (x, *layer.parameters()), fast_mode=True)
        assert gradgradcheck(function, (x, *layer.parameters()), fast_mode=True)

    def test_training_and_evaluation_do_not_differ(self, case, dtype):
        layer = case.make(dtype=dtype)
        assert torch.equal(case.call(layer.train()), case.call(layer.eval()))

    @pytest.mark.parametrize("to", FLOATS, ids=str)
    def test_conversion_converts_parameters_and_gradients(self, case, dtype, to):
        layer = case.make(dtype=dtype)
        case.call(layer).sum().backward()
        layer.to(to)
        for parameter in layer.parameters():
            assert (parameter.dtype, parameter.grad.dtype) == (to, to)
        assert case.call_on(layer, case.input.detach().to(to)).dtype == to

    def test_memory_that_is_made_later_computes(self, case, dtype):
        layer, other = case.make(device="meta", dtype=dtype), case.make(dtype=dtype)
        assert case.call_on(layer, case.input.to("meta")).shape == case.call(other).shape
        layer.to_empty(device="cpu").load_state_dict(other.state_dict())
        assert torch.equal(case.call(layer), case.call(other))

    def test_channels_last_input_gives_the_same(self, case, dtype):
        layer = case.make(dtype=dtype)
        x = case.input.detach().expand(2, 3, 4, -1)
        y = layer(x.to(memory_format=torch.channels_last))
        assert_close(y, layer(x.contiguous()), dtype)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_layer_can_go_to_a_gpu_and_back(self, case, dtype):
        layer = case.make(dtype=dtype)
        expected = case.call(layer)
        y = case.call_on(layer.cuda(), case.input.cuda())
        assert_close(y.cpu(), expected, dtype)
        assert torch.equal(case.call(layer.cpu()), expected)


def stock_arguments(make: partial) -> dict[str, object]:
    return {name: value for name, value in make.keywords.items() if name != "activation"}


def apart(t: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([t.detach(), torch.full_like(t, torch.nan)], -1)[..., 0]


# ---- OpInfo of F.linear and F.cross_entropy


@cache  # they take longer to make than to try, and no test changes them
def samples(name, dtype, requires_grad=False):
    torch.manual_seed(0)
    return list(INFOS[name].sample_inputs("cpu", dtype, requires_grad=requires_grad))


@pytest.fixture(params=first_quick(range(len(samples("linear", torch.float32)))))
def number(request, tried):
    tried("OpInfo of nn.functional.linear")
    return request.param


def tensors_of(number, dtype, requires_grad=False):
    """The tensors of a sample: x, weight and perhaps bias."""
    sample = samples("linear", dtype, requires_grad)[number]
    return [sample.input, *sample.args]


def pair(activation):
    """Ours and stock's, as functions of the tensors alone."""
    return (
        lambda *tensors: linear(*tensors, activation=activation),
        lambda *tensors: activated(F.linear(*tensors), activation),
    )


class TestLinear:
    """The generic tests of torch's test_ops.py, and of its tests of function transforms."""

    @every_activation
    @every_float
    @pytest.mark.parametrize("contiguous", [True, False])
    def test_values_and_gradients(self, number, dtype, activation, contiguous):
        sample = samples("linear", dtype, True)[number]
        sample = sample if contiguous else sample.noncontiguous()
        tensors = [sample.input, *sample.args]
        ours, stock = pair(activation)
        results = [gradients(f(*tensors), *tensors) for f in (ours, stock)]
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        assert_close(*results, dtype)

    @pytest.mark.parametrize(
        "dtype", first_quick(sorted(INFOS["linear"].dtypes - set(FLOATS), key=str)), ids=str
    )
    def test_every_other_dtype_gives_stocks_result_or_type_of_error(self, number, dtype, activation):
        tensors = tensors_of(number, dtype)
        ours, stock = pair(activation)
        try:
            expected = stock(*tensors)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(*tensors)
        else:
            torch.testing.assert_close(ours(*tensors), expected)

    @every_activation
    def test_derivatives(self, number, activation):
        tensors = tensors_of(number, torch.float64, True)
        ours, _ = pair(activation)
        assert gradcheck(ours, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(ours, tensors, check_fwd_over_rev=True, fast_mode=True)

    @every_activation
    def test_function_transforms(self, number, activation):
        tensors = tuple(tensors_of(number, torch.float32))
        every = tuple(range(len(tensors)))

        def transformed(f):
            func, directions = torch.func, tuple(torch.ones_like(t) for t in tensors)

            def loss(*tensors):
                return f(*tensors).square().sum()

            stacked = tuple(torch.stack([t, 2 * t]) for t in tensors)
            return (
                func.grad(loss, every)(*tensors),
                func.jvp(f, tensors, directions),
                func.jacrev(f, every)(*tensors),
                func.vmap(f)(*stacked),
                func.vmap(func.grad(loss, every))(*stacked),
            )

        ours, stock = map(transformed, pair(activation))
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)

    @every_activation
    def test_a_tensor_subclass_in_the_place_of_any_argument_changes_nothing(self, number, activation):
        ours, _ = pair(activation)
        tensors = tensors_of(number, torch.float32, True)

        def assert_equal(actual, expected, **_):
            assert_close(actual, expected)

        composite_compliance.check_with_mode(ours, tensors, {}, assert_equal)
        composite_compliance.check_backward_formula(ours, tensors, {}, None, None, assert_equal)
        composite_compliance.check_forward_ad_formula(ours, tensors, {}, None, assert_equal)

    def test_a_lazy_negation_counts(self, number, activation):
        tensors = tensors_of(number, torch.float32, True)
        negated = [torch._neg_view(-t.detach()).requires_grad_() for t in tensors]
        assert all(t.is_neg() for t in negated)
        ours, stock = pair(activation)
        assert_close(gradients(ours(*negated), *negated), gradients(stock(*tensors), *tensors))

    def test_a_lazy_copy_is_not_made_real(self, number, activation):
        tensors = [torch._lazy_clone(t).requires_grad_() for t in tensors_of(number, torch.float32)]
        ours, _ = pair(activation)
        y = ours(*tensors)
        torch.autograd.grad(y.sum(), tensors)
        assert all(torch._C._is_cow_tensor(t) for t in tensors)


@pytest.mark.parametrize("contiguous", [True, False])
@every_float
@pytest.mark.parametrize("number", first_quick(range(len(samples("cross_entropy", torch.float32)))))
def test_cross_entropy_has_stocks_values_and_gradients(tried, number, dtype, contiguous):
    tried("OpInfo of nn.functional.cross_entropy")
    sample = samples("cross_entropy", dtype, True)[number]
    sample = sample if contiguous else sample.noncontiguous()
    tensors = [sample.input, *sample.args, *sample.kwargs.values()]
    results = [
        gradients(f(sample.input, *sample.args, **sample.kwargs), *tensors)
        for f in (cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*results, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype], equal_nan=True)


LOSS_INPUTS = LOSS.module_inputs_func(LOSS, "cpu", torch.float32, True, True)


@pytest.mark.parametrize("example", first_quick(LOSS_INPUTS), ids=[each.desc for each in LOSS_INPUTS])
def test_every_example_of_the_loss_gives_stocks_results(tried, instruction_set, example):
    tried("ModuleInfo of nn.CrossEntropyLoss")
    constructor, forward, results = example.constructor_input, example.forward_input, []
    for make in (fastmlp.CrossEntropyLoss, nn.CrossEntropyLoss):
        arguments = [t.detach().requires_grad_(t.requires_grad) for t in forward.args]
        loss = make(*constructor.args, **constructor.kwargs)(*arguments, **forward.kwargs)
        results.append(gradients(loss, *arguments))
    torch.testing.assert_close(*results, equal_nan=True)
