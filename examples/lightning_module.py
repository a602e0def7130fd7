"""Lightning: a LightningModule, and what it takes to fuse it, trained by a Trainer.

It trains twice, stock and fused, the rounds of both in turns.
"""

import logging
import sys
import warnings
from statistics import median
from time import perf_counter

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastmlp

ROUNDS = int(sys.argv[1]) if sys.argv[1:] else 7

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
warnings.filterwarnings("ignore", module="lightning")  # so few batches, so few workers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train_set, test_x, test_y = TensorDataset(x[:1437], y[:1437]), x[1437:], y[1437:]


class Digits(L.LightningModule):
    """Pictures of 8x8 pixels to logits of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class FastDigits(Digits):
    """The same, fused: these lines may as well be in the module itself."""

    def configure_model(self) -> None:
        fastmlp.fuse(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return fastmlp.Adam(self.parameters(), lr=1e-3)


seconds: dict[str, list[float]] = {"stock": [], "fastmlp": []}
models = {}
for _ in range(ROUNDS):
    for name, module in zip(seconds, (Digits, FastDigits), strict=True):
        L.seed_everything(0, verbose=False)
        model = models[name] = module()
        trainer = L.Trainer(max_epochs=5, accelerator="cpu", **QUIET)
        start = perf_counter()
        trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True))
        seconds[name].append(perf_counter() - start)

for name, model in models.items():
    with torch.inference_mode():
        loss = F.cross_entropy(model(test_x), test_y)
    print(f"{name:8} {median(seconds[name]):.2f} s for 5 epochs, test loss {loss:.5f}")
stock, fused = (median(own) for own in seconds.values())
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")
