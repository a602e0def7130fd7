"""Chains: modules of which each takes the last one's output, and the runs of layers in them that are one op.

What is one op is decided from the modules as they are at each call, so a part may be swapped, hooked,
parametrized or put into another mode at any time: it is then called as torch would call it. A class whose
forward or call has been patched is no longer the one that is known here.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastmlp import functional

__all__ = ["ROLES", "Layers", "Role", "is_called_plainly", "output", "run", "run_sequential", "walk"]


class Role(NamedTuple):
    """What a module of one class does in a chain, as long as its owner's forward and call are these.

    The name is "linear", "layer" (linear and activation), "sequential" (a chain itself), "identity",
    "dropout" (an identity, where not in training), or the activation that it is. The owner is the class, or
    the one that a fused class has been made from.
    """

    name: str
    owner: type[nn.Module]
    forward: Callable[..., Any] | None
    call: Callable[..., Any] | None

    @classmethod
    def of(cls, owner: type[nn.Module], name: str) -> "Role":
        """The role of a class with the methods that its source gives it, whoever has patched them already."""
        return cls(name, owner, _original(owner, "forward"), _original(nn.Module, "__call__"))

    def holds(self) -> bool:
        """Whether the methods are still these."""
        return self.owner.forward is self.forward and self.owner.__call__ is self.call


def _original(cls: Any, name: str) -> Callable[..., Any] | None:
    """The class's method; None, as which none is ever found, where it is not from the file of its class."""
    method: Any = getattr(cls, name)
    owner = next(base for base in cls.__mro__ if name in vars(base))
    return method if method.__globals__ is vars(sys.modules[owner.__module__]) else None


#: By class. A derived class has none.
ROLES: dict[type[nn.Module], Role] = {
    owner: Role.of(owner, name)
    for owner, name in {
        nn.Linear: "linear",
        nn.ReLU: "relu",
        nn.Sigmoid: "sigmoid",
        nn.Tanh: "tanh",
        nn.Sequential: "sequential",
        nn.Identity: "identity",
        nn.Dropout: "dropout",
    }.items()
}


class Layers(NamedTuple):
    """Linear layers in their order, each with the activation after it."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: list[functional.Activation | None]

    def clear(self) -> None:
        """Takes all of them out."""
        for part in self:
            part.clear()

    def parameters(self) -> Iterator[Tensor]:
        """Layer by layer, the weight and the bias, if there is one."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            yield weight
            if bias is not None:
                yield bias

    def replaced(self, other: Callable[[Tensor], Tensor]) -> "Layers":
        """The same layers, of other parameters."""
        biases = [None if bias is None else other(bias) for bias in self.biases]
        return Layers(list(map(other, self.weights)), biases, self.activations)


#: What to do with a module that is no layer, with its input, and the layers that are to come before it.
Other = Callable[[nn.Module, Any, Layers], Any]


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: no hooks, and no forward of its own."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def walk(modules: Iterable[nn.Module], input: Any, layers: Layers, other: Other) -> Any:
    """Collects layers, which are still to be computed from the tensor that it returns.

    Where no global hooks are to see the modules.
    """
    for module in modules:
        role: Any = ROLES.get(type(module))
        if role is not None and role.owner.forward is role.forward and role.owner.__call__ is role.call:
            # Past Module.__getattr__, which costs more than a small layer: is_called_plainly, without a call.
            own, name = module.__dict__, role.name
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                pass
            elif name == "layer" or name == "linear":
                parameters = own["_parameters"]
                # In replicas of nn.DataParallel, for example, weights are plain tensors, and not there.
                if "weight" in parameters and "bias" in parameters:
                    layers.weights.append(parameters["weight"])
                    layers.biases.append(parameters["bias"])
                    layers.activations.append(own["activation"] if name == "layer" else None)
                    continue
            elif name == "identity" or (name == "dropout" and not own["training"]):
                continue
            elif name == "sequential":
                input = walk(own["_modules"].values(), input, layers, other)
                continue
            elif name != "dropout" and layers.weights and layers.activations[-1] is None:
                layers.activations[-1] = name  # the name of an activation
                continue
        input = other(module, input, layers)
    return input


def _called(module: nn.Module, input: Any, layers: Layers) -> Any:
    if layers.weights:
        input = output(input, layers)
        layers.clear()
    return module(input)


def run(modules: Iterable[nn.Module], input: Any) -> Any:
    """What the modules make of the input, one after the other, where no global hooks are to see them."""
    layers = Layers([], [], [])
    input = walk(modules, input, layers, _called)
    return output(input, layers) if layers.weights else input


def run_sequential(self: nn.Sequential, input: Any) -> Any:
    """``nn.Sequential.forward``, with its layers in as few ops as can be."""
    if functional.is_plain(input) and not _has_any_global_hook():  # type: ignore[no-untyped-call]
        return run(self._modules.values(), input)
    return nn.Sequential.forward(self, input)  # type: ignore[no-untyped-call]


def output(x: Tensor, layers: Layers) -> Tensor:
    """The layers' output: one op wherever the same activation stands between layers, and none at the end."""
    weights, biases, activations = layers
    begin, last = 0, len(weights) - 1
    while begin < last:
        activation, has_bias = activations[begin], biases[begin] is not None
        end = begin
        if activation is not None:
            while end < last and activations[end] == activation and (biases[end + 1] is not None) == has_bias:
                end += 1
        if activation is not None and activations[end] is None:
            end += 1
            x = functional.mlp(
                x,
                weights[begin:end],
                biases[begin:end] if has_bias else None,  # type: ignore[arg-type]  # none of them is None
                activation,
            )
            begin = end
        else:
            x = functional.linear(x, weights[begin], biases[begin], activation)
            begin += 1
    return functional.linear(x, weights[last], biases[last], activations[last]) if begin == last else x
