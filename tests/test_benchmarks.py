"""The benchmarks over the grid, on a tiny one: what they print and write, whatever the times are."""

import csv
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
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

    def test_a_product_that_fails_is_told_and_leaves_the_results_as_they_were(
        self, script, tiny_grid, tmp_path, monkeypatch, capfd
    ):
        def fail():
            raise ValueError("no product")

        kernels = script("kernels")
        products = kernels.products
        sides = {"dW": {"fastmlp": fail}, "dx": {"stock": fail}}

        def planted(*arguments):
            return {name: own | sides.get(name, {}) for name, own in products(*arguments).items()}

        monkeypatch.setattr(kernels, "products", planted)
        with pytest.raises(SystemExit) as caught:
            kernels.main(["--rounds", "1", "--output", str(tmp_path), "--only", "4x5x3"])
        assert caught.value.code == 1
        printed = capfd.readouterr().out
        assert "dW 4x5x3: fastmlp failed (ValueError: no product)" in printed
        assert "dx 4x5x3: stock failed (ValueError: no product)" in printed
        assert not [*tmp_path.iterdir()]


GPU = {"gpu": "H", "driver": "5", "cuda": "13.0", "torch": "2.11", "fastmlp": "1", "commit": "c"}


class TestProducts:
    def measured(self, over_stock, product="dW", dtype="tf32", products="own", M=64, hidden=""):
        """A row of kernels.py: 64x784x500 has 2^25.6 operations."""
        kind = {"architecture": "9.0", "dtype": dtype, "product": product, "products": products}
        shape = {"M": str(M), "K": "784", "N": "500", "hidden": hidden}
        return {**GPU, **kind, **shape, "over_stock_p50": over_stock}

    @pytest.mark.parametrize(
        ("over_stock", "choice", "mean"),
        [
            (["1.10", "0.98"], "own", "1.0383"),
            (["1.02", "0.97"], "library", "0.9947"),
            (["1.50", "0.96"], "library", "1.2000"),
            (["1.50", ""], "library", "1.5000"),  # where one could not be measured
            ([""], "library", ""),
        ],
    )
    def test_ours_are_those_that_win_on_the_mean_and_lose_nowhere(self, script, over_stock, choice, mean):
        (row,) = script("products").choices(map(self.measured, over_stock))
        assert row == {
            **GPU,
            "architecture": "9.0", "dtype": "tf32", "product": "dW", "size": 25,
            "choice": choice, "over_stock": mean, "shapes": len(over_stock),
        }  # fmt: skip

    def test_products_share_a_choice_by_dtype_kind_and_size(self, script):
        rows = [
            self.measured("2.0"),
            self.measured("0.5", M=80),  # 2^25.9
            self.measured("2.0", M=128),
            self.measured("2.0", dtype="float16"),
            self.measured("2.0", "chain forward", hidden="500-500"),  # 2^26.8
            self.measured("0.1", "forward", products="table"),  # which may be the library's
        ]
        table = script("products").choices(rows)
        assert [(row["dtype"], row["product"], row["size"], row["choice"]) for row in table] == [
            ("tf32", "dW", 25, "library"),
            ("tf32", "dW", 26, "own"),
            ("float16", "dW", 25, "own"),
            ("tf32", "chain forward", 26, "own"),
        ]

    def test_choices_of_other_architectures_and_dtypes_stay(self, script, tmp_path, capfd):
        products, path = script("products"), tmp_path / "products.csv"

        def run(*measured):
            script("rows").write_rows(tmp_path / "kernels_cuda.csv", measured)
            assert products.main(["--results", str(tmp_path), "--output", str(path)]) == 0
            return [(row["architecture"], row["dtype"], row["size"], row["choice"]) for row in rows(path)]

        run(self.measured("2.0"), self.measured("2.0", M=128), self.measured("2.0", dtype="bfloat16"))
        later = self.measured("0.9")
        table = run(later, later | {"architecture": "10.0"})
        assert table == [
            ("9.0", "bfloat16", "25", "own"),
            ("9.0", "tf32", "25", "library"),
            ("10.0", "tf32", "25", "library"),
        ]
        assert "9.0 tf32: dW 25\n" in capfd.readouterr().out

    def test_the_table_is_as_it_is_read(self, script, monkeypatch):
        """By the header, which is all that there is of a table until a GPU is measured."""
        with script("products").TABLE.open() as file:
            header = file.readline().strip().split(",")
        (row,) = script("products").choices([self.measured("1.1")])
        assert [*row] == header

    def test_without_measurements_one_sentence_says_so(self, script, tmp_path, capfd):
        with pytest.raises(SystemExit):
            script("products").main(["--results", str(tmp_path), "--output", str(tmp_path / "p.csv")])
        assert "no product that is our own is measured" in capfd.readouterr().err


class TestWhatWorks:
    """Of several calls that are to be timed in turns."""

    @pytest.fixture
    def sampled(self, script, monkeypatch):
        timing = script("timing")
        monkeypatch.setattr(timing, "WARM_UP", 2)
        monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
        return lambda **makers: timing.sample_what_works(makers, torch.device("cpu"), rounds=2)

    @pytest.fixture
    def lasting(self):
        """Makes a call that works so many times, and then raises."""

        def make(count):
            calls = iter(range(count))
            return lambda: lambda: next(calls)

        return make

    @pytest.mark.parametrize("count", [0, 2])
    def test_those_that_fail_at_once_or_soon_are_left_out(self, sampled, lasting, count):
        samples, failed = sampled(lasts=lasting(10**6), fails=lasting(count))
        assert [*samples] == ["lasts"]
        assert len(samples["lasts"]) == 2
        assert failed == {"fails": "StopIteration"}

    def test_one_that_fails_later_takes_the_others_with_it(self, sampled, lasting):
        samples, failed = sampled(lasts=lasting(10**6), fails=lasting(4))
        assert (samples, failed) == ({}, {"lasts": "StopIteration", "fails": "StopIteration"})

    def test_an_error_is_told_in_one_line_with_the_one_that_it_came_of(self, sampled):
        def fail():
            try:
                raise ValueError("no stream\nof this kind")
            finally:
                raise RuntimeError("no end")

        assert sampled(fails=fail) == ({}, {"fails": "RuntimeError: no end, after ValueError: no stream"})


class TestSteps:
    SGD, ADAM, INFERENCE = ["eager", "fused_sgd"], ["eager", "foreach", "fused"], ["eager"]
    VARIANTS = (
        dict.fromkeys(("swap", "all", "step"), SGD)
        | dict.fromkeys(("adam", "adam step", "clipped", "clipped step"), ADAM)
        | dict.fromkeys(("infer", "predict"), INFERENCE)
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
                    monkeypatch.setitem(group.stock, name, side._replace(make=fail))
        (swap, *_, infer, _), printed = measured("steps", "--only", "numbers")
        assert (swap["variants"], swap["failed"]) == ("eager fused_sgd", "compile: NotImplementedError")
        assert "compile beside swap failed (NotImplementedError): numbers @ 4\n" in printed
        assert [part.split(":")[0] for part in infer["failed"].split("; ")] == [
            "compile",
            "freezing",
            "max_autotune",
        ]

    def test_a_column_that_fails_is_told_and_leaves_the_results_as_they_were(
        self, script, tiny_grid, tmp_path, monkeypatch, capfd
    ):
        def fail(cell):
            raise ValueError("no step\nof this kind")

        steps = script("steps")
        monkeypatch.setitem(steps.GROUPS[0].columns, "step", steps.Side(fail))
        with pytest.raises(SystemExit) as caught:
            steps.main(["--rounds", "1", "--no-compile", "--output", str(tmp_path), "--only", "numbers"])
        assert caught.value.code == 1
        assert "step failed (ValueError: no step): numbers @ 4\n" in capfd.readouterr().out
        assert not [*tmp_path.iterdir()]

    def test_only_the_columns_asked_for_are_measured(self, measured):
        table, _ = measured("steps", "--no-compile", "--only", "numbers", "--columns", "all", "infer")
        assert [row["column"] for row in table] == ["all", "infer"]


def our_steps(case):
    """Ours in the place of a peer's, which the tests can do without."""
    return import_module("peers").fastmlp_steps(case)


def wrong_steps(case):
    """The same, with a loss that is not the network's."""
    steps = our_steps(case)
    return lambda count: 1.001 * steps(count)


class TestPeers:
    @pytest.fixture
    def peers(self, script, tiny_grid, monkeypatch):
        """Two peers, of which one is not here."""
        peers = script("peers")
        there, missing = peers.Peer(our_steps, "numpy"), peers.Peer(our_steps, "no_such_package")
        monkeypatch.setattr(peers, "PEERS", {"jax": there, "keras": missing})
        monkeypatch.setattr(peers, "REST_SECONDS", 0)
        return peers

    @pytest.mark.slow
    def test_every_peer_that_is_here_is_measured_with_every_optimizer(self, peers, measured):
        table, printed = measured("peers")
        cells = [("classes", "1"), ("classes", "4"), ("numbers", "4"), ("yes or no", "4")]
        assert [(row["network"], row["batch"], row["optimizer"]) for row in table] == [
            (*cell, optimizer) for cell in cells for optimizer in ("sgd", "adam")
        ]
        for row in table:
            for figure in ("ms", "jax_ms", "jax_speedup"):
                assert quantiles(row, figure) == sorted(quantiles(row, figure))
            assert all(row[key] for key in MACHINE | {"numpy", "target"})
            assert not any(row[key] for key in ("keras_ms_p50", "keras_speedup_p50", "no_such_package"))
            assert is_printed(row["ms_p50"], 3, printed)
        assert "keras is left out: no_such_package is not installed here\n" in printed

    @pytest.mark.slow
    def test_nothing_is_measured_where_the_losses_differ(self, peers, measured, monkeypatch):
        monkeypatch.setitem(peers.PEERS, "jax", peers.Peer(wrong_steps))
        with pytest.raises(SystemExit, match="classes @ 1, SGD: the losses differ"):
            measured("peers")

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("index", range(3), ids=["cross_entropy", "mse", "bce"])
    @pytest.mark.parametrize("name", ["jax", "tensorflow", "tensorflow_xla", "keras"])
    def test_a_peer_computes_what_ours_does(self, script, tiny_grid, monkeypatch, name, index, optimizer):
        peers = script("peers")
        peer = peers.PEERS[name]
        pytest.importorskip(peer.module)
        monkeypatch.setitem(peers.RATES, optimizer, 0.01)
        case = peers.Case(peers.Cell(peers.GRID[index], 4), optimizer)
        ours, others = (
            [steps(1) for _ in range(5)] for steps in (peers.fastmlp_steps(case), peer.make(case))
        )
        assert ours == pytest.approx(others, rel=1e-5)
        assert ours[0] != ours[-1]

    def test_without_any_peer_one_sentence_says_what_has_them(self, peers, monkeypatch, capfd):
        monkeypatch.setattr(peers, "PEERS", {"keras": peers.PEERS["keras"]})
        with pytest.raises(SystemExit):
            peers.main([])
        assert "no peer is installed here; make bench-peers" in capfd.readouterr().err


@pytest.mark.slow
def test_every_way_to_an_inference_is_measured(script, measured, monkeypatch):
    inference = script("inference")
    monkeypatch.setattr(inference, "CELLS", [("policy", 1), ("rl", 4)])
    absent = inference.Peer(inference.aot_inductor, program="no_such_compiler")
    monkeypatch.setitem(inference.SIDES, "aot_inductor", absent)  # compiling takes minutes
    table, printed = measured("inference")
    assert [(row["network"], row["batch"]) for row in table] == [("policy", "1"), ("rl", "4")]
    for row in table:
        for side in inference.SIDES.keys() - {"aot_inductor"}:
            assert quantiles(row, f"{side}_us") == sorted(quantiles(row, f"{side}_us"))
            assert is_printed(row[f"{side}_us_p50"], 1, printed)
        assert row["aot_inductor_us_p50"] == ""
        assert all(row[key] for key in MACHINE | {"onnxruntime", "numpy"})
    assert "aot_inductor is left out: no_such_compiler is not installed here\n" in printed


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


def test_every_way_to_train_networks_side_by_side_is_measured(script, measured, monkeypatch):
    jobs = [job._replace(sizes=(3, 5, 2), networks=2, batch=4) for job in script("ensemble").JOBS]
    monkeypatch.setattr(script("ensemble"), "JOBS", jobs)
    table, printed = measured("ensemble")
    own = [(row["job"], row["optimizer"]) for row in table]
    assert own == [(job.name, optimizer) for job in jobs for optimizer in ("SGD", "Adam")]
    for row in table:
        for figure in ("stock_ms", "vmap_ms", "steps_ms", "ensemble_ms", "over_vmap", "over_steps"):
            assert quantiles(row, figure) == sorted(quantiles(row, figure))
        assert all(row[key] for key in MACHINE)
        assert is_printed(row["over_stock_p50"], 2, printed)


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
    monkeypatch.setattr(readme, "speedups", lambda file="steps": cells if file == "steps" else other)
    other = {cell: dict.fromkeys(own, 1.0) for cell, own in cells.items()}
    told = readme.headline()
    assert "EPYC, small MLPs train 1.2 to 1.5 times as fast by one line, 2.2 to 3.1 times with" in told
    assert "up to 9 times at batch 1, and layers of a million weights 0.97 to 1.13 times. On" in told
    assert "Xeon, small MLPs train 1.0 to 1.0 times as fast by one line" in told


# ---- where there is a GPU

ROOT = Path(__file__).parents[1]
TINY = """
BATCHES = {"seed": 64, "rl": 64, "wide": 2048, "field": 64}
GRID = tuple(
    net._replace(sizes=tuple(max(1, size // 32) for size in net.sizes), batches=(BATCHES[net.name],))
    for net in GRID
    if net.name in BATCHES
)
NARROW = tuple(net._replace(batches=net.batches[:2]) for net in NARROW)
"""
SHORT = """
WARM_UP, ROUND_SECONDS, GPU_ROUND_SECONDS, FLUSHED_BYTES = 2, 1e-4, 1e-4, 1 << 10
"""


@pytest.fixture
def stand_in(tmp_path):
    """Runs a command in a copy of the sources, with a stand-in for a GPU, tiny networks and a lot of time."""
    copy = tmp_path / "copy"
    for folder in ("benchmarks", "fastmlp", "tests"):
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    own = copy / "tests/stand_in"

    def edit(name, *changes):
        text = (copy / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (copy / name).write_text(text)

    for name, lines in (("shapes", TINY), ("timing", SHORT)):
        with (copy / f"benchmarks/{name}.py").open("a") as file:
            file.write(lines)
    edit("benchmarks/kernels.py", ("PEAK_SIZE = 4096", "PEAK_SIZE = 64"), ("4e9, 32", "4e9, 2"))
    ten_times = [("SECONDS + 480", "SECONDS + 4800"), ("limit=$2", "limit=${2}0")]
    ten_times += [("timeout 60", "timeout 600"), ("timeout 10", "timeout 100")]
    edit("benchmarks/gpu_check.sh", *ten_times)
    environment = os.environ | {
        "OUT": str(tmp_path / "results"),
        "PATH": f"{own}:{os.environ['PATH']}",
        "PYTHON": str(own / "python"),
        "STAND_IN_PYTHON": sys.executable,
        "PYTEST_ADDOPTS": "-p stand_in_selection",
        "TORCHDYNAMO_DISABLE": "1",  # to compile takes minutes
        "OMP_NUM_THREADS": "1",
    }

    def run(*command):
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)

    run.edit, run.results, run.python = edit, tmp_path / "results", str(own / "python")
    return run


without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs no stand-in")
COLUMNS = [*(TestSteps.VARIANTS.keys() - {"predict"}), "graph of all", "graph of infer"]


@pytest.mark.slow
@without_a_gpu
def test_the_check_of_a_gpu_runs_from_end_to_end(stand_in):
    result = stand_in("benchmarks/gpu_check.sh")
    log = (stand_in.results / "gpu_check.log").read_text()
    assert result.returncode == 0, result.stdout + result.stderr + log
    assert {path.name for path in stand_in.results.iterdir()} == {
        "gpu_check.log", "kernels_cuda.csv", "products.csv", "steps_cuda.csv"
    }  # fmt: skip

    lines = result.stdout.splitlines()
    ended = [re.match(r"== (.*) \(0, \d+ s\)$", line) for line in lines]
    parts = [part[1] for part in ended if part]
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert parts == [
        "sight", "build", "self-check", "tests", *tools,
        *(f"kernels, {dtype}" for dtype in ("bfloat16", "float32", "tf32", "float16")), "products",
        *(f"{part}, {dtype}" for part in ("steps", "compiled") for dtype in ("float32", "bfloat16")),
    ]  # fmt: skip
    summary = lines[len(parts) :]
    assert len(summary) <= 40
    assert "every kernel is right" in log
    told = "\n".join(summary)
    assert log.endswith(f"{told}\n")
    assert all(f"{part} ok" in told.replace("\n", " ") for part in parts)
    assert re.search(r"^tests: \d+ passed, .* in ", told, re.M)
    assert all(f"{tool}: ERROR SUMMARY: 0 errors" in told for tool in tools)
    assert re.search(r"^µs: a launch \d.*, a replay \d.*, of 20 kernels \d", told, re.M)
    products = [line for line in summary if re.match(r"(forward|dW|dx|chain \w+)  ", line)]
    assert len(products) == 5
    steps = [line for line in summary if re.match(rf"({'|'.join(COLUMNS)})  ", line)]
    assert len(steps) == len(COLUMNS)
    assert not re.search("left out|-$| - ", "\n".join(products + steps))

    kernels, steps = (rows(stand_in.results / f"{name}_cuda.csv") for name in ("kernels", "steps"))
    assert {row["products"] for row in kernels} == {"own"}
    assert {row["architecture"] for row in kernels} == {"9.0"}
    table = rows(stand_in.results / "products.csv")
    assert {(row["dtype"], row["product"]) for row in table} == {
        (row["dtype"], row["product"]) for row in kernels
    }
    compiled = {(row["network"], row["column"]) for row in steps if row["compile_ms_p50"]}
    networks, columns = ("seed", "rl", "wide", "field"), ("all", "step", "graph of all", "infer")
    assert compiled == {(network, column) for network in networks for column in columns}
    assert len({(row["dtype"], row["network"], row["column"]) for row in steps}) == len(steps)
    assert not any(row["failed"] for row in (*kernels, *steps))


@pytest.mark.slow
@without_a_gpu
def test_a_way_of_a_gpu_that_fails_is_left_out_with_its_reason(stand_in):
    stand_in("touch", "built_for_the_stand_in")
    once = "calls = iter([None])\n    return lambda: (next(calls), step(x, target))"
    stand_in.edit("benchmarks/steps.py", ("return lambda: step(x, target)", once))
    options = "--device cuda --dtype bfloat16 --rounds 1 --no-compile --only seed rl --output"
    result = stand_in(stand_in.python, "benchmarks/steps.py", *options.split(), str(stand_in.results))
    assert result.returncode == 1
    assert "\nstep failed (StopIteration): seed @ 64, rl @ 64\n" in result.stdout
    steps = rows(stand_in.results / "steps_cuda.csv")
    assert {row["column"] for row in steps if not row["ms_p50"]} == {"step", "adam step", "clipped step"}
    assert {row["column"] for row in steps if row["speedup_p50"]} == {
        "swap", "all", "graph of all", "adam", "clipped", "infer", "graph of infer"
    }  # fmt: skip
    told = stand_in(sys.executable, "benchmarks/gpu_summary.py", str(stand_in.results)).stdout
    assert "\nleft out: bfloat16 step: StopIteration (2 times)\n" in told
