"""fastmlp: PyTorch multilayer perceptrons that train and infer faster by changing one line.

>>> model = fastmlp.MLP(784, 500, 10)
>>> model(torch.randn(64, 784)).shape
torch.Size([64, 10])
"""

import os
from pathlib import Path

import torch

__version__ = "0.1.0"

# A wheel has an extension for each torch, in a folder of its own. A build from source has one, right here.
if _folders := {path.name: path for path in sorted(Path(__file__).parent.glob("torch_*"))}:
    _folder = "torch_{}_{}".format(*torch.__version__.split("."))
    if _folder not in _folders:
        _known = ", ".join(name.removeprefix("torch_").replace("_", ".") for name in _folders)
        raise ImportError(
            f"this wheel of fastmlp runs with torch {_known}, and found torch {torch.__version__}"
        )
    __path__.append(str(_folders[_folder]))

try:
    from fastmlp import _C
except ImportError as error:
    raise ImportError(
        f"fastmlp's extension is not built for torch {torch.__version__} and this Python. "
        "Build it, in a copy of the source: pip install --force-reinstall --no-deps ."
    ) from error

if _asked := os.environ.get("FASTMLP_CPU"):
    try:
        _C.use_instruction_set(_asked)
    except ValueError as error:
        raise ValueError(f"FASTMLP_CPU: {error}") from None

from fastmlp import (
    flops,  # noqa: F401  importing it registers the formulas
    functional,
    products,
)
from fastmlp.ensemble import Ensemble
from fastmlp.fuse import fuse, unfuse
from fastmlp.nn import MLP, CrossEntropyLoss, Linear, LinearReLU
from fastmlp.optim import SGD, Adam, AdamW, clip_grad_norm_
from fastmlp.predictor import Predictor
from fastmlp.reasons import why_not_fused
from fastmlp.step import TrainStep

products.choose()

__all__ = [
    "MLP",
    "SGD",
    "Adam",
    "AdamW",
    "CrossEntropyLoss",
    "Ensemble",
    "Linear",
    "LinearReLU",
    "Predictor",
    "TrainStep",
    "build_info",
    "clip_grad_norm_",
    "functional",
    "fuse",
    "unfuse",
    "why_not_fused",
]


def build_info() -> dict[str, str | None]:
    """What was built, and what runs here.

    Returns:
        "compiler"; "cuda", the toolkit's version, and "cuda_architectures", both None without CUDA kernels;
        "cpu", the instruction set in use, and "cpu_supported", those that this processor can run.
    """
    return {
        "compiler": _C.compiler,
        "cuda": _C.cuda,
        "cuda_architectures": _C.cuda_architectures,
        "cpu": _C.instruction_set(),
        "cpu_supported": ", ".join(_C.instruction_sets()),
    }
