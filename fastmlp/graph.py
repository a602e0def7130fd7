"""Training steps as CUDA graphs: one launch, where the standard loop launches kernel after kernel."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from .layers import Layers, parameters_of
from .optim import has_step_hooks

__all__ = ["Graphs"]

MOST = 16  # graphs; each holds the memory of a step

Loss = Callable[[Tensor, Tensor, Layers], Tensor]  # of x, target and the layers


class Graphs:
    """The steps of a model and an optimizer on one GPU, a graph for each shape of batch.

    A graph holds addresses and numbers: those of parameters, momenta, options and `constants`. They are
    compared at each call, and where one has changed all graphs are dropped. Learning rates are read from
    memory, and may change at every call. A step is captured when it is the same for the second time: the
    first time, the standard loop has made the momenta, and what changes at every call is never captured.

    Args:
        optimizer: torch.optim.SGD or fastmlp.SGD.
        device: the GPU.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        """See the class."""
        self._optimizer, self.device = optimizer, device
        self._held: Hashable = None
        self._graphs: dict[Hashable, _Graph | None] = {}  # None for a shape that has come once

    def step(
        self, x: Tensor, target: Tensor, layers: Layers, loss: Loss, constants: Hashable
    ) -> Tensor | None:
        """The loss before one step; None, with nothing changed, where the standard loop is to take it.

        Args:
            x: the input.
            target: the target.
            layers: the network.
            loss: the loss, of layers with other parameters in the place of these.
            constants: what else the loss depends on.
        """
        parameters = list(parameters_of(layers))
        if not self._covers(x, target, parameters):
            return None
        own = set(parameters)
        groups = [_Group(group, own, self._optimizer) for group in self._optimizer.param_groups]
        held = (
            torch.backends.fp32_precision,  # type: ignore[attr-defined]
            torch.backends.cuda.matmul.fp32_precision,
            constants,
            *((id(p), p.data_ptr()) for p in parameters),
            *(group.held() for group in groups),
        )
        if held != self._held:
            self._held, self._graphs = held, {}
        batch = (x.shape, x.dtype, target.shape, target.dtype)
        if batch not in self._graphs:
            if len(self._graphs) < MOST:
                self._graphs[batch] = None
            return None
        graph = self._graphs[batch]
        if graph is None:
            graph = self._graphs[batch] = _Graph(loss, layers, groups, x, target)
        return graph.replay(x, target, [group.lr for group in groups])

    def _covers(self, x: Tensor, target: Tensor, parameters: Sequence[Tensor]) -> bool:
        """Whether a step would be kernels on the GPU and nothing else."""
        return (
            x.device == target.device == self.device
            and not (x.requires_grad or target.requires_grad)
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled(self.device.type)
            and not torch.cuda.is_current_stream_capturing()
            and not has_step_hooks(self._optimizer)
            and any(p.requires_grad for p in parameters)
            and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
        )


class _Group:
    """Those of a model's parameters that the optimizer changes alike."""

    def __init__(self, group: dict[str, Any], own: set[Tensor], optimizer: Optimizer) -> None:
        self.lr: float | Tensor = group["lr"]
        names = ("weight_decay", "momentum", "dampening", "nesterov", "maximize")
        self.options = {name: group[name] for name in names}
        self.parameters: list[Tensor] = [p for p in group["params"] if p in own and p.requires_grad]
        self.momenta: list[Tensor | None] = [None for _ in self.parameters]
        if group["momentum"] != 0:
            self.momenta = [optimizer.state.get(p, {}).get("momentum_buffer") for p in self.parameters]

    def held(self) -> Hashable:
        addresses = (m if m is None else m.data_ptr() for m in self.momenta)
        return (*self.options.values(), *map(id, self.parameters), *addresses)


class _Graph:
    """One captured step, which reads the batch and the learning rates from memory of its own."""

    def __init__(
        self, loss: Loss, layers: Layers, groups: Sequence[_Group], x: Tensor, target: Tensor
    ) -> None:
        self._x, self._target = (t.clone(memory_format=torch.contiguous_format) for t in (x, target))
        self._lrs = [torch.zeros((), device=x.device) for _ in groups]
        self._trained = [p for group in groups for p in group.parameters]
        self._changed = self._trained + [m for group in groups for m in group.momenta if m is not None]

        def step(memory: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
            # Leaves of the step's own: autograd has the parameters' wait for the stream that used them last.
            leaves = {p: memory(p.detach()).requires_grad_() for p in self._trained}
            weights = [leaves.get(p, p.detach()) for p in layers[0]]
            biases = [None if p is None else leaves.get(p, p.detach()) for p in layers[1]]
            value = loss(self._x, self._target, (weights, biases, layers[2]))
            gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
            with torch.no_grad():
                for group, lr in zip(groups, self._lrs, strict=True):
                    sgd(
                        [leaves[p] for p in group.parameters],
                        [gradients[p] for p in group.parameters],
                        [m if m is None else memory(m) for m in group.momenta],
                        fused=True,  # the one that reads a learning rate from the GPU's memory
                        lr=lr,  # type: ignore[arg-type]
                        **group.options,
                    )
            return value.detach(), list(gradients.values())

        stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            step(Tensor.clone)  # loads every kernel, and changes copies
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._value, self._gradients = step(lambda t: t)

    def replay(self, x: Tensor, target: Tensor, lrs: Sequence[float | Tensor]) -> Tensor:
        self._x.copy_(x)
        self._target.copy_(target)
        for own, lr in zip(self._lrs, lrs, strict=True):
            own.fill_(lr.detach().reshape(()) if isinstance(lr, Tensor) else lr)
        self._graph.replay()
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient
        torch.autograd.graph.increment_version(self._changed)  # autograd has not seen the graph write
        return self._value.clone()
