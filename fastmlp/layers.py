"""What a module is to a chain, in one table; the walk over a model that fuse and TrainStep share.

A chain is callables of which each takes the last one's output: modules, and functions and methods that are
activations by themselves. Its runs of layers are one op each. What is one is decided from the parts as they
are at each call, so they may be swapped, hooked, parametrized or put into another mode at any time: they are
then called as torch would call them. A class whose forward or call has been patched is no longer the one that
is known here.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_backward_hooks as _backward_hooks
from torch.nn.modules.module import _global_backward_pre_hooks as _backward_pre_hooks
from torch.nn.modules.module import _global_forward_hooks as _hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _pre_hooks

from fastmlp import _C, functional
from fastmlp import activations as table
from fastmlp.activations import ATTRIBUTES, COMPOSITES, METHODS, MODULES, Activation, is_torchs, usual

__all__ = [
    "FUNCTIONS", "KNOWN", "ROLES", "Bound", "Fused", "Layers", "Method", "Role", "Stopped", "apply",
    "apply_sequential", "call_directly", "drops", "is_called_plainly", "is_unwatched", "parameters_of",
    "role_of", "walk",
]  # fmt: skip


class Role(NamedTuple):
    """What a module of one class does in a chain, as long as its owner's forward and call are these.

    The name is "linear", "layer" (linear and activation), "identity", "dropout" (an identity, where not in
    training), "view" (it reshapes), "sequential" (its parts do it), "chain" (as parts tells, and nothing else
    may run in between), or the activation that it is. The owner is the class, or the one that a fused class
    has been made from.
    """

    name: str
    owner: type[nn.Module]
    forward: Callable[..., Any] | None
    call: Callable[..., Any] | None
    parts: Callable[[Any], Iterable[Any]] | None = None

    @classmethod
    def of(cls, owner: type[nn.Module], name: str, parts: Any = None) -> "Role":
        """The role of a class with the methods that its source gives it, whoever has patched them already."""
        return cls(name, owner, _original(owner, "forward"), _original(nn.Module, "__call__"), parts)

    def holds(self) -> bool:
        """Whether the methods are still these."""
        return self.owner.forward is self.forward and self.owner.__call__ is self.call


def _original(cls: Any, name: str) -> Callable[..., Any] | None:
    """The class's method; None, as which none is ever found, where it is not from the file of its class."""
    method: Any = getattr(cls, name)
    owner = next(base for base in cls.__mro__ if name in vars(base))
    return method if method.__globals__ is vars(sys.modules[owner.__module__]) else None


_NAMES = {
    nn.Linear: "linear",
    nn.Sequential: "sequential",
    nn.Identity: "identity",
    nn.Dropout: "dropout",
    nn.Flatten: "view",
}
#: By class. A derived class has none.
ROLES = {owner: Role.of(owner, name) for owner, name in (MODULES | _NAMES).items()}


class Fused(NamedTuple):
    """What is known of a class that ``fastmlp.fuse`` has made, under its name ``__fastmlp__``."""

    original: type[nn.Module]
    role: Role | None
    methods: Mapping[str, Any]  # rewrite.Rewritten, by name
    functions: Mapping[Any, Any]  # those, and parents', by the function that each has been and has become

    @staticmethod
    def of(cls: Any) -> "Fused | None":
        """That of the class; None where fuse has not made it."""
        fused: Fused | None = vars(cls).get("__fastmlp__")
        return fused


def role_of(cls: Any) -> str | None:
    """The name of the role of a class, one made by ``fastmlp.fuse`` included."""
    fused = Fused.of(cls)
    role = fused.role if fused else ROLES.get(cls)
    return role and role.name


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


#: What functions of one tensor are, as roles are named. One that has been exchanged in torch is another.
FUNCTIONS = table.FUNCTIONS | {F.dropout: "dropout"}
#: The names of their further arguments, by position, which functions made in C do not tell, and by keyword.
_ARGUMENTS: dict[Any, tuple[list[str], set[str]]] = {}
for _function, _name in FUNCTIONS.items():
    _names = [*inspect.signature(_function).parameters][1:] if isinstance(_function, FunctionType) else []
    _ARGUMENTS[_function] = _names, {*_names, *ATTRIBUTES.get(_name, ())}
_FUNCTION_TYPES = frozenset({FunctionType, BuiltinFunctionType})
_NO_ARGUMENTS: dict[str, Any] = {}
_NOT_FUSED = Fused(nn.Module, None, {}, {})
_OF_TENSOR = vars(Tensor)  # a method that is there, and not in its base, is not torch's


def _seen(part: Any) -> tuple[str | None, Any]:
    """What other callables are, as roles are named, with what they are called with, or with their parts."""
    kind = type(part)
    if kind is Method and part.args:
        return "view", _NO_ARGUMENTS
    if kind is Method and part.name not in _OF_TENSOR and part.name.removesuffix("_") in METHODS:
        return part.name.removesuffix("_"), _NO_ARGUMENTS
    if kind is Bound and type(part.function) in _FUNCTION_TYPES and part.function in FUNCTIONS:
        by_position, by_keyword = _ARGUMENTS[part.function]
        given = dict(zip(by_position, part.args, strict=False)) | part.kwargs
        is_understood = len(given) == len(part.args) + len(part.kwargs) and given.keys() <= by_keyword
        if is_understood and type(given.pop("inplace", False)) is bool:
            return FUNCTIONS[part.function], given
    if kind is MethodType and (fused := Fused.of(type(part.__self__))) and part.__func__ in fused.functions:
        return "chain", fused.functions[part.__func__].parts(part.__self__)
    return None, _NO_ARGUMENTS


def _drops(own: Mapping[str, Any]) -> bool | None:
    """Whether a dropout does anything, of its attributes or arguments; None where torch may refuse them."""
    p, training = own.get("p", 0.5), own.get("training")
    return training if type(training) is bool and type(p) in (float, int) and 0 <= p <= 1 else None


def _activation(name: Any, own: Mapping[str, Any]) -> Activation | None:
    """The activation of this name, with its attributes or arguments, where it is torch's and usual."""
    if not is_torchs(name):
        return None
    return usual(name, own) if ATTRIBUTES[name] and own else name


# ---- the walk

#: Linear layers in their order: the weights, the biases, and the activations after them.
Layers = tuple[list[Tensor], list[Tensor | None], list[Activation | None]]


class Stopped(NamedTuple):
    """What a walk returns that has come to what is no layer: the input of that."""

    input: Any


def walk(chain: Iterable[Any], input: Any, layers: Layers, other: Any = None) -> Any:
    """Collects layers, which are still to be computed from the tensor that it returns.

    Where the input is unwatched. What is no layer is left to `other(part, input, layers)`, which returns the
    output; without it the walk ends there.
    """
    weights, biases, activations = layers
    for part in chain:
        kind = type(part)
        role: Any = ROLES.get(kind)
        if role is None and kind not in _FUNCTION_TYPES:
            role = kind.__dict__.get("__fastmlp__", _NOT_FUSED).role
        if role is not None:
            name, owner, forward, call, inner = role
            # Past Module.__getattr__, which costs more than a small layer: is_called_plainly, without a call.
            own = part.__dict__
            if (
                owner.forward is not forward
                or owner.__call__ is not call
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                name = None
        elif kind in _FUNCTION_TYPES:
            name, own = FUNCTIONS.get(part), _NO_ARGUMENTS
            if name in _OF_TENSOR:  # F.tanh, say, calls the method
                name = None
        else:
            name, own = _seen(part)
        if name == "linear" or name == "layer":
            parameters = own["_parameters"]
            # In replicas of nn.DataParallel, for example, weights are plain tensors, and not there.
            if "weight" in parameters and "bias" in parameters:
                weights.append(parameters["weight"])
                biases.append(parameters["bias"])
                activations.append(own["activation"] if name == "layer" else None)
                continue
        elif name in COMPOSITES:
            if weights and activations[-1] is None:
                activation = name if name in _WATCHED else _activation(name, own)
                if activation is not None:
                    activations[-1] = activation
                    continue
        elif name == "identity" or (name == "dropout" and _drops(own) is False):
            continue
        elif name == "sequential" and other is not None:
            input = walk(own["_modules"].values(), input, layers, other)
            continue
        elif name == "sequential" or name == "chain":
            parts = own["_modules"].values() if name == "sequential" else inner(part) if role else own
            output = _taken(parts, input, layers)
            if type(output) is not Stopped:
                input = output
                continue
        elif name == "view" and not weights:
            try:
                input = part(input)
            except Exception:  # which will be raised again, where it belongs
                pass
            else:
                continue
        if other is None:
            return Stopped(input)
        input = other(part, input, layers)
    return input


def _taken(parts: Iterable[Any], input: Any, layers: Layers) -> Any:
    """As `walk`, where all parts are layers: they have been found at once, so no other code may run."""
    count, last = len(layers[0]), layers[2][-1:]
    output = walk(parts, input, layers)
    if type(output) is Stopped:
        for each in layers:
            del each[count:]
        layers[2][count - len(last) :] = last
    return output


def drops(part: Any) -> bool:
    """Whether it is a dropout in training of which nothing but its forward would be called."""
    role = ROLES.get(type(part))
    is_dropout = role is not None and role.name == "dropout" and role.holds() and is_called_plainly(part)
    return is_dropout and _drops(vars(part)) is True


def apply(parts: Iterable[Any], input: Any) -> Any:
    """What the callables make of the input, one after the other; NotImplemented where it is watched."""
    if not torch.compiler.is_dynamo_compiling():
        output = _C.apply(KNOWN, parts, input)  # where all are layers
        if output is not NotImplemented:
            return output
    return _apply(parts, input)


def _apply(parts: Iterable[Any], input: Any) -> Any:
    if not is_unwatched(input):
        return NotImplemented
    layers: Layers = ([], [], [])
    input = walk(parts, input, layers, _called)
    return functional.network(input, *layers) if layers[0] else input


def _called(part: Any, input: Any, layers: Layers) -> Any:
    """Computes the layers, and calls."""
    if layers[0]:
        input = functional.network(input, *layers)
        for each in layers:
            each.clear()
    return part(input)


def apply_sequential(module: nn.Sequential, input: Any) -> Any:
    """``nn.Sequential.forward``, with its layers in as few ops as can be."""
    if not torch.compiler.is_dynamo_compiling():  # as `apply`, whose call takes a tenth of a small network's
        output = _C.apply(KNOWN, module._modules, input)
        if output is not NotImplemented:
            return output
    output = _apply(module._modules.values(), input)
    if output is NotImplemented:
        output = nn.Sequential.forward(module, input)  # type: ignore[no-untyped-call]
    return output


def parameters_of(layers: Layers) -> Iterator[Tensor]:
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


_WATCHED = frozenset({"relu", "sigmoid", "tanh"})  # activations that _TORCHS has; `is_torchs` tells of others
#: What a chain goes past, as it is.
_TORCHS = tuple(
    (module, name, getattr(module, name))
    for module, names in (
        (F, ("linear", "relu", "dropout")),
        (torch, ("relu", "relu_", "sigmoid", "tanh")),
        (torch.compiler, ("_is_exporting_flag",)),
    )
    for name in names
)
#: What nn.Module's call looks up.
_CALL = ("_call_impl", _original(nn.Module, "_call_impl")), ("_compiled_call_impl", None)
#: What csrc/torch/chain.cpp is to know.
KNOWN = (
    ROLES,
    FUNCTIONS,
    COMPOSITES,
    (_hooks, _pre_hooks, _backward_hooks, _backward_pre_hooks),
    _TORCHS,
    _seen,
    _activation,
    _drops,
    _CALL,
)

_direct: WeakSet[Any] = WeakSet()


def call_directly(*classes: Any) -> None:
    """Has Python call modules of these classes past nn.Module's call and forward, where nobody can tell.

    They are to be fastmlp's, with a role, and with no forward of the owner's. Where somebody has assigned
    ``nn.Module.__call__`` for a while, as torch.fx does, Python has undone it: this does it again for all.
    """
    _direct.update(classes)
    for cls in _direct:
        _C.call_directly(KNOWN, cls)


def is_unwatched(input: object) -> bool:
    """Whether a chain may go other ways than through torch's functions, which are what they have been."""
    if type(input) not in functional.TENSORS:
        return False
    if torch._C._len_torch_function_stack() and not functional.is_plain(input):
        return False
    if not torch.compiler.is_dynamo_compiling():
        return _C.is_untouched(KNOWN)
    return not (_hooks or _pre_hooks or _backward_hooks or _backward_pre_hooks) and all(
        getattr(module, name) is value for module, name, value in _TORCHS
    )
