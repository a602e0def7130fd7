"""Writes the figures of the README and of docs/ from the CSV files in results/: none of them is typed.

A figure stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is a key of FIGURES.
`python benchmarks/readme.py` rewrites the pages in place; with `--check` it only tells, by its exit status,
whether that would change anything.
"""

import csv
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md", ROOT / "docs/architecture.md")

# What the keys of the CSV files are to people.
NETWORKS = {
    "seed": "MNIST classifier",
    "policy": "small RL policy",
    "rl": "RL policy",
    "elu": "locomotion policy",
    "tabular": "tabular data",
    "wide": "wide layers",
    "ffn": "transformer's feed-forward",
    "ranking": "recommender",
    "gelu": "small feed-forward, GELU",
    "field": "coordinate network",
    "siren-like": "physics, tanh",
}
COLUMNS = {
    "swap": "model only",
    "all": "+ loss and optimizer",
    "step": "TrainStep",
    "infer": "inference",
    "predict": "Predictor",
}
ADAM_COLUMNS = {
    "adam": "Adam, loop",
    "adam step": "Adam, TrainStep",
    "clipped": "clipped, loop",
    "clipped step": "clipped, TrainStep",
}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam"}
HABITS = {"eager": "", "compile": "torch.compile", "autocast": "autocast", "both": "both"}
MODELS = {
    "skorch": "skorch, classifier",
    "lightning": "Lightning, classifier",
    "stable_baselines3": "stable-baselines3, PPO",
    "rtdl_mlp": "rtdl_revisiting_models, MLP",
    "rtdl_resnet": "rtdl_revisiting_models, ResNet",
    "opt": "transformers, OPT",
    "t5": "transformers, T5",
    "keras": "Keras, TorchModuleWrapper",
}

# The rows of the README's table, by network and batch, of those that have been measured.
SHORT = (
    ("rl", "1"), ("policy", "64"), ("rl", "64"), ("seed", "64"), ("tabular", "128"),
    ("elu", "4096"), ("field", "65536"), ("wide", "256"), ("wide", "2048"), ("ffn", "4096"),
)  # fmt: skip
SMALL_BATCH = 128
LARGE_LAYER = 1 << 20  # weights


Cells = dict[tuple[str, str, str], dict[str, float]]


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file in results/."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table, the first column left, the others right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(row: dict[str, str]) -> str:
    """What a figure is worth nothing without."""
    versions = f"torch {row['torch']}, fastmlp {row['fastmlp']} at {row['commit']}"
    return f"{row['gpu'] or row['cpu']}, {row['threads']} threads, {versions}"


def train() -> str:
    """The table that train.py prints at its end."""
    sides = rows("train_summary")
    body = [
        [
            side["side"],
            f"{float(side['final_loss']):.4f}",
            f"{float(side['test_accuracy']):.2%}",
            f"{float(side['ms_p50']):.2f}",
            f"{float(side['speedup_p50']):.2f}",
        ]
        for side in sides
    ]
    header = ["", "final loss", "test accuracy", "ms a step", "times as fast"]
    difference = max(float(side["loss_difference"]) for side in sides)
    return (
        f"{table(header, body)}\n\n"
        f"The loss curves differ by {difference:.0e} at most. Measured on {where(sides[0])}."
    )


def steps() -> str:
    """How many times faster than stock each column of steps.py is, a cell of the grid a row: with SGD."""
    return steps_table(speedups(), COLUMNS)


def adam() -> str:
    """The same with Adam, and with gradients that are clipped besides."""
    return steps_table(speedups(), ADAM_COLUMNS)


def short() -> str:
    """The rows of the first of these that the README shows."""
    cells = {cell: own for cell, own in speedups().items() if (cell[0], cell[2]) in SHORT}
    return steps_table(cells, COLUMNS, has_mean=False)


def intel() -> str:
    """The same on another processor, where stock is faster."""
    return steps_table(speedups("steps_intel"), COLUMNS, "steps_intel")


def headline() -> str:
    """The same in sentences, a processor each."""
    gpu = "" if (RESULTS / "steps_cuda.csv").exists() else " Not yet measured on a GPU."
    return (
        f"**On an AMD EPYC, {gains(speedups())}. "
        f"On an older Intel Xeon, {gains(speedups('steps_intel'))}.{gpu}**"
    )


def gains(cells: Cells) -> str:
    """What small networks gain, and large ones."""
    large, single, small = [], [], []
    for (_, sizes, batch), cell in cells.items():
        widths = [int(width) for width in sizes.split("-")]
        if max(map(math.prod, pairwise(widths))) >= LARGE_LAYER:
            large += [cell[column] for column in ("swap", "all", "step")]
        elif batch == "1":
            single.append(cell["step"])
        elif int(batch) <= SMALL_BATCH:
            small.append(cell)
    swap, step = ([cell[column] for cell in small] for column in ("swap", "step"))
    return (
        f"small MLPs train {min(swap):.1f} to {max(swap):.1f} times as fast by one line, "
        f"{min(step):.1f} to {max(step):.1f} times with `TrainStep`, and up to {max(single):.0f} times at "
        f"batch 1, and layers of a million weights {min(large):.2f} to {max(large):.2f} times"
    )


def slower() -> str:
    """What is slower than stock, of all that is measured."""
    names = COLUMNS | ADAM_COLUMNS
    lines = [
        f"{NETWORKS[network]}, {short_sizes(sizes)} @ {batch}, {names[column]}{on}: {speedup:.2f}"
        for file, on in (("steps", ""), ("steps_intel", ", on Intel's"))
        for (network, sizes, batch), cell in speedups(file).items()
        for column, speedup in cell.items()
    ]
    lines += [
        f"{row['what']}, {name}: {float(row[column]):.2f}"
        for row in rows("training")
        for column, name in (("loop_speedup_p50", "loop"), ("step_speedup_p50", "TrainStep"))
    ]
    lines += [
        f"{MODELS[row['name']]}, {row['column']}: {float(row['speedup_p50']):.2f}"
        for row in rows("integrations")
    ]
    slow = [f"- {line}" for line in lines if float(line.rpartition(" ")[2]) < 1]
    return "\n".join(slow) or "Nothing."


def speedups(file: str = "steps") -> Cells:
    """By network, sizes and batch, how many times faster than stock each column of steps.py is."""
    cells: Cells = {}
    for row in rows(file):
        cell = cells.setdefault((row["network"], row["sizes"], row["batch"]), {})
        cell[row["column"]] = float(row["speedup_p50"])
    return cells


def short_sizes(sizes: str) -> str:
    """The widths, of which three or more that are the same are written once: 64×4-16."""
    return re.sub(r"\b(\d+)(-\1\b){2,}", lambda same: f"{same[1]}×{same[0].count('-') + 1}", sizes)


def steps_table(cells: Cells, names: Mapping[str, str], file: str = "steps", has_mean: bool = True) -> str:
    """The cells, one a row, in those of these columns that have been measured."""
    columns = [column for column in names if all(column in cell for cell in cells.values())]
    if not columns:
        return "Not measured yet."
    body = [
        [NETWORKS[name], short_sizes(sizes), batch, *(f"{cell[column]:.2f}" for column in columns)]
        for (name, sizes, batch), cell in cells.items()
    ]
    if has_mean:
        means = (geometric_mean([cell[column] for cell in cells.values()]) for column in columns)
        body.append(["geometric mean", "", "", *(f"{mean:.2f}" for mean in means)])
    header = ["", "network", "batch", *(names[column] for column in columns)]
    return f"{table(header, body)}\n\nMeasured on {where(rows(file)[0])}."


def kernels() -> str:
    """The share of the peak that each product reaches where it is large enough to, a shape a row."""
    least_operations = 50e6
    shapes: dict[tuple[str, str, str], list[str]] = {}
    results = rows("kernels")
    for row in results:
        shape = row["M"], row["K"], row["N"]
        if 2 * math.prod(map(int, shape)) >= least_operations:
            shares = shapes.setdefault(shape, [])
            shares.append(f"{float(row['peak_share_p50']):.0%}")
    body = [[" x ".join(shape), *shares] for shape, shares in shapes.items()]
    machine = f"{where(results[0])}, {results[0]['instruction_set']}"
    return f"{table(['M x K x N', 'y = relu(x Wᵀ + b)', 'dW, db', 'dx'], body)}\n\nMeasured on {machine}."


# What a step and an inference are compared with, in the order of the columns; and ours.
PEERS = {"jax": "JAX", "tensorflow": "TensorFlow", "tensorflow_xla": "TensorFlow, XLA", "keras": "Keras"}
INFERENCES = {
    "eager": "eager",
    "frozen": "frozen TorchScript",
    "aot_inductor": "AOTInductor",
    "onnx_runtime": "ONNX Runtime",
    "numpy": "NumPy",
    "fused": "`fuse`",
    "predictor": "`Predictor`",
    "reading": "reading the weights",
}
PACKAGES = {
    "jax": "JAX",
    "tensorflow": "TensorFlow",
    "keras": "Keras",
    "onnxruntime": "ONNX Runtime",
    "numpy": "NumPy",
}


def are_measured(names: Mapping[str, str], results: Sequence[Mapping[str, str]], column: str) -> list[str]:
    """Those of the names whose column is filled."""
    return [name for name in names if results[0].get(f"{name}_{column}")]


def among(row: dict[str, str]) -> str:
    """Where a figure comes from, with the packages that are not torch's or ours."""
    return ", ".join([where(row), *(f"{PACKAGES[name]} {row[name]}" for name in PACKAGES if row.get(name))])


def peers() -> str:
    """How many times faster than each peer's a step is, a cell and optimizer a row."""
    results = rows("peers")
    names = are_measured(PEERS, results, "ms_p50")
    body = [
        [
            NETWORKS[row["network"]],
            short_sizes(row["sizes"]),
            row["batch"],
            OPTIMIZERS[row["optimizer"]],
            f"{float(row['ms_p50']):.3f}",
            *(f"{float(row[f'{name}_speedup_p50']):.2f}" for name in names),
        ]
        for row in results
    ]
    speedups = ([float(row[f"{name}_speedup_p50"]) for row in results] for name in names)
    body.append(["geometric mean", "", "", "", "", *(f"{geometric_mean(own):.2f}" for own in speedups)])
    header = ["", "network", "batch", "", "fastmlp.TrainStep ms", *(f"over {PEERS[name]}" for name in names)]
    return f"{table(header, body)}\n\nMeasured on {among(results[0])}."


def inference() -> str:
    """Microseconds of a small network's inference, a cell a row, and how they compare with ONNX Runtime's."""
    results = rows("inference")
    sides = are_measured(INFERENCES, results, "us_p50")
    body = [
        [short_sizes(row["sizes"]), row["batch"], *(f"{float(row[f'{side}_us_p50']):.1f}" for side in sides)]
        for row in results
    ]
    means = [
        geometric_mean([float(row["onnx_runtime_us_p50"]) / float(row[f"{side}_us_p50"]) for row in results])
        for side in sides
    ]
    body.append(["times as fast as ONNX Runtime", "", *(f"{mean:.2f}" for mean in means)])
    header = ["network", "batch", *(INFERENCES[side] for side in sides)]
    return f"{table(header, body)}\n\nMeasured on {among(results[0])}."


def habits() -> str:
    """What torch.compile and autocast make of a training step, a cell and habit a row."""
    results = rows("habits")
    body = [
        [
            f"{row['sizes']} @ {row['batch']}",
            HABITS[row["habit"]],
            *(f"{float(row[column]):.2f}" for column in ("stock_ms_p50", "ms_p50", "speedup_p50")),
        ]
        for row in results
    ]
    header = ["", "with", "stock ms", "fastmlp ms", "times as fast"]
    return f"{table(header, body)}\n\nMeasured on {where(results[0])}."


def training() -> str:
    """How many times faster the updates of trainers are, a job a row."""
    results = rows("training")
    body = [
        [
            row["what"],
            f"{float(row[row['best'] + '_ms_p50']):.3f}",
            *(f"{float(row[column]):.2f}" for column in ("loop_speedup_p50", "step_speedup_p50")),
            row["way"],
        ]
        for row in results
    ]
    header = ["", "stock ms", "loop", "TrainStep", "which is"]
    return f"{table(header, body)}\n\nMeasured on {where(results[0])}."


def ensemble() -> str:
    """How many times faster than other ways networks train side by side, a job and optimizer a row."""
    results = rows("ensemble")
    body = [
        [
            row["what"],
            row["optimizer"],
            *(f"{float(row[f'{side}_ms_p50']):.2f}" for side in ("stock", "vmap", "steps", "ensemble")),
            *(f"{float(row[f'over_{side}_p50']):.2f}" for side in ("stock", "vmap", "steps")),
        ]
        for row in results
    ]
    ways = ["loop of stock", "vmap", "loop of TrainStep"]
    header = ["", "", *(f"{way} ms" for way in ways), "Ensemble ms", *(f"over {way}" for way in ways)]
    return f"{table(header, body)}\n\nMeasured on {where(results[0])}."


def integrations() -> str:
    """How many times faster models of other libraries are, a model a row."""
    results = rows("integrations")
    models: dict[str, list[str]] = {}
    for row in results:
        models.setdefault(MODELS[row["name"]], []).append(f"{float(row['speedup_p50']):.2f}")
    columns = list(dict.fromkeys(row["column"] for row in results))
    body = [[name, *speedups] for name, speedups in models.items()]
    return f"{table(['', *columns], body)}\n\nMeasured on {where(results[0])}."


def plans() -> str:
    """What an H100 is predicted to launch, and for how long, a cell a row. Nothing is measured."""
    from fastmlp.plan import plan, plan_step
    from shapes import GRID

    body = []
    for network in GRID:
        for batch in network.batches:
            cells = []
            for dtype in ("float32", "bfloat16"):
                launches = plan(network.sizes, batch, dtype)
                own = [launch for launch in launches if launch.owner == "own"]
                blocks = sorted({launch.blocks for launch in own})
                cells += [
                    f"{len(launches)}, {len(launches) - len(own)}",
                    "-".join(map(str, blocks[:1] + blocks[1:][-1:])),
                    f"{sum(launch.predicted for launch in own):.0f}",
                ]
            step = plan_step(network.sizes, batch)
            one = f"{step.predicted:.0f} ({step.blocks}, {step.barriers})" if step else "a graph"
            body.append([short_sizes("-".join(map(str, network.sizes))), str(batch), *cells, one])
    header = ["network", "batch"]
    for dtype in ("float32", "bfloat16"):
        header += [f"{dtype}: launches, torch's", "blocks", "µs of ours"]
    return table([*header, "step in one launch: µs (blocks, barriers)"], body)


def occupancy() -> str:
    """What a thread and a block of each family of kernels take, and the blocks that fit, a family a row."""
    results = rows("occupancy")
    architectures = list(dict.fromkeys(row["architecture"] for row in results))
    body: dict[str, list[str]] = {}
    for row in results:
        size = (int(row["static_bytes"]) + int(row["dynamic_bytes"])) / 1024
        cells = body.setdefault(row["kernels"], [row["kernels"], row["threads"], f"{size:.1f}"])
        fits = f"{row['blocks']} ({row['limit']})" if row["blocks"] != "0" else "not used"
        cells.append(f"{row['registers']}: {fits}")
    return (
        f"{table(['kernels', 'threads', 'KB shared', *architectures], list(body.values()))}\n\n"
        f"Compiled by CUDA {results[0]['cuda']}."
    )


FIGURES: dict[str, Callable[[], str]] = {
    figure.__name__: figure
    for figure in (
        headline, short, train, steps, adam, intel, training, ensemble, kernels, peers, inference,
        integrations, habits, slower, plans, occupancy,
    )
}  # fmt: skip


def filled(pages: Mapping[Path, str]) -> dict[Path, str]:
    """The pages with every figure, which stands once in one of them, as the CSV files have it."""
    texts = dict(pages)
    for name, figure in FIGURES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        places = [path for path, text in texts.items() for _ in range(text.count(begin))]
        if len(places) != 1 or texts[places[0]].count(end) != 1:
            raise SystemExit(f"expected {begin.strip()} and {end} once in the pages")
        before, rest = texts[places[0]].split(begin)
        texts[places[0]] = f"{before}{begin}{figure()}\n{end}{rest.split(end)[1]}"
    return texts


if __name__ == "__main__":
    before = {path: path.read_text() for path in PAGES}
    after = filled(before)
    stale = [path for path in PAGES if before[path] != after[path]]
    if "--check" in sys.argv[1:]:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{names}: stale, run python benchmarks/readme.py" if stale else 0)
    for path in stale:
        path.write_text(after[path])
