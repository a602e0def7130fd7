"""A coordinate network: learns a picture as a function from positions, by Fourier features, to colours.

It trains twice, by the standard loop and by fastmlp.TrainStep, the steps of both in turns.
"""

import copy
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import fastmlp

STEPS, BATCH = int(sys.argv[1]) if sys.argv[1:] else 500, 8192

torch.manual_seed(0)
picture = torch.tensor(load_sample_image("china.jpg")[::2, ::2] / 255).float()
height, width, _ = picture.shape
positions = torch.cartesian_prod(torch.linspace(0, 1, height), torch.linspace(0, width / height, width))
angles = positions @ torch.randn(2, 64) * 2 * math.pi * 6  # Tancik et al., 2020
x, y = torch.cat((angles.sin(), angles.cos()), dim=1), picture.flatten(0, 1)  # [pixels, 128], [pixels, 3]


def train(model: nn.Module, fused: bool) -> Iterator[float]:
    """Trains on pixels drawn at random; after each step its seconds."""
    criterion, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    step = fastmlp.TrainStep(model, criterion, optimizer)
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        pixels = torch.randint(len(x), (BATCH,), generator=draw)
        batch, target = x[pixels], y[pixels]
        start = perf_counter()
        if fused:
            step(batch, target)
        else:
            loss = criterion(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        yield perf_counter() - start


@torch.inference_mode()
def painted(model: nn.Module) -> Tensor:
    """The whole picture as the network has it."""
    return model(x).reshape(picture.shape)


layers = [layer for sizes in pairwise((128, 128, 128, 128, 3)) for layer in (nn.Linear(*sizes), nn.ReLU())]
model = nn.Sequential(*layers[:-1], nn.Sigmoid())
models = {"stock": model, "fastmlp": copy.deepcopy(model)}
paintings = {"before": painted(model)}
turns = zip(*(train(model, name == "fastmlp") for name, model in models.items()), strict=True)
ms = {}
for name, seconds in zip(models, zip(*turns, strict=True), strict=True):
    ms[name] = 1e3 * median(seconds)
    paintings[name] = painted(models[name])
    decibels = -10 * (paintings[name] - picture).square().mean().log10()
    print(f"{name:8} {ms[name]:.2f} ms a step, PSNR {decibels:.2f} dB")
stock, fused = ms.values()
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")

_, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
for axis, (name, painting) in zip(axes.flat, {**paintings, "the picture": picture}.items(), strict=True):
    axis.imshow(painting)
    axis.set_title(name)
    axis.axis("off")
Path("demo").mkdir(exist_ok=True)
plt.savefig("demo/coordinates.png")
