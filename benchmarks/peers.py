"""How much faster than the steps of JAX, TensorFlow and Keras fastmlp.TrainStep is, with SGD and with Adam.

Each side has a process of its own, since the thread pools of two libraries in one process get in each other's
way. The processes take turns, and are bound to the same processors, as many as there are threads. All start
from the same weights and see the same batch, which is there in the library's own form, and before anything is
timed their first losses must agree. A peer whose package is missing is left out.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from importlib.metadata import packages_distributions, version
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fastmlp
import timing
from command import Parser, benchmark_parser, execute, measured, start, table_output
from rows import write_rows
from shapes import GRID
from steps import ADAMS_LEARNING_RATE, CPU, LEARNING_RATE, Cell, one_call

NAME = "peers"
LEAST, MEAN = 1.05, 1.8  # times faster than JAX that every cell and the geometric mean are to be: goals
LOSSES_COMPARED = 5
TOLERANCE = 1e-4  # relative, of a loss in float32
REST_SECONDS = 0.1  # between turns: threads that have no more work spin, OpenBLAS's for 30 milliseconds

RATES = {"sgd": LEARNING_RATE, "adam": ADAMS_LEARNING_RATE}  # by optimizer
BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's defaults in torch


class Case(NamedTuple):
    """A training step."""

    cell: Cell
    optimizer: str

    def __str__(self) -> str:
        """As network @ batch, optimizer."""
        return f"{self.cell}, {'SGD' if self.optimizer == 'sgd' else 'Adam'}"

    def columns(self) -> dict[str, object]:
        """The columns of a CSV file that name it."""
        return {**self.cell.columns(), "optimizer": self.optimizer}


Steps = Callable[[int], float]  # takes so many steps, and waits for them; the loss of the last
Side = Callable[[Any], Steps]  # of a case, or of another thing that can be done again and again


class Peer(NamedTuple):
    """A side, and what it needs: it is left out where that is missing."""

    make: Side
    module: str = "torch"
    program: str = ""

    @property
    def missing(self) -> str:
        """What is not here; empty where all is."""
        if self.program and not shutil.which(self.program):
            return self.program
        return "" if self.module in packages_distributions() else self.module

    @property
    def version(self) -> str:
        """Of the package."""
        return version(packages_distributions()[self.module][0])


# ---- the sides: each makes, for a case, what takes its steps


def fastmlp_steps(case: Case) -> Steps:
    """By fastmlp.TrainStep."""
    make_optimizer = {"sgd": fastmlp.SGD, "adam": fastmlp.Adam}[case.optimizer]
    step = one_call(case.cell, make_optimizer, lr=RATES[case.optimizer])

    def steps(count: int) -> float:
        for _ in range(count):
            value = step()
        return value.item()

    return steps


def jax_steps(case: Case) -> Steps:
    """By a jitted JAX function that is given the parameters to keep, as JAX's own examples write it.

    Steps are enqueued, as in a training loop; only the last is waited for. Weights are [in_features,
    out_features], as is usual there.
    """
    import jax
    import jax.numpy as jnp

    cell, rate = case.cell, RATES[case.optimizer]

    def cross_entropy(y: Any, target: Any) -> Any:
        of_target = jnp.take_along_axis(y, target[:, None], axis=-1)
        return jnp.mean(jax.nn.logsumexp(y, axis=-1, keepdims=True) - of_target)

    losses: dict[str, Callable[[Any, Any], Any]] = {
        "cross_entropy": cross_entropy,
        "mse": lambda y, target: jnp.mean((y - target) ** 2),
        "bce": lambda y, target: jnp.mean(jax.nn.softplus(y) - target * y),
    }

    activation = {
        "relu": jax.nn.relu,
        "tanh": jnp.tanh,
        "elu": jax.nn.elu,
        "gelu": partial(jax.nn.gelu, approximate=False),
    }[cell.network.activation]

    def loss(parameters: list[Any], x: Any, target: Any) -> Any:
        *hidden, last_weight, last_bias = parameters
        for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
            x = activation(x @ weight + bias)
        return losses[cell.network.loss](x @ last_weight + last_bias, target)

    def sgd(parameters: Any, gradients: Any, state: Any) -> tuple[Any, Any]:
        return [w - rate * g for w, g in zip(parameters, gradients, strict=True)], state

    def adam(parameters: Any, gradients: Any, state: Any) -> tuple[Any, Any]:
        means, squares, count = state
        count += 1
        means = [m + (1 - BETAS[0]) * (g - m) for m, g in zip(means, gradients, strict=True)]
        squares = [BETAS[1] * v + (1 - BETAS[1]) * g * g for v, g in zip(squares, gradients, strict=True)]
        step, root = rate / (1 - BETAS[0] ** count), jnp.sqrt(1 - BETAS[1] ** count)
        moments = zip(parameters, means, squares, strict=True)
        return [w - step * m / (jnp.sqrt(v) / root + EPS) for w, m, v in moments], (means, squares, count)

    update = {"sgd": sgd, "adam": adam}[case.optimizer]

    def one(kept: Any, x: Any, target: Any) -> tuple[Any, Any]:
        parameters, state = kept
        value, gradients = jax.value_and_grad(loss)(parameters, x, target)
        return update(parameters, gradients, state), value

    jax.config.update("jax_platforms", "cpu")
    step = jax.jit(one, donate_argnums=0)
    x, target = (jnp.array(tensor.numpy()) for tensor in cell.data())
    parameters = [jnp.array(tensor.t().numpy()) for tensor in cell.weights()]
    zeros = [[jnp.zeros_like(w) for w in parameters] for _ in BETAS]
    kept: Any = parameters, (*zeros, jnp.float32(0)) if case.optimizer == "adam" else ()

    def steps(count: int) -> float:
        nonlocal kept
        for _ in range(count):
            kept, value = step(kept, x, target)
        jax.block_until_ready(kept)
        return float(value)

    return steps


def tensorflow() -> Any:
    """TensorFlow, on the CPU, with as many threads as torch has."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow

    threading = tensorflow.config.threading
    if threading.get_intra_op_parallelism_threads() == 0:  # it can be set once, before the first op
        threading.set_intra_op_parallelism_threads(torch.get_num_threads())
        threading.set_inter_op_parallelism_threads(torch.get_num_threads())
    return tensorflow


def tensorflow_steps(case: Case, compiles: bool = False) -> Steps:
    """By a tf.function, whose updates are TensorFlow's own kernels; compiled by XLA or not."""
    tf = tensorflow()
    cell, rate = case.cell, RATES[case.optimizer]
    losses: dict[str, Callable[[Any, Any], Any]] = {
        "cross_entropy": lambda y, target: tf.nn.sparse_softmax_cross_entropy_with_logits(target, y),
        "mse": lambda y, target: tf.math.squared_difference(y, target),
        "bce": lambda y, target: tf.nn.sigmoid_cross_entropy_with_logits(target, y),
    }
    activation = {"relu": tf.nn.relu, "tanh": tf.tanh, "elu": tf.nn.elu, "gelu": tf.nn.gelu}
    x, target = (tf.constant(tensor.numpy()) for tensor in cell.data())
    parameters = [tf.Variable(tensor.t().numpy()) for tensor in cell.weights()]
    means, squares = ([tf.Variable(tf.zeros_like(w)) for w in parameters] for _ in BETAS)
    powers = [tf.Variable(beta) for beta in BETAS]

    def sgd(gradients: Any) -> None:
        for w, g in zip(parameters, gradients, strict=True):
            tf.raw_ops.ResourceApplyGradientDescent(var=w.handle, alpha=rate, delta=g)

    def adam(gradients: Any) -> None:
        own = {"beta1_power": powers[0], "beta2_power": powers[1], "beta1": BETAS[0], "beta2": BETAS[1]}
        eps = EPS * tf.sqrt(1 - powers[1])
        for w, m, v, g in zip(parameters, means, squares, gradients, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=w.handle, m=m.handle, v=v.handle, lr=rate, epsilon=eps, grad=g, **own
            )
        for power, beta in zip(powers, BETAS, strict=True):
            power.assign(power * beta)

    update = {"sgd": sgd, "adam": adam}[case.optimizer]

    @tf.function(jit_compile=compiles)  # type: ignore[untyped-decorator]
    def step(x: Any, target: Any) -> Any:
        *hidden, last_weight, last_bias = parameters
        with tf.GradientTape() as tape:
            for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
                x = activation[cell.network.activation](x @ weight + bias)
            value = tf.reduce_mean(losses[cell.network.loss](x @ last_weight + last_bias, target))
        update(tape.gradient(value, parameters))
        return value

    def steps(count: int) -> float:
        for _ in range(count):
            value = step(x, target)
        return float(value)

    return steps


def keras_steps(case: Case) -> Steps:
    """By train_on_batch of a compiled Keras model, on TensorFlow; the loss is the mean of those of the steps.

    A step is a call, as on the other sides: fit takes many in one where it is given steps_per_execution.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"
    tf = tensorflow()
    import keras

    cell, network = case.cell, case.cell.network
    losses = {
        "cross_entropy": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "mse": keras.losses.MeanSquaredError(),
        "bce": keras.losses.BinaryCrossentropy(from_logits=True),
    }
    *hidden, outputs = network.sizes[1:]
    model = keras.Sequential([keras.Input(network.sizes[:1])])
    for size in hidden:
        model.add(keras.layers.Dense(size, network.activation))
    model.add(keras.layers.Dense(outputs))
    model.set_weights([tensor.t().numpy() for tensor in cell.weights()])
    optimizer = {
        "sgd": partial(keras.optimizers.SGD, LEARNING_RATE),
        "adam": partial(keras.optimizers.Adam, RATES["adam"], *BETAS, EPS),
    }[case.optimizer]()
    model.compile(optimizer, losses[network.loss])
    x, target = (tf.constant(tensor.numpy()) for tensor in cell.data())

    def steps(count: int) -> float:
        model.reset_metrics()
        for _ in range(count):
            value = model.train_on_batch(x, target)
        return float(value)

    return steps


PEERS: dict[str, Peer] = {
    "jax": Peer(jax_steps, "jax"),
    "tensorflow": Peer(tensorflow_steps, "tensorflow"),
    "tensorflow_xla": Peer(partial(tensorflow_steps, compiles=True), "tensorflow"),
    "keras": Peer(keras_steps, "keras"),
}
TITLES = {"jax": "JAX", "tensorflow": "TensorFlow", "tensorflow_xla": "TensorFlow, XLA", "keras": "Keras"}


# ---- in a side's process

own: list[Side] = []  # the side


def settle(side: Side, threads: int) -> None:
    """Binds the process to as many processors as it may have threads, which is how JAX sizes its pool.

    What libraries print is thrown away: what goes wrong comes back as an exception.
    """
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the measuring process ends this one
    own.append(side)


@lru_cache(maxsize=1)
def made(case: Any) -> Steps:
    """The side's steps, which go on where they were left until another case is asked for."""
    return own[0](case)


def first_losses(case: Any) -> list[float]:
    """The losses of the first steps."""
    steps = made(case)
    return [steps(1) for _ in range(LOSSES_COMPARED)]


def warm_up(case: Any) -> float:
    """Until all that the first steps pay for is paid; the least seconds of a step."""
    steps = made(case)
    return timing.warm_up(lambda: steps(1), CPU)


def seconds(case: Any, count: int) -> float:
    """Of a step, where so many follow each other and its threads are awake."""
    steps = made(case)
    steps(count)
    return timing.seconds_of(lambda: steps(count), CPU) / count


# ---- in the measuring process


def present(peers: Mapping[str, Peer], say: Callable[[str], object]) -> dict[str, Peer]:
    """Those that have all they need here; of the others it is said what is missing."""
    missing = {name: peer.missing for name, peer in peers.items()}
    for name, what in missing.items():
        if what:
            say(f"{name} is left out: {what} is not installed here")
    return {name: peer for name, peer in peers.items() if not missing[name]}


@contextmanager
def processes(threads: int, sides: Mapping[str, Side]) -> Iterator[dict[str, Executor]]:
    """A process for each side, bare of what this one has loaded and started."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=context, initializer=settle, initargs=(side, threads))
            )
            for name, side in sides.items()
        }


class Result(NamedTuple):
    """What was measured of each side in one case."""

    case: Any
    samples: timing.Samples

    def seconds(self, side: str) -> timing.Quantiles:
        """Of a step."""
        return timing.summarise({side: self.samples[side]})[side].seconds

    def speedup(self, side: str, other: str) -> timing.Quantiles:
        """How many times faster than another a side is, round by round."""
        return timing.summarise({name: self.samples[name] for name in (other, side)})[side].speedup


def check(case: object, losses: Mapping[str, Sequence[float]]) -> None:
    """Ends the measurement where the sides don't compute the same."""
    first, *others = losses.values()
    if not all(
        math.isclose(a, b, rel_tol=TOLERANCE) for own in others for a, b in zip(first, own, strict=True)
    ):
        raise SystemExit(f"{case}: the losses differ, so nothing is measured: {losses}")


def measure(case: Any, workers: Mapping[str, Executor], rounds: int) -> Result:
    """Checks the sides against each other, and times them in turns."""

    def on(name: str, function: Callable[..., Any], *arguments: object) -> Any:
        return workers[name].submit(function, case, *arguments).result()

    check(case, {name: on(name, first_losses) for name in workers})
    counts = {name: max(1, round(timing.ROUND_SECONDS / on(name, warm_up))) for name in workers}
    samples: timing.Samples = {name: [] for name in workers}
    for index in range(rounds):
        for name in timing.in_turn(list(workers), index):
            time.sleep(REST_SECONDS)
            samples[name].append([on(name, seconds, counts[name])])
    return Result(case, samples)


# ---- reporting


def table(results: Sequence[Result], peers: Sequence[str], whole_grid: bool) -> Table:
    """A case a row, then the geometric means; JAX's target is that of the whole grid."""
    titles = [f"× {TITLES[name]}" for name in peers]
    table = Table("", "ms", *titles, "20 to 80 %", "target", box=box.SIMPLE_HEAD)
    for title in table.columns[1:]:
        title.justify = "right"
    for result in results:
        speedups = [result.speedup("fastmlp", name) for name in peers]
        table.add_row(
            str(result.case),
            f"{1e3 * result.seconds('fastmlp').p50:.3f}",
            *(f"{speedup.p50:.2f}" for speedup in speedups),
            f"{speedups[0].p20:.2f} - {speedups[0].p80:.2f}",
            f"{LEAST:.2f}" if peers[0] == "jax" else "",
        )
    table.add_section()
    means = (geometric_mean([result.speedup("fastmlp", name).p50 for result in results]) for name in peers)
    target = f"{MEAN:.2f}" if whole_grid and peers[0] == "jax" else ""
    table.add_row("geometric mean", "", *(f"{mean:.2f}" for mean in means), "", target)
    return table


def row(result: Result, job: Mapping[str, str | int]) -> dict[str, object]:
    """One line of the CSV file; what was left out is empty."""
    columns = {**result.case.columns(), **result.seconds("fastmlp").times(1e3).columns("ms", 6)}
    for name in PEERS:
        is_there = name in result.samples
        milliseconds = result.seconds(name).times(1e3) if is_there else None
        speedup = result.speedup("fastmlp", name) if is_there else None
        columns |= timing.columns(milliseconds, f"{name}_ms", 6)
        columns |= timing.columns(speedup, f"{name}_speedup", 4)
    return {**columns, "target": LEAST, **job}


def versions(peers: Mapping[str, Peer], present: Mapping[str, Peer]) -> dict[str, str]:
    """By package, of those that are not fastmlp's own; empty for one that is missing."""
    return {
        peer.module: peer.version if name in present else ""
        for name, peer in peers.items()
        if peer.module != "torch"
    }


def parser() -> Parser:
    """The command line."""
    parser = benchmark_parser((__doc__ or "").split("\n")[0], [network.name for network in GRID])
    parser.add_argument("--optimizer", choices=RATES, help="one of them alone (both)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help=f"{', '.join(PEERS)} (all)")
    return parser


def run(parser: Parser, options: argparse.Namespace) -> None:
    """The whole grid, to table and file."""
    options.columns = options.optimizer or options.peers  # a part, as a part of the grid is
    job, output = start(parser, options), table_output()
    wanted = {name: peer for name, peer in PEERS.items() if not options.peers or name in options.peers}
    peers = present(wanted, output.print)
    if not peers:
        parser.error("no peer is installed here; make bench-peers has an environment with all")
    job |= versions(PEERS, peers)
    cases = [
        Case(Cell(network, batch), optimizer)
        for network in GRID
        for batch in network.batches
        for optimizer in RATES
        if (not options.only or network.name in options.only)
        if options.optimizer in (None, optimizer)
    ]
    sides = {**{name: peer.make for name, peer in peers.items()}, "fastmlp": fastmlp_steps}
    with timing.all_or_none(options.output) as folder, processes(int(job["threads"]), sides) as workers:
        output.print(timing.in_words(job))
        results = [measure(case, workers, options.rounds) for case in measured(cases, Console(stderr=True))]
        write_rows(folder / f"{NAME}.csv", [row(result, job) for result in results])
    output.print(table(results, list(peers), whole_grid=not options.only))
    output.print(f"{options.output / NAME}.csv is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
