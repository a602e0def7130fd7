"""The user's process: its threads, its forks, its environment variables, and `python -m fastmlp`."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import cases

import fastmlp
from fastmlp import _C

X, WEIGHT = torch.randn(256, 784), torch.randn(500, 784)  # work enough for every thread of the pool


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def forward_and_backward():
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    y = fastmlp.functional.linear_relu(x, weight)
    return y, *torch.autograd.grad(y.sum(), (x, weight))


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_several_python_threads_may_compute_at_once():
    expected = forward_and_backward()
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(forward_and_backward) for _ in range(32)]
    assert all(same(result.result(), expected) for result in results)


def test_a_forked_child_computes_though_the_pool_of_its_parent_is_gone():
    code = """
import os, signal, torch, fastmlp
x, weight = torch.randn(256, 784), torch.randn(500, 784)
expected = fastmlp.functional.linear_relu(x, weight).numpy()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if (fastmlp.functional.linear_relu(x, weight).numpy() == expected).all() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


class Activations(torch.utils.data.Dataset):
    """Computes a layer in the worker that loads an item."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return fastmlp.functional.linear_relu(X[index], WEIGHT)


def test_data_loader_workers_may_compute():
    expected = fastmlp.functional.linear_relu(X[:4], WEIGHT)
    loader = torch.utils.data.DataLoader(
        Activations(), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(next(iter(loader)), expected)


GRAPHS = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        self.last = nn.Softmax()
        return self.last(nn.Sequential(nn.ReLU(), nn.Tanh())(x))

def backend(graph, inputs):
    print(graph.code)
    return graph

models = [Net(), nn.Sequential(nn.Linear(4, 3), nn.ReLU()), lambda x: nn.Sequential(nn.ReLU(), nn.Tanh())(x)]
for model in models:
    torch.compile(model, backend=backend, fullgraph=True)(torch.ones(2, 4))
    for strict in (True, False):
        if isinstance(model, nn.Sequential) or (strict and isinstance(model, nn.Module)):
            program = torch.export.export(model, (torch.ones(2, 4),), strict=strict)
            print(program.graph_module.code, program.run_decompositions().graph_module.code)
"""
STATE = """
from torch.nn.modules import module
print({name: len(hooks) for name, hooks in vars(module).items() if name.startswith("_global_") and hooks})
print(torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.nn.Linear.forward.__module__)
"""


@pytest.mark.slow
def test_importing_changes_nothing_of_torch():
    code = GRAPHS + STATE
    without, with_import = python("-c", code), python("-c", "import fastmlp\n" + code)
    assert without.returncode == 0, without.stderr
    assert with_import.stdout == without.stdout


@cases(
    ["name"],
    [("avx512bf16",), ("avx512",), ("avx2",), ("portable",)],
    lambda name: name == "portable" or name not in _C.instruction_sets(),
)
def test_the_environment_variable_chooses_the_instruction_set(name):
    result = python("-c", "import fastmlp; print(fastmlp.build_info()['cpu'])", FASTMLP_CPU=name)
    if name in _C.instruction_sets():
        assert result.stdout.strip() == name
    else:
        assert (
            "FASTMLP_CPU: instruction set: expected one of avx512bf16, avx512, avx2, portable"
            in result.stderr
        )


def test_an_unknown_instruction_set_is_a_clear_error():
    result = python("-c", "import fastmlp", FASTMLP_CPU="sse9")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    expected = "instruction set: expected one of avx512bf16, avx512, avx2, portable"
    assert last.startswith(f"ValueError: FASTMLP_CPU: {expected}")
    assert last.endswith("got 'sse9'")


def test_the_self_check_names_what_runs_here_and_finds_every_kernel_right():
    result = python("-m", "fastmlp")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"fastmlp   {fastmlp.__version__}" in result.stdout
    assert torch.__version__ in result.stdout
    for name in _C.instruction_sets():
        assert f"cpu {name} float32" in result.stdout
    assert "every kernel is right" in result.stdout


def test_the_self_check_fails_where_a_kernel_is_wrong():
    code = """
import torch, runpy, sys
import fastmlp
wrong = torch.library.Library("fastmlp", "IMPL")
def network(input, weights, biases, activations, parameters):
    return torch.nn.functional.linear(input, weights[0], biases[0]) * 1.001
wrong.impl("network", network, "CPU", allow_override=True)
runpy.run_module("fastmlp", run_name="__main__")
"""
    result = python("-c", code)
    assert result.returncode == 1
    assert "WRONG" in result.stdout
