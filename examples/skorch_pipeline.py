"""skorch: a network as the last step of a scikit-learn pipeline, judged by cross-validation.

It is judged twice, stock and with another module and optimizer, the rounds of both in turns.
"""

import sys
from statistics import median
from time import perf_counter

import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
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


settings = {"lr": 1e-3, "batch_size": 32, "max_epochs": 10, "train_split": None, "verbose": 0}
net = NeuralNetClassifier(network, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, **settings)
pipeline = make_pipeline(StandardScaler(), net)
fused_pipeline = clone(pipeline).set_params(
    neuralnetclassifier__module=fused_network, neuralnetclassifier__optimizer=fastmlp.AdamW
)

sides = {"stock": pipeline, "fastmlp": fused_pipeline}
seconds: dict[str, list[float]] = {name: [] for name in sides}
scores = {}
for _ in range(ROUNDS):
    for name, side in sides.items():
        torch.manual_seed(0)
        start = perf_counter()
        scores[name] = cross_val_score(side, x, y, cv=5)
        seconds[name].append(perf_counter() - start)

for name, folds in scores.items():
    print(f"{name:8} {median(seconds[name]):.2f} s a cross-validation, mean accuracy {folds.mean():.2%}")
stock, fused = (median(own) for own in seconds.values())
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")
