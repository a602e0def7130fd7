"""Layers and networks of torch's own functions, to compare ours with."""

import torch.nn.functional as F

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
