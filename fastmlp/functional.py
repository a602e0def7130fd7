"""The ops, as functions of tensors. Notation: z = x Wᵀ + b, y = g(z), with g the activation."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastmlp import _C
from fastmlp.activations import COMPOSITES, Activation, resolved

__all__ = [
    "COMPOSITES",
    "Activation",
    "cross_entropy",
    "is_plain",
    "linear",
    "linear_relu",
    "mlp",
    "network",
]

# Other tensor types carry semantics of their own, which torch's operations know and ours do not.
TENSORS = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
_OPTIONAL = TENSORS | {type(None)}

_cross_entropy = torch.ops.fastmlp.cross_entropy.default
_network = torch.ops.fastmlp.network.default
_why_not_fused = torch.ops.fastmlp.why_not_fused.default


def is_plain(input: object) -> bool:
    """Whether a kernel may compute from the input: a tensor of torch's own type, where nobody reads the code.

    torch.export, and a TorchFunctionMode that does more than to set a device, are to see torch's functions.
    """
    if type(input) not in TENSORS or torch.compiler.is_exporting():
        return False
    if not torch._C._len_torch_function_stack():
        return True
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return all(type(mode) is DeviceContext for mode in modes)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """Linear layer and activation in one kernel: y = g(x Wᵀ + b).

    The same as ``g(torch.nn.functional.linear(input, weight, bias))``, derivatives of any order, autocast and
    tracing included. What the kernels do not cover is computed in just that way, and
    ``fastmlp.why_not_fused`` tells why.

    Args:
        input: x, of shape [..., in_features].
        weight: W, of shape [out_features, in_features].
        bias: b, of shape [out_features], or None.
        activation: g: a name, or a name and its parameters (``Activation``); None for the identity.

    Returns:
        y, of shape [..., out_features], with the dtype and on the device of ``input``.

    Raises:
        RuntimeError: for a shape, dtype or device that does not fit, as ``torch.nn.functional.linear`` does.
        ValueError: for an unknown activation.

    Examples:
        >>> x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.full((4,), -5.0)
        >>> fastmlp.functional.linear(x, weight, bias, activation="relu")
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    return network(input, (weight,), (bias,), (activation,))


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer and ReLU in one kernel: y = max(x Wᵀ + b, 0). See ``linear``."""
    return linear(input, weight, bias, "relu")


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    activation: Activation = "relu",
) -> Tensor:
    """A multilayer perceptron in one op and one autograd node: h_i = g(h_{i-1} W_iᵀ + b_i), no g at the end.

    The same as ``linear`` layer by layer, which it falls back to where the kernels do not cover a layer.

    Args:
        input: h_0, of shape [..., in_features].
        weights: W_i, of shape [out_features, in_features] each, one or more.
        biases: b_i, of shape [out_features] each, as many as weights; None or none for a network without.
        activation: g between layers, as for ``linear``.

    Returns:
        The output of the last layer, of shape [..., out_features].

    Raises:
        RuntimeError: for a shape, dtype or device that does not fit.
        ValueError: for an unknown activation.

    Examples:
        >>> weights = [torch.ones(4, 3), torch.ones(2, 4)]
        >>> fastmlp.functional.mlp(torch.ones(1, 3), weights)
        tensor([[12., 12.]])
    """
    count = len(weights)
    return network(
        input, weights, biases or (None,) * count, (*(activation,) * (count - 1), None) if count else ()
    )


def network(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[Activation | None],
) -> Tensor:
    """Layers one after the other, in one op and one autograd node: h_i = g_i(h_{i-1} W_iᵀ + b_i).

    The same as ``linear`` layer by layer, which it falls back to where the kernels do not cover a layer.

    Args:
        input: h_0, of shape [..., in_features].
        weights: W_i, of shape [out_features, in_features] each, one or more.
        biases: b_i, of shape [out_features], or None, for each layer.
        activations: g_i for each layer, as for ``linear``.

    Returns:
        The output of the last layer, of shape [..., out_features].

    Raises:
        RuntimeError: for a shape, dtype or device that does not fit.
        ValueError: for an unknown activation.

    Examples:
        >>> weights = [torch.ones(4, 3), torch.ones(2, 4)]
        >>> fastmlp.functional.network(torch.ones(1, 3), weights, [None, None], ["relu", "tanh"])
        tensor([[1., 1.]])
    """
    if is_plain(input):
        if not torch.compiler.is_dynamo_compiling():
            y = _C.network(input, weights, biases, activations)
            if y is not NotImplemented:
                return y
        elif TENSORS.issuperset(map(type, weights)) and _OPTIONAL.issuperset(map(type, biases)):
            names, parameters = zip(*map(resolved, activations), strict=True)
            return cast(Tensor, _network(input, weights, biases, names, sum(parameters, ())))
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        input = torch.nn.functional.linear(input, weight, bias)
        if activation is not None:
            name, parameters = resolved(activation)
            input = COMPOSITES[name](input, *parameters)
    return input


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax cross-entropy in one pass: the loss, and beside it its gradient where autograd will ask for it.

    The same as ``torch.nn.functional.cross_entropy``, whose arguments these are, derivatives of any order,
    autocast and tracing included. The kernels cover logits [N, C] or [C] of float32 and bfloat16, on CUDA
    float16 too, with int64 class indices. Class probabilities, more dimensions and other dtypes are torch's.

    Args:
        input: the logits, of shape [N, C], [C] or [N, C, d1, ...].
        target: class indices of shape [N], [] or [N, d1, ...], or class probabilities shaped as ``input``.
        weight: of each class, of shape [C] and the dtype of ``input``, or None for ones.
        size_average: deprecated in torch, see ``reduction``.
        ignore_index: the target of rows that count for nothing.
        reduce: deprecated in torch, see ``reduction``.
        reduction: "mean", over the weights of the targets; "sum"; or "none".
        label_smoothing: how much of the target is spread evenly over all classes, from 0 to 1.

    Returns:
        The loss, in the dtype of ``input``: of shape [], or with "none" of the shape of the class indices.

    Raises:
        IndexError: for a class index out of bounds; on CUDA an assertion fails on the device instead.
        RuntimeError: for a dtype or device that does not fit, or a ``weight`` not of shape [C].
        ValueError: for a batch of another size in ``target``, or an unknown ``reduction``.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> loss = fastmlp.functional.cross_entropy(logits, torch.tensor([0, 0]))
        >>> loss.backward()
        >>> print(f"{loss:.4f}", logits.grad)
        1.1269 tensor([[-0.0596,  0.0596],
                [-0.4404,  0.4404]])
    """
    if (
        type(target) in TENSORS
        and type(weight) in _OPTIONAL
        and size_average is None
        and reduce is None
        and is_plain(input)
    ):
        loss: Tensor = _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
        return loss
    return torch.nn.functional.cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


def why_composite(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why ``linear`` would compute these with torch's own operations; None where a kernel does."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if type(tensor) not in (TENSORS if name != "bias" else _OPTIONAL):
            return f"{name} is of a tensor type of its own, {type(tensor).__name__}"
    reason: str = _why_not_fused(input, weight, bias)
    return reason or None
