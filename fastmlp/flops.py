"""How many floating-point operations the ops take: for torch.utils.flop_counter, which counts products alone.

A product of [M, K] by [K, N] is 2 M N K. A layer is one forward, and backward one each for dW and dx.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fastmlp.step import _TRAINED

Shape = Sequence[int]

_ops = torch.ops.fastmlp


def _products(input: Shape, weights: Sequence[Shape]) -> list[int]:
    """The operations of one product with each weight, for an input of shape [..., in_features]."""
    return [2 * prod(input[:-1]) * prod(weight) for weight in weights]


def _backward(products: Sequence[int], has_grad_x: bool, has_grad_weight: Sequence[bool], lowest: int) -> int:
    """Of a chain of layers whose gradients go down to layer `lowest`, and with `has_grad_x` to the input."""
    return sum(
        product * (has_grad_weight[i] + (i > lowest or (i == 0 and has_grad_x)))
        for i, product in enumerate(products)
    )


@register_flop_formula(_ops.linear)
def _linear(input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return sum(_products(input, [weight]))


@register_flop_formula(_ops.linear_backward)
def _linear_backward(
    grad_y: Shape,
    input: Shape,
    weight: Shape,
    y: Shape | None,
    activation: str,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    return _backward(_products(input, [weight]), output_mask[0], output_mask[1:2], 0)


@register_flop_formula([_ops.mlp, _ops.mlp_forward])
def _mlp(input: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    return sum(_products(input, weights))


@register_flop_formula(_ops.mlp_backward)
def _mlp_backward(
    grad_y: Shape,
    input: Shape,
    weights: Sequence[Shape],
    biases: Sequence[Shape],
    hidden: Sequence[Shape],
    activation: str,
    wanted: Sequence[int],
    **kwargs: Any,
) -> int:
    count = len(weights)
    lowest = min((max(index - 1, 0) % count for index in wanted), default=count)
    has_grad_weight = [1 + i in wanted for i in range(count)]
    return _backward(_products(input, weights), 0 in wanted, has_grad_weight, lowest)


@register_flop_formula(_ops.train_step_)
def _train_step(
    input: Shape,
    target: Shape,
    params: Sequence[Shape],
    momenta: Sequence[Shape],
    workspace: Shape,
    has_bias: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    flags, start = args[-1], 0
    weights, trained = [], []  # of each layer: the weight's shape, and whether weight and bias are trained
    for bias in has_bias:
        end = start + 1 + bias
        weights.append(params[start])
        trained.append([bool(flag & _TRAINED) for flag in flags[start:end]])
        start = end
    products = _products(input, weights)
    lowest = next((i for i, layer in enumerate(trained) if any(layer)), len(trained))
    return sum(products) + _backward(products, False, [layer[0] for layer in trained], lowest)
