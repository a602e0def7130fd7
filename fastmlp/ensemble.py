"""Several networks of equal shapes, computed and trained in one call."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastmlp import _C
from fastmlp.graph import Slower
from fastmlp.layers import KNOWN
from fastmlp.optim import OPTIMIZERS
from fastmlp.step import KINDS, LOOP, LOSSES, NOT_KNOWN, ONE_CALL, TrainStep, checked_rows

__all__ = ["Ensemble", "EnsembleStep"]


class Ensemble(nn.Module):
    """Models side by side: twin critics, populations, sweeps, bagging.

    What the models compute is computed in one call, and spread over the threads, one network each, where they
    are chains of linear layers and activations (an MLP, an nn.Sequential, or what ``fastmlp.fuse`` makes of a
    forward), with the same activations, and are on the CPU. Hidden layers may be of other widths. All other
    models are called one after the other. Either way the numbers are those of the models, to the bit.

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
        return torch.stack([model(own) for model, (own,) in zip(self.models, self.split(x), strict=True)])

    def split(self, x: Tensor, *targets: Tensor) -> list[tuple[Tensor, ...]]:
        """What each model gets of x, and of targets, which have one for each model where x has."""
        count = len(self.models)
        if x.dim() == 2:
            return [(x, *targets)] * count
        if x.dim() != 3 or x.size(0) != count:
            raise ValueError(
                f"x: expected shape [batch, in_features], or [{count}, batch, in_features] for {count} "
                f"models, got {list(x.shape)}"
            )
        for target in targets:
            if target.dim() == 0 or target.size(0) != count:
                raise ValueError(
                    f"target: expected shape [{count}, ...], as x has one for each of {count} models, "
                    f"got {list(target.shape)}"
                )
        return [*zip(x, *targets, strict=True)]


class EnsembleStep(TrainStep):
    """What ``fastmlp.TrainStep`` is of an ``Ensemble``: a step of each of its models.

    The same, to the bit, as a TrainStep of each model. It is one call of the kernels, spread over the
    threads, where the models are such as an Ensemble computes in one call, and loss and optimizers such as a
    step in one call takes. All else is taken model by model.

    Args:
        model: the ensemble.
        loss: as of TrainStep. It is called for each model.
        optimizer: one that has the parameters of all models, or a list with one for each.
        max_grad_norm: where given, the gradients of each model are clipped to this norm; `grad_norm` has
            theirs, of shape [models].
        accumulate: as of TrainStep.
        process_group: as of TrainStep.
        strict: whether a step raises ValueError, with nothing changed, instead of going model by model.

    Raises:
        TypeError: as TrainStep.
        ValueError: as TrainStep; for another number of optimizers, or one LBFGS for several models.

    Examples:
        >>> critics = fastmlp.Ensemble([fastmlp.MLP(23, 256, 256, 1) for _ in range(2)])
        >>> optimizers = [torch.optim.Adam(critic.parameters()) for critic in critics.models]
        >>> step = fastmlp.TrainStep(critics, torch.nn.MSELoss(), optimizers)
        >>> step(torch.randn(64, 23), torch.randn(64, 1)).shape
        torch.Size([2])
        >>> step
        TrainStep(2 x MLP, MSELoss, Adam), in one call
    """

    model: Ensemble

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        process_group: Any = None,
        strict: bool = False,
    ) -> None:
        """See the class."""
        if not isinstance(model, Ensemble):
            raise TypeError(f"model: expected a fastmlp.Ensemble, got {type(model).__name__}")
        own = _one_each(optimizer, len(model.models))
        if isinstance(optimizer, torch.optim.LBFGS) and len(own) > 1:
            raise ValueError("optimizer: expected one LBFGS for each model, whose loss it asks for")
        super().__init__(
            model, loss, own[0], max_grad_norm=max_grad_norm, accumulate=accumulate, strict=strict
        )
        self.optimizer, self.process_group = optimizer, process_group
        self._steps = [
            TrainStep(
                each,
                loss,
                one,
                max_grad_norm=max_grad_norm,
                accumulate=accumulate,
                process_group=process_group,
            )
            for each, one in zip(model.models, own, strict=True)
        ]

    def __repr__(self) -> str:
        """As of TrainStep."""
        way, why = self._way or self._expected_way()
        names = repr(self._steps[0]).removeprefix("TrainStep(").rpartition("), ")[0]
        return f"TrainStep({len(self._steps)} x {names}), {way}" + (f": {why}" if why else "")

    def _expected_way(self) -> tuple[str, str | None]:
        ways = [step._expected_way() for step in self._steps]
        way, why = next((each for each in ways if each[1]), ways[0])
        return (way if way in (ONE_CALL, LOOP) else _ONE_BY_ONE), why

    def __call__(self, x: Tensor, *targets: Tensor) -> Any:
        """Takes one step of each model.

        Args:
            x: of shape [batch, in_features] for all models, or [models, batch, in_features], one for each.
            *targets: what the loss takes besides a model's output. Where x has one for each model, so have
                they, in their first dimension.

        Returns:
            The models' losses, of the parameters before the update, of shape [models], without a gradient.
            Where the loss returns a tuple, that, with this in its first place, and tuples of the models' in
            the others.

        Raises:
            IndexError: for a target that is no class, with nothing changed.
            ValueError: for another shape of x or targets; if `strict`, for a step that goes model by model.
            RuntimeError: where gradients are off.

        And what a TrainStep of a model raises, when those before it have been trained.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._untraced(x, *targets)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "TrainStep: expected gradients to be enabled, which the loss needs to be taken"
            )
        try:
            values = self._together(x, targets)
        except Slower as slower:
            why = str(slower)
        else:
            self._way = ONE_CALL, None
            return values
        if self.strict:
            raise ValueError(f"strict: expected no step that goes model by model, but {why}")
        self._way = _ONE_BY_ONE, why
        return self._one_by_one(x, targets)

    def run(
        self,
        x: Tensor,
        *targets: Tensor,
        batch_size: int,
        order: Tensor | None = None,
        rates: Any = None,
        callback: Callable[[int, Tensor], Any] | None = None,
    ) -> Tensor:
        """As of TrainStep, a call a step, and without rates. The losses are of shape [steps, models].

        Args:
            x: of shape [rows, in_features] for all models, or [models, rows, in_features], one for each.
            *targets: as of a step, of as many rows.
            batch_size: as of TrainStep.
            order: as of TrainStep, the same for all models.
            rates: None. The optimizers have their own.
            callback: as of TrainStep, called with the models' losses.
        """
        if rates is not None:
            raise ValueError("rates: expected None, as the optimizers of an ensemble have their own")
        rows = checked_rows(self.model.split(x, *targets)[0], batch_size, order)
        losses = []
        for number, begin in enumerate(range(0, rows, batch_size)):
            some = (
                slice(begin, min(begin + batch_size, rows)) if order is None else order[begin:][:batch_size]
            )
            values = self(*(t[some] if x.dim() == 2 else t[:, some] for t in (x, *targets)))
            losses.append(values[0] if isinstance(values, tuple) else values)
            if callback:
                callback(number, losses[number])
        return torch.stack(losses) if losses else torch.empty(0, len(self.model.models))

    def _together(self, x: Tensor, targets: tuple[Tensor, ...]) -> Any:
        """In one call; Slower, with nothing changed, where that cannot be."""
        known = _C.known_loss(LOSSES, self.loss) if len(targets) == 1 else None
        if known is None:
            raise Slower(NOT_KNOWN)
        if self.accumulate > 1 or self.process_group is not None:
            self._steps[0]._check_options()
        models, bound = [*self.model.models], self.max_grad_norm
        own = self.optimizer
        norms = None if bound is None else torch.empty(len(models))
        try:
            values = _C.train_ensemble(
                KNOWN,
                OPTIMIZERS,
                models,
                x,
                targets[0],
                known,
                [own] if isinstance(own, torch.optim.Optimizer) else _one_each(own, len(models)),
                norms,
                bound or 0.0,
                self._workspace,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise Slower(str(error)) from None
        if values is NotImplemented:
            raise Slower("models: they are no chains of layers alike on the CPU, or somebody looks on")
        if type(values) is str:
            raise Slower(values)
        self.grad_norm = norms
        return values

    def _one_by_one(self, x: Tensor, targets: tuple[Tensor, ...]) -> Any:
        """As TrainSteps of the models, and of the loss and the optimizers, that there are now."""
        models = self.model.models
        own = zip(self._steps, models, _one_each(self.optimizer, len(models)), strict=True)
        for step, model, optimizer in own:
            step.model, step.optimizer = model, optimizer
            step.loss, step.max_grad_norm = self.loss, self.max_grad_norm
        given = self.model.split(x, *targets)
        results = [step(*each) for step, each in zip(self._steps, given, strict=True)]
        norms = [step.grad_norm for step in self._steps if step.grad_norm is not None]
        self.grad_norm = torch.stack(norms) if norms else None
        if not isinstance(results[0], tuple):
            return torch.stack(results)
        values, *others = zip(*results, strict=True)
        return (torch.stack(values), *others)


_ONE_BY_ONE = "model by model"
KINDS[Ensemble] = EnsembleStep


def _one_each(optimizer: Any, count: int) -> list[Any]:
    """An optimizer for each of so many models, of one or a list."""
    own = [optimizer] * count if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    if not isinstance(own, (list, tuple)):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer or a list of them, got {type(own).__name__}"
        )
    if len(own) != count:
        raise ValueError(f"optimizer: expected one, or one for each of {count} models, got {len(own)}")
    return [*own]
