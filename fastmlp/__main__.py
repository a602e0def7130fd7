"""``python -m fastmlp``: what is built, what this machine runs, and a self-check of all its kernels.

Exit status 1 where a kernel's result is wrong.
"""

import platform
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastmlp
from fastmlp import _C, functional, products

_ops = torch.ops.fastmlp

# Sizes around the kernels' tiles, and smaller than a register.
SHAPES = [(1, 1, 1), (5, 3, 17), (64, 10, 500), (65, 131, 77)]

# A GPU besides has a shape whose three products are cut into large tiles (`cut` in csrc/cuda/plan.h),
# and more rows than its blocks take through a narrow network at once.
LARGE_SHAPE = (1000, 1016, 1024)
BATCH = {"cpu": 70, "cuda": 16500}

#: Relative error (in the 2-norm) that a right kernel stays below: a few roundings of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def largest_error(device: str, dtype: torch.dtype) -> float:
    """The largest relative error of forward and backward, over all activations and shapes.

    Against torch's operations in float64, which is what the ops take for it, each on what it reads.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for activation, parameters in _C.activations.items():
        of_layer = [activation], parameters
        is_large = device == "cuda" and activation in (
            "relu",
            "gelu",
        )  # of those in registers, and of the others
        for batch, out_features, in_features in [*SHAPES, *[LARGE_SHAPE] * is_large]:
            sizes = (
                (batch, in_features),
                (out_features, in_features),
                (out_features,),
                (batch, out_features),
            )
            x, weight, bias, grad_y = (
                torch.randn(size, generator=generator).to(device, dtype) for size in sizes
            )
            weight /= in_features**0.5
            y, *z = _ops.network_forward(x, [weight], [bias], *of_layer)
            (saved,) = z or [y]
            results = [
                (_ops.network(x, [weight], [bias], *of_layer),
                 *_ops.network_backward(grad_y, x, [weight], [saved], *of_layer, [0, 1, 2]))
                for x, weight, bias, grad_y, saved in (
                    (x, weight, bias, grad_y, saved),
                    [t.double() for t in (x, weight, bias, grad_y, saved)],
                )
            ]  # fmt: skip
            worst = max(worst, *map(relative_error, *results))
    return worst


def network_error(device: str, dtype: torch.dtype) -> float:
    """The largest relative error of a network, forward and backward, against its layers one by one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        values: Tensor = torch.randn(size, generator=generator) / size[-1] ** 0.5
        return values.to(device, dtype)

    weights, biases = [draw(n, k) for n, k in ((40, 30), (20, 40), (5, 20))], [draw(40), draw(20), draw(5)]
    batch = BATCH[device]
    activations, inputs, grad = ["silu", "tanh", "elu"], [draw(batch, 30)], draw(batch, 5)
    saved: list[Tensor] = []
    for i, activation in enumerate(activations):
        layer = [weights[i]], [biases[i]], [activation], _C.activations[activation]
        y, *z = _ops.network_forward(inputs[-1], *layer)
        inputs.append(y)
        saved += z or [y]
    parameters = [1.0]  # elu's
    y, *left = _ops.network_forward(inputs[0], weights, biases, activations, parameters)
    pairs = [(y, inputs[-1]), *zip(left, saved, strict=True)]
    arguments = weights, saved, activations, parameters
    grads = _ops.network_backward(grad, inputs[0], *arguments, [*range(7)])
    for i in reversed(range(3)):
        layer = [weights[i]], [saved[i]], [activations[i]], _C.activations[activations[i]]
        grad, grad_weight, grad_bias = _ops.network_backward(grad, inputs[i], *layer, [0, 1, 2])
        pairs += [(grads[1 + i], grad_weight), (grads[4 + i], grad_bias)]
    return max(relative_error(ours, layers.double()) for ours, layers in [*pairs, (grads[0], grad)])


def step_error(device: str, dtype: torch.dtype) -> float:
    """The largest relative error of a step of SGD and of Adam, both with weight decay."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(1000, generator=generator).to(device, dtype)

    w, g, m = draw(), draw(), draw()
    expected_g = g.double() + 0.25 * w.double()
    expected_m = 0.75 * m.double() + 0.5 * expected_g
    expected_w = w.double() - 0.125 * (expected_g + 0.75 * expected_m)
    options = [0.125, 0.75, 0.5, 0.25, True, False, False]
    covered = _ops.optimize_("sgd", [w], [g], [m], [], options)
    pairs = [(w, expected_w), (m, expected_m)]

    w, g, m, v, count = draw(), draw(), draw(), draw().square(), torch.tensor(2.0)
    expected_m = 0.75 * m.double() + 0.25 * g.double()
    expected_v = 0.5 * v.double() + 0.5 * g.double().square()
    root = (expected_v / (1 - 0.5**3)).sqrt() + 0.125
    expected_w = (1 - 0.125 * 0.25) * w.double() - 0.125 / (1 - 0.75**3) * expected_m / root
    options = [0.125, 0.75, 0.5, 0.125, 0.25, True, False]
    covered &= _ops.optimize_("adam", [w], [g], [m, v], [count], options)
    pairs += [(w, expected_w), (m, expected_m), (v, expected_v)]
    return max(relative_error(*pair) for pair in pairs) if covered else torch.inf


def clip_error(device: str, dtype: torch.dtype) -> float:
    """The largest relative error of the norm of gradients, and of these clipped to half of it."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator).to(device, dtype) for size in (1000, 3)]
    exact = torch.cat(grads).double()
    norm = _ops.clip_grad_norm_(grads, exact.norm().item() / 2)
    if norm is None:
        return torch.inf
    return max(relative_error(norm, exact.norm()), relative_error(torch.cat(grads), exact / 2))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """In the 2-norm."""
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(error.nan_to_num(torch.inf))


def why_not_on_gpu() -> str | None:
    """Why the GPU runs PyTorch's own operations; None where it runs the kernels, or there is none."""
    if torch.version.cuda and not _C.cuda:
        return "this build has no CUDA kernels, a build from source has"
    if not torch.cuda.is_available():
        return None
    products.choose("own")  # or the reason may be that the library has them
    x = torch.zeros(1, 1, device="cuda")
    return functional.why_composite(x, x)


def main() -> int:
    """Prints the report; 0, or 1 where a kernel is wrong."""
    info = fastmlp.build_info()
    built = (
        f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "without CUDA kernels"
    )
    binding = Path(_C.__file__).relative_to(Path(fastmlp.__file__).parent)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    why_not = why_not_on_gpu()
    if why_not:
        gpu += f"; {why_not}: PyTorch's own operations run"
    print(f"fastmlp   {fastmlp.__version__}, built with {info['compiler']}, {built}")
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"binding   {binding}")
    print(f"python    {platform.python_version()}")
    print(f"cpu       runs {info['cpu']} of {info['cpu_supported']}")
    print(f"gpu       {gpu}")
    print("\nself-check against float64        relative error")

    cpu = [(f"cpu {name}", "cpu", dtype, partial(_C.use_instruction_set, name))
           for name in _C.instruction_sets() for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    has_cuda = torch.cuda.is_available() and not why_not
    cuda = [(f"cuda, products {owner}", "cuda", dtype, partial(products.choose, owner))
            for owner in ("own", "library") for dtype in TOLERANCE if has_cuda]  # fmt: skip
    wrong = 0
    for name, device, dtype, choose in cpu + cuda:
        choose()
        error = max(check(device, dtype) for check in (largest_error, network_error, step_error, clip_error))
        right = error < TOLERANCE[dtype]
        wrong += not right
        kernel = f"{name} {str(dtype).removeprefix('torch.')}"
        print(
            f"  {kernel:30s}  {error:.1e}  {'ok' if right else f'WRONG, expected < {TOLERANCE[dtype]:.0e}'}"
        )
    products.choose()
    print(f"\n{wrong} of {len(cpu + cuda)} kernels are wrong" if wrong else "\nevery kernel is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
