"""Lightning: a LightningModule that fuses itself in one line, with fastmlp's Adam, in the hands of a Trainer.

It trains twice, stock and fused, the rounds of both in turns.
"""

import logging
import sys
import warnings
from statistics import median
from time import perf_counter

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastmlp

ROUNDS = int(sys.argv[1]) if sys.argv[1:] else 7  # each of 5 epochs

warnings.filterwarnings("ignore", module="lightning")  # so few batches, so few workers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train_set = TensorDataset(x[:1437], y[:1437])


class Digits(L.LightningModule):
    """Pictures of 8x8 pixels to logits of the ten digits."""

    def __init__(self, fused: bool) -> None:
        """Makes the layers; they are fused where that is asked for."""
        super().__init__()
        self.fused = fused
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)
        if fused:
            fastmlp.fuse(self)  # the one line

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        x, target = batch
        return nn.functional.cross_entropy(self(x), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, of torch or of fastmlp."""
        adam = fastmlp.Adam if self.fused else torch.optim.Adam
        return adam(self.parameters(), lr=1e-3)


seconds: dict[str, list[float]] = {"stock": [], "fastmlp": []}
models = {}
for _ in range(ROUNDS):
    for name in seconds:
        L.seed_everything(0, verbose=False)
        models[name] = Digits(fused=name == "fastmlp")
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = perf_counter()
        trainer.fit(models[name], DataLoader(train_set, batch_size=64, shuffle=True))
        seconds[name].append(perf_counter() - start)

for name, model in models.items():
    with torch.inference_mode():
        logits = model(x[1437:])
    loss = nn.functional.cross_entropy(logits, y[1437:])
    accuracy = (logits.argmax(1) == y[1437:]).float().mean()
    print(f"{name:8} {median(seconds[name]):.2f} s, test loss {loss:.5f}, test accuracy {accuracy:.2%}")
stock, fused = (median(own) for own in seconds.values())
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")
