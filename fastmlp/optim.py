"""The optimizers of torch.optim, and gradient clipping, with one kernel for all parameters."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from fastmlp import _C

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "AdamW",
    "clip_grad_norm_",
    "drop_gradients",
    "fuse_optimizer",
    "has_step_hooks",
    "take_step",
    "unfuse_optimizer",
]

_torchs_zero_grad = Optimizer.zero_grad
_torchs_clip_grad_norm_ = torch.nn.utils.clip_grad_norm_  # as it is now: a user may put ours in its place

# Raises where a CUDA graph is captured of what would not be safe there. Torch's releases differ in its name.
_check_capture: Any = getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or getattr(
    Optimizer, "_cuda_graph_capture_health_check", None
)

P = ParamSpec("P")
R = TypeVar("R")


def has_step_hooks(optimizer: Any) -> bool:
    """Whether anyone is to be called before or after a step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _hooked(step: Callable[P, R]) -> Callable[P, R]:
    """The step as torch wraps it, with hooks and a record for the profiler, but only where there are any.

    The record alone costs more than a small step.
    """
    observed = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        is_observed = profiler._is_profiler_enabled or has_step_hooks(args[0])
        return (observed if is_observed else step)(*args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # keeps torch from wrapping it again
    return wrapper


class Rule(NamedTuple):
    """What the kernels are to know of an optimizer: its name there, and what it keeps of each parameter."""

    name: str
    counter: str | None  # the key of a parameter's count of steps

    def options(self, group: dict[str, Any]) -> list[Any]:
        """The numbers of a group, in the kernels' order; [None] where one is none, or on a GPU."""
        return _C.options(self.name, group)

    def keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Those of a parameter's state, but for the count."""
        return _C.keys(self.name, group)

    def made(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        if self.counter is None:  # the first step writes it, and reads nothing
            return {key: torch.empty_like(parameter, requires_grad=False) for key in self.keys(group)}
        is_double = torch.get_default_dtype() == torch.float64  # as torch has it
        count = torch.zeros((), dtype=torch.float64 if is_double else torch.float32)
        zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in self.keys(group)}
        return {self.counter: count} | zeros


_SGD, _ADAM = Rule("sgd", None), Rule("adam", "step")


class _OneKernel(Optimizer):
    """What the optimizers have in common: a step of a group by one kernel, or else by torch."""

    _rule: Rule
    _torchs: type[Optimizer]
    _torch_step: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        """Looks up torch's own step, without the hooks that it runs once patched: ours has run them."""
        super().__init_subclass__()
        if "_torchs" in vars(cls):
            cls._torch_step = staticmethod(
                inspect.unwrap(cls._torchs.step, stop=lambda step: not getattr(step, "hooked", False))
            )

    @_hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients; with a closure, which computes them, after it and with its result."""
        if torch.compiler.is_compiling() or self.defaults["differentiable"]:
            return self._torch_step(self, closure)
        if self._rule.counter is not None:  # a graph would hold the count of the step that it is captured in
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if self._update(group):
                continue
            self.param_groups = [group]
            try:
                self._torch_step(self)
            finally:
                self.param_groups = groups
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, or makes them 0; with a record for the profiler only where one looks."""
        if not set_to_none or profiler._is_profiler_enabled or torch.compiler.is_compiling():
            Optimizer.zero_grad(self, set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def _update(self, group: dict[str, Any]) -> bool:
        """One step of a group by the kernel; False, with nothing changed, where it does not cover it."""
        if (
            torch.compiler.is_compiling()
            or group["foreach"] is not None
            or group["fused"] is False
            or group.get("capturable")
            or getattr(self, "found_inf", None) is not None  # of a GradScaler, which torch's kernels read
        ):
            return False
        rule = self._rule
        if rule.counter and group["fused"] and any(param.is_cuda for param in group["params"]):
            return False  # torch's fused kernel counts on the GPU
        options = rule.options(group)
        if None in options:
            return False
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        keys = rule.keys(group)
        new: dict[Tensor, dict[str, Any]] = {}
        states = []
        for param in params if keys else ():
            state = self.state.get(param)
            if not state or state.get(keys[0]) is None:
                state = new[param] = rule.made(param, group)
            states.append(state)
        if rule.counter is None and new:
            if len(new) < len(params):  # the first step for some
                return False
            options[-1] = True
        try:
            tensors = [state[key] for key in keys for state in states]
            counts = [state[rule.counter] for state in states] if rule.counter else []
        except KeyError:  # which torch will raise
            return False
        if params and not _C.optimize(rule.name, params, grads, tensors, counts, options):
            return False
        for param, state in new.items():
            self.state[param].update(state)
        return True


class SGD(_OneKernel, torch.optim.SGD):
    """``torch.optim.SGD`` with one kernel for all parameters of a group.

    The same arguments, defaults, hooks and ``state_dict``, the same numbers to within rounding: see
    ``torch.optim.SGD``. For a parameter w, whose gradient is dW (-dW to maximize):

        g = dW + weight_decay · w
        m = momentum · m + (1 - dampening) · g     (in the first step g),   then g = m or, after Nesterov,
                                                                                 g + momentum · m
        w = w - lr · g

    A group takes the kernel where its parameters and gradients are dense, overlap nowhere, and are on one
    device and of one dtype: float32 or bfloat16, on CUDA also float16. It computes in float32, and makes no
    tensor but the momentum's. All else takes torch's own path, with torch's results: what ``foreach``,
    ``fused=False`` and ``differentiable`` ask for, a learning rate that is on a GPU or requires a gradient,
    and a step that ``torch.compile`` traces.

    Args:
        params: parameters, named parameters, or dicts that define groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: factor of the momentum; 0 for none.
        dampening: what a gradient lacks when it enters the momentum.
        weight_decay: factor of w in its own gradient.
        nesterov: whether to look ahead along the momentum.
        maximize: whether to climb.
        foreach: asks for torch's implementation over lists of tensors, or not over lists.
        differentiable: whether autograd should see the step.
        fused: False asks for torch's implementation tensor by tensor.

    Raises:
        ValueError: without parameters; for a negative learning rate, momentum or weight decay; for Nesterov
            without momentum or with dampening.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fastmlp.SGD([weight], lr=0.5, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0., 0.])
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([2., 4.])
    """

    _rule, _torchs = _SGD, torch.optim.SGD


class Adam(_OneKernel, torch.optim.Adam):
    """``torch.optim.Adam`` with one kernel for all parameters of a group.

    The same arguments, defaults, hooks and ``state_dict``, the same numbers to within rounding: see
    ``torch.optim.Adam``. For a parameter w, whose gradient is dW (-dW to maximize), in its step number t:

        g = dW + weight_decay · w
        m = beta1 · m + (1 - beta1) · g       v = beta2 · v + (1 - beta2) · g²
        w = w - lr / (1 - beta1ᵗ) · m / (√(v / (1 - beta2ᵗ)) + eps)

    With ``amsgrad`` the largest v so far takes v's place in the last line. What takes the kernel, and what
    torch's own path, is as in ``SGD``; so does what ``capturable`` asks for.

    Args:
        params: parameters, named parameters, or dicts that define groups.
        lr: learning rate, a number or a tensor of one element.
        betas: beta1 and beta2, numbers or tensors of one element.
        eps: what is added to the denominator.
        weight_decay: factor of w in its own gradient.
        amsgrad: whether v may only grow in the denominator.
        foreach: asks for torch's implementation over lists of tensors, or not over lists.
        maximize: whether to climb.
        capturable: whether torch's implementation should be safe to capture in a CUDA graph.
        differentiable: whether autograd should see the step.
        fused: False asks for torch's implementation tensor by tensor.
        decoupled_weight_decay: whether the decay is AdamW's.

    Raises:
        ValueError: without parameters; for a negative learning rate, eps or weight decay; for betas that are
            not from 0 to less than 1.
        RuntimeError: for a sparse gradient.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fastmlp.Adam([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000, 1.5000])
        >>> list(optimizer.state[weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    _rule, _torchs = _ADAM, torch.optim.Adam


class AdamW(_OneKernel, torch.optim.AdamW):
    """``torch.optim.AdamW`` with one kernel for all parameters of a group.

    As ``Adam``, but for the weight decay, which is no part of the gradient: it takes
    lr · weight_decay · w from w. The same arguments and defaults as ``torch.optim.AdamW``'s.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fastmlp.AdamW([weight], lr=0.5, weight_decay=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.4500, 1.4000])
    """

    _rule, _torchs = _ADAM, torch.optim.AdamW


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with one kernel for all gradients, whose norm it bounds.

        norm = √Σ g²                               over all elements of all gradients
        g = g · min(1, max_norm / (norm + 1e-6))

    The kernel takes gradients that are dense, overlap nowhere, and are on one device and of one dtype:
    float32 or bfloat16, on CUDA also float16. It adds up in float64, where no square overflows. All else
    takes torch's own path, with torch's results: other norms, what ``foreach`` asks for, and a call that
    ``torch.compile`` traces.

    Args:
        parameters: a tensor, or an iterable of tensors, whose gradients are scaled in place.
        max_norm: the norm that the gradients are not to exceed.
        norm_type: order of the norm, a number or "inf".
        error_if_nonfinite: whether a norm that is infinite or NaN raises an error, and changes nothing.
            Otherwise it makes gradients 0 or NaN.
        foreach: asks for torch's implementation over lists of tensors, or not over lists.

    Returns:
        The norm before, of shape [], on the device of the gradients and of their dtype; 0 without gradients.

    Raises:
        RuntimeError: for a norm that is not finite, where ``error_if_nonfinite``.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> fastmlp.clip_grad_norm_([weight], max_norm=0.5)
        tensor(5.)
        >>> weight.grad
        tensor([0.3000, 0.4000])
    """
    if norm_type == 2 and foreach is None and not torch.compiler.is_compiling():
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = _C.clip_grad_norm(tensors, float(max_norm), error_if_nonfinite)
        if norm is not NotImplemented:
            return norm
        parameters = tensors or parameters  # of a generator nothing is left; it warns if there was nothing
    return _torchs_clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


_OURS: dict[type[Optimizer], type[_OneKernel]] = {cls._torchs: cls for cls in (SGD, Adam, AdamW)}


_RULES = {cls: ours._rule for torchs, ours in _OURS.items() for cls in (torchs, ours)}
#: What csrc/torch/training.cpp is to know: those, and who is called before or after any optimizer's step.
OPTIMIZERS = _RULES, (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


def drop_gradients(optimizer: Optimizer) -> None:
    """``optimizer.zero_grad()``, as quickly as by ours for every optimizer that has torch's."""
    is_torchs = type(optimizer).zero_grad is _torchs_zero_grad and "zero_grad" not in vars(optimizer)
    if is_torchs:
        _OneKernel.zero_grad(optimizer)  # type: ignore[arg-type]  # which reads what all optimizers have
    else:
        optimizer.zero_grad()


def take_step(optimizer: Optimizer) -> None:
    """One step along the gradients: by our kernel for torch's optimizers too, which stay what they are."""
    cls: Any = type(optimizer)
    is_replaced = "step" in vars(optimizer) and not getattr(optimizer.step, "_wrapped_by_lr_sched", False)
    if cls not in _OURS or is_replaced:
        optimizer.step()
        return
    optimizer.__class__ = _OURS[cls]
    try:
        _OURS[cls].step(optimizer)  # type: ignore[arg-type]  # which it is, for now
    finally:
        optimizer.__class__ = cls
    optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedulers look at


def fuse_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, one of torch's whose class has become ours; others stay as they are."""
    if type(optimizer) in _OURS:
        _set_class(optimizer, _OURS[type(optimizer)])
    return optimizer


def unfuse_optimizer(optimizer: Optimizer) -> Optimizer:
    """The inverse of ``fuse_optimizer``."""
    if type(optimizer) in _OURS.values():
        _set_class(optimizer, type(optimizer)._torchs)  # type: ignore[attr-defined]
    return optimizer


def _set_class(optimizer: Optimizer, cls: Any) -> None:
    is_wrapped = "step" in vars(optimizer)
    if is_wrapped and not getattr(optimizer.step, "_wrapped_by_lr_sched", False):
        raise ValueError("optimizer: expected no step set on it, which would go on calling torch's own")
    optimizer.__class__ = cls
    if not is_wrapped:
        return
    # A scheduler has wrapped the class's step, to see whether it is called: torch's step by now, or ours.
    del optimizer.step
    function, held = cls.step, ref(optimizer)

    @wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        own = held()
        own._opt_called = True  # type: ignore[union-attr]
        return function(own, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]
