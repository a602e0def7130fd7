"""In every Python that finds this folder on its path, the device "cuda" means the CPU.

It is for test_benchmarks.py alone, which tries benchmarks/gpu_check.sh from end to end without a GPU: the
script, and the Python of benchmarks and tests. The kernels are the CPU's. A graph computes while it is
captured, and replays torch's operations.
"""

import functools
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmlp


def is_gpu(device):
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def on_the_cpu(arguments):
    """The arguments without a GPU, and then without float16 too, which the CPU's kernels lack."""
    if not any(map(is_gpu, arguments)):
        return arguments
    others = {torch.float16: torch.float32}
    return ["cpu" if is_gpu(each) else others.get(each, each) if isinstance(each, torch.dtype) else each
            for each in arguments]  # fmt: skip


def redirected(function):
    @functools.wraps(function)
    def call(*arguments, **options):
        redirected = on_the_cpu([*arguments, *options.values()])
        named = zip(options, redirected[len(arguments) :], strict=True)
        return function(*redirected[: len(arguments)], **dict(named))

    return call


for name in ("arange", "empty", "full", "ones", "rand", "randint", "randn", "tensor", "zeros"):
    setattr(torch, name, redirected(getattr(torch, name)))
torch.Tensor.to = redirected(torch.Tensor.to)
torch.Tensor.cuda = lambda tensor, *_, **__: tensor


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, device=None):
        pass

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self, stream=None):
        self.time = perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls = []

    def replay(self):
        with torch.no_grad():
            for call, arguments, options, result in self.calls:
                made = call(*arguments, **options)
                if not call._schema.is_mutable and not call.is_view:
                    for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)


class Capture(TorchDispatchMode):
    """In place of torch.cuda.graph."""

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        result = call(*args, **(kwargs or {}))
        self.graph.calls.append((call, args, kwargs or {}, result))
        return result


stand_ins = {
    "CUDAGraph": Graph,
    "Event": Event,
    "Stream": Stream,
    "_sleep": lambda cycles: None,
    "current_stream": lambda device=None: Stream(),
    "device_count": lambda: 1,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "a stand-in",
    "graph": Capture,
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "set_stream": lambda stream: None,
    "stream": lambda stream: nullcontext(),
    "synchronize": lambda device=None: None,
}
for name, stand_in in stand_ins.items():
    setattr(torch.cuda, name, stand_in)

fastmlp._C.cuda = fastmlp._C.cuda_architectures = (
    "a stand-in" if Path("built_for_the_stand_in").exists() else None
)
fastmlp._C.use_products = lambda owner, table: None
