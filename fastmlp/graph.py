"""Training steps as CUDA graphs: one launch, where the standard loop launches kernel after kernel."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _C, functional
from .layers import Layers, parameters_of
from .optim import OPTIMIZERS

__all__ = ["Graphs", "Slower"]

MOST = 16  # shapes of batches; each has the memory of a step

_optimize = torch.ops.fastmlp.optimize_by_numbers_.default
_clip = torch.ops.fastmlp.clip_grad_norm_.default
_failed: list[Any] = []  # graphs that torch's allocator may still ask what they capture


class Slower(Exception):
    """Why a step is the standard loop."""


class Graphs:
    """The steps of a model and an optimizer on one GPU, a graph for each of the last shapes of batch.

    A graph holds where tensors are, and how they lie there. All that is compared at each call, and where it
    has changed all graphs are dropped. The numbers of the optimizer are read from memory, and may change at
    every call. A shape is captured when it comes for the second time: the first time, the standard loop has
    made the optimizer's states. A shape whose capture fails stays the loop.
    """

    def __init__(self) -> None:
        """See the class."""
        self._held: Any = None  # what was compared last
        self._options: Any = None  # that `_numbers` has been made of
        self._numbers = torch.empty(0)
        self._graphs: dict[bytes, _Graph | None] = {}  # None for a shape that has come once
        self._refused: dict[bytes, str] = {}

    def step(
        self,
        x: Tensor,
        target: Tensor,
        layers: Layers,
        loss: Callable[..., Any],
        known: tuple[Any, ...],
        optimizer: Optimizer,
        max_norm: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss before one step, and the norm of its gradients where they are clipped.

        Args:
            x: the input.
            target: the target.
            layers: the network.
            loss: of the network's output and the target.
            known: all that it depends on besides; in the third and fourth place tensors or None.
            optimizer: SGD, Adam or AdamW.
            max_norm: what the gradients are clipped to, or None.

        Raises:
            Slower: with nothing changed, where the standard loop is to take the step.
        """
        weights, biases, activations = layers
        batch = _C.batch(x, target, weights[0])
        if batch is None:
            raise Slower("x or target is on another device, or requires a gradient")
        if torch.cuda.is_current_stream_capturing():
            raise Slower("the caller captures a CUDA graph")
        parameters = [*dict.fromkeys(parameters_of(layers))]
        found = _C.collect(OPTIMIZERS, optimizer, parameters, max_norm is not None)
        if isinstance(found, str):
            raise Slower(found)
        name, trained, states, counts, options = found
        if not all(t.is_cpu for t in counts):
            raise Slower("optimizer: it counts its steps on the GPU")
        places = _C.places(weights, biases, known[2:4], trained, counts, *states)
        held = places, name, activations, known[:2], known[4:], max_norm
        if held != self._held:
            self._held, self._graphs, self._options = held, {}, None
            size = len(trained) * _C.size_of_numbers
            self._numbers = torch.zeros(size, dtype=torch.uint8, device=trained[0].device)

        if batch in self._refused:
            raise Slower(self._refused[batch])
        is_new = batch not in self._graphs
        graph = self._graphs.pop(batch, None)
        if is_new and len(self._graphs) == MOST:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[batch] = graph  # behind all others
        if is_new:
            raise Slower("until a batch of the same shape comes again, a step is the loop")
        if graph is None:
            step = _Step(layers, loss, name, max_norm, trained, states, self._numbers)
            graph = self._graphs[batch] = self._captured(batch, step, x, target)
        if counts or options != self._options:
            numbers = _C.count_up_numbers(name, *options, counts, self._numbers.is_cuda)
            self._numbers.copy_(numbers, non_blocking=True)
            self._options = options
        return graph.replay(x, target)

    def _captured(self, batch: bytes, step: "_Step", x: Tensor, target: Tensor) -> "_Graph":
        """The step as a graph; Slower, from now on, where there cannot be one."""
        pools = [graph.pool for graph in self._graphs.values() if graph is not None]
        try:  # torch takes no pool whose graphs are all gone
            pool = pools[0] if pools else torch.cuda.graph_pool_handle()
            return _Graph(step, x, target, pool)
        except Slower as slower:
            why = str(slower)
        except Exception as error:
            why = f"a step could not be captured as a CUDA graph: {error.__context__ or error}"
            warnings.warn(
                f"TrainStep: for batches of shape {[*x.shape]} it stays the standard loop: {why}",
                stacklevel=5,
            )
        del self._graphs[batch]
        self._refused[batch] = why
        raise Slower(why)


class _Step(NamedTuple):
    """What a step is made of besides the batch."""

    layers: Layers
    loss: Callable[..., Any]
    optimizer: str
    max_norm: float | None
    trained: list[Tensor]
    states: list[tuple[Tensor, ...]]  # of each of the trained
    numbers: Tensor

    def __call__(
        self, x: Tensor, target: Tensor, memory: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The loss, the norm of the gradients, and these; changes what `memory` makes of what it trains."""
        # Leaves of the step's own: autograd has the parameters' wait for the stream that used them last.
        leaves = {p: memory(p.detach()).requires_grad_() for p in self.trained}
        weights = [leaves.get(p, p.detach()) for p in self.layers[0]]
        biases = [None if p is None else leaves.get(p, p.detach()) for p in self.layers[1]]
        value = self.loss(functional.network(x, weights, biases, self.layers[2]), target)
        params = list(leaves.values())
        grads = list(torch.autograd.grad(value, params))
        norm = None if self.max_norm is None else _clip(grads, self.max_norm)
        is_covered, end = self.max_norm is None or norm is not None, 0
        for kinds, part in groupby(self.states, len):  # those that the optimizer changes alike
            of_each = [*part]
            begin, end = end, end + len(of_each)
            own = [memory(each[kind]) for kind in range(kinds) for each in of_each]
            numbers = self.numbers[begin * _C.size_of_numbers : end * _C.size_of_numbers]
            is_covered &= _optimize(self.optimizer, params[begin:end], grads[begin:end], own, numbers)
        if not is_covered:
            raise Slower("the kernels do not cover the parameters, their gradients or the optimizer's states")
        return value.detach(), norm, grads


class _Graph:
    """One captured step, which reads batch and numbers from memory that no other graph writes.

    Graphs of one pool share what they work in, but for what they return.
    """

    def __init__(self, step: _Step, x: Tensor, target: Tensor, pool: Any) -> None:
        self.pool, device = pool, x.device
        self._x, self._target = (t.clone(memory_format=torch.contiguous_format) for t in (x, target))
        self._trained, self._changed = step.trained, [*step.trained, *chain(*step.states)]
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # so that the current one is set again, however a capture fails
            try:
                step(self._x, self._target, Tensor.clone)  # loads every kernel, and changes copies
            finally:
                current.wait_stream(stream)
            try:
                with torch.cuda.graph(
                    self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self._value, self._norm, self._gradients = step(self._x, self._target, lambda t: t)
            except BaseException:
                _failed.append(self._graph)
                with suppress(AttributeError, RuntimeError):  # not where torch has ended it
                    torch._C._cuda_endAllocateToPool(device.index, pool)
                    torch._C._cuda_releasePool(device.index, pool)
                raise

    def replay(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        self._x.copy_(x)
        self._target.copy_(target)
        self._graph.replay()
        _C.leave(self._trained, self._gradients, self._changed)
        return self._value.clone(), None if self._norm is None else self._norm.clone()
