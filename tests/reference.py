"""Torch's own layers, networks and gradients, to compare ours with; and how tests choose their cases."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmlp.activations import COMPOSITES, resolved

#: Each activation with torch's parameters, and with others.
ACTIVATIONS = [
    None,
    *COMPOSITES,
    ("leaky_relu", -0.5),
    ("hardtanh", -0.5, 2.0),
    ("elu", 2.0),
    ("celu", 0.5),
    ("softplus", 2.0, 5.0),
]
#: One of each kind: backward reads nothing, y, or z.
KINDS = [None, "tanh", "silu"]
MODULES = {None: nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def linear(x, weight, bias=None, activation=None):
    """What fastmlp.functional.linear computes."""
    return network(x, [weight], [bias], [activation])


def network(x, weights, biases, activations):
    """What fastmlp.functional.network computes."""
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        name, parameters = resolved(activation)
        x = F.linear(x, weight, bias)
        x = x if name == "identity" else COMPOSITES[name](x, *parameters)
    return x


def mlp(x, weights, biases, activation):
    """What fastmlp.functional.mlp computes."""
    count = len(weights)
    return network(x, weights, biases or [None] * count, [activation] * (count - 1) + [None])


def chain(*sizes, activation=nn.ReLU):
    """Layers of these sizes with activations between them, as torch's own modules."""
    layers = [part for k, n in pairwise(sizes) for part in (nn.Linear(k, n), activation())]
    return nn.Sequential(*layers[:-1])


def leaves(*shapes, dtype=torch.float32, scale=1.0):
    """Tensors that require a gradient; None for the shape None."""
    made = [None if shape is None else scale * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [None if t is None else t.to(dtype).requires_grad_() for t in made]


def layer(*shape, out_features=5, bias=True, dtype=torch.float32):
    """Leaves: x of the shape, weight and bias; z is of the order of 1."""
    (weight,) = leaves((out_features, shape[-1]), dtype=dtype, scale=max(shape[-1], 1) ** -0.5)
    x, bias = leaves(shape, (out_features,) if bias else None, dtype=dtype)
    return x, weight, bias


def gradients(y, *tensors, grad=None):
    """Y, and its gradients by those of the tensors that require one; along one of many sizes, or `grad`."""
    wanted = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    if grad is None:
        grad = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).to(y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, wanted, grad)


def is_fused(y):
    """Whether the kernels have computed y, and will compute its gradients."""
    return any(kind in y.grad_fn.name() for kind in ("NetworkFunction", "CrossEntropyFunction"))


def cases(names, values, is_quick, **options):
    """Parameters of a test, by tuples of values; those that are not quick make it a slow one."""
    marks = {True: [], False: [pytest.mark.slow]}
    values = [pytest.param(*value, marks=marks[bool(is_quick(*value))]) for value in values]
    return pytest.mark.parametrize(names, values, **options)
