"""Why kernels do not compute something: a model, a layer or a training step."""

import copy
from typing import Any

import torch
from torch import nn

from fastmlp import functional
from fastmlp.fuse import plan
from fastmlp.step import TrainStep

__all__ = ["why_not_fused"]


def why_not_fused(model: nn.Module | TrainStep, *inputs: Any) -> str | None:
    """Why parts of a model are not fused, or why a step is not one call; None where all is that can be.

    Args:
        model: a model, fused or not yet, a layer, or a ``fastmlp.TrainStep``.
        *inputs: where given, a copy of the model is called with them, and the reasons are added why its
            linear layers would compute them with torch's own operations. Of a step, its x and targets: a copy
            of the step is called with them.

    Returns:
        Of a model, a line for each such module: its name and the reason. Of a step, the reason
        why such a call is not one call of a kernel; without inputs, why the last call was not, or if there
        has been none, the first will not be.

    Raises:
        TypeError: if ``model`` is none of these.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(784, 10), torch.nn.Tanh())
        >>> fastmlp.why_not_fused(model)
        '(itself): fastmlp.fuse has not been applied'
        >>> fastmlp.why_not_fused(fastmlp.fuse(model), torch.randn(64, 784))
        >>> fastmlp.why_not_fused(model.double(), torch.randn(64, 784).double())
        '0: the CPU kernels cover float32 and bfloat16'
        >>> layer = fastmlp.Linear(784, 10)
        >>> fastmlp.why_not_fused(layer, torch.randn(64, 784))
        >>> optimizer = fastmlp.SGD(layer.parameters(), lr=0.1)
        >>> step = fastmlp.TrainStep(layer, torch.nn.MSELoss(), optimizer, accumulate=4)
        >>> fastmlp.why_not_fused(step)
        'accumulate: gradients outlive a call'
    """
    if isinstance(model, TrainStep):
        return model.reason(*inputs)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module or a fastmlp.TrainStep, got {type(model).__name__}"
        )
    changes, reasons = plan(model)
    names = {module: name for name, module in model.named_modules()}
    reasons |= {names[module]: "fastmlp.fuse has not been applied" for module in changes}
    if inputs:
        reasons = _reasons_of_inputs(model, inputs) | reasons
    lines = [f"{name or '(itself)'}: {reasons[name]}" for name in names.values() if name in reasons]
    return "\n".join(lines) or None


def _reasons_of_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Why the linear layers of the model would not be computed by kernels, by name."""
    model, reasons = copy.deepcopy(model), dict[str, str]()

    def watch(layer: nn.Linear, name: str) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (input,) = (*args, *kwargs.values())
            reason = functional.why_composite(input, layer.weight, layer.bias)
            if reason is not None:
                reasons[name] = reason

        layer.register_forward_pre_hook(before, with_kwargs=True)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            watch(module, name)
    with torch.random.fork_rng():
        model(*inputs)
    return reasons
