"""Drop-in modules: the parameters, initial values and ``state_dict`` of torch's own, with fused kernels."""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastmlp import activations, functional
from fastmlp.layers import ROLES, Role, apply_sequential, call_directly

__all__ = ["MLP", "CrossEntropyLoss", "Linear", "LinearReLU"]


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` followed by an activation, in one kernel: y = g(x Wᵀ + b).

    Shapes: input [..., in_features], output [..., out_features], weight [out_features, in_features],
    bias [out_features].

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether b is there.
        device: where the parameters are made.
        dtype: what the parameters are made of.
        activation: g: a name ("relu", "gelu", "elu", ...), a tuple of a name and parameters, a module of
            torch.nn, or None for the identity. See ``fastmlp.functional.Activation``.

    Raises:
        ValueError: for an unknown activation.

    Examples:
        >>> layer = fastmlp.Linear(784, 500, activation="tanh")
        >>> layer(torch.randn(64, 784)).shape
        torch.Size([64, 500])
        >>> layer
        Linear(in_features=784, out_features=500, bias=True, activation='tanh')
        >>> fastmlp.Linear(784, 500, activation=torch.nn.LeakyReLU(0.2))
        Linear(in_features=784, out_features=500, bias=True, activation=('leaky_relu', 0.2))
    """

    activation: functional.Activation | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: functional.Activation | torch.nn.Module | None = None,
    ) -> None:
        """See the class."""
        checked = activations.checked(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = checked

    def forward(self, input: Tensor) -> Tensor:
        """Y = g(x Wᵀ + b): [..., in_features] to [..., out_features]."""
        return functional.linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """What ``print`` shows: as torch.nn.Linear, and the activation if there is one."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + activation


class LinearReLU(Linear):
    """``Linear`` with ReLU: y = max(x Wᵀ + b, 0).

    Examples:
        >>> layer = fastmlp.LinearReLU(784, 500)
        >>> layer.load_state_dict(torch.nn.Linear(784, 500).state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        """See the class."""
        super().__init__(in_features, out_features, bias, device, dtype, activation="relu")


class MLP(torch.nn.Sequential):
    """A multilayer perceptron: an activation between layers, logits out.

    A ``torch.nn.Sequential`` of ``Linear``: its parts can be indexed, initialised, hooked and swapped.
    As long as they are not, the network is one op (``fastmlp.functional.mlp``); else those that were run
    by themselves.
    ``state_dict`` keys are "0.weight", "0.bias", "1.weight", ... by layer.

    Args:
        *sizes: the widths, at least two: in_features, hidden layers, out_features.
        activation: between layers, as for ``Linear``.
        bias: whether the layers have one.
        device: where the parameters are made.
        dtype: what the parameters are made of.

    Raises:
        ValueError: for fewer than two sizes, or an unknown activation.

    Examples:
        >>> fastmlp.MLP(784, 500, 10)
        MLP(
          (0): Linear(in_features=784, out_features=500, bias=True, activation='relu')
          (1): Linear(in_features=500, out_features=10, bias=True)
        )
    """

    def __init__(
        self,
        *sizes: int,
        activation: functional.Activation | torch.nn.Module | None = "relu",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """See the class."""
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected at least in_features and out_features, got {sizes}")
        last = len(sizes) - 2
        super().__init__(
            *(
                Linear(*pair, bias, device, dtype, activation=activation if i < last else None)
                for i, pair in enumerate(pairwise(sizes))
            )
        )

    def __getitem__(self, index: Any) -> Any:
        """A layer; of a slice, an nn.Sequential of the layers, which no list of sizes describes."""
        if isinstance(index, slice):
            return torch.nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, input: Tensor) -> Tensor:
        """The network's output: [..., in_features] to [..., out_features]."""
        return apply_sequential(self, input)  # type: ignore[no-any-return]


ROLES |= {
    Linear: Role.of(Linear, "layer"),
    LinearReLU: Role.of(LinearReLU, "layer"),
    MLP: Role.of(MLP, "sequential"),
}
call_directly(Linear, LinearReLU, MLP)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``, loss and gradient in one pass: ``fastmlp.functional.cross_entropy``.

    The same arguments, ``state_dict`` and results.

    Examples:
        >>> criterion = fastmlp.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(64, 10), torch.zeros(64, dtype=torch.int64))
        tensor(2.3026)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [N, C] and class indices [N], and of all else that torch's own takes."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
