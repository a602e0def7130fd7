"""fastmlp.functional.linear against torch's own linear and activation: values, gradients, layouts, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import ACTIVATIONS, KINDS, gradients, is_fused, layer
from reference import linear as stock

import fastmlp
from fastmlp import _C
from fastmlp.functional import linear, linear_relu, why_composite

DTYPES = [torch.float32, torch.bfloat16]


#: Where the derivative jumps.
KINKS = {
    "relu": [0],
    "leaky_relu": [0],
    ("leaky_relu", -0.5): [0],
    "relu6": [0, 6],
    "hardtanh": [-1, 1],
    ("hardtanh", -0.5, 2.0): [-0.5, 2],
    "hardsigmoid": [-3, 3],
    ("elu", 2.0): [0],
    "selu": [0],
    "hardswish": [-3, 3],
}


def results(function, x, weight, bias, activation=None, grad=None):
    """Y, and the gradients of whatever requires one."""
    return gradients(function(x, weight, bias, activation), x, weight, bias, grad=grad)


def assert_as_stock(*arguments):
    ours, stocks = (results(f, *arguments) for f in (linear, stock))
    torch.testing.assert_close(ours, stocks, rtol=1e-5, atol=1e-5, equal_nan=True)


# ---- values


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 9), max_size=2).flatmap(
        lambda leading: st.integers(0, 70).map(lambda k: (*leading, k))
    ),
    out_features=st.integers(0, 40),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_shape_gives_the_values_and_gradients_of_stock(
    instruction_set, shape, out_features, bias, activation
):
    x, weight, b = layer(*shape, out_features=out_features, bias=bias)
    assert is_fused(linear(x, weight, b, activation))
    assert_as_stock(x, weight, b, activation)


# An activation is computed alike whatever the product was: each shape with one, and each with a shape.
PRODUCTS = [
    (shape, "tanh", dtype) for shape in [(64, 784, 500), (1, 784, 500), (2000, 30, 64)] for dtype in DTYPES
]
PRODUCTS += [((33, 17, 6), activation, torch.float32) for activation in ACTIVATIONS]
PRODUCTS += [((33, 17, 6), activation, torch.bfloat16) for activation in KINDS]


@pytest.mark.parametrize(("shape", "activation", "dtype"), PRODUCTS, ids=str)
def test_error_is_within_one_and_a_half_of_stocks(instruction_set, shape, dtype, activation):
    batch, in_features, out_features = shape
    torch.manual_seed(0)
    squares = torch.zeros(2, 4, dtype=torch.float64)  # ours and stock's, of y and the three gradients
    for _ in range(max(1, 10000 // (batch * out_features))):
        x, weight, bias = layer(batch, in_features, out_features=out_features, dtype=dtype)
        grad_y = torch.randn(batch, out_features, dtype=dtype)
        exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        # Where rounding moves z across a kink, the gradient jumps: an error of neither.
        for kink in KINKS.get(activation, ()):
            grad_y[(F.linear(*exact) - kink).abs() < 0.05] = 0
        expected = results(stock, *exact, activation, grad_y.double())
        for i, function in enumerate((linear, stock)):
            found = results(function, x, weight, bias, activation, grad_y)
            errors = [((r - e).norm() / e.norm()) ** 2 for r, e in zip(found, expected, strict=True)]
            squares[i] += torch.stack(errors)
    ours, stocks = squares
    assert (ours <= 1.5**2 * stocks).all(), (ours / stocks).sqrt()


def test_linear_relu_is_linear_with_relu():
    x, weight, bias = layer(3, 4)
    assert torch.equal(linear_relu(x, weight, bias), linear(x, weight, bias, "relu"))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_infinity_and_signed_zero_come_out_as_stocks(instruction_set, activation):
    z = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 100.0, -100.0, 88.8, -88.8])
    x = z.repeat(64)[:, None].requires_grad_()  # so many that none of stock's vectors is left unfilled
    (y, grad_x), (stocks_y, stocks_grad_x) = (
        (y.detach()[:11, 0], torch.autograd.grad(y, x, torch.ones_like(y))[0][:11, 0])
        for y in (f(x, torch.ones(1, 1), None, activation) for f in (linear, stock))
    )
    # Stock's gelu and mish make NaN of an infinity, where there is a limit.
    expected, stocks_grad_x = (
        torch.where(theirs.isnan() & z.isinf(), ours, theirs)
        for ours, theirs in ((y, stocks_y), (grad_x, stocks_grad_x))
    )
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-36, equal_nan=True)
    torch.testing.assert_close(grad_x, stocks_grad_x, rtol=1e-5, atol=1e-5, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(y[numbers].signbit(), expected[numbers].signbit())


def test_nan_and_infinity_of_bfloat16_come_out_as_of_float32(instruction_set):
    # Of which stock's library makes NaN on processors that multiply no bfloat16.
    x, weight, bias = (t.detach() for t in layer(33, 7, out_features=40, dtype=torch.bfloat16))
    x[3, 2], x[5, 6], x[32, 6] = torch.nan, torch.inf, -torch.inf
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias]
    exact = [t.detach().float().requires_grad_(t.requires_grad) for t in leaves]
    both = results(linear, *leaves, "relu"), results(stock, *exact, "relu")
    for ours, right in zip(*both, strict=True):
        torch.testing.assert_close(ours.float(), right, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_relus_gradient_is_0_at_0_and_passes_at_nan(instruction_set):
    x = torch.tensor([[0.0], [-0.0], [torch.nan], [1.0], [-1.0]], requires_grad=True)
    linear(x, torch.ones(1, 1), None, "relu").sum().backward()
    assert x.grad.flatten().tolist() == [0, 0, 1, 1, 0]


# ---- layouts


LAYOUTS = {
    "transposed": lambda: torch.randn(7, 6).t(),
    "a slice of columns": lambda: torch.randn(6, 20)[:, 3:10],
    "every other row": lambda: torch.randn(12, 7)[::2],
    "every other column": lambda: torch.randn(6, 14)[:, ::2],
    "one row expanded": lambda: torch.randn(1, 7).expand(6, 7),
    "one number expanded": lambda: torch.randn(1, 1).expand(6, 7),
    "permuted": lambda: torch.randn(3, 7, 2).permute(2, 0, 1),
    "a slice of three dimensions": lambda: torch.randn(4, 5, 9)[1:3, :3, 1:8],
    "one dimension": lambda: torch.randn(14)[::2],
    "a view with an offset": lambda: torch.randn(50)[1:43].view(6, 7),
    "channels last": lambda: torch.randn(2, 3, 4, 7).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_may_lie_in_memory_in_any_way(instruction_set, layout):
    x = LAYOUTS[layout]()
    _, weight, bias = layer(7)
    y = linear(x, weight, bias, "tanh")
    assert is_fused(y)
    assert y.is_contiguous()
    assert_as_stock(x.requires_grad_(), weight, bias, "tanh")


@pytest.mark.parametrize("rows", [slice(None, None, 2), slice(1, 6)], ids=str)
def test_weight_may_be_a_slice_of_rows(instruction_set, rows):
    x, weight, _ = layer(6, 7, out_features=10)
    assert is_fused(linear(x, weight[rows], None, "relu"))
    assert_as_stock(x, weight[rows], None, "relu")


def test_gradient_may_be_expanded(instruction_set):
    x, weight, bias = layer(6, 7)
    linear(x, weight, bias, "sigmoid").sum().backward()
    expected = torch.autograd.grad(stock(x, weight, bias, "sigmoid").sum(), (x, weight, bias))
    torch.testing.assert_close((x.grad, weight.grad, bias.grad), expected)


def test_an_empty_batch_gives_zero_gradients_and_not_none():
    x, weight, bias = layer(0, 7)
    linear(x, weight, bias, "relu").sum().backward()
    assert x.grad.shape == (0, 7)
    assert weight.grad.shape == (5, 7)
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("wanted", range(1, 8))
def test_each_gradient_is_computed_where_it_is_asked_for_and_nowhere_else(wanted):
    arguments = layer(6, 7)
    for i, tensor in enumerate(arguments):
        tensor.requires_grad_(bool(wanted >> i & 1))
    assert_as_stock(*arguments, "tanh")
    y = linear(*arguments, "tanh")
    y.sum().backward()
    assert [t.grad is not None for t in arguments] == [t.requires_grad for t in arguments]


# ---- what the kernels cover


def test_the_reference_layer_is_fused():
    assert why_composite(*layer(64, 784, out_features=500)) is None
    assert is_fused(linear(*layer(64, 784, out_features=500), "relu"))


class Subclass(torch.Tensor):
    pass


UNCOVERED = {
    "float64": lambda: layer(6, 7, dtype=torch.float64),
    "float16": lambda: layer(6, 7, dtype=torch.float16),
    "weight transposed": lambda: [
        torch.randn(6, 7),
        torch.randn(7, 5, requires_grad=True).t(),
        torch.randn(5),
    ],
    "weight of one dimension": lambda: [torch.randn(6, 7), torch.randn(7, requires_grad=True), None],
    "bias of one number": lambda: [torch.randn(6, 7), torch.randn(5, 7, requires_grad=True), torch.randn(1)],
    "bias a matrix": lambda: [torch.randn(6, 7), torch.randn(5, 7, requires_grad=True), torch.randn(6, 5)],
    "a tensor subclass": lambda: [torch.randn(6, 7).as_subclass(Subclass), *layer(6, 7)[1:]],
    "a sparse weight": lambda: [torch.randn(6, 7), torch.eye(5, 7).to_sparse_csr(), None],
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_the_kernels_do_not_cover_takes_the_composite_path(case):
    arguments = UNCOVERED[case]()
    assert why_composite(*arguments)
    expected = stock(*arguments, "relu")
    y = linear(*arguments, "relu")
    torch.testing.assert_close(y, expected)
    assert type(y) is type(expected)
    if y.requires_grad:
        assert not is_fused(y)


def test_meta_tensors_have_a_shape_and_nothing_else():
    y = linear(*(t.to("meta") for t in layer(2, 3, 7)), "relu")
    assert y.is_meta
    assert y.shape == (2, 3, 5)


@pytest.fixture
def matmul_precision():
    """Torch's own setting for its library's products of float32 on the CPU."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


def test_float32_is_multiplied_as_bfloat16_only_where_torch_is_told_so_and_the_processor_can(
    instruction_set, matmul_precision
):
    arguments = *layer(64, 96, out_features=80, bias=False), None
    exact = results(linear, *arguments)
    matmul_precision.fp32_precision = "bf16"
    for got, expected in zip(results(linear, *arguments), exact, strict=True):
        assert got.dtype == torch.float32
        if instruction_set == "avx512bf16":
            error = (got - expected).abs().max() / expected.abs().max()
            assert 1e-5 < error < 2e-2
        else:
            assert torch.equal(got, expected)


def test_bfloat16_takes_the_librarys_path_where_the_processor_has_tiles_for_it():
    # A process of its own: choosing an instruction set asks for the kernels, and other tests have.
    import subprocess
    import sys

    code = (
        "import torch, fastmlp; layer = fastmlp.Linear(3, 2, dtype=torch.bfloat16); "
        "print(fastmlp.why_not_fused(layer, torch.ones(2, 3, dtype=torch.bfloat16)))"
    )
    reason = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    with open("/proc/cpuinfo") as file:
        has_tiles = "amx_bf16" in file.read()
    assert reason.startswith("(itself): this processor multiplies tiles" if has_tiles else "None")


# ---- errors


ERRORS = {
    "columns that differ": (
        [(6, 7), (5, 8)],
        {},
        r"input: expected shape \[..., 8\].*\[5, 8\], got \[6, 7\]",
    ),
    "a bias of another size": (
        [(6, 7), (5, 7), (4,)],
        {},
        r"bias: expected shape \[5\].*\[5, 7\], got \[4\]",
    ),
    "an input of no dimension": ([(), (5, 7)], {}, r"input: expected shape"),
    "a weight of another dtype": (
        [(6, 7), (5, 7)],
        {1: torch.float64},
        "weight: expected dtype Float.*got Double",
    ),
    "a bias of another dtype": (
        [(6, 7), (5, 7), (5,)],
        {2: torch.bfloat16},
        "bias: expected dtype Float.*BFloat16",
    ),
    "an integer weight": ([(6, 7), (5, 7)], {1: torch.int64}, "weight: expected dtype Float.*got Long"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_raise_stocks_type_of_error_and_name_the_argument(case, grad):
    shapes, changes, message = ERRORS[case]
    arguments = [torch.zeros(shape).to(changes.get(i, torch.float32)) for i, shape in enumerate(shapes)]
    arguments[0].requires_grad_(grad)
    with pytest.raises(RuntimeError):
        stock(*arguments)
    with pytest.raises(RuntimeError, match=message):
        linear(*arguments, activation="relu")


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: t.as_subclass(Subclass)], ids=["plain", "subclass"])
def test_an_unknown_activation_is_a_value_error_that_lists_the_known(wrap):
    x, weight, _ = layer(6, 7)
    with pytest.raises(ValueError, match=r"activation: expected .*'relu', 'leaky_relu'.*got 'sine'"):
        linear(wrap(x), weight, None, "sine")


@pytest.mark.parametrize(
    ("grad_y", "saved", "message"),
    [
        ((6, 4), (6, 4), r"weight: expected shape \[4, \*\], got \[5, 7\]"),
        ((6, 5), (5, 5), r"saved: expected shape \[6, 5\], got \[5, 5\]"),
        ((4, 5), (4, 5), r"input: expected shape \[4, 7\], got \[6, 7\]"),
    ],
)
def test_the_backward_op_checks_its_own_arguments(grad_y, saved, message):
    x, weight, _ = (t.detach() for t in layer(6, 7))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmlp.network_backward(
            torch.ones(grad_y), x, [weight], [torch.ones(saved)], ["relu"], [], [0, 1, 2]
        )


@pytest.mark.parametrize("missing", ["input", "weight", "saved"])
def test_the_backward_op_asks_for_what_the_wanted_gradients_are_made_of(missing):
    x, weight, _ = (t.detach() for t in layer(6, 7))
    arguments = {"input": x, "weight": weight, "saved": torch.ones(6, 5)} | {missing: None}
    x, weight, saved = arguments.values()
    with pytest.raises(RuntimeError, match=f"{missing}: expected what the forward pass read or gave"):
        torch.ops.fastmlp.network_backward(torch.ones(6, 5), x, [weight], [saved], ["relu"], [], [0, 1, 2])


# ---- determinism


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(65, 785, 501), (300, 30, 256), (128, 256, 256), (7000, 64, 16)], ids=str)
def test_the_same_input_gives_the_same_bits_for_every_number_of_threads(instruction_set, dtype, shape):
    batch, in_features, out_features = shape
    arguments = [*layer(batch, in_features, out_features=out_features, dtype=dtype), "tanh"]
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs += [results(linear, *arguments), results(linear, *arguments)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_parameters_and_inputs_are_left_as_they_are():
    arguments = layer(6, 7)
    before = [t.clone() for t in arguments]
    results(linear, *arguments, "relu")
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("instruction_set", _C.instruction_sets(), indirect=True)
def test_every_instruction_set_computes_and_build_info_names_the_one_in_use(instruction_set):
    assert_as_stock(*layer(6, 70, out_features=33), "gelu")
    assert fastmlp.build_info()["cpu"] == instruction_set
    assert instruction_set in fastmlp.build_info()["cpu_supported"].split(", ")
