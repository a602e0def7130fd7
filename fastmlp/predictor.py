"""Inference by a snapshot of a model, for acting and serving."""

import copy
import sys
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastmlp import _C
from fastmlp.functional import TENSORS
from fastmlp.fuse import fuse, walk_to_the_end
from fastmlp.layers import Layers, is_unwatched, parameters_of
from fastmlp.reasons import why_not_fused

__all__ = ["Predictor"]

Array = TypeVar("Array")


class Predictor:
    """A snapshot of a model that turns an array into the model's output in the least time, on the CPU.

    For a small network Python and torch take longer than the network. A predictor looks at nothing but the
    array: no hooks, no modes, no autograd. Like an exported file it has a copy of the parameters, which later
    training does not change, until `refresh` takes another. It computes the bits of the model that
    ``fastmlp.fuse`` has fused.

    Several threads may call one predictor at once. It can be copied, pickled, and used after a fork.

    Args:
        model: a chain of linear layers and activations of float32 on the CPU, as ``fastmlp.fuse`` finds it in
            an MLP, nn.Sequential, or a module with a forward of its own. Dropout must be in eval mode. A copy
            of the model is called once; the model itself is not changed.

    Raises:
        TypeError: where ``model`` is no module.
        ValueError: where it is not such a chain, and why.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
        >>> act = fastmlp.Predictor(model)
        >>> act(torch.zeros(8)).shape
        torch.Size([4])
        >>> act(numpy.zeros((32, 8))).dtype
        dtype('float32')
        >>> act
        Predictor(8-64-4)
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Takes a new copy of the model's parameters, and of its layers where they have changed.

        Raises:
            ValueError: as at first; the old copy stays.
        """
        self.__setstate__({"model": self.model, "layers": _layers_of(self.model)})

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """What the model makes of x.

        Args:
            x: a tensor or a NumPy array, of shape [..., in_features]. Rows of adjacent float32 on the CPU are
                read where they lie. All else, float64 for one, is converted to that first.
            out: where the output goes, if given: float32 on the CPU of shape [..., out_features], without
                gaps. It may not share memory with x.

        Returns:
            out, or a new tensor or array, as x is: float32 of shape [..., out_features], without a gradient.

        Raises:
            TypeError: where x is neither a tensor nor an array.
            ValueError: for another shape of x, and for an out that is not as above; nothing is written then.
        """
        y = _C.predict(self._snapshot, x, out)
        if y is NotImplemented:
            y = _C.predict(self._snapshot, _converted(x), out)
        if y is NotImplemented:
            raise ValueError(f"x: expected a dense array of shape [..., in_features], got {x!r}")
        return y  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """The widths of its layers."""
        weights = self._layers[0]
        return f"Predictor({'-'.join(map(str, [weights[0].shape[1], *map(len, weights)]))})"

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: the model, and the parameters of the snapshot."""
        return {"model": self.model, "layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of ``__getstate__``."""
        self.model, self._layers = state["model"], state["layers"]
        self._snapshot = _C.snapshot(*self._layers)


def _layers_of(model: nn.Module) -> Layers:
    """The layers that all of the model is, of a copy, without gaps; ValueError where it is more."""
    expected = "model: expected a chain of linear layers and activations, with dropout in eval mode"
    first = next((part for part in model.modules() if isinstance(part, nn.Linear)), None)
    if first is None:
        raise ValueError(f"{expected}, got {type(model).__name__} without a torch.nn.Linear")
    x = torch.zeros(1, first.in_features)
    layers: Layers = ([], [], [])
    try:
        own = copy.deepcopy(model)
        with torch.no_grad(), torch.random.fork_rng():
            start = walk_to_the_end(own, x, layers, {}) if is_unwatched(x) else None
    except Exception as error:
        raise ValueError(f"{expected}; called with x of shape {list(x.shape)} it raises: {error}") from error
    is_x = type(start) is Tensor and start.data_ptr() == x.data_ptr() and start.shape == x.shape
    if not layers[0] or not is_x:
        reasons = why_not_fused(fuse(own)) or "something else is computed before the last of them"
        raise ValueError(f"{expected}, but {reasons}")
    for p in parameters_of(layers):
        if type(p) not in TENSORS or not p.is_cpu or p.dtype != torch.float32:
            raise ValueError(
                f"model: expected float32 on the CPU, got a parameter of {p.dtype} on {p.device}"
            )
    weights, biases, activations = layers
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        features = weights[i - 1].shape[0] if i else x.shape[1]
        if weight.dim() != 2 or weight.shape[1] != features:
            raise ValueError(f"model: expected a weight of shape [*, {features}], got {list(weight.shape)}")
        weights[i] = weight.detach().contiguous()
        if bias is not None:
            if bias.shape not in ((1,), weight.shape[:1]):
                raise ValueError(f"model: expected a bias of shape [{len(weight)}], got {list(bias.shape)}")
            biases[i] = bias.detach().expand(len(weight)).contiguous()
    return weights, biases, [*activations]


def _converted(x: Any) -> Any:
    """The same as float32 whose rows lie as the kernels read them."""
    if isinstance(x, Tensor):
        return x.detach().as_subclass(Tensor).to("cpu", torch.float32).resolve_neg().contiguous()
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(x, numpy.ndarray):
        raise TypeError(f"x: expected a tensor or a NumPy array, got {type(x).__name__}")
    return numpy.ascontiguousarray(x, numpy.float32)
