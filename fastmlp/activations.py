"""The activations: what each is in torch's own terms, as a function and as a module."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmlp import _C

__all__ = [
    "ACTIVATIONS",
    "ATTRIBUTES",
    "COMPOSITES",
    "FUNCTIONS",
    "METHODS",
    "MODULES",
    "Activation",
    "Composite",
    "Name",
    "checked",
    "is_torchs",
    "resolved",
    "usual",
]

#: The activations that the kernels know; without one, a layer is plain linear.
Name = Literal[
    "relu", "leaky_relu", "relu6", "hardtanh", "elu", "celu", "selu", "sigmoid", "tanh",
    "softplus", "silu", "gelu", "gelu_tanh", "mish", "hardswish", "hardsigmoid",
]  # fmt: skip

#: By name, with the parameters that torch has by default, or by name and parameters: ``("leaky_relu", 0.2)``.
Activation = Name | tuple[str | float, ...]


class Composite(NamedTuple):
    """The function of z and the parameters, the class of module, and the names of the parameters."""

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

#: The parameters by name, as torch's modules have them as attributes and its functions as arguments.
ATTRIBUTES = {name: row.attributes for name, row in ACTIVATIONS.items()} | {"gelu": ("approximate",)}

#: The name of each module; GELU's for both of its ways.
MODULES: dict[type[nn.Module], str] = {row.module: name for name, row in reversed(ACTIVATIONS.items())}

#: Where torch has functions that are the activation, some of which write to their input, and what they are.
_SOURCES: dict[str, list[tuple[dict[str, Any], str, Any]]] = {
    name: [
        (vars(holder), key, vars(holder)[key])
        for holder in (torch, F)
        for key in (name, name + "_")
        if key in vars(holder)
    ]
    for name in ACTIVATIONS
}

#: The activations by these functions. One that has been exchanged in torch is another function.
FUNCTIONS: dict[Any, str] = {function: name for name, sources in _SOURCES.items() for *_, function in sources}

#: Activations that tensors have as methods.
METHODS = frozenset(name for name in ACTIVATIONS if hasattr(Tensor, name))

#: Those of which torch's kernels make what the formula says; of others they differ in what they refuse.
_USUAL: dict[str, Callable[..., bool]] = {
    "leaky_relu": lambda negative_slope: negative_slope >= 0,
    "hardtanh": lambda min_val, max_val: min_val <= max_val,
    "elu": lambda alpha: alpha >= 0,
    "celu": lambda alpha: alpha > 0,
    "softplus": lambda beta, threshold: beta > 0 and threshold == threshold,
}


def is_torchs(name: str) -> bool:
    """Whether nobody has exchanged in torch what computes the activation."""
    return all(holder.get(key) is function for holder, key, function in _SOURCES[name])


def usual(name: str, values: Mapping[str, Any]) -> Activation | None:
    """The activation whose parameters are among the values, or torch's by default; None for unusual ones."""
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(values.get("approximate", "none")))  # type: ignore[return-value]
    attributes = ATTRIBUTES[name]
    if not attributes:
        return name  # type: ignore[return-value]
    numbers = [*map(values.get, attributes, _C.activations[name])]
    is_usual = all(type(number) in (int, float) for number in numbers) and _USUAL[name](*numbers)
    return (name, *numbers) if is_usual else None


def resolved(activation: Activation | None) -> tuple[str, tuple[float, ...]]:
    """The name, "identity" for none, and the parameters; ValueError for what the kernels do not know."""
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
        name = MODULES.get(type(activation))
        found = name and usual(name, vars(activation))
        if not found:
            raise ValueError(f"activation: expected a module that is a known activation, got {activation}")
        activation = found
    resolved(activation)
    return activation
