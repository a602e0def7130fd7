"""SGD: ``torch.optim.SGD``, with one kernel for all parameters."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from fastmlp import _C  # noqa: F401  importing it registers the ops

__all__ = ["SGD"]

# Other tensor types carry semantics of their own, which torch's operations know and ours do not.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})

_sgd = torch.ops.fastmlp.sgd_.default

# Torch's own step, without the hooks that it runs once it has been patched: SGD.step has run them.
_torch_step: Callable[..., Any] = inspect.unwrap(
    torch.optim.SGD.step, stop=lambda step: not getattr(step, "hooked", False)
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


class SGD(torch.optim.SGD):
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
    ``fused`` and ``differentiable`` ask for where they are given, a learning rate that is on a GPU or
    requires a gradient, and a step that ``torch.compile`` traces.

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
        fused: asks for torch's fused implementation, or not for it.

    Raises:
        ValueError: without parameters; for a negative learning rate, momentum or weight decay; for Nesterov
            without momentum or with dampening.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fastmlp.SGD([weight], lr=0.5, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0., 0.])
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([2., 4.])
    """

    @_hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients; with a closure, which computes them, after it and with its result."""
        if torch.compiler.is_compiling() or self.defaults["differentiable"]:
            return _torch_step(self, closure)
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
                _torch_step(self)
            finally:
                self.param_groups = groups
        return loss

    def _update(self, group: dict[str, Any]) -> bool:
        """One step of a group by the kernel; False, with nothing changed, where it does not cover it."""
        if torch.compiler.is_compiling() or group["foreach"] is not None or group["fused"] is not None:
            return False
        numbers = [_number(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")]
        if None in numbers:
            return False
        has_momentum = numbers[1] != 0
        params, grads, buffers = [], [], []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if type(param) not in _PLAIN or type(grad) not in _PLAIN:
                return False
            params.append(param)
            grads.append(grad)
            if has_momentum and (buffer := self.state[param].get("momentum_buffer")) is not None:
                if type(buffer) not in _PLAIN:
                    return False
                buffers.append(buffer)
        is_first = has_momentum and not buffers
        if is_first:
            buffers = [torch.empty_like(grad) for grad in grads]
        if has_momentum and len(buffers) < len(params):  # the first step for some
            return False
        flags = (group["nesterov"], group["maximize"], is_first)
        if params and not _sgd(params, grads, buffers, *numbers, *flags):
            return False
        if is_first:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer
        return True


def _number(value: Any) -> float | None:
    """What a hyperparameter is as a number; None where only torch can use it, or a GPU has it."""
    if isinstance(value, (float, int)):
        return value
    is_number = type(value) is Tensor and value.is_cpu and not value.requires_grad and value.numel() == 1
    return value.item() if is_number else None
