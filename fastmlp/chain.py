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

__all__ = ["ROLES", "Layers", "Role", "is_called_plainly", "parameters", "run", "run_sequential", "walk"]


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


#: Linear layers in their order: the weights, the biases, and the activations after them.
Layers = tuple[list[Tensor], list[Tensor | None], list[functional.Activation | None]]

#: What to do with a module that is no layer, with its input, and the layers that are to come before it.
Other = Callable[[nn.Module, Any, Layers], Any]


def parameters(layers: Layers) -> Iterator[Tensor]:
    """Layer by layer, the weight and the bias, if there is one."""
    for weight, bias in zip(layers[0], layers[1], strict=True):
        yield weight
        if bias is not None:
            yield bias


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
    weights, biases, activations = layers
    for module in modules:
        role: Any = ROLES.get(type(module))
        if role is not None:
            name, owner, forward, call = role
            # Past Module.__getattr__, which costs more than a small layer: is_called_plainly, without a call.
            own = module.__dict__
            if (
                owner.forward is not forward
                or owner.__call__ is not call
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                pass
            elif name == "linear" or name == "layer":
                parameters = own["_parameters"]
                # In replicas of nn.DataParallel, for example, weights are plain tensors, and not there.
                if "weight" in parameters and "bias" in parameters:
                    weights.append(parameters["weight"])
                    biases.append(parameters["bias"])
                    activations.append(own["activation"] if name == "layer" else None)
                    continue
            elif name == "identity" or (name == "dropout" and not own["training"]):
                continue
            elif name == "sequential":
                input = walk(own["_modules"].values(), input, layers, other)
                continue
            elif name != "dropout" and weights and activations[-1] is None:
                activations[-1] = name
                continue
        input = other(module, input, layers)
    return input


def _called(module: nn.Module, input: Any, layers: Layers) -> Any:
    if layers[0]:
        input = functional.network(input, *layers)
        for part in layers:
            part.clear()
    return module(input)


def run(modules: Iterable[nn.Module], input: Any) -> Any:
    """What the modules make of the input, one after the other, where no global hooks are to see them."""
    layers: Layers = ([], [], [])
    input = walk(modules, input, layers, _called)
    return functional.network(input, *layers) if layers[0] else input


def run_sequential(self: nn.Sequential, input: Any) -> Any:
    """``nn.Sequential.forward``, with its layers in as few ops as can be."""
    if functional.is_plain(input) and not _has_any_global_hook():  # type: ignore[no-untyped-call]
        return run(self._modules.values(), input)
    return nn.Sequential.forward(self, input)  # type: ignore[no-untyped-call]
