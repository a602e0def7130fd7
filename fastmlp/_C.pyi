"""The extension: importing it registers the ops."""

from collections.abc import Sequence

from torch import Tensor

compiler: str
cuda: str | None
cuda_architectures: str | None

def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...
def network(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str | None],
) -> Tensor: ...
def train_step(*arguments: object) -> Tensor: ...
