"""Predictor: the fused model's bits, of a snapshot, for tensors and arrays."""

import copy
import itertools
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastmlp


class Written(nn.Module):
    """A model with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 20), nn.Linear(20, 3, bias=False)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x)


def sequential(*sizes, activation=nn.ReLU):
    layers = [nn.Linear(k, n) for k, n in itertools.pairwise(sizes)]
    parts = [part for layer in layers for part in (layer, activation())]
    return nn.Sequential(*parts[:-1])


MODELS = {
    "nn.Sequential": lambda: sequential(8, 64, 64, 3),
    "of z": lambda: sequential(8, 30, 3, activation=nn.GELU),
    "one layer": lambda: nn.Linear(8, 3),
    "MLP": lambda: fastmlp.MLP(8, 64, 3),
    "a forward of its own": Written,
    "fused already": lambda: fastmlp.fuse(Written()),
    "nested, in eval mode": lambda: nn.Sequential(sequential(8, 9), nn.Dropout(), sequential(9, 3)).eval(),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def fused(model, x):
    with torch.no_grad():
        return fastmlp.fuse(copy.deepcopy(model))(x)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (64, 8), (0, 8), (2, 3, 8), (1100, 8)], ids=str)
def test_it_gives_the_bits_of_the_fused_model(model, shape, instruction_set):
    before, predict, x = copy.deepcopy(model.state_dict()), fastmlp.Predictor(model), torch.randn(shape)
    expected = fused(model, x)
    y = predict(x)
    assert torch.equal(y, expected)
    assert y.dtype == torch.float32
    assert not y.requires_grad
    array = predict(x.numpy())
    assert isinstance(array, np.ndarray)
    assert array.shape == expected.shape
    assert (array == expected.numpy()).all()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


FORMS = {
    "float64": lambda x: x.double(),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.cat([x, x], -1)[:, :8],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "upside down": lambda x: torch.from_numpy(x.numpy()[::-1].copy()).flip(0),
    "a parameter": nn.Parameter,
}


@pytest.mark.parametrize("form", FORMS)
def test_x_may_be_of_any_form(form):
    torch.manual_seed(0)
    predict, x = fastmlp.Predictor(sequential(8, 20, 3)), torch.randn(10, 8)
    given, expected = FORMS[form](x), predict(x)
    assert torch.equal(predict(given), expected)
    array = given.detach().numpy()
    assert (predict(array) == expected.numpy()).all()
    assert (predict(array[::-1]) == expected.numpy()[::-1]).all()


def test_rows_that_no_one_stride_leads_to_are_found():
    predict, x = fastmlp.Predictor(sequential(8, 20, 3)), torch.randn(5, 4, 8)
    for rows in (x[:, :3], x.transpose(0, 1), x[:, :1], x[:1, ::2]):
        assert torch.equal(predict(rows), predict(rows.contiguous()))
        assert (predict(rows.numpy()) == predict(rows).numpy()).all()


def test_the_output_goes_where_it_is_asked_to():
    predict, x = fastmlp.Predictor(sequential(8, 20, 3)), torch.randn(10, 8)
    expected = predict(x)
    for out in (torch.empty(10, 3), np.empty((10, 3), np.float32)):
        assert predict(x, out=out) is out
        assert (np.asarray(out) == expected.numpy()).all()
        assert predict(x.numpy(), out) is out


def test_a_tensor_written_to_is_one_that_autograd_misses():
    out = torch.randn(10, 3).requires_grad_().exp()
    with torch.no_grad():
        fastmlp.Predictor(sequential(8, 3))(torch.randn(10, 8), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


frozen = np.zeros((10, 3), np.float32)
frozen.flags.writeable = False
SHARED = torch.zeros(10, 11)
WRONG = {
    "features": (torch.zeros(10, 7), None, r"x: expected shape \[\.\.\., 8\], got \[10, 7\]"),
    "features of an array": (np.zeros(7), None, r"x: expected shape \[\.\.\., 8\], got \[7\]"),
    "a scalar": (torch.tensor(1.0), None, r"x: expected a dense array of shape \[\.\.\., in_features\]"),
    "out's shape": (torch.zeros(10, 8), torch.zeros(10, 4), r"out: expected .* of shape \[10, 3\]"),
    "out's dtype": (torch.zeros(10, 8), torch.zeros(10, 3).double(), "out: expected an array of float32"),
    "out's gaps": (torch.zeros(10, 8), torch.zeros(10, 6)[:, ::2], "without gaps"),
    "out's rows": (torch.zeros(10, 8), torch.zeros(10, 6)[:, :3], "without gaps"),
    "out is read-only": (torch.zeros(10, 8), frozen, "out: expected"),
    "out is x": (SHARED[:, :8], SHARED.view(-1)[80:].view(10, 3), "out: expected memory that x does not use"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_written(case):
    x, out, message = WRONG[case]
    before = copy.deepcopy(out)
    with pytest.raises(ValueError, match=message):
        fastmlp.Predictor(sequential(8, 20, 3))(x, out)
    assert out is None or (np.asarray(out) == np.asarray(before)).all()


@pytest.mark.parametrize("x", [[0.0] * 8, None, "x"])
def test_what_is_no_array_is_refused(x):
    with pytest.raises(TypeError, match="x: expected a tensor or a NumPy array, got"):
        fastmlp.Predictor(sequential(8, 3))(x)


REFUSED = {
    "no module": (lambda: print, TypeError, "model: expected a torch.nn.Module, got builtin"),
    "no layer": (nn.ReLU, ValueError, "without a torch.nn.Linear"),
    "another module": (lambda: nn.Sequential(nn.Linear(8, 3), nn.Softmax(-1)), ValueError, "chain of linear"),
    "a norm": (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)).eval(), ValueError, "else"),
    "dropout": (lambda: nn.Sequential(nn.Dropout(), nn.Linear(8, 3)), ValueError, "dropout in eval mode"),
    "float64": (lambda: nn.Linear(8, 3).double(), ValueError, "float32"),
    "meta": (lambda: nn.Linear(8, 3, device="meta"), ValueError, "on the CPU, got .* on meta"),
    "sizes": (lambda: sequential(8, 9).append(nn.Linear(4, 3)), ValueError, r"a weight of shape \[\*, 9\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_refused_with_the_reason(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        fastmlp.Predictor(make())


def test_the_model_is_not_changed_where_it_is_refused():
    model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(), nn.BatchNorm1d(4, momentum=None))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match="chain of linear"):
        fastmlp.Predictor(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_is_not_passed_by():
    model = sequential(8, 20, 3)
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="chain of linear"):
        fastmlp.Predictor(model)


def test_it_is_a_snapshot_until_it_is_refreshed():
    model, x = sequential(8, 20, 3), torch.randn(5, 8)
    predict, before = fastmlp.Predictor(model), fused(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(predict(x), before)
    model[1] = nn.Tanh()
    predict.refresh()
    assert torch.equal(predict(x), fused(model, x))
    model.append(nn.Softmax(-1))
    after = predict(x)
    with pytest.raises(ValueError, match="chain of linear"):
        predict.refresh()
    assert torch.equal(predict(x), after)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
def test_a_copy_has_the_snapshot(copied):
    model, x = sequential(8, 20, 3), torch.randn(5, 8)
    predict = fastmlp.Predictor(model)
    expected = predict(x)
    nn.init.zeros_(model[0].weight)
    assert torch.equal(copied(predict)(x), expected)
    assert repr(copied(predict)) == "Predictor(8-20-3)"


def test_threads_may_predict_at_once():
    torch.manual_seed(0)
    predict, xs = fastmlp.Predictor(sequential(30, 300, 300, 3)), torch.randn(64, 200, 30)
    expected = [predict(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(predict, xs), expected))


def test_a_forked_child_may_predict():
    predict, x = fastmlp.Predictor(sequential(30, 900, 900, 3)), torch.randn(200, 30)
    expected = predict(x)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(predict(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@settings(max_examples=30, deadline=None, database=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=5),
    rows=st.integers(0, 70),
    gap=st.integers(0, 5),
    name=st.sampled_from(["relu", "tanh", "silu", "gelu"]),
)
def test_any_network_and_array_gives_the_bits_of_the_fused_model(sizes, rows, gap, name):
    model = fastmlp.MLP(*sizes, activation=name)
    x = torch.randn(rows, sizes[0] + gap)[:, : sizes[0]]
    predict = fastmlp.Predictor(model)
    assert torch.equal(predict(x), fused(model, x))
    assert (predict(x.numpy()) == predict(x).numpy()).all()
