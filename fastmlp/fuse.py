"""Fused kernels for a model that is already there: its modules change class, and nothing else."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastmlp import chain, functional
from fastmlp.nn import Linear
from fastmlp.trace import Refused, Trace, is_sequential, original_class, trace

__all__ = ["fuse", "unfuse", "why_not_fused"]

Model = TypeVar("Model", bound=nn.Module)

#: How often a forward is traced anew because something that it reads has changed.
_MOST_TRACES = 8


def fuse(model: Model, inplace: bool = True) -> Model:
    """Lets a model compute Linear layers, and the ReLU, Sigmoid or Tanh after them, in fused kernels.

    Chains of such layers become one op. They are found in every nn.Sequential, and in every forward of a
    module's own that can be traced safely; what is not found stays as it is, and :func:`why_not_fused` tells
    why. Dropout counts as nothing in eval mode, as Identity does.

    Modules change their class, to one that is derived from it and prints with "Fused" before its name; an
    nn.Linear does only where no other module runs it. Parameters, ``state_dict``, hooks, modes and all else
    are untouched. What is fused is decided at each call: parts may be swapped, hooked, pruned, parametrized
    or set to other modes at any time. Under ``torch.compile`` a forward of a module's own runs as it was
    written. Call :func:`unfuse` before ``torch.jit.script``, or where a module's very type counts.

    Args:
        model: any module.
        inplace: whether to change the model itself, or a deep copy.

    Returns:
        The model.

    Raises:
        TypeError: if ``model`` is no nn.Module.

    Example:
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
    _check(model)
    if not inplace:
        model = copy.deepcopy(model)
    changes, _ = _plan(model)
    for module, traced in changes.items():
        if traced is not None:
            module.__dict__[_TRACES] = _Traces([traced])
        cls: Any = type(module)
        object.__setattr__(module, "__class__", _fused_class(cls))
    return model


def unfuse(model: Model) -> Model:
    """Undoes :func:`fuse`, in place: every module is of the class again that it was of.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: if ``model`` is no nn.Module.

    Example:
        >>> model = fastmlp.fuse(torch.nn.Sequential(torch.nn.Linear(784, 10), torch.nn.Tanh()))
        >>> type(fastmlp.unfuse(model))
        <class 'torch.nn.modules.container.Sequential'>
    """
    _check(model)
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__dict__.pop(_TRACES, None)
            object.__setattr__(module, "__class__", _unfused_class(type(module)))
    return model


def why_not_fused(model: nn.Module, *inputs: Any) -> str | None:
    """Why parts of a model are not fused, or None where all of it is that can be.

    Args:
        model: a model, fused or not yet, or a layer.
        *inputs: where given, a copy of the model is called with them, and the reasons are added why its
            linear layers would compute them with torch's own operations
            (:func:`fastmlp.functional.why_not_fused`).

    Returns:
        A line for each such module: its name and the reason.

    Raises:
        TypeError: if ``model`` is no nn.Module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(784, 10), torch.nn.Tanh())
        >>> fastmlp.why_not_fused(model)
        '(itself): fastmlp.fuse has not been applied'
        >>> fastmlp.why_not_fused(fastmlp.fuse(model), torch.randn(64, 784))
        >>> fastmlp.why_not_fused(model.double(), torch.randn(64, 784).double())
        '0: the CPU kernels cover float32 and bfloat16'
    """
    _check(model)
    changes, reasons = _plan(model)
    names = {module: name for name, module in model.named_modules()}
    reasons |= {names[module]: "fastmlp.fuse has not been applied" for module in changes}
    if inputs:
        reasons = _reasons_of_inputs(model, inputs) | reasons
    lines = [f"{name or '(itself)'}: {reasons[name]}" for name in names.values() if name in reasons]
    return "\n".join(lines) or None


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


# ---- what there is to fuse


def _plan(model: nn.Module) -> tuple[dict[nn.Module, Trace | None], dict[str, str]]:
    """The modules that are to change, with the traces of those that have one; why others are not, by name."""
    changes: dict[nn.Module, Trace | None] = {}
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
                changes[module] = None
        elif not isinstance(module, nn.ModuleList | nn.ModuleDict):
            try:
                traced = trace(module)
            except Refused as refusal:
                reasons[name] = f"its forward {refusal}"
                continue
            if traced.fuses:
                run_by_others.update(module.get_submodule(path) for path in traced.layers)
                if cls is original_class(module):
                    changes[module] = traced
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or isinstance(module, Linear):
            continue
        if type(module) not in chain.ROLES:
            reasons[name] = f"is a {type(module).__name__}, not an nn.Linear"
        elif not chain.is_called_plainly(module):
            reasons[name] = "has a forward set on it" if "forward" in module.__dict__ else "has hooks"
        elif type(module) is nn.Linear and module not in run_by_others:
            changes[module] = None
    return changes, reasons


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


def _reasons_of_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Why the linear layers of the model would not be computed by kernels, by name."""
    model, reasons = copy.deepcopy(model), dict[str, str]()

    def watch(layer: nn.Linear, name: str) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (input,) = (*args, *kwargs.values())
            reason = functional.why_not_fused(input, layer.weight, layer.bias)
            if reason is not None:
                reasons[name] = reason

        layer.register_forward_pre_hook(before, with_kwargs=True)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            watch(module, name)
    with torch.random.fork_rng():
        model(*inputs)
    return reasons


# ---- the classes


class _Traces(list[Trace]):
    """A module's traces, which its copies and pickles go without: they trace for themselves."""

    attempts = 0

    def __reduce__(self) -> tuple[type["_Traces"], tuple[()]]:
        """An empty one."""
        return _Traces, ()


_TRACES = "_fastmlp_traces"


class _Fused:
    """What the fused classes have in common."""

    _unfused: type[nn.Module]

    def __init_subclass__(cls) -> None:
        """Keeps the fused class from classes that register theirs."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the original class would be pickled, whose name can be imported, and fused again."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        make, arguments, *state = reduced
        if arguments[:1] == (type(self),):
            return _restored, (make, self._unfused, *arguments[1:]), *state
        return self._unfused if make is type(self) else make, arguments, *state


def _restored(make: Callable[..., nn.Module], cls: Any, *arguments: Any) -> nn.Module:
    return make(_fused_class(cls), *arguments)


@cache
def _fused_class(cls: Any) -> Any:
    """The class that computes the same in fused kernels."""
    if cls is nn.Linear:
        forward: Callable[..., Any] = _linear_forward
    elif issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward:
        forward = _sequential_forward
    else:
        forward = _traced_forward(cls)
    name = f"Fused{cls.__name__}"
    attributes = {
        "_unfused": cls,
        "forward": wraps(cls.forward)(forward),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__.removesuffix(cls.__name__) + name,
        "__doc__": cls.__doc__,
    }
    fused = type(cls)(name, (_Fused, cls), attributes)
    if cls is nn.Linear:
        chain.ROLES[fused] = chain.ROLES[cls]
    elif forward is _sequential_forward:
        chain.ROLES[fused] = chain.Role.of(cls, "sequential")
    return fused


def _unfused_class(cls: Any) -> Any:
    if "_unfused" in vars(cls):
        return cls._unfused
    if not issubclass(cls, _Fused):
        return cls
    # A class made of a fused one, as torch.nn.utils.parametrize makes them: the same, made of the original.
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(map(_unfused_class, cls.__bases__))
    return type(cls)(cls.__name__.replace("Fused", "", 1), bases, attributes)


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    if nn.Linear.forward is chain.ROLES[nn.Linear].forward:
        return functional.linear(input, self.weight, self.bias)
    return nn.Linear.forward(self, input)


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    if nn.Sequential.forward is chain.ROLES[nn.Sequential].forward:
        return chain.run_sequential(self, input)
    return nn.Sequential.forward(self, input)  # type: ignore[no-untyped-call]


def _traced_forward(cls: Any) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            not kwargs
            and all(map(functional.is_plain, args))
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
            and not torch.compiler.is_compiling()
        ):
            traced, arguments = _traced(self)
            if traced is not None and traced.inputs == len(args):
                return traced.function(*arguments, *args)
        return cls.forward(self, *args, **kwargs)

    return forward


def _traced(module: nn.Module) -> tuple[Trace | None, Any]:
    """The trace that is true to the module as it is, a new one if need be, and what its function takes."""
    traces = module.__dict__.get(_TRACES)
    if traces is None:
        traces = module.__dict__[_TRACES] = _Traces()
    for traced in traces:
        arguments = traced.arguments(module)
        if arguments is not None:
            return traced, arguments
    if traces.attempts < _MOST_TRACES:
        traces.attempts += 1
        with contextlib.suppress(Refused):
            traces.append(trace(module))
            arguments = traces[-1].arguments(module)
            return (None if arguments is None else traces[-1]), arguments
    return None, None
