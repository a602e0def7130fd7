"""How fast many networks train side by side: a step of each, by fastmlp.Ensemble and by what else there is.

A loop of stock's steps (the best of its optimizer's variants), torch.func's vmap of the stacked models with
one optimizer, a loop of fastmlp.TrainStep, and one TrainStep of an Ensemble, whose models have an optimizer
each. Gradients are clipped, each model's to a norm of its own. The sides take turns.
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
from steps import ADAMS_LEARNING_RATE, CPU, MAX_GRAD_NORM
from timing import Call
from training import STOCK

NAME = "ensemble"


class Job(NamedTuple):
    """Networks of these widths, with a batch each or one for all."""

    name: str
    what: str
    networks: int
    sizes: tuple[int, ...]
    batch: int
    is_shared: bool

    def models(self) -> list[nn.Module]:
        """The same at each call."""
        torch.manual_seed(0)
        return [stock_mlp(*self.sizes) for _ in range(self.networks)]

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        torch.manual_seed(1)
        lead = (self.batch,) if self.is_shared else (self.networks, self.batch)
        return torch.randn(*lead, self.sizes[0]), torch.randn(*lead, self.sizes[-1])


JOBS = (
    Job("population", "64 networks 8-64-64-4 @ 64", 64, (8, 64, 64, 4), 64, False),
    Job("critics", "twin critics 23-256-256-1 @ 256", 2, (23, 256, 256, 1), 256, True),
)
Optimizer = Callable[..., torch.optim.Optimizer]
# With rates that the one batch is not fitted by: gradients would become subnormal numbers.
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, lr=ADAMS_LEARNING_RATE),
    "Adam": partial(torch.optim.Adam, lr=ADAMS_LEARNING_RATE),
}


def one_by_one(job: Job, step_of: Callable[[nn.Module], Callable[[Tensor, Tensor], object]]) -> Call:
    """A step of each model."""
    steps, (x, target) = [step_of(model) for model in job.models()], job.data()
    batches = [(x, target)] * job.networks if job.is_shared else [*zip(x, target, strict=True)]

    def step() -> None:
        for own, batch in zip(steps, batches, strict=True):
            own(*batch)

    return step


def stock(job: Job, make: Optimizer, **options: bool) -> Call:
    """The standard loop, model by model."""

    def step_of(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
        optimizer = make(model.parameters(), **options)

        def step(x: Tensor, target: Tensor) -> None:
            value = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()

        return step

    return one_by_one(job, step_of)


def vmapped(job: Job, make: Optimizer) -> Call:
    """The models stacked, as torch's tutorial on model ensembling does it, and one optimizer."""
    models, (x, target) = job.models(), job.data()
    parameters, _ = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    optimizer = make(parameters.values(), fused=True)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(skeleton, parameters, (x,)), target)

    batched = None if job.is_shared else 0
    differentiate = torch.func.vmap(torch.func.grad(loss), in_dims=(0, batched, batched))

    def step() -> None:
        gradients = differentiate(parameters, x, target)
        squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
        factors = (MAX_GRAD_NORM / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient * factors.view(-1, *[1] * (gradient.dim() - 1))
        optimizer.step()

    return step


def steps(job: Job, make: Optimizer) -> Call:
    """A TrainStep of each model."""
    loss = nn.MSELoss()
    return one_by_one(
        job,
        lambda model: fastmlp.TrainStep(model, loss, make(model.parameters()), max_grad_norm=MAX_GRAD_NORM),
    )


def ensemble(job: Job, make: Optimizer) -> Call:
    """A TrainStep of all models."""
    models = fastmlp.Ensemble(job.models())
    optimizers = [make(model.parameters()) for model in models.models]
    step = fastmlp.TrainStep(models, nn.MSELoss(), optimizers, max_grad_norm=MAX_GRAD_NORM, strict=True)
    return partial(step, *job.data())


OTHERS = {"vmap": vmapped, "steps": steps, "ensemble": ensemble}
COLUMNS = {"stock": "stock", "vmap": "vmap", "steps": "TrainSteps"}  # what ours is compared with


class Result(NamedTuple):
    """What was measured of one job with one optimizer."""

    job: Job
    optimizer: str
    seconds: dict[str, timing.Quantiles]  # of stock the best variant's
    speedups: dict[str, timing.Quantiles]  # of the ensemble over the others


def measure(job: Job, rounds: int) -> list[Result]:
    """Times all sides in turns, with each optimizer."""
    results = []
    for name, make in OPTIMIZERS.items():
        calls = {f"stock {kind}": stock(job, make, **options) for kind, options in STOCK.items()}
        calls |= {side: made(job, make) for side, made in OTHERS.items()}
        samples = timing.sample(calls, CPU, rounds)
        medians = timing.summarise(samples)
        best = min((side for side in calls if side not in OTHERS), key=lambda side: medians[side].seconds.p50)
        samples["stock"] = samples[best]
        seconds = {side: own.seconds for side, own in timing.summarise(samples).items()}
        speedups = {
            side: timing.summarise({key: samples[key] for key in (side, "ensemble")})["ensemble"].speedup
            for side in COLUMNS
        }
        kept = {side: seconds[side] for side in (*COLUMNS, "ensemble")}
        results.append(Result(job, name, kept, speedups))
    return results


def table(results: Sequence[Result]) -> Table:
    """A job and optimizer a row."""
    over = [f"over {name}" for name in COLUMNS.values()]
    table = Table("", "", *(f"{name} ms" for name in COLUMNS.values()), "ms", *over, box=box.SIMPLE_HEAD)
    for result in results:
        times = (f"{1e3 * own.p50:.3f}" for own in result.seconds.values())
        speedups = (f"{own.p50:.2f}" for own in result.speedups.values())
        table.add_row(result.job.what, result.optimizer, *times, *speedups)
    return table


def row(result: Result, machine: Mapping[str, Any]) -> dict[str, object]:
    """One line of the CSV file."""
    columns: dict[str, object] = {
        "job": result.job.name,
        "what": result.job.what,
        "optimizer": result.optimizer,
    }
    for name, seconds in result.seconds.items():
        columns |= seconds.times(1e3).columns(f"{name}_ms", 6)
    for name, speedup in result.speedups.items():
        columns |= speedup.columns(f"over_{name}", 4)
    return columns | dict(machine)


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
