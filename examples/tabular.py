"""A table: from a pandas DataFrame to a classifier, by AdamW with early stopping, and a plot.

It trains twice, by the standard loop and by fastmlp.TrainStep, the epochs of both in turns.
"""

import copy
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import fastmlp

EPOCHS, PATIENCE = int(sys.argv[1]) if sys.argv[1:] else 200, 10  # at most; without a better loss
PARTS = [369, 100, 100]  # rows to learn from, to validate and to test with

frame = load_breast_cancer(as_frame=True).frame.sample(frac=1, random_state=0)
standardised = (frame - frame[: PARTS[0]].mean()) / frame[: PARTS[0]].std()
features = torch.tensor(standardised.drop(columns="target").to_numpy("float32"))  # [rows, 30]
targets = torch.tensor(frame[["target"]].to_numpy("float32"))  # [rows, 1]
(x, valid_x, test_x), (y, valid_y, test_y) = features.split(PARTS), targets.split(PARTS)


def train(model: nn.Module, fused: bool) -> Iterator[tuple[float, float]]:
    """Trains, and leaves the model at its best; after each epoch its seconds and the validation loss."""
    criterion, optimizer = nn.BCEWithLogitsLoss(), torch.optim.AdamW(model.parameters(), lr=3e-4)
    step = fastmlp.TrainStep(model, criterion, optimizer)
    shuffle = torch.Generator().manual_seed(0)
    best, best_epoch = float("inf"), 0
    for epoch in range(EPOCHS):
        start = perf_counter()
        for rows in torch.randperm(len(x), generator=shuffle).split(32):
            if fused:
                step(x[rows], y[rows])
            else:
                loss = criterion(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        seconds = perf_counter() - start

        with torch.inference_mode():
            valid_loss = criterion(model(valid_x), valid_y).item()
        yield seconds, valid_loss
        if valid_loss < best:
            best, best_epoch, state = valid_loss, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch == PATIENCE:
            break
    model.load_state_dict(state)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
models = {"stock": model, "fastmlp": copy.deepcopy(model)}
epochs = zip(*zip_longest(*(train(model, name == "fastmlp") for name, model in models.items())), strict=True)
ms = {}
for name, own in zip(models, epochs, strict=True):
    seconds, losses = zip(*filter(None, own), strict=True)  # None where the other trained on
    ms[name] = 1e3 * median(seconds)
    accuracy = ((models[name](test_x) > 0) == test_y).float().mean()
    print(f"{name:8} {ms[name]:.2f} ms an epoch, loss {min(losses):.5f}, test accuracy {accuracy:.2%}")
    plt.plot(torch.tensor(seconds).cumsum(0), losses, label=name)
stock, fused = ms.values()
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")

plt.gca().set(title="Breast cancer, 30-256-256-1", xlabel="seconds", ylabel="validation loss")
plt.legend()
Path("demo").mkdir(exist_ok=True)
plt.savefig("demo/tabular.png")
