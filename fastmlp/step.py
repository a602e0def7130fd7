"""The whole training step, forward, loss, backward and the optimizer's update, in one call."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from . import _C, functional
from .activations import resolved
from .fuse import walk_to_the_end
from .graph import Graphs, Slower
from .layers import KNOWN, Layers, Role, is_unwatched, parameters_of
from .nn import CrossEntropyLoss
from .optim import OPTIMIZERS, clip_grad_norm_, drop_gradients, take_step
from .rewrite import Rewritten

__all__ = ["KINDS", "LOOP", "LOSSES", "NOT_KNOWN", "ONE_CALL", "TrainStep"]

_network_backward = torch.ops.fastmlp.network_backward.default


#: What csrc/torch/step.cpp is to know of losses: by class, the methods that it must have, its name there, and
#: the attribute that is the label smoothing or the bound; and functions that are by themselves a loss's mean.
LOSSES: dict[Any, tuple[Any, ...]] = {
    owner: (Role.of(owner, name), name, number)
    for owner, name, number in (
        (nn.CrossEntropyLoss, "cross_entropy", "label_smoothing"),
        (CrossEntropyLoss, "cross_entropy", "label_smoothing"),
        (nn.MSELoss, "mse", None),
        (nn.L1Loss, "l1", None),
        (nn.SmoothL1Loss, "smooth_l1", "beta"),
        (nn.HuberLoss, "huber", "delta"),
        (nn.BCEWithLogitsLoss, "bce_with_logits", None),
    )
} | {
    F.cross_entropy: ("cross_entropy", True, None, None, -100, 0.0),
    F.mse_loss: ("mse", True, None, None, 0, 0.0),
    F.l1_loss: ("l1", True, None, None, 0, 0.0),
    F.smooth_l1_loss: ("smooth_l1", True, None, None, 0, 1.0),
    F.huber_loss: ("huber", True, None, None, 0, 1.0),
    F.binary_cross_entropy_with_logits: ("bce_with_logits", True, None, None, 0, 0.0),
}
#: Models that have a step of their own.
KINDS: dict[type[nn.Module], Any] = {}
_CPU = torch.device("cpu")
_CAPTURED = {"cuda"}  # the devices whose steps become graphs


class TrainStep:
    """Forward, loss, backward and the optimizer's update in one call, which trains as the standard loop does.

    The same as

        value = loss(model(x), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    to within rounding, and the same to the bit from run to run and for every number of threads. All that the
    loop trains is taken, the fastest way that there is for it:

    - In one call of a kernel: a model that ends by a chain of linear layers and activations, and trains
      nothing before it; a loss of torch's that the kernels know (cross-entropy with classes as targets, MSE,
      L1, smooth L1, Huber, binary cross-entropy of logits; mean or sum); SGD, Adam or AdamW, of torch.optim
      or of fastmlp; in float32, on the CPU, or on a GPU where layers and batch are small enough for one
      launch to be faster than many.
    - In two calls around the loss, where that is another, on the CPU: it may be any callable, and autograd
      differentiates it down to the model's output.
    - In the standard loop, with the last layers, clipping and the optimizer fused, for all else: other
      optimizers, models that are trained before or between their layers too (whose other layers
      ``fastmlp.fuse`` fuses), an x that requires a gradient, `accumulate`, `process_group`, autocast. On
      a GPU the loop becomes a CUDA graph where model, loss and optimizer are such as in the first way, of
      any size.

    A step prints which it is, and ``fastmlp.why_not_fused`` tells why. The first two change each weight
    while its gradient is in cache: no gradient outlives its layer (or, where many rows meet few weights, or
    gradients are clipped, the call), and `.grad` stays as it is. In the loop it is the gradient. The memory
    that a step works in is kept for the next. Its state is in `optimizer.state` under torch's own keys,
    options are read at each call: checkpoints and learning-rate schedulers work as ever.

    A CUDA graph is captured once a batch of the same shape comes again, with parameters and the optimizer's
    states in the same place; the optimizer's numbers may change at every call. The last 16 shapes have one.
    Graphs keep the memory of a step, and the next replay of any may overwrite the gradients. The step stays
    the loop while the caller captures a graph, where a learning rate or Adam's counts of steps are on the GPU
    (as `fused` and `capturable` have them), and where optimizer, loss or a parameter has hooks. It stays so
    for a shape whose capture has failed, with a warning.

    Args:
        model: any module of one input. Of a ``fastmlp.Ensemble`` each model takes a step of its own: see
            ``fastmlp.ensemble.EnsembleStep``, which is made then.
        loss: any callable of the model's output and the targets. It returns the loss, or a tuple whose first
            element is the loss.
        optimizer: any optimizer; of an Ensemble also a list of one for each model. Parameters that it does
            not know stay as they are.
        max_grad_norm: where given, gradients are clipped as by torch.nn.utils.clip_grad_norm_. `grad_norm`
            is then the norm that they had in the last step, a tensor.
        accumulate: parameters change once in so many calls, by the mean of their gradients.
        process_group: where given (torch.distributed.group.WORLD for all processes), parameters are made
            those of the group's first process, and each step takes the mean of all processes' gradients, as
            under DistributedDataParallel.
        strict: whether a step raises ValueError, with nothing changed, instead of being the standard loop.

    Raises:
        TypeError: for a model that is no module, a loss that cannot be called, or no optimizer.
        ValueError: for other options than these.

    Examples:
        >>> model, loss = fastmlp.MLP(784, 500, 10), torch.nn.CrossEntropyLoss()
        >>> step = fastmlp.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.01))
        >>> value = step(torch.randn(64, 784), torch.randint(10, (64,)))
        >>> value.shape, value.requires_grad
        (torch.Size([]), False)
        >>> step
        TrainStep(MLP, CrossEntropyLoss, SGD), in one call
    """

    def __new__(cls, model: Any = None, *_: Any, **__: Any) -> Self:
        """A step of the model's own kind, where there is one."""
        own: Any = next((step for kind, step in KINDS.items() if isinstance(model, kind)), cls)
        made: Self = object.__new__(own if issubclass(own, cls) else cls)
        return made

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer],
        *,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        process_group: Any = None,
        strict: bool = False,
    ) -> None:
        """See the class."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected a number of calls from 1 on, got {accumulate}")
        if accumulate > 1 and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("accumulate: expected 1 for LBFGS, which asks for the loss several times a step")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.max_grad_norm, self.accumulate, self.process_group = max_grad_norm, accumulate, process_group
        self.strict = strict
        self.grad_norm: Tensor | None = None
        self._calls = 0
        self._forget()
        if process_group is not None:
            first = torch.distributed.get_global_rank(process_group, 0)
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.detach(), first, group=process_group)

    def _forget(self) -> None:
        """Drops what is kept for the next call alone."""
        self._rewritten: dict[Any, Rewritten] = {}
        self._graphs = Graphs()
        self._workspace = torch.empty(0, dtype=torch.uint8)  # as large as the largest batch has needed
        self._way: tuple[str, str | None] | None = None  # the last call's, and why it was no better

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: not what is kept for the next call alone."""
        names = ("_rewritten", "_graphs", "_workspace", "_way")
        return {name: value for name, value in self.__dict__.items() if name not in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of ``__getstate__``."""
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        """What it is a step of, and how the last was taken, or would be."""
        loss = self.loss if hasattr(self.loss, "__name__") else type(self.loss)
        names = type(self.model).__name__, loss.__name__, type(self.optimizer).__name__
        way, why = self._way or self._expected_way()
        return f"TrainStep({', '.join(names)}), {way}" + (f": {why}" if way == LOOP else "")

    def reason(self, *batch: Any) -> str | None:
        """Why the last call was not one call of a kernel, or the first would not be; None where it is.

        Args:
            *batch: x and targets, where given: a copy of the step is called with them.
        """
        expected = self._expected_way()
        if not batch:
            return (self._way or expected)[1]
        if expected[0] == LOOP:  # of hooks, say, which copies do not have
            return expected[1]
        other = copy.deepcopy(self)
        other.strict = False
        with torch.random.fork_rng():
            other(*batch)
        return other.reason()

    def __call__(self, x: Any, *targets: Any) -> Any:
        """Takes one step.

        Args:
            x: what the model takes, of shape [..., in_features]. The batch may change from call to call.
            *targets: what the loss takes besides the model's output.

        Returns:
            The loss of the parameters before the update, without a gradient. Where the loss returned a tuple,
            that, with this in its first place.

        Raises:
            ValueError: if `strict`, for a step that would be the standard loop.
            RuntimeError: where gradients are off.

        And all that the standard loop raises: where model, loss or backward do, nothing has been changed.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._untraced(x, *targets)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "TrainStep: expected gradients to be enabled, which the loss needs to be taken"
            )
        may_be_one_call = len(targets) == 1 and self._may_be_one_call()
        if may_be_one_call and (known := _C.known_loss(LOSSES, self.loss)):
            try:
                value = self._call((self.model,), x, targets[0], known)
            except (*_REFUSALS, Slower):  # which the other ways will meet again
                value = NotImplemented
            if value is not NotImplemented:
                self._way = ONE_CALL, None
                return value
        if isinstance(self.optimizer, torch.optim.LBFGS):
            return self._closure_step(x, targets)
        layers: Layers = ([], [], [])
        try:
            if not is_unwatched(x):
                x = self.model(x)
                raise Slower("hooks for all modules, a mode, torch.export or x itself are to see the modules")
            x = walk_to_the_end(self.model, x, layers, self._rewritten)
            self._check_options()
            return self._fast_step(x, targets, layers)
        except Slower as slower:
            why = str(slower)
        return self._standard_step(x, targets, layers, why)

    def run(
        self,
        x: Tensor,
        *targets: Tensor,
        batch_size: int,
        order: Tensor | None = None,
        rates: Tensor | Sequence[Any] | None = None,
        callback: Callable[[int, Tensor], Any] | None = None,
    ) -> Tensor:
        """Takes steps over data in memory: an epoch, or any number of them.

        The same, to the bit, as

            for rows in order.split(batch_size):
                step(x[rows], *(target[rows] for target in targets))

        Where a step is one call, so are all of them: batches are gathered in it, and Python sees to signals
        and other threads each 10 ms. Where a step is one launch on a GPU, so are up to 128 of them; one
        such launch is under way while the next is made ready. An exception, KeyboardInterrupt too, leaves
        whole steps. Model and optimizer are looked at anew each time, after a callback too.

        Args:
            x: what the model takes, of shape [rows, ...].
            *targets: what the loss takes besides the model's output, of shape [rows, ...] each.
            batch_size: rows of a step. The last step may have fewer.
            order: numbers of rows, int64 of any length: a permutation, say; else all in their order.
            rates: a learning rate for each step, of shape [steps]; or of shape [steps, groups] for each of
                the optimizer's groups. They take the place of the groups' own, which stay as they are.
            callback: called after each step with its number, from 0 on, and its loss: to show progress, to
                step a scheduler, to raise an exception and so to stop. Steps are then one call each.

        Returns:
            The losses, each before its step's update, of shape [steps].

        Raises:
            TypeError: for data that is no tensor, or an order that is not int64.
            ValueError: for a batch_size below 1, targets or rates of another length, or other shapes.
            IndexError: for a row in `order` that x does not have; with nothing changed, as the two above.

        And all that a step raises, once the steps before it have been taken.

        Examples:
            >>> model = fastmlp.MLP(20, 64, 3)
            >>> optimizer = torch.optim.Adam(model.parameters())
            >>> step = fastmlp.TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer)
            >>> x, target = torch.randn(1000, 20), torch.randint(3, (1000,))
            >>> step.run(x, target, batch_size=64, order=torch.randperm(1000)).shape
            torch.Size([16])
        """
        if torch.compiler.is_dynamo_compiling():
            return self._untraced_run(
                x, *targets, batch_size=batch_size, order=order, rates=rates, callback=callback
            )
        rows = checked_rows((x, *targets), batch_size, order)
        count = -(-rows // batch_size)
        if rates is not None:
            groups = len(self.optimizer.param_groups)
            rates = torch.as_tensor(rates, dtype=torch.float64, device="cpu").detach()
            if rates.shape not in ((count,), (count, groups)):
                raise ValueError(
                    f"rates: expected shape [{count}] or [{count}, {groups}], got {[*rates.shape]}"
                )
            rates = rates[:, None].contiguous() if rates.dim() == 1 else rates.contiguous()
        data = [t.contiguous() for t in (x, *targets)]
        order = None if order is None else order.to(x.device).contiguous()
        losses, number = torch.empty(count, dtype=torch.float32, device=x.device), 0
        launched: list[torch.cuda.Event] = []
        memory = data  # of a batch
        if order is not None:
            memory = [t.new_empty(min(batch_size, rows), *t.shape[1:]) for t in data]
        while number < count:
            begin = number * batch_size
            end = min(begin + batch_size, rows)
            first = begin if order is None else 0
            batch = [t[first : first + end - begin] for t in memory]
            steps = 1 if callback else max(1, (rows - begin) // batch_size)
            done = self._run_in_one_call(batch, (*data, losses, order, rates, begin, steps, number))
            if not done:
                if order is not None:
                    batch = [t[order[begin:end]] for t in data]
                value = self._at_rates(batch, rates if rates is None else rates[number].tolist())
                if losses.dtype != value.dtype or losses.device != value.device:
                    losses = losses.to(value)
                losses[number], done = value, 1
            number += done
            if x.is_cuda and done > 1:
                launched.append(torch.cuda.current_stream(x.device).record_event())
                if len(launched) > 1:
                    launched.pop(0).synchronize()
            if callback:
                callback(number - 1, losses[number - 1])
        return losses

    def _run_in_one_call(self, batch: list[Tensor], run: tuple[Any, ...]) -> int:
        """As many steps as there is time for, from this batch on; 0 where the next is no call of a kernel."""
        if len(batch) != 2 or not torch.is_grad_enabled() or not self._may_be_one_call():
            return 0
        known = _C.known_loss(LOSSES, self.loss)
        try:
            done = self._call((self.model,), batch[0], batch[1], known, run=run) if known else 0
        except (*_REFUSALS, Slower):  # which the step by itself will meet again
            return 0
        if done is NotImplemented or done == 0:
            return 0
        self._way = ONE_CALL, None
        return int(done)

    def _at_rates(self, batch: list[Tensor], rates: list[float] | None) -> Any:
        """The loss of one step; with learning rates, which take the place of the groups' own for it."""
        if rates is None:
            return _loss_in(self(*batch))
        groups = self.optimizer.param_groups
        if len(rates) not in (1, len(groups)):
            raise ValueError(f"rates: expected one for each of {len(groups)} groups, got {len(rates)}")
        own = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates if len(rates) > 1 else rates * len(groups), strict=True):
                group["lr"] = rate
            return _loss_in(self(*batch))
        finally:
            for group, rate in zip(groups, own, strict=False):
                group["lr"] = rate

    # torch.compile has nothing to gain here, and cannot follow all that a step does to an optimizer.

    @_disable_dynamo
    def _untraced(self, x: Any, *targets: Any) -> Any:
        return self(x, *targets)

    @_disable_dynamo
    def _untraced_run(self, *data: Tensor, **options: Any) -> Tensor:
        return self.run(*data, **options)

    # ---- which way

    def _check_options(self) -> None:
        """Raises Slower where a step is the loop whatever the batch."""
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise Slower(_LBFGS)
        if why := _C.why_not_trained(OPTIMIZERS, self.optimizer):
            raise Slower(why)
        if self.accumulate > 1:
            raise Slower("accumulate: gradients outlive a call")
        if self.process_group is not None:
            raise Slower("process_group: processes share gradients")

    def _may_be_one_call(self) -> bool:
        return self.accumulate == 1 and self.process_group is None

    def _expected_way(self) -> tuple[str, str | None]:
        """What the first call will be, if the model lets it."""
        try:
            self._check_options()
        except Slower as slower:
            return LOOP, str(slower)
        return (ONE_CALL, None) if _C.known_loss(LOSSES, self.loss) else (_TWO_CALLS, NOT_KNOWN)

    # ---- in calls of kernels

    def _fast_step(self, x: Any, targets: tuple[Any, ...], layers: Layers) -> Any:
        """One step, from what comes to the last layers.

        Raises:
            Slower: with nothing changed, where it is to be the loop.
        """
        if not layers[0]:
            raise Slower("model: it does not end by a chain of layers")
        if type(x) not in functional.TENSORS or x.requires_grad:
            raise Slower("model: what comes to its last layers requires a gradient")
        weight = layers[0][0]
        device = "cpu" if weight.is_cpu else weight.device.type
        if torch.is_autocast_enabled(device):
            raise Slower(f"autocast is enabled on {device}")
        known = (
            _C.known_loss(LOSSES, self.loss)
            if len(targets) == 1 and type(targets[0]) in functional.TENSORS
            else None
        )
        why = NOT_KNOWN
        if known is not None:
            try:
                value = self._call(layers, x, targets[0], known)
            except _REFUSALS as error:
                why = str(error)  # torch will do it, or raise
            else:
                if value is not NotImplemented:
                    self._way = ONE_CALL, None
                    return value
        if device in _CAPTURED and known is not None:
            value, self.grad_norm = self._graphs.step(
                x, targets[0], layers, self.loss, known, self.optimizer, self.max_grad_norm
            )
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedulers look at
            self._way = "as a CUDA graph", None
            return value
        if device in _CAPTURED or device != "cpu":
            raise Slower(f"on {device} a step is the loop, or with a loss that the kernels know a CUDA graph")
        parameters, is_clipped = [*parameters_of(layers)], self.max_grad_norm is not None
        if slower := _C.why_not_trained(OPTIMIZERS, self.optimizer, parameters, is_clipped):
            raise Slower(slower)
        self._way = _TWO_CALLS, why
        return self._step_around(x, targets, layers)

    def _call(
        self,
        model: tuple[nn.Module] | Layers,
        x: Any,
        target: Any,
        loss: tuple[Any, ...],
        left: Sequence[Tensor | None] = (),
        run: tuple[Any, ...] | None = None,
    ) -> Any:
        """The op train_step_, or a run, of a model that is a chain of layers from its input on, or of those.

        Returns NotImplemented where the model is none, or somebody looks on, or on a GPU where a step is more
        than one launch.

        Raises:
            Slower: where the optimizer does not let it.

        And what the op raises; with nothing changed, all of them.
        """
        is_elsewhere = type(x) in functional.TENSORS and not x.is_cpu
        bound, device = self.max_grad_norm, x.device if is_elsewhere else _CPU
        norm = None if bound is None else torch.empty((), device=device)
        if (is_elsewhere or not self._workspace.is_cpu) and self._workspace.device != device:
            self._workspace = torch.empty(0, dtype=torch.uint8, device=device)
        value = _C.train_step(
            KNOWN,
            OPTIMIZERS,
            model,
            x,
            target,
            loss,
            left,
            self.optimizer,
            norm,
            bound or 0.0,
            self._workspace,
            run,
        )
        if type(value) is str:
            raise Slower(value)
        if value is not NotImplemented:
            self.grad_norm = norm
        return value

    def _step_around(self, x: Tensor, targets: tuple[Any, ...], layers: Layers) -> Any:
        """Forward, the loss as autograd differentiates it, then backward and update in one call.

        What the loss sees is the layers' own autograd node, so it may do all that it may do in the loop. At
        the end only, when all of the output's gradient has come to the node, it keeps that for the kernel.
        """
        y = functional.network(x, *layers)
        node = y.grad_fn
        result = self.loss(y, *targets)
        value = _loss_in(result)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        arrival = _C.differentiate_down_to(node, value, trained) if isinstance(value, Tensor) else None
        if arrival is None:  # the layers are torch's own operations
            self._take_slower("the kernels do not cover the layers, or what comes to them")
            self._backward(value)
            return _detached(result)
        grad_y, left, others = arrival
        if others.count(None) == len(others):
            if grad_y is None:  # and nothing has a gradient
                return _detached(result)
            try:
                self._call(layers, x, grad_y, _GIVEN, left)
            except (*_REFUSALS, Slower) as error:
                why = str(error)
            else:
                return _detached(result)
        else:
            why = "loss: gradients come to parameters by other ways than the model's output"
        self._take_slower(why)
        gradients = dict(zip(trained, others, strict=True))
        if grad_y is not None:
            found = _gradients(x, layers, grad_y, left)
            for parameter, own in zip(parameters_of(layers), found, strict=True):
                other = gradients.get(parameter)
                gradients[parameter] = own if other is None else other if own is None else own + other
        drop_gradients(self.optimizer)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self._finish_gradients()
        take_step(self.optimizer)
        return _detached(result)

    # ---- the loop

    def _take_slower(self, why: str) -> None:
        """Notes that the step is the loop, or raises where it must not be."""
        if self.strict:
            raise ValueError(f"strict: expected no step that is the standard loop, but {why}")
        self._way = LOOP, why

    def _standard_step(self, x: Any, targets: tuple[Any, ...], layers: Layers, why: str) -> Any:
        """The loop, from what comes to the last layers; without any, from what the model has returned."""
        self._take_slower(why)
        result = self.loss(functional.network(x, *layers) if layers[0] else x, *targets)
        self._backward(_loss_in(result))
        return _detached(result)

    def _backward(self, value: Any) -> None:
        """The rest of the loop."""
        if self._calls % self.accumulate == 0:
            drop_gradients(self.optimizer)
        (value / self.accumulate if self.accumulate > 1 else value).backward()
        self._calls += 1
        if self._calls % self.accumulate == 0:
            self._finish_gradients()
            take_step(self.optimizer)

    def _finish_gradients(self) -> None:
        """Makes them the mean of all processes', and clips them."""
        if self.process_group is not None:
            size = torch.distributed.get_world_size(self.process_group)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad, group=self.process_group)
                    parameter.grad /= size
        if self.max_grad_norm is not None:
            self.grad_norm = clip_grad_norm_(self.model.parameters(), self.max_grad_norm)

    def _closure_step(self, x: Any, targets: tuple[Any, ...]) -> Any:
        """One step of an optimizer that asks for the loss itself, as often as it likes."""
        self._take_slower(_LBFGS)
        first: Any = None

        def closure() -> Any:
            nonlocal first
            drop_gradients(self.optimizer)
            result = self.loss(self.model(x), *targets)
            value = _loss_in(result)
            value.backward()
            self._finish_gradients()
            first = result if first is None else first
            return value

        self.optimizer.step(closure)
        return _detached(first)


ONE_CALL, _TWO_CALLS, LOOP = "in one call", "in two calls around the loss", "in the standard loop"
NOT_KNOWN = "loss: the kernels know torch's own, of one target, as a mean or a sum"
_LBFGS = "optimizer: LBFGS asks for the loss itself"
_GIVEN = ("given", False, None, None, 0, 0.0)  # a loss whose gradient is known
_REFUSALS = IndexError, RuntimeError, TypeError, ValueError  # of the op


def checked_rows(data: tuple[Tensor, ...], batch_size: int, order: Tensor | None) -> int:
    """How many rows the steps of a run take together."""
    for number, t in enumerate(data):
        name = f"target {number}" if number else "x"
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dim() == 0 or len(t) != len(data[0]):
            rows = len(data[0]) if number else "rows"
            raise ValueError(f"{name}: expected shape [{rows}, ...], got {[*t.shape]}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a number of rows from 1 on, got {batch_size}")
    rows = len(data[0])
    if order is None:
        return rows
    if not isinstance(order, Tensor) or order.dtype != torch.int64:
        raise TypeError(f"order: expected a tensor of int64, got {getattr(order, 'dtype', type(order))}")
    if order.dim() != 1:
        raise ValueError(f"order: expected shape [any], got {[*order.shape]}")
    for row in (int(order.min()), int(order.max())) if len(order) else ():
        if not 0 <= row < rows:
            raise IndexError(f"order: expected rows from 0 to {rows - 1}, got {row}")
    return len(order)


def _loss_in(result: Any) -> Any:
    """The loss, of what a callable returned for it."""
    return result[0] if isinstance(result, tuple) else result


def _detached(result: Any) -> Any:
    """What a step returns of that."""
    return (result[0].detach(), *result[1:]) if isinstance(result, tuple) else result.detach()


def _gradients(
    x: Tensor, layers: Layers, grad_y: Tensor, left: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Of the layers' parameters, as `parameters_of` has them; None where they require none."""
    weights, biases, activations = layers
    count = len(weights)
    numbered = [
        (p, 1 + i + count * (k > 0)) for i in range(count) for k, p in enumerate((weights[i], biases[i]))
    ]
    own = [(p, number) for p, number in numbered if p is not None]
    wanted = [number for p, number in own if p.requires_grad]
    names, parameters = zip(*map(resolved, activations), strict=True)
    with torch.no_grad():
        found = _network_backward(grad_y, x, weights, left, names, sum(parameters, ()), wanted)
    gradients = iter(found)
    return [next(gradients) if p.requires_grad else None for p, _ in own]
