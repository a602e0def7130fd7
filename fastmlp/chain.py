"""Chains: callables of which each takes the last one's output, and the runs of layers that are one op.

A callable is a module, or a function or method that is an activation by itself. What is one op is decided
from the modules as they are at each call, so a part may be swapped, hooked, parametrized or put into
another mode at any time: it is then called as torch would call it. A class whose forward or call has been
patched is no longer the one that is known here.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_backward_hooks as _backward_hooks
from torch.nn.modules.module import _global_backward_pre_hooks as _backward_pre_hooks
from torch.nn.modules.module import _global_forward_hooks as _hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _pre_hooks

from fastmlp import functional
from fastmlp.activations import ATTRIBUTES, COMPOSITES, MODULES, Activation, usual

__all__ = [
    "METHODS",
    "ROLES",
    "Bound",
    "Layers",
    "Method",
    "Role",
    "Stopped",
    "called",
    "dropped",
    "drops",
    "is_called_plainly",
    "is_unwatched",
    "parameters",
    "role_of",
    "run",
    "run_sequential",
    "stop",
    "walk",
]


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
        **MODULES,
        nn.Linear: "linear",
        nn.Sequential: "sequential",
        nn.Identity: "identity",
        nn.Dropout: "dropout",
    }.items()
}


def role_of(cls: Any) -> str | None:
    """The name of the role of a class, one made by ``fastmlp.fuse`` included."""
    role = ROLES.get(cls) or vars(cls).get("_role")
    return None if role is None else role.name


#: What functions of one tensor are to a chain. One that has been exchanged in torch is another function.
FUNCTIONS: dict[Any, str] = {
    getattr(holder, name + suffix): name
    for name in COMPOSITES
    for holder in (torch, F)
    for suffix in ("", "_")
    if hasattr(holder, name + suffix)
} | {F.dropout: "dropout"}
#: Their further arguments: the names by position, and by keyword. Functions made in C do not tell the former.
_ARGUMENTS: dict[Any, tuple[list[str], set[str]]] = {}
for _function, _name in FUNCTIONS.items():
    _names = [*inspect.signature(_function).parameters][1:] if isinstance(_function, FunctionType) else []
    _ARGUMENTS[_function] = _names, {*_names, *ATTRIBUTES.get(_name, ())}
#: Activations that tensors have as methods.
METHODS = frozenset(name for name in COMPOSITES if hasattr(Tensor, name))
_FUNCTION_TYPES = frozenset({FunctionType, BuiltinFunctionType})
_OF_TENSOR = vars(Tensor)
_linear, _relu, _dropout = F.linear, F.relu, F.dropout
_torchs_relu, _torchs_relu_, _sigmoid, _tanh = torch.relu, torch.relu_, torch.sigmoid, torch.tanh

#: Where torch finds what computes an activation, of those that `is_unwatched` does not look for.
_SOURCES = {
    name: [
        (vars(holder), key, vars(holder)[key])
        for holder in (torch, F)
        for key in (name, name + "_")
        if key in vars(holder)
    ]
    for name in COMPOSITES
    if name not in ("relu", "sigmoid", "tanh")
}


def _is_torchs(name: str) -> bool:
    """Whether nobody has exchanged what computes the activation, one of `_SOURCES`."""
    return all(holder.get(key) is value for holder, key, value in _SOURCES[name])


class Method(NamedTuple):
    """A method of the value that a chain has come to."""

    name: str
    args: tuple[Any, ...] = ()

    def __call__(self, value: Any) -> Any:
        """What the method makes of the value."""
        return getattr(value, self.name)(*self.args)


class Bound(NamedTuple):
    """A function, with what it is called with beside the value that a chain has come to."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, value: Any) -> Any:
        """What the function makes of the value."""
        return self.function(value, *self.args, **self.kwargs)


def _role_of_function(function: Any) -> Any:  # Activation | Literal["identity"] | None
    """The activation that a function with arguments or a method is, or "identity"."""
    kind = type(function)
    if kind is Method and not function.args:
        name = function.name.removesuffix("_")
        return name if name in METHODS and function.name not in _OF_TENSOR else None
    if kind is not Bound or type(function.function) not in _FUNCTION_TYPES:
        return None
    name = FUNCTIONS.get(function.function)
    if name is None or (name in _SOURCES and not _is_torchs(name)):
        return None
    by_position, by_keyword = _ARGUMENTS[function.function]
    given = dict(zip(by_position, function.args, strict=False)) | function.kwargs
    if len(given) < len(function.args) + len(function.kwargs) or not given.keys() <= by_keyword:
        return None
    if name == "dropout":
        p, training = given.get("p", 0.5), given.get("training")
        return "identity" if type(p) is float and 0 <= p <= 1 and training is False else None
    return usual(name, given) if type(given.pop("inplace", False)) is bool else None


#: Linear layers in their order: the weights, the biases, and the activations after them.
Layers = tuple[list[Tensor], list[Tensor | None], list[Activation | None]]

#: What to do with a callable that is no layer, with its input, and the layers that are to come before it.
Other = Callable[[Any, Any, Layers], Any]


class Stopped:
    """What an `Other` returns for the walk to end, and the walk then: what there was to call."""

    __slots__ = ("input",)

    def __init__(self, input: Any) -> None:
        """See the class."""
        self.input = input


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


def is_unwatched(input: object) -> bool:
    """Whether a chain may go other ways than through torch's functions, which are what they have been."""
    return (
        type(input) in functional.TENSORS
        and not (_hooks or _pre_hooks or _backward_hooks or _backward_pre_hooks)  # global ones
        and (not torch._C._len_torch_function_stack() or functional.is_plain(input))
        and not torch.compiler._is_exporting_flag
        and F.linear is _linear
        and F.relu is _relu
        and F.dropout is _dropout
        and torch.relu is _torchs_relu
        and torch.relu_ is _torchs_relu_
        and torch.sigmoid is _sigmoid
        and torch.tanh is _tanh
    )


def walk(modules: Iterable[Any], input: Any, layers: Layers, other: Other) -> Any:
    """Collects layers, which are still to be computed from the tensor that it returns.

    Where the input is unwatched.
    """
    weights, biases, activations = layers
    for module in modules:
        kind = type(module)
        role: Any = ROLES.get(kind)
        if role is None and kind not in _FUNCTION_TYPES:
            role = kind.__dict__.get("_role")  # of a class made by fastmlp.fuse
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
            elif name == "identity" or (name == "dropout" and not own["training"] and _is_rate(own["p"])):
                continue
            elif name == "sequential":
                parts = own["_modules"].values()
                if other is not stop:
                    input = walk(parts, input, layers, other)
                    if type(input) is Stopped:
                        return input
                    continue
                output = _taken(parts, input, layers)
                if type(output) is not Stopped:
                    input = output
                    continue
            elif name == "chain":
                output = _taken(kind._parts(module), input, layers)
                if type(output) is not Stopped:
                    input = output
                    continue
            elif (
                name != "dropout"
                and weights
                and activations[-1] is None
                and (name not in _SOURCES or _is_torchs(name))
            ):
                activation = usual(name, own) if ATTRIBUTES[name] else name
                if activation is not None:
                    activations[-1] = activation
                    continue
        else:
            if kind in _FUNCTION_TYPES:
                name = FUNCTIONS.get(module)
                if (
                    name in COMPOSITES
                    and weights
                    and activations[-1] is None
                    and name not in _OF_TENSOR
                    and (name not in _SOURCES or _is_torchs(name))
                ):
                    activations[-1] = name  # type: ignore[call-overload]  # one of COMPOSITES
                    continue
            elif kind is MethodType:
                own = type(module.__self__).__dict__.get("_wholes")  # of a class made by fastmlp.fuse
                if own is not None and module.__func__ in own:
                    output = _taken(own[module.__func__].parts(module.__self__), input, layers)
                    if type(output) is not Stopped:
                        input = output
                        continue
            elif kind is Method and module.args and not weights:
                try:
                    input = module(input)
                except Exception:  # which will be raised again, where it belongs
                    pass
                else:
                    continue
            else:
                activation = _role_of_function(module)
                if activation == "identity":
                    continue
                if activation is not None and weights and activations[-1] is None:
                    activations[-1] = activation
                    continue
        input = other(module, input, layers)
        if type(input) is Stopped:
            return input
    return input


def _taken(parts: Iterable[Any] | None, input: Any, layers: Layers) -> Any:
    """As `walk`, where all parts are layers: they have been found at once, so no other code may run."""
    if parts is None:
        return Stopped(input)
    count, last = len(layers[0]), layers[2][-1] if layers[2] else None
    output = walk(parts, input, layers, stop)
    if type(output) is Stopped:
        for each in layers:
            del each[count:]
        if count:
            layers[2][-1] = last
    return output


def stop(module: Any, input: Any, layers: Layers) -> Any:
    """Ends the walk before what is no layer."""
    return Stopped(input)


def drops(module: Any) -> bool:
    """Whether it is a dropout that is called plainly, in training: :func:`dropped` is all that it does."""
    role = ROLES.get(type(module))
    if role is None or role.name != "dropout" or not (role.holds() and is_called_plainly(module)):
        return False
    return module.__dict__["training"] is True and _is_rate(module.__dict__["p"])


def dropped(module: nn.Dropout, input: Tensor) -> Tensor:
    """What a dropout makes of its input."""
    return _dropout(input, module.p, True, module.inplace)


def _is_rate(p: object) -> bool:
    """Whether dropout accepts it."""
    return type(p) in (float, int) and 0 <= p <= 1  # type: ignore[operator]


def called(module: Any, input: Any, layers: Layers) -> Any:
    """Computes the layers, and calls."""
    if layers[0]:
        input = functional.network(input, *layers)
        for part in layers:
            part.clear()
    return module(input)


def run(modules: Iterable[Any], input: Any) -> Any:
    """What the callables make of the input, one after the other, where it is unwatched."""
    layers: Layers = ([], [], [])
    input = walk(modules, input, layers, called)
    return functional.network(input, *layers) if layers[0] else input


def run_sequential(self: nn.Sequential, input: Any) -> Any:
    """``nn.Sequential.forward``, with its layers in as few ops as can be."""
    if is_unwatched(input):
        return run(self._modules.values(), input)
    return nn.Sequential.forward(self, input)  # type: ignore[no-untyped-call]
