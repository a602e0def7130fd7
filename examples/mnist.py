"""The training script of every tutorial, with one line more.

It runs twice, without the line and with it, the epochs of both in turns.
"""

import sys
from collections.abc import Iterator
from statistics import median
from time import perf_counter

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastmlp

EPOCHS = int(sys.argv[1]) if sys.argv[1:] else 40

digits = load_digits()  # of 8x8 pixels, enlarged to the 28x28 of MNIST
images = nn.functional.interpolate(torch.tensor(digits.images[:, None]).float(), (28, 28), mode="bilinear")
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
train_set, test_set = TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def tutorial(fused: bool) -> Iterator[tuple[float, float, float]]:
    """Trains; after each epoch its seconds, the loss of its last batch, and the accuracy on the test set."""
    torch.manual_seed(0)
    order = torch.Generator().manual_seed(0)  # the same for both
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True, generator=order)
    test_loader = DataLoader(test_set, batch_size=64)

    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    if fused:
        fastmlp.fuse(model)  # <--- the one line

    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    for _ in range(EPOCHS):
        start = perf_counter()
        for x, target in train_loader:
            loss = criterion(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = perf_counter() - start

        with torch.no_grad():
            right = sum((model(x).argmax(1) == target).sum().item() for x, target in test_loader)
        yield seconds, loss.item(), right / len(test_set)


epochs = zip(*zip(tutorial(fused=False), tutorial(fused=True), strict=True), strict=True)
ms = {}
for name, own in zip(("stock", "fastmlp"), epochs, strict=True):
    ms[name] = 1e3 * median(seconds for seconds, _, _ in own)
    _, loss, accuracy = own[-1]
    print(f"{name:8} {ms[name]:.1f} ms an epoch, loss {loss:.5f}, test accuracy {accuracy:.2%}")
stock, fused = ms.values()
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")
