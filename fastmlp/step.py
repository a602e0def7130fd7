"""The whole training step, forward, loss, backward and the optimizer's update, in one call."""

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.module import _has_any_global_hook

from . import _C, functional
from .activations import resolved
from .fuse import is_sequential, rewritten_forward
from .graph import Graphs
from .layers import ROLES, Layers, Method, Role, is_called_plainly, parameters_of, walk
from .nn import CrossEntropyLoss
from .optim import has_step_hooks, rule_of
from .rewrite import Pending, Refused, Rewritten

__all__ = ["TrainStep"]

_train_step = torch.ops.fastmlp.train_step_

_LOSSES = {
    owner: Role.of(owner, name)
    for owner, name in {
        nn.CrossEntropyLoss: "cross_entropy",
        CrossEntropyLoss: "cross_entropy",
        nn.MSELoss: "mse",
        nn.BCEWithLogitsLoss: "bce_with_logits",
    }.items()
}
_CAPTURED = {"cuda"}  # the devices whose steps become graphs, with SGD


class _Unknown(Exception):
    """Why a step is none that is known, and the error for that."""

    def __init__(self, reason: str, error: type[Exception] = TypeError) -> None:
        super().__init__(reason)
        self.error = error(reason)


class TrainStep:
    """Forward, loss, backward and the optimizer's update in one call, which trains as the standard loop does.

    The same as

        value = loss(model(x), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    to within rounding, and the same to the bit from run to run and for every number of threads. On the CPU
    it is one kernel that changes each weight while its gradient is in cache: no gradient outlives its layer
    (or, where many rows meet few weights, the call), and `.grad` stays as it is. The memory that a step works
    in is kept for the next. Its state is in `optimizer.state` under torch's own keys, options are read at
    each call: checkpoints and learning-rate schedulers work as ever.

    With `max_grad_norm`, `accumulate` or `process_group`, and on a GPU, gradients do exist, in `.grad`: the
    step is then the standard loop itself, with fused layers. A step prints which it is, and
    :func:`fastmlp.why_not_fused` tells why.

    On a GPU, without these, the loop with SGD becomes a CUDA graph once a batch of the same shape comes
    again, with parameters and momentum in the same place and the same options; the learning rate may change
    at every call. The graph keeps the memory of a step, and its next replay overwrites the gradients. The
    step stays the loop under autocast, while the caller captures a graph, and where optimizer, loss or a
    parameter has hooks.

    Args:
        model: an nn.Sequential of Linear layers and activations (fastmlp.MLP is one), float32;
            nested ones, nn.Identity, and nn.Flatten() at the beginning are understood. So is a module whose
            forward ends by returning such a chain; what it does before, without parameters, it does itself at
            every call.
        loss: nn.CrossEntropyLoss, with classes as targets, nn.MSELoss, or nn.BCEWithLogitsLoss, whose weight
            and pos_weight are the same for the whole batch; mean or sum.
        optimizer: SGD, Adam or AdamW, of torch.optim or of fastmlp. Parameters that it does not know stay as
            they are.
        max_grad_norm: where given, gradients are clipped as by torch.nn.utils.clip_grad_norm_.
        accumulate: parameters change once in so many calls, by the mean of their gradients.
        process_group: where given (torch.distributed.group.WORLD for all processes), parameters are made
            those of the group's first process, and each step takes the mean of all processes' gradients, as
            under DistributedDataParallel.

    Raises:
        TypeError: for a model, loss or optimizer that a step does not know, naming what does not fit.
        ValueError: for options that it does not know.

    Example:
        >>> model, loss = fastmlp.MLP(784, 500, 10), torch.nn.CrossEntropyLoss()
        >>> step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.01))
        >>> value = step(torch.randn(64, 784), torch.randint(10, (64,)))
        >>> value.shape, value.requires_grad
        (torch.Size([]), False)
        >>> step
        TrainStep(MLP, CrossEntropyLoss, SGD), in one call
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        process_group: Any = None,
    ) -> None:
        """See the class."""
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.max_grad_norm, self.accumulate, self.process_group = max_grad_norm, accumulate, process_group
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected a number of calls from 1 on, got {accumulate}")
        self._calls = 0
        self._forget()
        try:
            layers, _ = self._look(None)
            self._check(layers)
        except _Unknown as unknown:
            raise unknown.error from None
        if process_group is not None:
            first = torch.distributed.get_global_rank(process_group, 0)
            for parameter in parameters_of(layers):
                torch.distributed.broadcast(parameter.detach(), first, group=process_group)

    def _forget(self) -> None:
        """Drops what is kept for the next call alone."""
        self._rewritten: dict[Any, Rewritten] = {}
        self._graphs: Graphs | None = None
        self._workspace = torch.empty(0, dtype=torch.uint8)  # as large as the largest batch has needed

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: not what is kept for the next call alone."""
        names = ("_rewritten", "_graphs", "_workspace")
        return {name: value for name, value in self.__dict__.items() if name not in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of ``__getstate__``."""
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        """What it is a step of, and how it is taken."""
        names = ", ".join(type(each).__name__ for each in (self.model, self.loss, self.optimizer))
        reason = self.reason()
        how = "in one call" if reason is None else f"in the standard loop: {reason}"
        return f"TrainStep({names}), {how}"

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Takes one step.

        Args:
            x: input of shape [batch, in_features] (for MSE and BCE [..., in_features]), float32. The batch
                may change from call to call. No gradient is computed for it.
            target: classes, int64 of shape [batch], for cross-entropy; else float32, of the output's shape.

        Returns:
            The loss of the parameters before the update, a float32 scalar without a gradient.

        Raises:
            RuntimeError: for a shape, dtype or device that does not fit; where gradients are off, or no
                parameter requires one, as the standard loop; where one may not be written.
            IndexError: for a target that is no class.
            TypeError or ValueError: where model, loss or optimizer have become what a step does not know.

        Nothing has been changed where an error is raised.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._untraced(x, target)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "TrainStep: expected gradients to be enabled, which the loss needs to be taken"
            )
        if self._why_watched(x) is not None:  # the modules themselves are to be seen
            return self._standard_step(x, target, None)
        try:
            layers, x = self._look(x)
            device = layers[0][0].device
            has_gradients = self._why_gradients(device) is not None
            if not has_gradients and device.type not in _CAPTURED:
                return self._fused_step(x, target, layers)
        except _Unknown as unknown:
            raise unknown.error from None
        if not has_gradients and isinstance(self.optimizer, torch.optim.SGD):
            if self._graphs is None or self._graphs.device != device:
                self._graphs = Graphs(self.optimizer, device)
            if is_called_plainly(self.loss):
                value = self._graphs.step(x, target, layers, self._loss_of, self._constants(layers))
                if value is not None:
                    self.optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedulers look at
                    return value
        return self._standard_step(x, target, layers)

    def reason(self, *batch: Tensor) -> str | None:
        """Why a call would not be one call of a kernel; None where it would. See fastmlp.why_not_fused.

        Args:
            *batch: x and target, which a copy of the step is called with, or nothing.
        """
        try:
            layers, _ = self._look(None)
            device = layers[0][0].device
            reason = self._why_watched(*batch[:1]) or self._why_gradients(device)
            if reason is not None:
                return reason
            if device.type in _CAPTURED:
                return f"on {device.type} a step is the standard loop, with SGD as a CUDA graph"
            self._check(layers)
            self._arguments(layers)
        except _Unknown as unknown:
            return str(unknown)
        if batch:
            try:
                with torch.random.fork_rng():
                    copy.deepcopy(self)(*batch)
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                return str(error)
        return None

    def _why_watched(self, x: Tensor | None = None) -> str | None:
        """Why the step is the standard loop, of the modules as they are."""
        if _has_any_global_hook():  # type: ignore[no-untyped-call]  # of profilers, say
            return "there are hooks for all modules"
        if x is None or functional.is_plain(x):
            return None
        if type(x) in functional.TENSORS:
            return "torch's functions are to be seen by torch.export, or by a TorchFunctionMode"
        return f"x is of a tensor type of its own, {type(x).__name__}"

    def _why_gradients(self, device: torch.device) -> str | None:
        """Why the step is the standard loop, with fused layers."""
        if self.max_grad_norm is not None:
            return "max_grad_norm is given, which needs all gradients at once"
        if self.accumulate > 1:
            return "accumulate is given, so gradients outlive a call"
        if self.process_group is not None:
            return "process_group is given, whose processes share gradients"
        if torch.is_autocast_enabled(device.type):
            return f"autocast is enabled on {device.type}"
        return None

    @_disable_dynamo
    def _untraced(self, x: Tensor, target: Tensor) -> Tensor:
        # torch.compile has nothing to gain here, and cannot follow all that a step does to an optimizer.
        return self(x, target)

    def _look(self, x: Tensor | None) -> tuple[Layers, Any]:
        """The layers of the model as it is, and what comes to the first of them, where x is given.

        Raises:
            _Unknown: where a step would not do what the standard loop does.
        """
        optimizer, loss = self.optimizer, self.loss
        if rule_of(optimizer) is None:
            raise _Unknown(
                "optimizer: expected SGD, Adam or AdamW, of torch.optim or fastmlp, got "
                f"{type(optimizer).__name__}; others train in the standard loop"
            )
        known = _LOSSES.get(type(loss))
        if known is None or not known.holds():
            names = ", ".join(f"nn.{kind.__name__}" for kind in _LOSSES if kind is not CrossEntropyLoss)
            other = "" if known is None else " with other methods"
            raise _Unknown(f"loss: expected {names}, got {type(loss).__name__}{other}")
        if loss.reduction not in ("mean", "sum"):
            raise _Unknown(f"loss: expected reduction='mean' or 'sum', got {loss.reduction!r}", ValueError)
        layers: Layers = ([], [], [])
        x = walk((self.model,), x, layers, self._other)
        if not layers[0]:
            raise _Unknown("model: expected an nn.Linear or more, got none")
        return layers, x

    def _other(self, module: Any, x: Any, layers: Layers) -> Any:
        """What a chain does with x before its first layer, or the layers of a module with its own forward."""
        if module is not None and not isinstance(module, nn.Module):
            if isinstance(module, Method) and module.args and not layers[0]:
                return x if x is None else module(x)
            raise _Unknown(f"model: {_EXPECTED}, got {getattr(module, '__name__', module)}; {_OTHERS}")
        if module is not None and is_called_plainly(module):
            if is_sequential(module):
                return walk(module._modules.values(), x, layers, self._other)
            if type(module) is nn.Flatten and not layers[0] and (module.start_dim, module.end_dim) == (1, -1):
                return x if x is None else module(x)
        name = next((name for name, each in self.model.named_modules() if each is module), "")
        where = f"model, module {name or '(itself)'}"
        if module is None:
            raise _Unknown(f"{where}: {_EXPECTED}, got None")
        if not is_called_plainly(module):
            raise _Unknown(
                f"{where}: expected no hooks and no forward set on it, which no step would call", ValueError
            )
        kind, role = type(module).__name__, ROLES.get(type(module))
        if role is not None and not role.holds():
            raise _Unknown(f"{where}: expected torch's own {role.owner.__name__}, got one with other methods")
        if role is not None or not module._modules:
            raise _Unknown(f"{where}: {_EXPECTED}, got {kind}; {_OTHERS}")
        x, callables = self._chain_of(module, x, layers, f"{where}: {_EXPECTED}, got {kind}, whose forward")
        return walk(callables, x, layers, self._other)

    def _chain_of(self, module: nn.Module, x: Any, layers: Layers, words: str) -> tuple[Any, list[Any]]:
        """What a module's forward, which ends by returning a chain, does with x before, and the chain."""
        try:
            rewritten = rewritten_forward(module, self._rewritten)
        except Refused as refusal:
            raise _Unknown(f"{words} {refusal}; {_OTHERS}") from None
        more = _Unknown(f"{words} does more than to end by a chain; {_OTHERS}")
        if rewritten.ending is None or rewritten.later is None or (layers[0] and not rewritten.is_whole):
            raise more
        if x is None:
            callables = _flat(rewritten.callables(rewritten.ending, module))
            others = [_flat(rewritten.callables(plan, module)) for plan in rewritten.plans]
            if None in callables or any(
                isinstance(each, nn.Linear) and each not in callables for other in others for each in other
            ):
                raise more
            return x, callables
        pending = rewritten.as_original(later=True)(module, x)
        if type(pending) is not Pending or (
            isinstance(pending.input, Tensor) and pending.input.requires_grad and not x.requires_grad
        ):
            raise more
        return pending

    def _check(self, layers: Layers) -> None:
        """What only a new step looks at, and who asks for reasons: later, the kernel sees to it.

        Raises:
            _Unknown: where the loss has weights, or the layers parameters, that a step does not know.
        """
        _check_parameters(layers)
        if isinstance(self.loss, nn.BCEWithLogitsLoss):
            outputs = layers[0][-1].shape[0]
            _check_over_outputs("weight", self.loss.weight, outputs)
            _check_over_outputs("pos_weight", self.loss.pos_weight, outputs)

    def _constants(self, layers: Layers) -> Hashable:
        """What the loss of a batch depends on, besides parameters."""
        loss = self.loss
        weights = (weight.data_ptr() for weight in loss.buffers())
        options = (getattr(loss, name, None) for name in ("reduction", "ignore_index", "label_smoothing"))
        return (
            type(loss),
            *layers[2],
            *(bias is None for bias in layers[1]),
            *options,
            *weights,
        )

    def _loss_of(self, x: Tensor, target: Tensor, layers: Layers) -> Tensor:
        value: Tensor = self.loss(functional.network(x, *layers), target)
        return value

    def _arguments(self, layers: Layers) -> tuple[tuple[Any, ...], list[tuple[Tensor, dict[str, Tensor]]]]:
        """What the kernel takes besides x and target, and the states that are new, with their parameters.

        Raises:
            _Unknown: where a step would not do what the standard loop does.
        """
        optimizer, loss = self.optimizer, self.loss
        if has_step_hooks(optimizer):
            raise _Unknown("optimizer: expected no step hooks, which no step would call", ValueError)
        if not is_called_plainly(loss):
            raise _Unknown(
                "loss: expected no hooks and no forward set on it, which no step would call", ValueError
            )
        rule = rule_of(optimizer)
        assert rule is not None  # _look has seen to that
        groups: dict[int, tuple[int, dict[str, Any], tuple[str, ...]]] = {}
        options: list[Any] = []  # of each group, and once more for a first step
        for number, group in enumerate(optimizer.param_groups):
            if group["differentiable"]:
                raise _Unknown("optimizer: expected differentiable=False", ValueError)
            options += rule.options(group)
            known = number, group, rule.keys(group)
            for p in group["params"]:
                groups[id(p)] = known
        if None in options:
            raise _Unknown(
                "optimizer: expected options as numbers, or as tensors of one on the CPU", ValueError
            )
        params: list[Tensor] = []
        states: list[Tensor] = []
        counts: list[Tensor] = []
        numbers: list[int] = []  # of each parameter's options; -1 where it is not trained
        first: dict[int, int] = {}
        made = []
        requires_grad = is_known = False
        nothing, does_count = [_NOTHING] * rule.most, rule.counter is not None
        for parameter in parameters_of(layers):
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise _Unknown(
                    "model: expected parameters without hooks, which no step would call", ValueError
                )
            params.append(parameter)
            requires_grad |= parameter.requires_grad
            number, group, keys = groups.get(id(parameter), _UNKNOWN)
            is_known |= number >= 0
            if not parameter.requires_grad:
                number, keys = -1, ()
            if keys:
                state: Any = optimizer.state.get(parameter)
                if not state or state.get(keys[0]) is None:
                    state = rule.made(parameter, group)
                    made.append((parameter, state))
                    if not does_count:
                        if number not in first:
                            first[number] = len(options) // rule.numbers
                            options += [*options[number * rule.numbers :][: rule.numbers - 1], True]
                        number = first[number]
                for key in keys:
                    states.append(state[key])
                states += nothing[len(keys) :]
                if does_count:
                    counts.append(state[rule.counter])
            else:
                states += nothing
                if does_count:
                    counts.append(_NOTHING)
            numbers.append(number)
        if not requires_grad:
            raise _Unknown(
                "model: expected a parameter or more that requires a gradient, got none", RuntimeError
            )
        if not is_known:
            raise _Unknown("optimizer: expected parameters of the model among its own, got none", ValueError)
        kind = _LOSSES[type(loss)].name
        of_loss: tuple[Any, ...] = (None, None, -100, 0.0)
        if kind == "cross_entropy":
            of_loss = (loss._buffers["weight"], None, loss.ignore_index, loss.label_smoothing)
        elif kind == "bce_with_logits":
            of_loss = (loss._buffers["weight"], loss._buffers["pos_weight"], -100, 0.0)
        arguments = (
            params,
            states,
            counts,
            self._workspace,
            [bias is not None for bias in layers[1]],
            layers[2],
            kind,
            loss.reduction == "mean",
            *of_loss,
            rule.name,
            options,
            numbers,
        )
        return arguments, made

    def _fused_step(self, x: Tensor, target: Tensor, layers: Layers) -> Tensor:
        arguments, made = self._arguments(layers)
        value: Tensor = _C.train_step(x, target, *arguments)
        if value is NotImplemented:
            names, parameters = zip(*map(resolved, layers[2]), strict=True)
            activations = names, sum(parameters, ())
            value = _train_step(x, target, *arguments[:5], *activations, *arguments[6:])
        for parameter, state in made:
            self.optimizer.state[parameter].update(state)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedulers look at
        return value

    def _standard_step(self, x: Tensor, target: Tensor, layers: Layers | None) -> Tensor:
        """The loop, by the layers, or by the model itself."""
        begins = self._calls % self.accumulate == 0
        value: Tensor = (
            self.loss(self.model(x), target) if layers is None else self._loss_of(x, target, layers)
        )
        if begins:
            self.optimizer.zero_grad()
        scaled = value / self.accumulate if self.accumulate > 1 else value
        scaled.backward()  # type: ignore[no-untyped-call]
        self._calls += 1
        if self._calls % self.accumulate == 0:
            parameters = list(self.model.parameters() if layers is None else parameters_of(layers))
            gradients = [p.grad for p in parameters if p.grad is not None]
            if self.process_group is not None:
                size = torch.distributed.get_world_size(self.process_group)
                for gradient in gradients:
                    torch.distributed.all_reduce(gradient, group=self.process_group)
                    gradient /= size
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            self.optimizer.step()
        return value.detach()


_NOTHING = torch.empty(0)
_UNKNOWN: tuple[int, dict[str, Any], tuple[str, ...]] = (-1, {}, ())


def _check_over_outputs(name: str, values: Tensor | None, outputs: int) -> None:
    """_Unknown where a loss's weights are not one number for each output, or for all, whatever the row."""
    if values is None or values.numel() == 1:
        return
    if values.numel() != outputs or list(values.shape[-1:]) != [outputs]:
        raise _Unknown(
            f"loss: expected {name} of shape [{outputs}], one for each output, or of one element, "
            f"got {list(values.shape)}",
            ValueError,
        )


def _check_parameters(layers: Layers) -> None:
    """_Unknown where parameters are not what a step can change one by one."""
    parameters = list(parameters_of(layers))
    for p in parameters:
        if p.dtype != torch.float32 or p.device != parameters[0].device or not p.is_contiguous():
            raise _Unknown(
                "model: expected contiguous float32 parameters on one device, got "
                f"{p.dtype} of shape {list(p.shape)} and strides {p.stride()} on {p.device}",
                ValueError,
            )
    ends = 0
    for p in sorted((p for p in parameters if p.numel()), key=Tensor.data_ptr):
        if p.data_ptr() < ends:
            raise _Unknown(
                "model: expected layers that share no parameters, nor the memory of any", ValueError
            )
        ends = p.data_ptr() + p.nbytes


def _flat(lists: list[list[Any]]) -> list[Any]:
    return [each for inner in lists for each in inner]


_EXPECTED = "expected nn.Linear, or an activation of torch's after it"
_OTHERS = "other models train in the standard loop, with fastmlp's layers"
