"""Models and trainers that other people wrote give the same after fuse, and train the same.

By SGD: Adam divides by the size of a gradient, and where that is only rounding (of a bias before BatchNorm),
so is what it makes of the parameter.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmlp

FUSED = {
    "skorch": [""],
    "lightning": [""],
    "stable_baselines3": [
        "mlp_extractor.policy_net",
        "mlp_extractor.value_net",
        "action_net",
        "value_net",
    ],
    "rtdl_mlp": ["", "blocks.0", "blocks.1", "blocks.2"],
    "rtdl_resnet": ["input_projection", "blocks.0", "blocks.1", "output"],
    "opt": [
        f"model.decoder.layers.{layer}{name}"
        for layer in range(2)
        for name in ("", *(f".self_attn.{part}_proj" for part in ("k", "v", "q", "out")))
    ]
    + ["lm_head"],
    "t5": [
        f"{side}.block.{block}.layer.{layer}.{part}{name}"
        for side, parts in (
            ("encoder", ("SelfAttention", "DenseReluDense")),
            ("decoder", ("SelfAttention", "EncDecAttention", "DenseReluDense")),
        )
        for block in range(2)
        for layer, part in enumerate(parts)
        for name in (("", ".wo") if part == "DenseReluDense" else (".q", ".k", ".v", ".o"))
    ]
    + ["lm_head"],
    "keras": [""],
}


@pytest.fixture(params=FUSED)
def name(request):
    return request.param


@pytest.fixture
def made(script):
    return script("integrations").made


def parameters(job):
    return {key: value.detach().clone() for key, value in job.module.state_dict().items()}


def test_the_parts_that_are_named_are_fused(made, name):
    module = made(name, fused=True).module
    fused = [part for part, child in module.named_modules() if child._get_name().startswith("Fused")]
    assert fused == FUSED[name]


class Ops(TorchDispatchMode):
    """Notes the activation of each layer of each op that computes some, and every ReLU of torch's own."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fastmlp.network.default:
            self.seen.append(tuple(None if name == "identity" else name for name in args[3]))
        elif function is torch.ops.aten.relu.default:
            self.seen.append("relu")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lightning", {("relu", None)}),
        ("rtdl_mlp", {("relu", "relu", "relu", None)}),
        ("opt", {("relu", None), (None,)}),
        ("t5", {("relu",), (None,)}),
    ],
)
def test_relus_that_a_forward_calls_are_in_the_op_of_their_layer(made, name, expected):
    job = made(name, fused=True)
    with Ops() as ops, torch.no_grad():
        job.output()
    assert set(ops.seen) == expected


def test_the_outputs_stay_the_same(made, name):
    stock, fused = (made(name, side).output() for side in (False, True))
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-5)


def test_it_trains_as_stock_does(made, name):
    trained = []
    for side in (False, True):
        job = made(name, side)
        before = parameters(job)
        torch.manual_seed(1)
        job.train(4)
        trained.append(parameters(job))
        assert any(not torch.equal(before[key], value) for key, value in trained[-1].items())
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-4)


def test_it_goes_on_after_it_is_unfused(made, name):
    job = made(name, fused=True)
    y = job.output()
    fastmlp.unfuse(job.module)
    assert not any(part._get_name().startswith("Fused") for part in job.module.modules())
    torch.testing.assert_close(job.output(), y, rtol=1e-4, atol=1e-5)
    job.train(2)
