"""The examples run, tell what they saved, and compute what stock computes."""

from functools import cache

import pytest

from examples import figures, run

AMOUNTS = {"mnist": 2, "tabular": 4, "coordinates": 4, "serve": 100}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs an example, once for all tests: where it ran, and what it printed."""

    @cache
    def of(name):
        folder = tmp_path_factory.mktemp(name)
        return folder, run(name, AMOUNTS[name], folder)

    return of


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("mnist", r" loss (\S+),"),
        pytest.param("tabular", r" loss (\S+),", marks=pytest.mark.slow),
        pytest.param("coordinates", r" PSNR (\S+) dB", marks=pytest.mark.slow),
    ],
)
def test_a_model_becomes_what_stock_makes_of_it(name, result, finished):
    stock, fused = figures(result, finished(name)[1])
    assert fused == pytest.approx(stock, rel=1e-3)


def test_answers_are_those_of_stock(finished):
    [difference] = figures(r"difference of an output: (\S+)", finished("serve")[1])
    assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tabular", "coordinates"])
def test_pictures_are_saved(name, finished):
    assert (finished(name)[0] / "demo" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
