"""The choice of kernels on a GPU, which needs none to be known: over the grid of the benchmarks."""

import subprocess
import sys

import pytest

from fastmlp.plan import MULTIPROCESSORS, SHARED_MEMORY, plan, plan_step

GRID = {
    "784-500-10": (1, 64, 1024),
    "8-64-64-4": (1, 64),
    "17-256-256-6": (1, 64, 2048),
    "30-256-256-2": (128, 4096),
    "1024-1024-1024-1024-1024": (256, 2048),
    "512-2048-512": (4096,),
    "479-1024-1024-512-256-1": (2048,),
    "64-64-64-64-16": (65536,),
}
CELLS = [(widths, batch) for widths, batches in GRID.items() for batch in batches]


def sizes_of(widths):
    return [int(width) for width in widths.split("-")]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


every_cell = pytest.mark.parametrize(("widths", "batch"), CELLS)


@pytest.fixture
def products(widths, batch, dtype):
    """The products that the kernels would compute of a network if all were theirs, one by one."""
    launches = plan(sizes_of(widths), batch, dtype, products="own")
    return [one for one in launches if one.name in ("forward", "dx", "dW")]


@every_cell
def test_tiles_are_filled_where_the_product_is_no_narrower_than_the_smallest(products):
    assert [one for one in products if min(one.rows, one.columns) >= 64 and one.fill < 0.85] == []


@every_cell
def test_large_tiles_are_for_those_that_fill_the_gpu_with_them(products):
    for one in products:
        assert one.tile == 64 or min(one.rows, one.columns) >= 128


@every_cell
def test_a_sum_is_split_for_idle_multiprocessors_alone_and_not_into_short_parts(products):
    for one in products:
        assert one.splits == 1 or (one.blocks <= MULTIPROCESSORS and one.steps >= one.tile / 8)


@every_cell
def test_no_multiprocessor_is_idle_where_the_sum_is_long(products):
    for one in products:
        assert one.blocks > MULTIPROCESSORS / 2 or one.steps < 2 * one.tile / 8


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (16, 64)])
def test_a_small_product_over_a_large_batch_takes_small_tiles(rows, columns, dtype):
    (dW,) = [one for one in plan([columns, rows], 65536, dtype, products="own") if one.name == "dW"]
    assert (dW.rows, dW.columns, dW.tile, dW.splits) == (rows, columns, 64, 128)


@pytest.mark.parametrize(
    ("widths", "batch", "expected"),
    [
        ("784-500-10", 64, "forward 0, forward 1, dx 1, dW 1, dW 0"),
        ("8-64-64-4", 64, "chain forward 0, chain backward 2, dW 2, dW 1, dW 0"),
        ("512-2048-512", 4096, "forward 0, g 0, forward 1, dz 1, dx 1, dz 0, dW 1, dW 0"),
    ],
)
def test_the_launches_of_a_network_are_known(widths, batch, expected, dtype):
    launches = plan(sizes_of(widths), batch, dtype)
    assert ", ".join(f"{one.name} {one.layer}" for one in launches) == expected


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_a_chain_is_where_two_of_its_weights_fit_in_a_block(architecture):
    launches = plan([128] * 4, 64, "float32", architecture)
    tiles = 8 * 64 * (64 + 1 + 2 * 128)  # of 64 bytes of the rows, with gaps, and of two weights
    fits = SHARED_MEMORY[architecture] >= tiles
    assert (launches[0].name == "chain forward") == fits


def test_a_small_step_is_one_launch_of_blocks_that_are_all_there_at_once():
    steps = [plan_step([784, 500, 10], batch) for batch in (1, 64)]
    assert [1 < step.blocks <= MULTIPROCESSORS for step in steps] == [True, True]
    assert plan_step([784, 500, 10], 64, clips=True).barriers == steps[1].barriers + 1
    assert plan_step([8, 64, 64, 4], 1)[:2] == (1, 0)


@pytest.mark.parametrize(
    "sizes", [[17, 6], [1024, 1024, 1024, 10], [8] * 10], ids=["no hidden layer", "too large", "too many"]
)
def test_all_other_steps_are_graphs(sizes):
    assert plan_step(sizes, 64) is None


def test_weights_that_do_not_fit_in_the_shared_memory_are_no_one_launch():
    sizes = [2048, 1664, 10]
    assert plan_step(sizes, 4, clips=True, architecture="sm_90") is not None
    assert plan_step(sizes, 4, clips=True, architecture="sm_86") is None


@every_cell
def test_a_training_step_predicted_is_no_shorter_than_what_it_has_to_read(widths, batch, dtype):
    launches = plan(sizes_of(widths), batch, dtype, products="own")
    assert sum(one.predicted for one in launches) > sum(one.bytes for one in launches) / 3.35e6


def told(*arguments):
    command = [sys.executable, "-m", "fastmlp", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_plan_is_printed():
    result = told("--plan", "784-500-10", "--batch", "64")
    assert result.returncode == 0
    assert "64 x 500    784    64       6      48" in result.stdout
    assert "5 launches" in result.stdout
    assert "one launch of 63 blocks that meet 2 times" in result.stdout


@pytest.mark.parametrize("widths", ["784", "784-0"])
def test_a_network_that_is_none_has_no_plan(widths):
    result = told("--plan", widths)
    assert result.returncode == 2
    assert "expected two or more widths" in result.stderr
