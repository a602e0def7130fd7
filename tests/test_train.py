"""The main demo, run as its users run it: benchmarks/train.py in a process of its own."""

import csv
import gzip
import os
import random
import signal
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = {"train.csv", "train_summary.csv", "train.png", "train.svg", "train-dark.svg"}
SIDES = ["stock PyTorch", "fastmlp", "fastmlp.TrainStep"]
SMALL = ["--sizes", "784,16,10", "--epochs", "2", "--threads", "1"]
IDX = {
    "train-images-idx3-ubyte": (2051, (96, 4, 4)),
    "train-labels-idx1-ubyte": (2049, (96,)),
    "t10k-images-idx3-ubyte": (2051, (32, 4, 4)),
    "t10k-labels-idx1-ubyte": (2049, (32,)),
}


def start(*arguments: object, **settings: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(BENCHMARKS / "train.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    return subprocess.Popen(command, **pipes)  # type: ignore[call-overload,no-any-return]


def train(*arguments: object) -> "subprocess.CompletedProcess[str]":
    process = start(*arguments)
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path, side: str) -> list[str]:
    return [row["loss"] for row in rows(folder / "train.csv") if row["side"] == side]


def idx_bytes(magic: int, shape: tuple[int, ...], content: bytes) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in (magic, *shape)) + content


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    draw = random.Random(0)
    for name, (magic, shape) in IDX.items():
        count = shape[0] * (16 if len(shape) == 3 else 1)
        content = bytes(draw.randrange(256 if len(shape) == 3 else 10) for _ in range(count))
        (folder / name).write_bytes(idx_bytes(magic, shape, content))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    folder = tmp_path_factory.mktemp("finished") / "made" / "by [train]"
    return folder, train(*SMALL, "--output", folder)


def test_a_run_succeeds_and_writes_its_files_and_no_others(finished):
    folder, process = finished
    assert (process.returncode, process.stderr) == (0, "")
    assert {path.name for path in folder.iterdir()} == FILES
    assert f"{folder / 'train'}.svg" in process.stdout


def test_the_pictures_are_pictures(finished):
    folder, _ = finished
    assert (folder / "train.png").read_bytes().startswith(b"\x89PNG\r\n")
    light, dark = ((folder / name).read_text() for name in ("train.svg", "train-dark.svg"))
    assert "</svg>" in light
    assert "</svg>" in dark
    assert light != dark


def test_the_curves_hold_every_step_of_every_side(finished):
    folder, _ = finished
    for side in SIDES:
        curve = [row for row in rows(folder / "train.csv") if row["side"] == side]
        assert [int(row["step"]) for row in curve] == list(range(1, 2 * (1437 // 64) + 1))
        seconds = [float(row["seconds"]) for row in curve]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0


def test_table_and_summary_agree(finished):
    folder, process = finished
    summary = rows(folder / "train_summary.csv")
    assert [row["side"] for row in summary] == SIDES
    for row in summary:
        assert f"{float(row['final_loss']):.4f}" in process.stdout
        assert f"{float(row['test_accuracy']):.2%}" in process.stdout
        assert f"{float(row['ms_p50']):.3f}" in process.stdout
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert all(row[key] for key in ("cpu", "threads", "torch", "fastmlp", "python"))
    speedup = float(summary[1]["speedup_p50"])  # which the file has rounded to four decimals
    assert any(f"{speedup + error:.2f}" in process.stdout for error in (-5e-5, 0, 5e-5))


def test_the_sides_learn_the_same(finished):
    folder, _ = finished
    stock, *others = ([float(loss) for loss in losses(folder, side)] for side in SIDES)
    assert stock[-1] < stock[0]
    for own, summary in zip(others, rows(folder / "train_summary.csv")[1:], strict=True):
        assert own == pytest.approx(stock, rel=1e-3)
        largest = max(abs(a - b) for a, b in zip(stock, own, strict=True))
        assert float(summary["loss_difference"]) == pytest.approx(largest, abs=1e-6)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses(finished, tmp_path):
    folder, _ = finished
    assert train(*SMALL, "--seed", 0, "--output", tmp_path).returncode == 0
    for side in SIDES:
        assert losses(tmp_path, side) == losses(folder, side)


def test_plot_draws_the_same_picture_from_the_csv(script, finished, tmp_path):
    folder, _ = finished
    for name in ("train.csv", "train_summary.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    script("plot").draw(tmp_path / "train.csv", tmp_path / "train")
    for name in ("train.svg", "train-dark.svg"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_speedups_that_have_been_measured_are_drawn_beside_the_curves(script, finished, tmp_path):
    folder, _ = finished
    for name in ("train.csv", "train_summary.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    lines = ["network,batch,column,speedup_p50", "seed,64,step,2.5", "seed,64,swap,1.3", "rl,1,step,9.0"]
    (tmp_path / "steps.csv").write_text("\n".join(lines))
    plot = script("plot")
    assert [*plot.read_speedups(tmp_path / "steps.csv").values()] == [2.5, 9.0]
    plot.draw(tmp_path / "train.csv", tmp_path / "train")
    drawn = [xml.etree.ElementTree.parse(path / "train.svg").getroot() for path in (folder, tmp_path)]
    without, with_bars = (len(svg.findall(".//*[@id='axes_2']")) for svg in drawn)
    assert (without, with_bars) == (0, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sizes", "784"],
        ["--sizes", "784,0,10"],
        ["--sizes", "100,10"],
        ["--sizes", "784,9"],
        ["--batch", "0"],
        ["--batch", "1438"],
        ["--epochs", "-1"],
        ["--lr", "nan"],
        ["--threads", "1000000"],
        ["--seed", "one"],
        ["--device", "abacus"],
        ["--data", "no/such/folder"],
        ["--output", __file__],
    ],
    ids=" ".join,
)
def test_a_bad_option_is_named_in_one_sentence(script, capfd, arguments, tmp_path):
    with pytest.raises(SystemExit) as caught:
        script("train").main(["--output", str(tmp_path), *arguments])
    output, errors = capfd.readouterr()
    assert (caught.value.code, output) == (2, "")
    assert errors.count("\n") == 1
    assert f"argument {arguments[0]}: " in errors
    assert list(tmp_path.iterdir()) == []


def test_plain_and_gzipped_idx_files_under_both_spellings_are_the_same_data(script, idx_folder):
    plain = script("data").idx(idx_folder, classes=10)
    for name in IDX:
        path = idx_folder / name
        (idx_folder / f"{name.replace('-idx', '.idx')}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = script("data").idx(idx_folder, classes=10)
    for part in ("train_x", "train_y", "test_x", "test_y"):
        assert getattr(plain, part).equal(getattr(zipped, part))


def test_idx_images_are_normalised_by_the_training_images(script, idx_folder):
    images = script("data").idx(idx_folder, classes=10)
    assert images.train_x.shape == (96, 16)
    assert images.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.train_x.std().item() == pytest.approx(1, abs=1e-5)


def replaced(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def zipped_and_cut(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()


def only_named_zipped(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.gz"))


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, Path.unlink, "no such file"),
        (IMAGES, shortened, "truncated, expected 1552 bytes for 96x4x4 and found 1551"),
        (LABELS, lengthened, "oversized, expected 40 bytes for 32 and found 41"),
        (IMAGES, replaced(b""), "truncated, expected a header of 16 bytes and found 0"),
        (IMAGES, replaced(idx_bytes(2049, (96,), bytes(96))), "expected 0x00000803 for images"),
        (LABELS, replaced(idx_bytes(2051, (32, 1, 1), bytes(32))), "expected 0x00000801 for labels"),
        (LABELS, replaced(idx_bytes(2049, (31,), bytes(31))), "31 labels, but 32 images in t10k"),
        (LABELS, replaced(idx_bytes(2049, (32,), bytes([10] * 32))), "label 10, expected labels below 10"),
        (LABELS, replaced(idx_bytes(2049, (0,), b"")), "holds no elements at all"),
        (IMAGES, replaced(idx_bytes(2051, (2**32 - 1,) * 3, b"")), "truncated"),
        (IMAGES, replaced(idx_bytes(2051, (96, 2, 2), bytes(384))), "images of 4x4 pixels, expected 2x2"),
        (IMAGES, zipped_and_cut, "expected a whole gzip file"),
        (IMAGES, only_named_zipped, "expected a whole gzip file"),
    ],
)
def test_a_damaged_idx_file_is_named_with_what_was_expected(script, idx_folder, name, damage, message):
    damage(idx_folder / name)
    data = script("data")
    with pytest.raises(data.DataError) as caught:
        data.idx(idx_folder, classes=10)
    culprit = "t10k-images-idx3-ubyte" if "pixels" in message else name
    assert f"{idx_folder / culprit}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_run_on_idx_files_succeeds_and_stops_at_a_damaged_one(idx_folder, tmp_path):
    arguments = ["--data", idx_folder, "--sizes", "16,8,10", "--threads", 1, "--output", tmp_path / "results"]
    assert train(*arguments).returncode == 0
    assert rows(tmp_path / "results" / "train_summary.csv")[0]["data"] == "tiny"

    shortened(idx_folder / IMAGES)
    process = train(*arguments)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1
    assert f"argument --data: {idx_folder / IMAGES}: truncated" in process.stderr


@pytest.mark.slow
def test_an_interrupted_run_leaves_the_results_as_they_were(tmp_path):
    (tmp_path / "train.csv").write_text("of an earlier run")
    process = start("--epochs", 100000, "--threads", 1, "--output", tmp_path)
    assert process.stdout is not None
    process.stdout.readline()  # training starts after the first lines
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]
    assert (tmp_path / "train.csv").read_text() == "of an earlier run"


@pytest.mark.slow
def test_a_closed_pipe_ends_the_run_before_the_training(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = start("--epochs", 100000, "--output", tmp_path, stdout=writer)
    os.close(writer)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (2, "train.py: cannot write (standard output was closed)\n")
    assert list(tmp_path.iterdir()) == []
