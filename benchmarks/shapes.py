"""The grid: the networks and batches that every benchmark measures."""

from itertools import pairwise
from typing import NamedTuple

from torch import nn

from fastmlp.activations import ACTIVATIONS


class Network(NamedTuple):
    """Widths from input to output, and the batches it is measured at."""

    name: str
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    loss: str = "cross_entropy"
    activation: str = "relu"  # between layers, as fastmlp.MLP names it


GRID = (
    Network("seed", (784, 500, 10), (1, 64, 1024)),  # the reference workload, MNIST-shaped
    Network("policy", (8, 64, 64, 4), (1, 64), "mse", "tanh"),  # reinforcement learning's default
    Network("rl", (17, 256, 256, 6), (1, 64, 2048)),  # policy networks
    Network("elu", (48, 512, 256, 128, 12), (4096,), "mse", "elu"),  # locomotion policies
    Network("tabular", (30, 256, 256, 2), (128, 4096)),
    Network("wide", (1024,) * 5, (256, 2048)),
    Network("ffn", (512, 2048, 512), (4096,), "mse"),  # a transformer's feed-forward block
    Network("ranking", (479, 1024, 1024, 512, 256, 1), (2048,), "bce"),  # recommendation, top MLP
    Network("gelu", (256, 1024, 256), (512,), "mse", "gelu"),  # the same, smaller, as language models have it
    Network("field", (64, 64, 64, 64, 16), (65536,), "mse"),  # coordinate networks
    Network("siren-like", (2, 256, 256, 256, 1), (4096,), "mse", "tanh"),  # the same, for physics
)

# Beside the seed at 64: sizes that no tile, register or cache line divides.
ODD = Network("odd", (785, 501, 11), (65,))

# What a GPU may compute as one kernel, of widths up to 64 and up to 128: little of the GPU is filled, to all.
BATCHES = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
NARROW = (
    Network("policy", (8, 64, 64, 4), BATCHES),
    Network("field", (64, 64, 64, 64, 16), BATCHES),
    Network("less narrow", (32, 128, 128, 128, 3), BATCHES),
)


def stock_mlp(*sizes: int, activation: str = "relu") -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for in_features, out_features in pairwise(sizes):
        layers += [nn.Linear(in_features, out_features), ACTIVATIONS[activation].module()]
    return nn.Sequential(*layers[:-1])
