"""How much faster than stock the training is that people do: their losses, optimizers and clipping.

Each job is the update of a published trainer or example, on random data: the same model, from the same
weights, by stock's loop (the best of its optimizer's variants), by the loop with a fused model, optimizer and
clipping, and by fastmlp.TrainStep. The sides take turns.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

import fastmlp
import timing
from command import Parser, benchmark_parser, execute, measure_all
from shapes import stock_mlp
from steps import CPU
from timing import Call

NAME = "training"


class Job(NamedTuple):
    """What is trained, and how."""

    name: str
    what: str
    model: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    batch: Callable[[], tuple[Tensor, ...]]
    optimizer: Callable[..., torch.optim.Optimizer]
    max_grad_norm: float | None = None


class Heads(nn.Module):
    """Several networks of one input, trained together: an actor and a critic, or twin critics."""

    def __init__(self, *networks: nn.Module) -> None:
        """See the class."""
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Their outputs."""
        return [network(x) for network in self.networks]


def clipped_objective(mean: Tensor, action: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """PPO's loss of a Gaussian policy whose deviation is 1 (Schulman et al., 2017)."""
    ratio = (-0.5 * (action - mean).square().sum(-1) - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def actor_and_critic(
    outputs: list[Tensor], action: Tensor, old: Tensor, gain: Tensor, value: Tensor
) -> Tensor:
    """The policy's loss, and half of the critic's."""
    return clipped_objective(outputs[0], action, old, gain) + 0.5 * F.mse_loss(outputs[1].flatten(), value)


def twin_critics(outputs: list[Tensor], target: Tensor) -> Tensor:
    """SAC's loss of both."""
    return 0.5 * (F.mse_loss(outputs[0], target) + F.mse_loss(outputs[1], target))


def heat_equation(u: Tensor, x: Tensor) -> Tensor:
    """The mean square of u_t - u_xx, where x has time in its first column."""
    first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)[0]
    return (first[:, 0] - second[:, 1]).square().mean()


def policy_batch(batch: int, features: int, actions: int) -> tuple[Tensor, ...]:
    """Observations, actions, their log-probabilities and advantages."""
    return (
        torch.randn(batch, features),
        torch.randn(batch, actions),
        -0.5 * torch.rand(batch) * actions,
        torch.randn(batch),
    )


def points() -> tuple[Tensor, ...]:
    """Points, which derivatives are taken by, twice: for the model and for the loss."""
    x = torch.rand(2048, 2).requires_grad_()
    return x, x


adam = partial(torch.optim.Adam, lr=3e-4)
tanh = partial(stock_mlp, activation="tanh")
JOBS = (
    Job(
        "ppo",
        "PPO, actor and critic of 64-64 @ 64, clipped",
        lambda: Heads(tanh(8, 64, 64, 4), tanh(8, 64, 64, 1)),
        actor_and_critic,
        lambda: (*policy_batch(64, 8, 4), torch.randn(64)),
        adam,
        0.5,
    ),
    Job(
        "pendulum",
        "PPO, policy of 64-64 @ 256",
        lambda: tanh(3, 64, 64, 1),
        clipped_objective,
        lambda: policy_batch(256, 3, 1),
        adam,
    ),
    Job(
        "policy",
        "PPO, policy of 256-256 @ 64, clipped",
        lambda: stock_mlp(17, 256, 256, 6),
        clipped_objective,
        lambda: policy_batch(64, 17, 6),
        adam,
        0.5,
    ),
    Job(
        "sac",
        "SAC, twin critics of 256-256 @ 256",
        lambda: Heads(stock_mlp(23, 256, 256, 1), stock_mlp(23, 256, 256, 1)),
        twin_critics,
        lambda: (torch.randn(256, 23), torch.randn(256, 1)),
        adam,
    ),
    Job(
        "tabular",
        "AdamW, 30-256-256-2 @ 128",
        lambda: stock_mlp(30, 256, 256, 2),
        nn.CrossEntropyLoss(),
        lambda: (torch.randn(128, 30), torch.randint(2, (128,))),
        partial(torch.optim.AdamW, lr=1e-3),
    ),
    Job(
        "coordinates",
        "32-64-64-64-3 @ 65536",
        lambda: stock_mlp(32, 64, 64, 64, 3),
        nn.MSELoss(),
        lambda: (torch.randn(65536, 32), torch.rand(65536, 3)),
        adam,
    ),
    Job(
        "physics",
        "second derivatives, 2-64-64-64-1 @ 2048",
        lambda: tanh(2, 64, 64, 64, 1),
        heat_equation,
        points,
        adam,
    ),
    Job(
        "higgs",
        "HIGGS, 300-300-300-300-300 @ 100",
        lambda: tanh(28, 300, 300, 300, 300, 300, 1),
        nn.BCEWithLogitsLoss(),
        lambda: (torch.randn(100, 28), torch.randint(2, (100, 1)).float()),
        partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    ),
)


# ---- the sides


def loop(job: Job, model: nn.Module, fuses: bool, **options: bool) -> Call:
    """The standard loop."""
    optimizer, batch = job.optimizer(model.parameters(), **options), job.batch()
    clip = nn.utils.clip_grad_norm_
    if fuses:
        fastmlp.fuse(model)
        fastmlp.fuse(optimizer)
        clip = fastmlp.clip_grad_norm_

    def step() -> None:
        value = job.loss(model(batch[0]), *batch[1:])
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if job.max_grad_norm is not None:
            clip(model.parameters(), job.max_grad_norm)
        optimizer.step()

    return step


STOCK: dict[str, Mapping[str, bool]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


class Result(NamedTuple):
    """What was measured of one job."""

    job: Job
    stock: str  # the best of its variants
    seconds: dict[str, timing.Quantiles]
    loop: timing.Quantiles  # times as fast
    step: timing.Quantiles
    way: str  # of the step


def measure(job: Job, rounds: int) -> list[Result]:
    """Times all sides in turns."""
    torch.manual_seed(0)
    model = job.model()
    calls: dict[str, Call] = {
        name: loop(job, copy.deepcopy(model), False, **options) for name, options in STOCK.items()
    }
    calls["loop"] = loop(job, copy.deepcopy(model), True)
    own = fastmlp.fuse(copy.deepcopy(model))  # where its end is not all that there is
    step = fastmlp.TrainStep(own, job.loss, job.optimizer(own.parameters()), max_grad_norm=job.max_grad_norm)
    batch = job.batch()
    calls["step"] = lambda: step(*batch)
    samples = timing.sample(calls, CPU, rounds)
    seconds = {name: timed.seconds for name, timed in timing.summarise(samples).items()}
    best = min(STOCK, key=lambda name: seconds[name].p50)
    over = timing.summarise({name: samples[name] for name in (best, "loop", "step")})
    way = repr(step).rpartition("), ")[2].partition(":")[0]
    return [Result(job, best, seconds, over["loop"].speedup, over["step"].speedup, way)]


def table(results: Sequence[Result]) -> Table:
    """A job a row."""
    titles = ("", "stock ms", "stock", "loop", "step", "the step is")
    table = Table(*titles, box=box.SIMPLE_HEAD)
    for result in results:
        stock = f"{1e3 * result.seconds[result.stock].p50:.3f}"
        speedups = f"{result.loop.p50:.2f}", f"{result.step.p50:.2f}"
        table.add_row(result.job.what, stock, result.stock, *speedups, result.way)
    return table


def row(result: Result, job: Mapping[str, Any]) -> dict[str, object]:
    """One line of the CSV file."""
    columns: dict[str, object] = {
        "job": result.job.name,
        "what": result.job.what,
        "best": result.stock,
        "way": result.way,
    }
    for name, seconds in result.seconds.items():
        columns |= seconds.times(1e3).columns(f"{name}_ms", 6)
    speedups = result.loop.columns("loop_speedup", 4) | result.step.columns("step_speedup", 4)
    return columns | speedups | dict(job)


def parser() -> Parser:
    """The command line."""
    return benchmark_parser((__doc__ or "").split("\n")[0], [job.name for job in JOBS])


def run(parser: Parser, options: argparse.Namespace) -> None:
    """All jobs, to table and file."""
    jobs = [job for job in JOBS if not options.only or job.name in options.only]
    measure_all(parser, options, NAME, jobs, measure, row, table)


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
