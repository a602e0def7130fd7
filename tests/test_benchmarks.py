"""The benchmarks over the grid, on a tiny one: what they print and write, whatever the times are."""

import csv
import shutil
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

QUANTILES = ("p20", "p50", "p80")
MACHINE = {"cpu", "threads", "torch", "python", "fastmlp", "commit"}


@pytest.fixture
def tiny_grid(script, monkeypatch):
    network = script("shapes").Network
    grid = (
        network("classes", (5, 7, 3), (1, 4)),
        network("numbers", (5, 3), (4,), "mse"),
        network("yes or no", (5, 1), (4,), "bce"),
    )
    for name in ("kernels", "steps", "peers"):
        monkeypatch.setattr(script(name), "GRID", grid)
    monkeypatch.setattr(script("kernels"), "ODD", network("odd", (5, 3), (4,)))
    monkeypatch.setattr(script("habits"), "CELLS", [script("steps").Cell(grid[0], 4)])
    monkeypatch.setattr(script("timing"), "ROUND_SECONDS", 1e-3)
    monkeypatch.setattr(script("kernels"), "PEAK_STEPS", 1000)


@pytest.fixture
def measured(script, tiny_grid, tmp_path, capfd):
    """Runs a benchmark for three rounds; the rows of its CSV file, and what it prints."""

    def run(name: str, *arguments: str) -> tuple[list[dict[str, str]], str]:
        assert script(name).main(["--rounds", "3", "--output", str(tmp_path), *arguments]) == 0
        assert [path.name for path in tmp_path.iterdir()] == [f"{name}.csv"]
        return rows(tmp_path / f"{name}.csv"), capfd.readouterr().out

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quantiles(row: dict[str, str], name: str) -> list[float]:
    return [float(row[f"{name}_{key}"]) for key in QUANTILES]


def is_printed(figure: str, decimals: int, printed: str) -> bool:
    """The figure, which the file has rounded to more decimals, so that its last half decides either way."""
    half = 0.5 * 10.0 ** -len(figure.split(".")[1])
    return any(f"{float(figure) + error:.{decimals}f}" in printed for error in (-half, 0, half))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
class TestKernels:
    def test_every_product_is_measured_at_every_distinct_layer(self, measured):
        table, printed = measured("kernels")
        shapes = ["1x5x7", "1x7x3", "4x5x7", "4x7x3", "4x5x3", "4x5x1"]
        assert [(row["product"], f"{row['M']}x{row['K']}x{row['N']}") for row in table] == [
            (product, shape) for shape in shapes for product in ("forward", "dW", "dx")
        ]
        for row in table:
            for figure in ("gflops", "peak_gflops", "peak_share", "over_library", "over_stock"):
                assert quantiles(row, figure) == sorted(quantiles(row, figure))
            assert all(row[key] for key in MACHINE | {"instruction_set"})
            assert is_printed(row["over_stock_p50"], 2, printed)

    def test_only_those_asked_for_are_measured(self, measured):
        table, _ = measured("kernels", "--only", "d. 4x5x[13]")
        assert [(row["product"], row["N"]) for row in table] == [
            ("dW", "3"), ("dx", "3"), ("dW", "1"), ("dx", "1")
        ]  # fmt: skip


class TestSteps:
    SGD, ADAM = ["eager", "fused_sgd"], ["eager", "foreach", "fused"]
    VARIANTS = (
        dict.fromkeys(("swap", "all", "step"), SGD)
        | dict.fromkeys(("adam", "adam step", "clipped", "clipped step"), ADAM)
        | {"infer": ["eager"]}
    )

    def test_every_column_is_measured_in_every_cell(self, measured):
        table, printed = measured("steps", "--no-compile")
        cells = [("classes", "1"), ("classes", "4"), ("numbers", "4"), ("yes or no", "4")]
        assert [(row["network"], row["batch"], row["column"]) for row in table] == [
            (*cell, column) for cell in cells for column in self.VARIANTS
        ]
        for row in table:
            for figure in ("ms", "speedup", *(f"{variant}_ms" for variant in row["variants"].split())):
                assert quantiles(row, figure) == sorted(quantiles(row, figure))
            assert all(row[key] for key in MACHINE | {"target"})
            assert is_printed(row["ms_p50"], 3, printed)
        assert printed.count("geometric mean") == len(self.VARIANTS)

    def test_the_best_of_the_variants_measured_is_stock(self, measured):
        table, _ = measured("steps", "--no-compile", "--only", "classes@4")
        assert {(row["network"], row["batch"]) for row in table} == {("classes", "4")}
        for row in table:
            variants = row["variants"].split()
            assert variants == self.VARIANTS[row["column"]]
            assert row["best"] == min(variants, key=lambda name: quantiles(row, f"{name}_ms")[1])
            assert row["compile_ms_p50"] == ""

    def test_a_variant_that_does_not_compile_is_reported_and_the_others_are_measured(
        self, script, measured, monkeypatch
    ):
        def fail(cell):
            raise NotImplementedError

        steps = script("steps")
        for group in steps.GROUPS:
            for name, side in group.stock.items():
                if side.compiles:
                    monkeypatch.setitem(group.stock, name, steps.Side(fail, compiles=True))
        (swap, *_, infer), printed = measured("steps", "--only", "numbers")
        assert (swap["variants"], swap["failed"]) == ("eager fused_sgd", "compile:NotImplementedError")
        assert "numbers @ 4, swap: compile failed (NotImplementedError)" in printed
        assert [part.split(":")[0] for part in infer["failed"].split()] == [
            "compile",
            "freezing",
            "max_autotune",
        ]


def wrong_steps(cell):
    """Ours, with a loss that is not the network's."""
    steps = import_module("peers").fastmlp_steps(cell)
    return lambda count: 1.001 * steps(count)


@pytest.mark.slow
class TestPeers:
    @pytest.fixture
    def without_jax(self, script, monkeypatch):
        """Ours takes the place of JAX, which the tests can do without."""
        peers = script("peers")
        monkeypatch.setattr(peers, "version", lambda _: "of nothing")
        monkeypatch.setitem(peers.SIDES, "jax", peers.fastmlp_steps)

    def test_both_sides_are_measured_in_every_cell(self, without_jax, measured):
        table, printed = measured("peers")
        cells = [("classes", "1"), ("classes", "4"), ("numbers", "4"), ("yes or no", "4")]
        assert [(row["network"], row["batch"]) for row in table] == cells
        for row in table:
            for figure in ("ms", "jax_ms", "speedup"):
                assert quantiles(row, figure) == sorted(quantiles(row, figure))
            assert all(row[key] for key in MACHINE | {"jax", "target"})
            assert is_printed(row["ms_p50"], 3, printed)
        assert printed.count("geometric mean") == 1

    def test_nothing_is_measured_where_the_losses_differ(self, script, without_jax, measured, monkeypatch):
        monkeypatch.setitem(script("peers").SIDES, "jax", wrong_steps)
        with pytest.raises(SystemExit, match="classes @ 1: the losses differ"):
            measured("peers")

    @pytest.mark.parametrize("index", range(3), ids=["cross_entropy", "mse", "bce"])
    def test_jax_computes_the_losses_that_ours_does(self, script, tiny_grid, index):
        pytest.importorskip("jax")
        peers = script("peers")
        cell = peers.Cell(peers.GRID[index], 4)
        ours, jaxs = (peers.first_losses(side, cell) for side in (peers.fastmlp_steps, peers.jax_steps))
        assert ours == pytest.approx(jaxs, rel=1e-5)
        assert ours[0] != ours[-1]

    def test_without_jax_one_sentence_says_what_has_it(self, script, tiny_grid, monkeypatch, capfd):
        def fail(name):
            raise PackageNotFoundError(name)

        monkeypatch.setattr(script("peers"), "version", fail)
        with pytest.raises(SystemExit):
            script("peers").main([])
        assert "JAX is not installed here; make bench-peers" in capfd.readouterr().err


def test_every_way_of_a_trainer_is_measured(measured):
    table, printed = measured("training", "--only", "policy", "tabular")
    assert [(row["job"], row["way"]) for row in table] == [
        ("policy", "in two calls around the loss"),
        ("tabular", "in one call"),
    ]
    for row in table:
        assert row["best"] in ("default", "foreach", "fused")
        assert all(row[key] for key in MACHINE)
        assert is_printed(row["step_speedup_p50"], 2, printed)


def test_every_habit_is_measured_with_stocks_layers_and_with_ours(measured, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # which takes no C++
    table, printed = measured("habits")
    assert [row["habit"] for row in table] == ["eager", "compile", "autocast", "both"]
    for row in table:
        for figure in ("stock_ms", "ms", "speedup", "over_eager"):
            assert quantiles(row, figure) == sorted(quantiles(row, figure))
        assert all(row[key] for key in MACHINE)
        assert is_printed(row["stock_ms_p50"], 3, printed)
    assert table[0]["speedup_p50"] == table[0]["over_eager_p50"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kernels", ["--only", "("]),
        ("kernels", ["--only", "dy"]),
        ("steps", ["--only", "none"]),
        ("habits", ["--only", "none"]),
    ],
)
def test_a_bad_option_is_named_in_one_sentence(script, tiny_grid, capfd, tmp_path, name, arguments):
    with pytest.raises(SystemExit) as caught:
        script(name).main([*arguments, "--output", str(tmp_path / "results")])
    output, errors = capfd.readouterr()
    assert (caught.value.code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "argument --only: " in errors
    assert not (tmp_path / "results").exists()


def test_the_headline_tells_what_small_and_large_networks_gain(script, monkeypatch):
    readme = script("readme")
    gains = {
        ("small", "8-64-4", "1"): (1.9, 2.9, 8.6),
        ("small", "8-64-4", "64"): (1.2, 1.4, 3.1),
        ("small", "8-64-64-4", "128"): (1.5, 1.6, 2.2),
        ("small", "8-64-4", "4096"): (1.1, 1.1, 1.1),
        ("large", "1024-1024", "64"): (1.13, 1.02, 0.97),
    }
    cells = {cell: dict(zip(("swap", "all", "step"), own, strict=True)) for cell, own in gains.items()}
    monkeypatch.setattr(readme, "speedups", lambda: cells)
    told = readme.headline()
    assert "1.2 to 1.5 times as fast by one line, 2.2 to 3.1 times with `TrainStep`" in told
    assert "up to 9 times at batch 1. Layers of a million weights gain −3 to 13 %." in told
