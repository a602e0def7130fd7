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


def _backward(grad_y: Shape, x: Shape | None, weight: Shape | None, mask: Sequence[bool]) -> int:
    """The operations of dx, where mask[0] asks for it, and of dW, where mask[1] does."""
    of_dx = 2 * prod(grad_y) * weight[1] if mask[0] and weight is not None else 0
    of_dw = 2 * prod(grad_y) * x[-1] if mask[1] and x is not None else 0
    return of_dx + of_dw


@register_flop_formula(_ops.linear)
def _linear(input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return sum(_products(input, [weight]))


@register_flop_formula(_ops.linear_backward)
def _linear_backward(
    grad_y: Shape,
    input: Shape | None,
    weight: Shape | None,
    y: Shape | None,
    activation: str,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    return _backward(grad_y, input, weight, output_mask)


@register_flop_formula([_ops.mlp, _ops.mlp_forward])
def _mlp(input: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    return sum(_products(input, weights))


@register_flop_formula(_ops.mlp_backward)
def _mlp_backward(
    grad_y: Shape,
    input: Shape | None,
    weights: Sequence[Shape | None],
    hidden: Sequence[Shape | None],
    activation: str,
    wanted: Sequence[int],
    **kwargs: Any,
) -> int:
    count = len(weights)
    lowest = min((max(number - 1, 0) % count for number in wanted), default=count)
    inputs, outputs = [input, *hidden], [*hidden, grad_y]
    return sum(
        _backward(y, inputs[i], weights[i], [i > lowest or 0 in wanted, 1 + i in wanted])
        for i, y in enumerate(outputs)
        if i >= lowest and y is not None
    )


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
    is_trained, start = args[-1], 0
    weights, trained = [], []  # of each layer: the weight's shape, and whether weight and bias are trained
    for bias in has_bias:
        end = start + 1 + bias
        weights.append(params[start])
        trained.append(is_trained[start:end])
        start = end
    products = _products(input, weights)
    lowest = next((i for i, layer in enumerate(trained) if any(layer)), len(trained))
    return sum(product * (1 + trained[i][0] + (i > lowest)) for i, product in enumerate(products))
