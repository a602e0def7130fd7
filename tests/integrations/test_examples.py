"""The examples with other libraries run, tell what they saved, and train what stock trains."""

import pytest

from examples import figures, run


@pytest.mark.parametrize(
    ("name", "result"),
    [("skorch_pipeline", r" accuracy (\S+)%"), ("lightning_module", r" loss (\S+)")],
)
def test_a_model_becomes_what_stock_makes_of_it(name, result, tmp_path):
    stock, fused = figures(result, run(name, 1, tmp_path))
    assert fused == pytest.approx(stock, rel=1e-3)


def test_an_agent_becomes_what_stock_makes_of_it(tmp_path):
    output = run("ppo", 1, tmp_path)
    [difference] = figures(r"difference of a value after the first round: (\S+)", output)
    assert difference < 1e-3
