"""Serving: a function of NumPy arrays, how long one request takes, and how long the slowest ones take.

All sides answer each request in turns: stock, the fused model, and a Predictor, which is a snapshot of it.
"""

import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import nn

import fastmlp

REQUESTS = int(sys.argv[1]) if sys.argv[1:] else 20_000


def server(model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """What answers requests: features [batch, 17] in, outputs [batch, 6] out, both float32."""
    model.eval()

    @torch.inference_mode()
    def predict(x: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(x)).numpy()

    return predict


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(17, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 6))
servers = {
    "stock": server(model),
    "fused": server(fastmlp.fuse(model, inplace=False)),
    "Predictor": fastmlp.Predictor(model),
}

requests = np.random.default_rng(0).standard_normal((REQUESTS, 1, 17), dtype=np.float32)
seconds: dict[str, list[float]] = {name: [] for name in servers}
difference = 0.0
for x in requests:
    answers = []
    for name, predict in servers.items():
        start = perf_counter()
        answers.append(predict(x))
        seconds[name].append(perf_counter() - start)
    difference = max(difference, *(float(np.abs(own - answers[0]).max()) for own in answers[1:]))

us = {name: 1e6 * np.quantile(own, [0.5, 0.95, 0.99]) for name, own in seconds.items()}
for name, (p50, p95, p99) in us.items():
    print(f"{name:9} {p50:.1f} µs a request; 95 % below {p95:.1f}, 99 % below {p99:.1f}")
print(f"largest difference of an output: {difference:.1e}")
stock, best = us["stock"][0], us["Predictor"][0]
print(f"saved: {1 - best / stock:.0%} of the time, {stock / best:.2f} times as fast")
