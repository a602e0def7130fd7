"""The extension: importing it registers the ops."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

activations: dict[str, tuple[float, ...]]
compiler: str
cuda: str | None
cuda_architectures: str | None

def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...
def use_products(owner: str, rows: Sequence[tuple[int, str, str, int, str]]) -> None: ...  # if cuda
def network(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str | tuple[str | float, ...] | None],
) -> Tensor: ...
def optimize(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    states: Sequence[Tensor],
    counts: Sequence[Tensor],
    options: Sequence[float | None],
) -> bool: ...
def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float, error_if_nonfinite: bool) -> Tensor: ...
def snapshot(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str | tuple[str | float, ...] | None],
) -> object: ...
def predict(snapshot: object, x: object, out: object) -> Any: ...
def train_step(*arguments: object) -> Any: ...
def differentiate_down_to(
    node: object, value: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]] | None: ...
def attribute(object: object, name: object, getattr: object, getattribute: object) -> Any: ...
def find(
    calls: tuple[Any, ...], roots: tuple[Any, ...], variables: object, kinds: tuple[object, ...]
) -> list[Any] | None: ...
def is_unchanged(function: object, code: object, other: object) -> bool: ...
