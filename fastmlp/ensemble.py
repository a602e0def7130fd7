"""Several networks of equal shapes, computed and trained in one call."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastmlp import _C
from fastmlp.layers import KNOWN

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Models side by side: twin critics, populations, sweeps, bagging.

    What the models compute is computed in one call, and spread over the threads, one network each, where they
    are chains of linear layers and activations (an MLP, an nn.Sequential, or what ``fastmlp.fuse`` makes of a
    forward), differ in nothing but the values of their parameters, and are on the CPU. All other models are
    called one after the other. Either way the numbers are those of the models, to the bit.

    They stay ordinary modules, in `models`, with their own parameters, hooks and ``state_dict``: each may be
    used, saved, and trained by itself at any time, or exchanged for another.

    Args:
        models: one or more modules of one input.

    Raises:
        TypeError: where one is no module.
        ValueError: where there is none.

    Examples:
        >>> critics = fastmlp.Ensemble([fastmlp.MLP(23, 256, 256, 1) for _ in range(2)])
        >>> critics(torch.randn(64, 23)).shape
        torch.Size([2, 64, 1])
        >>> critics(torch.randn(2, 64, 23)).shape
        torch.Size([2, 64, 1])
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        """See the class."""
        super().__init__()
        models = [*models]
        for index, model in enumerate(models):
            if not isinstance(model, nn.Module):
                raise TypeError(f"models[{index}]: expected a torch.nn.Module, got {type(model).__name__}")
        if not models:
            raise ValueError("models: expected one or more, got none")
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """What the models make of x.

        Args:
            x: of shape [batch, in_features] for all models, or [models, batch, in_features], one for each.

        Returns:
            Of shape [models, batch, out_features].

        Raises:
            ValueError: for another shape.
        """
        if not torch.compiler.is_dynamo_compiling():
            y = _C.ensemble(KNOWN, [*self.models], x)
            if y is not NotImplemented:
                return y
        return torch.stack([model(own) for model, own in zip(self.models, self.split(x), strict=True)])

    def split(self, x: Tensor) -> list[Tensor]:
        """What each model gets of x."""
        count = len(self.models)
        if x.dim() == 2:
            return [x] * count
        if x.dim() != 3 or x.size(0) != count:
            raise ValueError(
                f"x: expected shape [batch, in_features], or [{count}, batch, in_features] for {count} "
                f"models, got {list(x.shape)}"
            )
        return [*x.unbind()]
