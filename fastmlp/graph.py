"""Training steps as CUDA graphs: one launch, where the standard loop launches kernel after kernel."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _C, functional
from .layers import Layers, parameters_of
from .optim import Rule, rule_of

__all__ = ["Graphs", "Slower"]

MOST = 16  # shapes of batches; each has the memory of a step

_optimize = torch.ops.fastmlp.optimize_by_numbers_.default
_clip = torch.ops.fastmlp.clip_grad_norm_.default
_failed: list[Any] = []  # graphs that torch's allocator may still ask what they capture


class Slower(Exception):
    """Why a step is the standard loop."""


class _Part(NamedTuple):
    """Those of the trained parameters that the optimizer changes alike."""

    begin: int
    end: int
    states: int  # tensors of each

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors[self.begin : self.end]


class Graphs:
    """The steps of a model and an optimizer on one GPU, a graph for each of the last shapes of batch.

    A graph holds where tensors are, and how they lie there. All that is compared at each call, and where it
    has changed all graphs are dropped. The numbers of the optimizer are read from memory, and may change at
    every call. A shape is captured when it comes for the second time: the first time, the standard loop has
    made the optimizer's states. A shape whose capture fails stays the loop.
    """

    def __init__(self) -> None:
        """See the class."""
        self._held: Any = None  # what was compared last, and of the states
        self._places: bytes | None = None
        self._trained: list[Tensor] = []
        self._parts: list[_Part] = []
        self._groups: list[int] = []  # of each of the trained parameters
        self._names: list[tuple[str, ...]] = []  # of each one's states, and of its count where there is one
        self._counts: list[int] = []  # where they are among all states
        self._options: list[Any] | None = None  # that `_numbers` has been made of
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
        rule: Any = rule_of(optimizer)
        keys: list[Any] = []
        options: list[Any] = []
        params: list[list[Tensor]] = []
        for group in optimizer.param_groups:
            keys.append(None if group["differentiable"] else rule.keys(group))
            options += rule.options(group)
            params.append(group["params"])
        places = _C.places(weights, biases, known[2:4], *params)
        held = places, rule.name, keys, activations, known[:2], known[4:], max_norm
        if held != self._held:
            self._held = self._places = None
            self._plan(layers, params, keys, rule, max_norm)
            self._held = held
        states = _C.states(optimizer.state, self._trained, self._names)
        if states is None:
            raise Slower("until the optimizer has its states, a step is the loop")
        counts = [states[index] for index in self._counts]
        places = _C.places(states)
        if places != self._places:
            self._places, self._graphs = None, {}
            if not all(t.is_cpu for t in counts):
                raise Slower("optimizer: it counts its steps on the GPU")
            self._places = places
        if None in options:
            raise Slower("optimizer: an option is neither a number nor a tensor of one on the CPU")

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
            step = _Step(layers, loss, rule, max_norm, self._trained, self._parts, states, self._numbers)
            graph = self._graphs[batch] = self._captured(batch, step, x, target)
        if counts or options != self._options:
            numbers = _C.count_up_numbers(rule.name, options, self._groups, counts, self._numbers.is_cuda)
            self._numbers.copy_(numbers, non_blocking=True)
            self._options = options
        return graph.replay(x, target)

    def _plan(
        self,
        layers: Layers,
        params: list[list[Tensor]],
        keys: list[Any],
        rule: Rule,
        max_norm: float | None,
    ) -> None:
        """Finds what is trained, and how."""
        if None in keys:
            raise Slower("optimizer: it is differentiable")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters_of(layers)):
            raise Slower("model: a parameter has hooks")
        own = {p for p in parameters_of(layers) if p.requires_grad}
        self._trained, self._parts, self._groups, self._names, self._counts = [], [], [], [], []
        counted = (rule.counter,) if rule.counter else ()
        for number, (of_group, names) in enumerate(zip(params, keys, strict=True)):
            begin, found = len(self._trained), [p for p in of_group if p in own]
            self._trained += found
            self._parts.append(_Part(begin, len(self._trained), len(names)))
            self._groups += [number] * len(found)
            self._names += [(*names, *counted)] * len(found)
        if counted:
            self._counts = [end - 1 for end in accumulate(map(len, self._names))]
        if not self._trained:
            raise Slower("optimizer: it trains none of the last layers' parameters")
        if max_norm is not None and len(own) > len(self._trained):
            raise Slower("optimizer: it does not know all gradients that are clipped together")
        size = len(self._trained) * _C.size_of_numbers
        self._numbers = torch.zeros(size, dtype=torch.uint8, device=self._trained[0].device)
        self._options = None

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
    rule: Rule
    max_norm: float | None
    trained: list[Tensor]
    parts: list[_Part]
    states: list[Tensor]  # of each of the trained; its count is the last, where there is one
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
        is_covered, states = self.max_norm is None or norm is not None, iter(self.states)
        for part in self.parts:
            length = part.states + (self.rule.counter is not None)
            of_each = [[*islice(states, length)][: part.states] for _ in range(part.begin, part.end)]
            own = [memory(each[kind]) for kind in range(part.states) for each in of_each]
            numbers = self.numbers[part.begin * _C.size_of_numbers : part.end * _C.size_of_numbers]
            is_covered &= _optimize(self.rule.name, part.cut(params), part.cut(grads), own, numbers)
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
        self._trained, self._changed = step.trained, step.trained + step.states
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
