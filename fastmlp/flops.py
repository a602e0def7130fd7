"""How many floating-point operations the ops take: for torch.utils.flop_counter, which counts products alone.

A product of [M, K] by [K, N] is 2 M N K. A layer is one forward, and backward one each for dW and dx.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]

_ops = torch.ops.fastmlp


def _products(input: Shape, weights: Sequence[Shape]) -> list[int]:
    """The operations of one product with each weight, for an input of shape [..., in_features]."""
    return [2 * prod(input[:-1]) * prod(weight) for weight in weights]


@register_flop_formula([_ops.network, _ops.network_forward])
def _network(input: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    return sum(_products(input, weights))


@register_flop_formula(_ops.network_backward)
def _network_backward(
    grad_y: Shape,
    input: Shape | None,
    weights: Sequence[Shape | None],
    saved: Sequence[Shape | None],
    activations: Sequence[str],
    parameters: Sequence[float],
    wanted: Sequence[int],
    **kwargs: Any,
) -> int:
    count = len(weights)
    lowest = min((max(number - 1, 0) % count for number in wanted), default=count)
    total, width = 0, grad_y[-1]
    for i in reversed(range(lowest, count)):
        x, weight = [input, *saved][i], weights[i]
        below = 0
        if 1 + i in wanted and x is not None:
            below = x[-1]
            total += 2 * prod(grad_y[:-1]) * width * below
        if (i > lowest or 0 in wanted) and weight is not None:
            below = weight[1]
            total += 2 * prod(grad_y[:-1]) * width * below
        width = below
    return total


@register_flop_formula(_ops.train_step_)
def _train_step(
    input: Shape,
    target: Shape,
    params: Sequence[Shape],
    states: Sequence[Shape],
    counts: Sequence[Shape],
    workspace: Shape,
    has_bias: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    is_given, numbers, start = args[2] == "given", args[10], 0  # whether there is no forward pass
    weights, trained = [], []  # of each layer: the weight's shape, and whether weight and bias are trained
    for bias in has_bias:
        end = start + 1 + bias
        weights.append(params[start])
        trained.append([number >= 0 for number in numbers[start:end]])
        start = end
    products = _products(input, weights)
    lowest = next((i for i, layer in enumerate(trained) if any(layer)), len(trained))
    return sum(product * (1 - is_given + trained[i][0] + (i > lowest)) for i, product in enumerate(products))
