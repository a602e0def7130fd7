"""Whose the products of a GPU are: what can be known without one. The choice itself is in test_kernels.py."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from fastmlp import _C, products

ROOT = Path(__file__).parents[1]
HEADER = "architecture,dtype,product,size,choice\n"


@pytest.fixture
def told(monkeypatch):
    """What a build with CUDA would be told."""
    calls = []
    monkeypatch.setattr(_C, "cuda", "13.0")
    monkeypatch.setattr(_C, "use_products", lambda *arguments: calls.append(arguments), raising=False)
    return calls


def test_an_owner_that_is_none_is_refused(told):
    with pytest.raises(ValueError, match="FASTMLP_PRODUCTS: expected one of own, library, table, got 'ours'"):
        products.choose("ours")
    assert told == []


def test_the_table_is_read(told, monkeypatch, tmp_path):
    table = tmp_path / "products.csv"
    table.write_text(HEADER + "9.0,tf32,chain forward,31,own\n10.0,bfloat16,dW,28,library\n")
    monkeypatch.setattr(products, "TABLE", table)
    products.choose("table")
    rows = [(90, "tf32", "chain forward", 31, "own"), (100, "bfloat16", "dW", 28, "library")]
    assert told == [("table", rows)]


def test_the_table_of_the_package_can_be_read(told):
    products.choose("library")
    assert told[0][0] == "library"


GLUE = """
#include <torch/extension.h>
#include "{root}/csrc/torch/library.cpp"

void multiply(at::Tensor c, at::Tensor a, at::Tensor b, std::optional<at::Tensor> bias) {{
  fastmlp::multiply({{.dtype = fastmlp::Dtype(c.scalar_type() == at::kBFloat16),
                     .rows = a.size(0), .columns = b.size(1), .K = a.size(1),
                     .a = {{a.data_ptr(), {{a.stride(0), a.stride(1)}}}},
                     .b = {{b.data_ptr(), {{b.stride(0), b.stride(1)}}}},
                     .bias = bias ? bias->data_ptr() : nullptr, .c = c.data_ptr()}}, c.device());
}}
"""


@pytest.fixture(scope="module")
def multiply(tmp_path_factory):
    return cpp_extension.load_inline(
        "library_products",
        GLUE.format(root=ROOT),
        functions="multiply",
        build_directory=str(tmp_path_factory.mktemp("library")),
        extra_cflags=["-O0"],
    ).multiply


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_librarys_product_is_the_one_that_torchs_linear_makes(multiply, dtype):
    x, weight, bias, dz = (torch.randn(size, dtype=dtype) for size in [(40, 33), (20, 33), (20,), (40, 20)])
    wide = torch.randn(40, 50, dtype=dtype)
    calls = [
        (x, weight.t(), bias, torch.nn.functional.linear(x, weight, bias)),
        (x, weight.t(), None, torch.nn.functional.linear(x, weight)),
        (dz, weight, None, dz.mm(weight)),
        (dz.t(), x, None, dz.t().mm(x)),
        (wide[:, :33], weight.t(), bias, torch.nn.functional.linear(wide[:, :33], weight, bias)),
    ]
    with torch.autocast("cpu", torch.bfloat16):  # which is the caller's affair
        for a, b, bias, expected in calls:
            c = torch.full_like(expected, torch.nan)
            multiply(c, a, b, bias)
            assert torch.equal(c, expected)
