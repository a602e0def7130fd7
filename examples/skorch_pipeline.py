"""skorch: a network as the last step of a scikit-learn pipeline, judged by cross-validation.

It is judged twice, stock and fused, the rounds of both in turns.
"""

import sys
from statistics import median
from time import perf_counter

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

import fastmlp

ROUNDS = int(sys.argv[1]) if sys.argv[1:] else 5

x, y = load_breast_cancer(return_X_y=True)
x = x.astype("float32")


def network() -> nn.Sequential:
    """Features [batch, 30] to logits [batch, 2]."""
    return nn.Sequential(nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))


def fused_network() -> nn.Sequential:
    """The same, fused."""
    return fastmlp.fuse(network())


def pipeline(module: object, optimizer: type[torch.optim.Optimizer]) -> Pipeline:
    """Standardises, then classifies."""
    net = NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        optimizer=optimizer,
        lr=1e-3,
        batch_size=32,
        max_epochs=10,
        train_split=None,
        verbose=0,
    )
    return make_pipeline(StandardScaler(), net)


sides = {
    "stock": pipeline(network, torch.optim.AdamW),
    "fastmlp": pipeline(fused_network, fastmlp.AdamW),
}
seconds: dict[str, list[float]] = {name: [] for name in sides}
scores = {}
for _ in range(ROUNDS):
    for name, side in sides.items():
        torch.manual_seed(0)
        start = perf_counter()
        scores[name] = cross_val_score(side, x, y, cv=5)
        seconds[name].append(perf_counter() - start)

for name, folds in scores.items():
    print(f"{name:8} {median(seconds[name]):.2f} s a cross-validation, accuracy {folds.mean():.2%} of {folds.round(3)}")
stock, fused = (median(own) for own in seconds.values())
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")
