"""The activations: what each is in torch's own terms, as a function and as a module."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmlp import _C

__all__ = ["ACTIVATIONS", "COMPOSITES", "Activation", "Composite", "Name", "checked", "resolved"]

#: The activations that the kernels know; without one, a layer is plain linear.
Name = Literal[
    "relu", "leaky_relu", "relu6", "hardtanh", "elu", "celu", "selu", "sigmoid", "tanh",
    "softplus", "silu", "gelu", "gelu_tanh", "mish", "hardswish", "hardsigmoid",
]  # fmt: skip

#: By name, with the parameters that torch has by default, or by name and parameters: ``("leaky_relu", 0.2)``.
Activation = Name | tuple[str | float, ...]


class Composite(NamedTuple):
    """The function of z and the parameters; the class of module, and which of its attributes they are."""

    function: Callable[..., Tensor]
    module: type[nn.Module]
    attributes: tuple[str, ...] = ()


#: By name.
ACTIVATIONS = {
    "relu": Composite(torch.relu, nn.ReLU),
    "leaky_relu": Composite(F.leaky_relu, nn.LeakyReLU, ("negative_slope",)),
    "relu6": Composite(F.relu6, nn.ReLU6),
    "hardtanh": Composite(F.hardtanh, nn.Hardtanh, ("min_val", "max_val")),
    "elu": Composite(F.elu, nn.ELU, ("alpha",)),
    "celu": Composite(F.celu, nn.CELU, ("alpha",)),
    "selu": Composite(F.selu, nn.SELU),
    "sigmoid": Composite(torch.sigmoid, nn.Sigmoid),
    "tanh": Composite(torch.tanh, nn.Tanh),
    "softplus": Composite(F.softplus, nn.Softplus, ("beta", "threshold")),
    "silu": Composite(F.silu, nn.SiLU),
    "gelu": Composite(F.gelu, nn.GELU),
    "gelu_tanh": Composite(partial(F.gelu, approximate="tanh"), nn.GELU),
    "mish": Composite(F.mish, nn.Mish),
    "hardswish": Composite(F.hardswish, nn.Hardswish),
    "hardsigmoid": Composite(F.hardsigmoid, nn.Hardsigmoid),
}

#: What each activation is in torch's own terms.
COMPOSITES: dict[str, Callable[..., Tensor]] = {name: row.function for name, row in ACTIVATIONS.items()}

_BY_MODULE = {row.module: name for name, row in reversed(ACTIVATIONS.items())}


def resolved(activation: Activation | None) -> tuple[str, tuple[float, ...]]:
    """The name, "identity" for none, and the parameters; ValueError where the kernels know none such."""
    name, *given = activation if isinstance(activation, tuple) else (activation or "identity",)
    defaults = _C.activations.get(name)  # type: ignore[arg-type]
    if defaults is None or len(given) not in (0, len(defaults)):
        known = ", ".join(map(repr, COMPOSITES))
        raise ValueError(f"activation: expected {known} or None, got {activation!r}")
    return str(name), tuple(map(float, given)) or defaults


def checked(activation: Activation | nn.Module | None) -> Activation | None:
    """An activation that the kernels know, for one or for a module that is one; ValueError for all else."""
    if isinstance(activation, nn.Module):
        if type(activation) is nn.Identity:
            return None
        name = _BY_MODULE.get(type(activation))
        if name is None:
            raise ValueError(f"activation: expected a module that is a known activation, got {activation}")
        if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
            name = "gelu_tanh"
        numbers = [float(getattr(activation, attribute)) for attribute in ACTIVATIONS[name].attributes]
        activation = (name, *numbers) if numbers else name  # type: ignore[assignment]
    resolved(activation)  # type: ignore[arg-type]
    return activation  # type: ignore[return-value]
