"""Fused kernels for a model that is already there: its modules change class, and nothing else."""

import copy
import inspect
import threading
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from types import FunctionType, MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastmlp import _C, functional
from fastmlp.layers import (
    KNOWN,
    ROLES,
    Fused,
    Layers,
    Role,
    apply_sequential,
    call_directly,
    is_called_plainly,
    is_unwatched,
    role_of,
    walk,
)
from fastmlp.nn import Linear
from fastmlp.optim import fuse_optimizer, unfuse_optimizer
from fastmlp.rewrite import Pending, Refused, Rewritten, rewrite

__all__ = ["fuse", "plan", "unfuse", "walk_to_the_end"]

Model = TypeVar("Model", bound=nn.Module | torch.optim.Optimizer)


def fuse(model: Model, inplace: bool = True) -> Model:
    """Lets a model compute Linear layers, and the activations after them, in fused kernels.

    Chains of such layers become one op. They are found in every nn.Sequential, and in the source of every
    forward of a module's own, which runs as it is written in all else; where the source does not tell what
    runs, it is left alone, and ``fastmlp.why_not_fused`` tells why. Dropout counts as nothing in eval
    mode, as Identity does.

    Modules change their class, to one that is derived from it and prints with "Fused" before its name;
    ``module.__class__`` is what it was. An nn.Linear changes only where no other module runs it. Parameters,
    ``state_dict``, hooks, modes and all else are untouched. What is fused is decided at each call: parts may
    be swapped, hooked, pruned, parametrized or set to other modes at any time. Under ``torch.compile`` a
    forward of a module's own runs as it was written. Call ``unfuse`` before ``torch.jit.script``, or
    where a module's very type counts.

    An optimizer of torch.optim becomes that of the same name of fastmlp, where there is one: SGD, Adam,
    AdamW. Its groups, its state, and the schedulers that hold it, are untouched.

    Args:
        model: any module, or an optimizer.
        inplace: whether to change the model itself, or a deep copy. An optimizer changes itself.

    Returns:
        The model, or the optimizer.

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: for an optimizer whose ``step`` has been replaced by another than a scheduler's.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(784, 500), torch.nn.ReLU(), torch.nn.Linear(500, 10))
        >>> fastmlp.fuse(model)
        FusedSequential(
          (0): Linear(in_features=784, out_features=500, bias=True)
          (1): ReLU()
          (2): Linear(in_features=500, out_features=10, bias=True)
        )
        >>> model(torch.randn(64, 784)).shape
        torch.Size([64, 10])
    """
    if isinstance(model, torch.optim.Optimizer):
        fuse_optimizer(model)
        return model
    _check(model)
    call_directly()
    if not inplace:
        model = copy.deepcopy(model)
    changes, _ = plan(model)
    for module, fused in changes.items():
        _set_class(module, fused)
    return model


def unfuse(model: Model) -> Model:
    """Undoes ``fuse``, in place: every module, or the optimizer, is of the class again that it was of.

    Args:
        model: any module, or an optimizer.

    Returns:
        The model, or the optimizer.

    Raises:
        TypeError: if ``model`` is neither.

    Examples:
        >>> model = fastmlp.fuse(torch.nn.Sequential(torch.nn.Linear(784, 10), torch.nn.Tanh()))
        >>> type(fastmlp.unfuse(model))
        <class 'torch.nn.modules.container.Sequential'>
    """
    if isinstance(model, torch.optim.Optimizer):
        unfuse_optimizer(model)
        return model
    _check(model)
    for module in model.modules():
        if isinstance(module, _OfFused):
            _set_class(module, _unfused_class(type(module)))
    return model


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


# ---- what there is to fuse


def plan(model: nn.Module) -> tuple[dict[nn.Module, Any], dict[str, str]]:
    """The modules that are to change, and their new classes; why others are not, by name."""
    changes: dict[nn.Module, Any] = {}
    reasons: dict[str, str] = {}
    run_by_others: set[nn.Module] = set()
    modules = dict(_modules(model, "", set()))
    for name, module in modules.items():
        cls = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            reasons[name] = "is a ScriptModule"
        elif isinstance(module, nn.Linear) or not _has_layers(module):
            continue
        elif "forward" in module.__dict__:
            reasons[name] = "has a forward set on it"
        elif is_sequential(module):
            run_by_others.update(module.children())
            if cls.forward is nn.Sequential.forward:
                changes[module] = _fused_class(cls)
        elif cls.forward is not nn.Sequential.forward and not isinstance(
            module, nn.ModuleList | nn.ModuleDict
        ):
            try:
                fused = _fused_class(original_class(module))
            except Refused as refusal:
                reasons[name] = f"its forward {refusal}"
                continue
            layers, is_worth_it = _layers(module, fused.__fastmlp__.functions.values())
            if is_worth_it:
                run_by_others |= layers
                if cls is original_class(module):
                    changes[module] = fused
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or isinstance(module, Linear):
            continue
        if role_of(type(module)) is None:
            reasons[name] = f"is a {type(module).__name__}, not an nn.Linear"
        elif not is_called_plainly(module):
            reasons[name] = "has a forward set on it" if "forward" in module.__dict__ else "has hooks"
        elif type(module) is nn.Linear and module not in run_by_others:
            changes[module] = _fused_class(nn.Linear)
    return changes, reasons


def _layers(module: nn.Module, functions: Iterable[Rewritten]) -> tuple[set[nn.Module], bool]:
    """The linear layers in the runs of its functions, and whether more is one op than they by themselves."""
    layers: set[nn.Module] = set()
    is_worth_it = False
    for rewritten in functions:
        for plan in rewritten.plans:
            called = [each for calls in rewritten.callables(plan, module) for each in calls]
            parts = [each for each in called if isinstance(each, nn.Module)]
            own = {part for part in parts if role_of(type(part)) in ("linear", "layer")}
            layers |= own
            is_worth_it |= bool(own) or (
                len(called) > 1 and any(isinstance(m, nn.Linear) for part in parts for m in part.modules())
            )
    return layers, is_worth_it


def _modules(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """As nn.Module.named_modules, without the parts of a ScriptModule."""
    if module in seen:
        return
    seen.add(module)
    yield name, module
    if not isinstance(module, torch.jit.ScriptModule):
        for key, child in module.named_children():
            yield from _modules(child, f"{name}.{key}" if name else key, seen)


def _has_layers(module: nn.Module) -> bool:
    """Whether layers are among its children, or in lists, dictionaries or Sequentials among them."""
    return any(
        isinstance(child, nn.Linear)
        or ((isinstance(child, nn.ModuleList | nn.ModuleDict) or is_sequential(child)) and _has_layers(child))
        for child in module.children()
    )


# ---- the classes


class _Meta(type):
    """Writes to a fused class go to the original: `type(self).calls += 1` counts for all its modules."""

    def __setattr__(cls, name: str, value: object) -> None:
        if fused := Fused.of(cls):
            setattr(fused.original, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if fused := Fused.of(cls):
            delattr(fused.original, name)
        else:
            super().__delattr__(name)


_class: Any = vars(object)["__class__"]


def _set_class(module: nn.Module, cls: Any) -> None:
    _class.__set__(module, cls)


class _OfFused:
    """What the fused classes have in common."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the fused class from classes that register theirs."""
        if not Fused.of(cls):
            super().__init_subclass__(**kwargs)

    @property
    def __class__(self) -> Any:
        """The original: what `super(self.__class__, self)` means, and what others derive classes from."""
        return original_class(self)

    @__class__.setter
    def __class__(self, cls: Any) -> None:
        _set_class(self, cls)  # type: ignore[arg-type]

    def _get_name(self) -> str:
        name: str = super()._get_name()  # type: ignore[misc]
        return f"Fused{name}" if Fused.of(type(self)) else name

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the original class would be pickled, whose name can be imported, and fused again."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        make, arguments, *state = reduced
        cls = original_class(self)
        if arguments[:1] == (type(self),) != (cls,):
            return _restored, (make, cls, *arguments[1:]), *state
        return cls if make is type(self) else make, arguments, *state


def _restored(make: Callable[..., nn.Module], cls: Any, *arguments: Any) -> nn.Module:
    try:
        return make(_fused_class(cls), *arguments)
    except Refused:  # another source than where it was pickled
        return make(cls, *arguments)


class _Rewritten:
    """A method of the original class, rewritten, as long as it is still the one that it was."""

    def __init__(self, cls: Any, name: str, rewritten: Rewritten) -> None:
        self.cls, self.name, self.rewritten = cls, name, rewritten
        self.original, self.code, self.function, *_ = rewritten
        self.fused: Any = None

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return getattr(self.cls, self.name)
        if not torch.compiler.is_dynamo_compiling() and getattr(self.cls, self.name) is self.original:
            if _C.is_unchanged(self.original, self.code, self.function):
                return MethodType(self.function, module)
            if self.rewritten.is_current():
                return MethodType(self.rewritten.as_original(), module)
        return getattr(super(self.fused, module), self.name)


_lock = threading.RLock()
_classes: WeakKeyDictionary[Any, Callable[[], Any]] = WeakKeyDictionary()


def _fused_class(cls: Any) -> Any:
    """The class that computes the same in fused kernels.

    Raises:
        Refused: where its forward is left as it is.
    """
    with _lock:
        known = _classes.get(cls)
        fused = known and known()
        if fused is None or not all(
            each.holds(cls, name) for name, each in fused.__fastmlp__.methods.items()
        ):
            fused = _make_class(cls)
            _classes[cls] = ref(fused)
        return fused


def _make_class(cls: Any) -> Any:
    methods: dict[str, Rewritten] = {}
    functions: dict[Any, Rewritten] = {}
    attributes: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    role: Role | None = None
    if cls is nn.Linear:
        role = ROLES[cls]
        attributes["forward"] = wraps(cls.forward)(_linear_forward)
    elif _is_sequential(cls):
        role = Role.of(cls, "sequential")
        attributes["forward"] = wraps(cls.forward)(_sequential_forward)
    else:
        methods, functions = _functions(cls)
        attributes |= {name: _Rewritten(cls, name, each) for name, each in methods.items()}
        if methods["forward"].is_whole:
            role = Role.of(cls, "chain", methods["forward"].parts)
    attributes["__fastmlp__"] = Fused(cls, role, methods, functions)
    base: Any = type(cls)
    meta: Any = type(base.__name__, (_Meta, base) if base is not type else (_Meta,), {})
    # Past the class's own metaclass, which may keep a list of the classes that it makes.
    make: Any = ABCMeta.__new__ if issubclass(meta, ABCMeta) else type.__new__
    fused = make(meta, cls.__name__, (_OfFused, cls), attributes)
    for method in attributes.values():
        if isinstance(method, _Rewritten):
            method.fused = fused
    if not methods:
        call_directly(fused)
    return fused


def _functions(cls: Any) -> tuple[dict[str, Rewritten], dict[Any, Rewritten]]:
    """The class's forward rewritten, and what methods forward may call, where they can be; so of parents."""
    functions = {"forward": rewrite(inspect.getattr_static(cls, "forward"))}
    if functions["forward"].code.co_name != "forward" and functions["forward"].within is None:
        raise Refused(f"is another function, {functions['forward'].code.co_name}: it may be decorated")
    inherited: dict[Any, Rewritten] = {}
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    names = ["forward", *functions["forward"].names()]
    for name in names:
        found = [vars(base)[name] for base in bases if name in vars(base)]
        for method in found if "super" in names else found[:1]:
            if type(method) is not FunctionType or method in inherited:
                continue
            try:
                rewritten = functions[name] if name in functions and method is found[0] else rewrite(method)
            except Refused:
                continue
            inherited[method] = rewritten
            names += [each for each in rewritten.names() if each not in names]
            if rewritten.plans and method is found[0]:
                functions[name] = rewritten
    return functions, {key: each for each in inherited.values() for key in (each.original, each.function)}


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    if nn.Linear.forward is ROLES[nn.Linear].forward and is_unwatched(input):
        return functional.linear(input, self.weight, self.bias)
    return nn.Linear.forward(self, input)


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    if nn.Sequential.forward is ROLES[nn.Sequential].forward:
        return apply_sequential(self, input)
    return nn.Sequential.forward(self, input)  # type: ignore[no-untyped-call]


def rewritten_forward(module: nn.Module, known: dict[Any, Rewritten]) -> Rewritten:
    """The module's forward, rewritten, of those known or else to be known.

    Raises:
        Refused: where it is left as it is.
    """
    cls = original_class(module)
    if cls not in known or not known[cls].holds(cls, "forward"):
        known[cls] = _fused_class(cls).__fastmlp__.methods["forward"]
    return known[cls]


def walk_to_the_end(model: Any, x: Any, layers: Layers, known: dict[Any, Rewritten]) -> Any:
    """Collects the layers that the model ends by, where x is unwatched, and calls all before them.

    Args:
        model: the model.
        x: its input.
        layers: where they go.
        known: forwards that are rewritten already, and those that will be.

    Returns:
        What comes to the layers; where the model ends by none, its output.
    """

    def other(module: Any, x: Any, layers: Layers) -> Any:
        if is_sequential(module) and is_called_plainly(module):
            return walk(module._modules.values(), x, layers, other)
        if layers[0]:
            x = functional.network(x, *layers)
            for each in layers:
                each.clear()
        if not isinstance(module, nn.Module) or not module._modules or type(module) in ROLES:
            return module(x)
        if not is_called_plainly(module) or type(module).__call__ is not nn.Module.__call__:
            return module(x)
        try:
            rewritten = rewritten_forward(module, known)
        except Refused:
            return module(x)
        if rewritten.ending is None or rewritten.later is None:
            return module(x)
        output = rewritten.as_original(later=True)(module, x)
        if type(output) is not Pending:
            return output
        return walk(output.callables, output.input, layers, other)

    found = _C.find_layers(KNOWN, (model,), x, layers)
    return walk((model,), x, layers, other) if found is NotImplemented else found


def original_class(module: Any) -> Any:
    """The module's class before ``fuse``."""
    fused = Fused.of(type(module))
    return fused.original if fused else type(module)


def is_sequential(module: nn.Module) -> bool:
    """Whether the module runs its children one after the other, as nn.Sequential does."""
    return isinstance(module, nn.Sequential) and _is_sequential(original_class(module))


def _is_sequential(cls: Any) -> bool:
    return (
        issubclass(cls, nn.Sequential)
        and cls.__iter__ is nn.Sequential.__iter__
        and cls.__call__ is nn.Module.__call__
        and any(role_of(base) == "sequential" and cls.forward is base.forward for base in cls.__mro__)
    )


def _unfused_class(cls: Any) -> Any:
    if fused := Fused.of(cls):
        return fused.original
    if not issubclass(cls, _OfFused):
        return cls
    # A class made of a fused one: the same, made of the original.
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_unfused_class, cls.__bases__)), attributes)
