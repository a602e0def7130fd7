"""What torch.utils.flop_counter counts: for a network of ours as much as for torch's own modules."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastmlp

MODELS = {
    "one op": fastmlp.MLP(6, 5, 4, 3),
    "an op for each layer": nn.Sequential(*fastmlp.MLP(6, 5, 4, 3)),
    "torch's own modules": nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    ),
}


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_forward_pass_counts_as_torchs_own_does():
    with torch.no_grad():
        counts = {counted(lambda model=model: model(torch.ones(2, 7, 6))) for model in MODELS.values()}
    assert counts == {2 * 14 * (6 * 5 + 5 * 4 + 4 * 3)}


@settings(deadline=None)
@given(of_input=st.booleans(), of_parameters=st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_whatever_gradients_are_asked_for_count_as_torchs_own_do(of_input, of_parameters):
    x = torch.ones(2, 7, 6, requires_grad=of_input)
    for model in MODELS.values():
        for parameter, required in zip(model.parameters(), of_parameters, strict=True):
            parameter.requires_grad_(required)
    counts = {counted(lambda model=model: model(x).sum().backward()) for model in MODELS.values()}
    if not of_input:
        model = MODELS["one op"]
        step = fastmlp.TrainStep(model, nn.MSELoss(), fastmlp.SGD(model.parameters(), lr=0.0))
        counts.add(counted(lambda: step(x, torch.ones(2, 7, 3))))
    assert len(counts) == 1
    assert counts.pop() > 0
