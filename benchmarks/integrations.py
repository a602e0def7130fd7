"""How much faster models and trainers that other people wrote are, after fastmlp.fuse and nothing else.

Each trains as its own library trains, from the same weights, stock and fused in turns. What is fused of each
is written beside it. Needs the packages of the dependency group `integrations`.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import fastmlp
import timing
from command import Parser, benchmark_parser, execute, measure_all

NAME = "integrations"
CPU = torch.device("cpu")

os.environ.setdefault("KERAS_BACKEND", "torch")


class Job(NamedTuple):
    """A model in the hands of its library."""

    module: nn.Module  # what is given to fastmlp.fuse
    output: Callable[[], Tensor]  # of a fixed batch, in eval mode
    train: Callable[[int], object]  # so many steps; environment steps for reinforcement learning


# ---- the jobs: each makes its model, and says what is fused of it


def skorch() -> Job:
    """A classifier. The module is a chain: one op."""
    from skorch import NeuralNetClassifier

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 30, generator=generator).numpy()
    y = torch.randint(2, (256,), generator=generator).numpy()
    module = nn.Sequential(nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    net = NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        lr=0.1,
        batch_size=128,
        train_split=None,
        verbose=0,
    ).initialize()
    return Job(
        net.module_,
        lambda: net.forward(x, training=False),
        lambda steps: net.partial_fit(x, y, epochs=steps // 2),
    )


def lightning() -> Job:
    """The network of the tutorials, its layers called in forward: one op."""
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Digits(L.LightningModule):  # type: ignore[misc]  # whose type is unknown without the package
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(784, 500), nn.Linear(500, 10)

        def forward(self, x: Tensor) -> Any:
            return self.fc2(torch.relu(self.fc1(x.flatten(1))))

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, target = batch
            return nn.functional.cross_entropy(self(x), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 1, 28, 28, generator=generator)
    data = torch.utils.data.TensorDataset(x, torch.randint(10, (640,), generator=generator))
    loader = torch.utils.data.DataLoader(data, batch_size=64)
    module = Digits()

    def train(steps: int) -> None:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)

    return Job(module, lambda: module.eval()(x[:64]), train)


def stable_baselines3() -> Job:
    """PPO on the pendulum. The layers of policy and value with their Tanh, and the heads: an op each."""
    import gymnasium
    from stable_baselines3 import PPO

    agent = PPO("MlpPolicy", gymnasium.make("Pendulum-v1"), n_steps=64, batch_size=64, seed=0, device="cpu")
    observations = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))

    def output() -> Tensor:
        agent.policy.set_training_mode(False)
        values, log_probability, _ = agent.policy.evaluate_actions(observations, observations[:, :1])
        return torch.cat((values.squeeze(1), log_probability))

    return Job(agent.policy, output, lambda steps: agent.learn(64 * steps, reset_num_timesteps=False))


def standard_loop(module: nn.Module, features: int, outputs: int, batch: int = 128) -> Job:
    """A module that takes rows of numbers, in the loop that everybody writes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, features, generator=generator)
    target = torch.randint(outputs, (batch,), generator=generator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    def train(steps: int) -> None:
        module.train()
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return Job(module, lambda: module.eval()(x), train)


def rtdl_mlp() -> Job:
    """In eval mode one op; where dropout is between the layers, an op for each layer with its ReLU."""
    from rtdl_revisiting_models import MLP

    return standard_loop(MLP(d_in=30, d_out=2, n_blocks=3, d_block=256, dropout=0.1), 30, 2)


def rtdl_resnet() -> Job:
    """The two layers of a block with their ReLU: one op in eval mode, else two; other layers: an op each."""
    from rtdl_revisiting_models import ResNet

    module = ResNet(
        d_in=30,
        d_out=2,
        n_blocks=2,
        d_block=192,
        d_hidden=None,
        d_hidden_multiplier=2.0,
        dropout1=0.15,
        dropout2=0.0,
    )
    return standard_loop(module, 30, 2)


def language_model(model: Any, **inputs: Tensor) -> Job:
    """A transformer, which computes its own loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train(steps: int) -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()

    def output() -> Tensor:
        logits: Tensor = model.eval()(**inputs).logits
        return logits

    return Job(model, output, train)


def tokens() -> Tensor:
    """A batch of token ids, from 3 on: those before mean something to the models."""
    return torch.randint(3, 128, (4, 64), generator=torch.Generator().manual_seed(0))


def opt() -> Job:
    """The feed-forward of a block, with its ReLU: one op; every other Linear by itself."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=128,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=2,
        ffn_dim=512,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return language_model(OPTForCausalLM(config), input_ids=tokens(), labels=tokens())


def t5() -> Job:
    """Every Linear, with the ReLU of the feed-forwards."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=128, d_model=128, d_ff=512, d_kv=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return language_model(T5ForConditionalGeneration(config), input_ids=tokens(), labels=tokens())


def keras() -> Job:
    """A torch module as a layer. The module is a chain: one op."""
    import keras as K

    module = nn.Sequential(nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    layer = K.layers.TorchModuleWrapper(module)
    model = K.Sequential([layer])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 30, generator=generator)
    target = torch.randint(2, (128,), generator=generator)
    model.compile(
        optimizer=K.optimizers.SGD(0.1), loss=K.losses.SparseCategoricalCrossentropy(from_logits=True)
    )

    def train(steps: int) -> None:
        for _ in range(steps):
            model.train_on_batch(x, target)

    def output() -> Tensor:
        y: Tensor = model(x, training=False)
        return y

    return Job(module, output, train)


JOBS: dict[str, Callable[[], Job]] = {
    make.__name__: make
    for make in (skorch, lightning, stable_baselines3, rtdl_mlp, rtdl_resnet, opt, t5, keras)
}
STEPS = 10  # of training in a call that is timed, so that what a trainer does once does not count for all


def made(name: str, fused: bool) -> Job:
    """The job, from the same weights each time."""
    torch.manual_seed(0)
    job = JOBS[name]()
    if fused:
        fastmlp.fuse(job.module)
    return job


# ---- measuring


class Result(NamedTuple):
    """What was measured of one job."""

    name: str
    column: str  # "train", a step; or "infer"
    stock: timing.Quantiles  # seconds
    fused: timing.Quantiles
    speedup: timing.Quantiles


def measure(name: str, rounds: int) -> Iterable[Result]:
    """Times the job stock and fused in turns."""
    jobs = {side: made(name, side == "fused") for side in ("stock", "fused")}

    def inference(job: Job) -> Callable[[], object]:
        return torch.inference_mode()(job.output)

    columns: dict[str, tuple[dict[str, Callable[[], object]], int]] = {
        "train": ({side: partial(job.train, STEPS) for side, job in jobs.items()}, STEPS),
        "infer": ({side: inference(job) for side, job in jobs.items()}, 1),
    }
    for column, (calls, steps) in columns.items():
        timed = timing.summarise(timing.sample(calls, CPU, rounds))
        stock, fused = (timed[side].seconds.times(1 / steps) for side in ("stock", "fused"))
        yield Result(name, column, stock, fused, timed["fused"].speedup)


# ---- reporting


def table(results: Sequence[Result]) -> Table:
    """A job and column a row."""
    table = Table("", "", "ms", "stock ms", "times as fast", "20 to 80 %", box=box.SIMPLE_HEAD)
    for title in table.columns[2:]:
        title.justify = "right"
    for result in results:
        table.add_row(
            result.name,
            result.column,
            f"{1e3 * result.fused.p50:.3f}",
            f"{1e3 * result.stock.p50:.3f}",
            f"{result.speedup.p50:.2f}",
            f"{result.speedup.p20:.2f} - {result.speedup.p80:.2f}",
        )
    return table


def row(result: Result, job: dict[str, str | int]) -> dict[str, object]:
    """One line of the CSV file."""
    return {
        "name": result.name,
        "column": result.column,
        **result.fused.times(1e3).columns("ms", 6),
        **result.stock.times(1e3).columns("stock_ms", 6),
        **result.speedup.columns("speedup", 4),
        **job,
    }


def parser() -> Parser:
    """The command line."""
    return benchmark_parser((__doc__ or "").split("\n")[0], list(JOBS))


def run(parser: Parser, options: argparse.Namespace) -> None:
    """All jobs, to table and file."""
    measure_all(parser, options, NAME, options.only or list(JOBS), measure, row, table)


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement, with every way to fail turned into one line and an exit status."""
    return execute(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
