"""Chains: modules of which each takes the last one's output, and the runs of layers in them that are one op.

What is one op is decided from the modules as they are at each call, so a part may be swapped, hooked,
parametrized or put into another mode at any time: it is then called as torch would call it.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from fastmlp import functional

__all__ = ["ROLES", "is_called_plainly", "run"]

#: What a module of exactly this class does in a chain: "linear", "layer" (linear and activation),
#: "sequential" (a chain itself), "identity", "dropout" (an identity, where not in training), or the
#: activation that it is.
ROLES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Sequential: "sequential",
    nn.Identity: "identity",
    nn.Dropout: "dropout",
}


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


def run(modules: Iterable[nn.Module], input: Tensor) -> Tensor:
    """What the modules make of the input, one after the other, where no global hooks are to see them."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    activations: list[functional.Activation | None] = []
    input = _walk(modules, input, weights, biases, activations)
    return _computed(input, weights, biases, activations) if weights else input


def _walk(
    modules: Iterable[nn.Module],
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activations: list[functional.Activation | None],
) -> Tensor:
    """Collects layers, which are still to be computed from the tensor that it returns."""
    for module in modules:
        role = ROLES.get(type(module))
        # Past Module.__getattr__, which costs more than a small layer; `is_called_plainly`, without the call.
        own = module.__dict__
        if role is None or (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            pass
        elif role == "layer" or role == "linear":
            parameters = own["_parameters"]
            try:
                weight, bias = parameters["weight"], parameters["bias"]
            except KeyError:  # in replicas of nn.DataParallel, for example, whose weights are plain tensors
                pass
            else:
                weights.append(weight)
                biases.append(bias)
                activations.append(own["activation"] if role == "layer" else None)
                continue
        elif role == "identity" or (role == "dropout" and not own["training"]):
            continue
        elif role == "sequential":
            input = _walk(own["_modules"].values(), input, weights, biases, activations)
            continue
        elif role != "dropout" and weights and activations[-1] is None:
            activations[-1] = role  # type: ignore[call-overload]  # the name of an activation
            continue
        if weights:
            input = _computed(input, weights, biases, activations)
            weights.clear()
            biases.clear()
            activations.clear()
        input = module(input)
    return input


def _computed(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activations: list[functional.Activation | None],
) -> Tensor:
    """The layers' output: one op wherever the same activation stands between layers, and none at the end."""
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
