"""The whole training step, forward, loss, backward and SGD, in one call."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from . import functional
from .chain import ROLES, is_called_plainly
from .graph import Graphs
from .nn import CrossEntropyLoss
from .optim import SGD, has_step_hooks
from .trace import Refused, Trace, is_sequential, trace

__all__ = ["TrainStep"]

_train_step = torch.ops.fastmlp.train_step_

_LOSSES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse",
    nn.BCEWithLogitsLoss: "bce_with_logits",
}
_TRAINED, _NESTEROV, _MAXIMIZE, _FIRST = 1, 2, 4, 8  # as in csrc/torch/step.cpp


class _Layer(NamedTuple):
    linear: nn.Linear
    activation: functional.Activation | None


class TrainStep:
    """Forward, loss, backward and SGD's update in one call, which trains as the standard loop does.

    The same as

        value = loss(model(x), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    to within rounding, and the same to the bit from run to run and for every number of threads. On the CPU
    it is one kernel that changes each weight while its gradient is in cache: no gradient outlives its layer
    (or, where many rows meet few weights, the call), and `.grad` stays as it is. The memory that a step works
    in is kept for the next. Momentum is in `optimizer.state` under torch's own keys, options are read at each
    call: checkpoints and learning-rate schedulers work as ever.

    With `max_grad_norm`, `accumulate` or `process_group`, and on a GPU, gradients do exist, in `.grad`: the
    step is then the standard loop itself, with fused layers.

    On a GPU, without these, the loop becomes a CUDA graph once a batch of the same shape comes again, with
    parameters and momentum in the same place and the same options; the learning rate may change at every
    call. The graph keeps the memory of a step, and its next replay overwrites the gradients. The step stays
    the loop under autocast, while the caller captures a graph, and where optimizer, loss or a parameter has
    hooks.

    Args:
        model: an nn.Sequential of Linear layers and ReLU, Sigmoid or Tanh (fastmlp.MLP is one), float32;
            nested ones, nn.Identity, and nn.Flatten() at the beginning are understood. So is a module whose
            forward calls such a chain, after operations without parameters that reshape its input, say.
        loss: nn.CrossEntropyLoss, with classes as targets, nn.MSELoss, or nn.BCEWithLogitsLoss, whose weight
            and pos_weight are the same for the whole batch; mean or sum.
        optimizer: torch.optim.SGD or fastmlp.SGD. Parameters that it does not know stay as they are.
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
        if type(optimizer) not in (torch.optim.SGD, SGD):
            raise TypeError(
                f"optimizer: expected torch.optim.SGD or fastmlp.SGD, got {type(optimizer).__name__}; "
                "others train in the standard loop"
            )
        if any(group["differentiable"] for group in optimizer.param_groups):
            raise ValueError("optimizer: expected differentiable=False")
        if type(loss) not in _LOSSES:
            names = ", ".join(f"nn.{kind.__name__}" for kind in _LOSSES if kind is not CrossEntropyLoss)
            raise TypeError(f"loss: expected {names}, got {type(loss).__name__}")
        if loss.reduction == "none":
            raise ValueError("loss: expected reduction='mean' or 'sum', got 'none'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected a number of calls from 1 on, got {accumulate}")
        self._chain = _Chain(model)
        if isinstance(loss, nn.BCEWithLogitsLoss):
            outputs = self._chain.layers[-1].linear.weight.shape[0]
            _check_over_outputs("weight", loss.weight, outputs)
            _check_over_outputs("pos_weight", loss.pos_weight, outputs)
        device = self._chain.layers[0].linear.weight.device
        is_plain = max_grad_norm is None and accumulate == 1 and process_group is None
        self._in_one_kernel = is_plain and device.type == "cpu"
        self._graphs = self._make_graphs(device) if is_plain and device.type == "cuda" else None
        self._calls = 0
        self._workspace = torch.empty(0, dtype=torch.uint8)  # as large as the largest batch has needed
        if process_group is not None:
            first = torch.distributed.get_global_rank(process_group, 0)
            for parameter in self._parameters():
                torch.distributed.broadcast(parameter.detach(), first, group=process_group)

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Takes one step.

        Args:
            x: input of shape [batch, in_features] (for MSE and BCE [..., in_features]), float32. The batch
                may change from call to call. No gradient is computed for it.
            target: classes, int64 of shape [batch], for cross-entropy; else float32, of the output's shape.

        Returns:
            The loss of the parameters before the update, a float32 scalar without a gradient.

        Raises:
            RuntimeError: for a shape, dtype or device that does not fit; nothing has been changed then.
            IndexError: for a target that is no class; nothing has been changed then.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._untraced(x, target)
        if not self._chain.holds():
            self._chain = _Chain(self.model)
        for function in self._chain.first:
            x = function(x)
        if self._in_one_kernel:
            return self._fused_step(x, target)
        if self._graphs is not None and is_called_plainly(self.loss):
            value = self._graphs.step(x, target, list(self._parameters()))
            if value is not None:
                self.optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedulers look at
                return value
        return self._standard_step(x, target)

    @_disable_dynamo
    def _untraced(self, x: Tensor, target: Tensor) -> Tensor:
        # torch.compile has nothing to gain here, and cannot follow all that a step does to an optimizer.
        return self(x, target)

    def _parameters(self) -> Iterator[Tensor]:
        for linear, _ in self._chain.layers:
            yield linear.weight
            if linear.bias is not None:
                yield linear.bias

    def _make_graphs(self, device: torch.device) -> Graphs:
        def constants() -> Hashable:
            names = ("reduction", "ignore_index", "label_smoothing")
            weights = (weight.data_ptr() for weight in self.loss.buffers())
            activations = (layer.activation for layer in self._chain.layers)
            return (*activations, *(getattr(self.loss, name, None) for name in names), *weights)

        return Graphs(self._loss_of, self.optimizer, device, constants)

    def _loss_of(self, x: Tensor, target: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        own = iter(parameters)
        y = x
        for linear, activation in self._chain.layers:
            y = functional.linear(y, next(own), None if linear.bias is None else next(own), activation)
        value: Tensor = self.loss(y, target)
        return value

    def _fused_step(self, x: Tensor, target: Tensor) -> Tensor:
        optimizer, loss = self.optimizer, self.loss
        if has_step_hooks(optimizer):
            raise ValueError("optimizer: expected no step hooks, which no step would call")
        if not is_called_plainly(loss):
            raise ValueError("loss: expected no hooks and no forward set on it, which no step would call")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        params: list[Tensor] = []
        momenta: list[Tensor] = []
        has_bias: list[int] = []
        activations: list[str] = []
        options: list[float] = []
        flags: list[int] = []
        made = []
        for linear, activation in self._chain.layers:
            own = linear._parameters
            has_bias.append(own["bias"] is not None)
            activations.append(activation or "identity")
            for parameter in own.values():
                if parameter is None:
                    continue
                if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                    raise ValueError("model: expected parameters without hooks, which no step would call")
                params.append(parameter)
                group = groups.get(id(parameter))
                if group is None or not parameter.requires_grad:
                    momenta.append(_NOTHING)
                    options += 0.0, 0.0, 0.0, 0.0
                    flags.append(0)
                    continue
                momentum = group["momentum"]
                flag = _TRAINED | _NESTEROV * group["nesterov"] | _MAXIMIZE * group["maximize"]
                buffer = _NOTHING
                if momentum != 0:
                    buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
                    if buffer is None:
                        buffer = torch.empty_like(parameter, requires_grad=False)
                        made.append((parameter, buffer))
                        flag |= _FIRST
                momenta.append(buffer)
                options += float(group["lr"]), momentum, group["dampening"], group["weight_decay"]
                flags.append(flag)
        kind = _LOSSES[type(loss)]
        of_loss: tuple[Any, ...] = (None, None, -100, 0.0)
        if kind == "cross_entropy":
            of_loss = (loss.weight, None, loss.ignore_index, loss.label_smoothing)
        elif kind == "bce_with_logits":
            of_loss = (loss.weight, loss.pos_weight, -100, 0.0)
        value: Tensor = _train_step(
            x,
            target,
            params,
            momenta,
            self._workspace,
            has_bias,
            activations,
            kind,
            loss.reduction == "mean",
            *of_loss,
            options,
            flags,
        )
        for parameter, buffer in made:
            optimizer.state[parameter]["momentum_buffer"] = buffer
        optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedulers look at
        return value

    def _standard_step(self, x: Tensor, target: Tensor) -> Tensor:
        begins = self._calls % self.accumulate == 0
        value = self._loss_of(x, target, self._parameters())
        if begins:
            self.optimizer.zero_grad()
        scaled = value / self.accumulate if self.accumulate > 1 else value
        scaled.backward()  # type: ignore[no-untyped-call]
        self._calls += 1
        if self._calls % self.accumulate == 0:
            parameters = list(self._parameters())
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


def _check_over_outputs(name: str, values: Tensor | None, outputs: int) -> None:
    """ValueError where a loss's weights are not one number for each output, or for all, whatever the row."""
    if values is None or values.numel() == 1:
        return
    if values.numel() != outputs or list(values.shape[-1:]) != [outputs]:
        raise ValueError(
            f"loss: expected {name} of shape [{outputs}], one for each output, or of one element, "
            f"got {list(values.shape)}"
        )


class _Chain:
    """What a model is to a step: what it does to its input first, and its layers.

    Raises:
        TypeError or ValueError: where the model is no such chain.
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        self.first: list[Callable[[Tensor], Tensor]] = []
        self.layers: list[_Layer] = []
        self.traced: list[tuple[nn.Module, Trace]] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._add(model)
        if not self.layers:
            raise TypeError("model: expected an nn.Linear or more, got none")
        parameters = [p for layer in self.layers for p in layer.linear.parameters()]
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("model: expected layers that share no parameters")
        for p in parameters:
            if p.dtype != torch.float32 or p.device != parameters[0].device or not p.is_contiguous():
                raise ValueError(
                    "model: expected contiguous float32 parameters on one device, got "
                    f"{p.dtype} of shape {list(p.shape)} and strides {p.stride()} on {p.device}"
                )

    def holds(self) -> bool:
        """Whether the forwards that were traced are still what they were."""
        return all(trace.modules(module) is not None for module, trace in self.traced)

    def _add(self, module: nn.Module) -> None:
        where = f"model, module {self._names.get(module) or '(itself)'}"
        if not is_called_plainly(module):
            raise ValueError(f"{where}: expected no hooks and no forward set on it, which no step would call")
        role, layers = ROLES.get(type(module)), self.layers
        if role == "linear" or role == "layer":
            assert isinstance(module, nn.Linear)
            layers.append(_Layer(module, module.__dict__["activation"] if role == "layer" else None))
        elif role in functional.COMPOSITES and layers and layers[-1].activation is None:
            layers[-1] = _Layer(layers[-1].linear, cast(functional.Activation, role))
        elif is_sequential(module):
            for child in module._modules.values():
                assert child is not None
                self._add(child)
        elif isinstance(module, nn.Flatten) and not layers and (module.start_dim, module.end_dim) == (1, -1):
            self.first.append(module)
        elif role is None and module._modules:
            self._add_traced(module, where)
        elif role != "identity":
            raise TypeError(f"{where}: {_EXPECTED}, got {type(module).__name__}; {_OTHERS}")

    def _add_traced(self, module: nn.Module, where: str) -> None:
        """A module with a forward of its own."""
        name = type(module).__name__
        try:
            traced = trace(module)
        except Refused as refusal:
            raise TypeError(f"{where}: {_EXPECTED}, got {name}, whose forward {refusal}; {_OTHERS}") from None
        found = traced.chain(module)
        if found is None or (self.layers and found[0] is not None):
            raise TypeError(f"{where}: {_EXPECTED}, got {name}, whose forward does more; {_OTHERS}")
        first, parts = found
        if first is not None:
            self.first.append(first)
        for part in parts:
            self._add(part)
        self.traced.append((module, traced))


_EXPECTED = "expected nn.Linear, or nn.ReLU, nn.Sigmoid or nn.Tanh after it"
_OTHERS = "other models train in the standard loop, with fastmlp's layers"
