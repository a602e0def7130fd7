"""fastmlp's optimizers: the results and the habits of torch.optim's, whichever path a step takes."""

import copy
import pickle
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastmlp
from fastmlp import _C, optim

KINDS = {name: (getattr(fastmlp, name), getattr(torch.optim, name)) for name in ("SGD", "Adam", "AdamW")}
OPTIONS = {
    "plain": {"lr": 0.1},
    "tensor lr": {"lr": torch.tensor(0.1)},
    "lr of one element": {"lr": torch.tensor([0.1])},
    "weight decay": {"lr": 0.1, "weight_decay": 0.5},
    "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"kind": "Adam", "lr": 0.1},
    "Adam of tensors": {"kind": "Adam", "lr": torch.tensor(0.1), "betas": 2 * (torch.tensor(0.75),)},
    "Adam without a past": {"kind": "Adam", "betas": (0.0, 0.0), "eps": 1e-3},
    "Adam with all": {"kind": "Adam", "lr": 0.1, "weight_decay": 0.5, "amsgrad": True, "maximize": True},
    "AdamW": {"kind": "AdamW", "lr": 0.1, "weight_decay": 0.5},
}
SHAPES = [(500, 7), (500,), (), (0,), (3, 0, 2), (1,), (4, 3, 2, 5)]
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def parameters(*shapes, dtype=torch.float32, seed=0):
    """New parameters with gradients; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        values = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2)]
        made.append(nn.Parameter(values[0]))
        made[-1].grad = values[1]
    return made


def take_steps(optimizer, params, steps=4):
    """So many steps, along gradients that change from step to step."""
    for step in range(steps):
        if step > 0:
            for param in params:
                if param.grad is not None:
                    param.grad.mul_(-0.7).add_(0.1)
        optimizer.step()


def both(make_params, steps=4, kind="SGD", **options):
    """The optimizers, ours and torch's, after the same steps of the same parameters."""
    optimizers = []
    for make in KINDS[kind]:
        params = make_params()
        optimizers.append(make(params, **options))
        take_steps(optimizers[-1], params, steps)
    return optimizers


def tensors_of(optimizer):
    """Parameters and what the optimizer keeps of them, in order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return params, [state for param in params for state in optimizer.state.get(param, {}).values()]


def assert_same(ours, stock, **tolerance):
    for mine, theirs in zip(tensors_of(ours), tensors_of(stock), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.detach(), b.detach(), **tolerance)
                assert a.stride() == b.stride()


@pytest.fixture
def kernel_calls(monkeypatch):
    """What the op has returned, call by call: whether the kernel covered the tensors."""
    calls = []
    op = optim._C.optimize
    monkeypatch.setattr(optim._C, "optimize", lambda *arguments: calls.append(op(*arguments)) or calls[-1])
    return calls


# ---- the kernel's path


@every_option
def test_steps_are_those_of_torch(instruction_set, kernel_calls, options):
    ours, stock = both(lambda: parameters(*SHAPES), **options)
    assert kernel_calls == [True] * 4
    assert_same(ours, stock)


@every_option
def test_bfloat16_is_rounded_no_more_often_than_by_torch(instruction_set, kernel_calls, options):
    ours, stock = both(lambda: parameters((500, 7), (33,), dtype=torch.bfloat16), steps=1, **options)
    exact, _ = both(lambda: parameters((500, 7), (33,), dtype=torch.bfloat16, seed=0), steps=0, **options)
    params, _ = tensors_of(exact)
    doubles = [nn.Parameter(param.detach().double()) for param in params]
    for double, param in zip(doubles, params, strict=True):
        double.grad = param.grad.double()
    options = dict(options)
    KINDS[options.pop("kind", "SGD")][1](doubles, **options).step()
    assert kernel_calls == [True]
    for mine, theirs, right in zip(tensors_of(ours)[0], tensors_of(stock)[0], doubles, strict=True):
        assert (mine.double() - right).norm() <= 1.001 * (theirs.double() - right).norm()
        torch.testing.assert_close(mine.double(), right, rtol=2**-8, atol=1e-6)


@settings(max_examples=30, deadline=None, database=None)
@given(
    options=st.sampled_from(list(OPTIONS.values())),
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=80),
    seed=st.integers(0, 99),
)
def test_any_number_of_parameters_of_any_shape_is_updated(options, shapes, seed):
    assert_same(*both(lambda: parameters(*shapes, seed=seed), steps=2, **options))


def test_the_number_of_threads_does_not_change_a_bit(instruction_set):
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = parameters((300, 301), (7,), (100, 999))
        take_steps(fastmlp.SGD(params, **OPTIONS["nesterov"]), params)
        results.append(params)
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, *others in zip(*results, strict=True) for other in others)


@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_a_parameter_without_a_gradient_is_left_alone(kernel_calls, name):
    def make():
        params = parameters((3,), (4,), (5,))
        params[1].grad = None
        return params

    ours, stock = both(make, **OPTIONS[name])
    assert kernel_calls == [True] * 4
    assert_same(ours, stock)
    assert len(ours.state) == 2


@pytest.mark.parametrize("name", ["dampening", "Adam with all"])
def test_a_state_that_begins_later_than_others_begins_as_in_torch(kernel_calls, name):
    options = dict(OPTIONS[name])
    optimizers = []
    for kind in KINDS[options.pop("kind", "SGD")]:
        params = parameters((3,), (4,))
        late, params[1].grad = params[1].grad, None
        optimizers.append(kind(params, **options))
        take_steps(optimizers[-1], params, 2)
        params[1].grad = late
        take_steps(optimizers[-1], params, 3)
    assert_same(*optimizers)
    assert kernel_calls == [True] * (4 if name == "dampening" else 5)  # and one step of torch's


def test_parameters_that_are_dense_in_any_order_of_dimensions_take_the_kernel(kernel_calls):
    def make():
        (param,) = parameters((7, 5))
        transposed = nn.Parameter(param.detach().t())
        transposed.grad = param.grad.t()
        return [transposed]

    ours, stock = both(make, **OPTIONS["momentum"])
    assert kernel_calls == [True] * 4
    assert_same(ours, stock)


def test_groups_have_options_of_their_own():
    def make():
        first, second = parameters((3,), (4,))
        return [{"params": [first]}, {"params": [second], "lr": 0.01, "momentum": 0.5, "weight_decay": 1.0}]

    optimizers = []
    for kind in (fastmlp.SGD, torch.optim.SGD):
        groups = make()
        optimizers.append(kind(groups, lr=0.1))
        take_steps(optimizers[-1], tensors_of(optimizers[-1])[0])
    assert_same(*optimizers)


@pytest.mark.parametrize("name", ["momentum", "Adam", "Adam with all", "Adam without a past"])
def test_infinities_and_nan_spread_as_in_torch(name):
    def make():
        params = parameters((40,))
        params[0].data[0], params[0].data[1] = torch.inf, torch.nan
        params[0].grad[2], params[0].grad[3] = torch.inf, torch.nan
        return params

    assert_same(*both(make, **OPTIONS[name]), equal_nan=True)


@pytest.mark.parametrize("name", ["nesterov", "Adam with all", "AdamW"])
def test_two_thousand_steps_stay_as_close_to_the_exact_ones_as_torchs(kernel_calls, name):
    options = dict(OPTIONS[name], lr=1e-3)
    kinds = KINDS[options.pop("kind", "SGD")]
    runs = []
    for kind, dtype in ((kinds[0], torch.float32), (kinds[1], torch.float32), (kinds[1], torch.float64)):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.ones(64, dtype=dtype))
        optimizer = kind([param], **options)
        for _ in range(2_000):
            param.grad = torch.randn(64, generator=generator).to(dtype)
            optimizer.step()
        runs.append(param.detach().double())
    ours, stock, exact = runs
    assert kernel_calls == [True] * 2_000
    assert (ours - exact).abs().max() <= 1.5 * (stock - exact).abs().max()


def test_where_float64_is_the_default_steps_are_counted_in_it_as_in_torch(kernel_calls):
    torch.set_default_dtype(torch.float64)
    try:
        ours, stock = both(lambda: parameters((5,)), **OPTIONS["Adam"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert kernel_calls == [True] * 4
    assert_same(ours, stock)


def test_steps_that_are_counted_otherwise_are_torchs(kernel_calls):
    optimizers = []
    for kind in KINDS["Adam"]:
        params = parameters((5,))
        optimizers.append(kind(params))
        take_steps(optimizers[-1], params, 1)
        optimizers[-1].state[params[0]]["step"] = torch.tensor([1.0, 2.0])[:1].to(torch.bfloat16)
        take_steps(optimizers[-1], params, 2)
    assert kernel_calls == [True, False, False]
    assert_same(*optimizers, rtol=1e-5, atol=1e-6)


def test_a_step_in_inference_mode_updates():
    params = parameters((3,))
    before = params[0].detach().clone()
    with torch.inference_mode():
        fastmlp.SGD(params, lr=1.0).step()
    assert torch.equal(params[0], before - params[0].grad)


def test_autograd_notices_that_a_saved_parameter_has_changed():
    (param,) = parameters((3,))
    loss = param.square().sum()
    fastmlp.SGD([param], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- torch's path


def sparse():
    (param,) = parameters((5, 3))
    param.grad = param.grad.to_sparse()
    return [param]


def strided():
    (param,) = parameters((6, 6))
    sliced = nn.Parameter(param.detach()[:, ::2])
    sliced.grad = param.grad[:, 1::2]
    return [sliced]


def laid_out_otherwise():
    (param,) = parameters((6, 4))
    param.grad = param.grad.t().contiguous().t()
    return [param]


def overlapping():
    memory = torch.arange(10.0)
    params = [nn.Parameter(memory[:6]), nn.Parameter(memory[4:])]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def with_one_gradient():
    params = parameters((5,), (5,))
    params[1].grad = params[0].grad
    return params


def mixed():
    return parameters((5,)) + parameters((5,), dtype=torch.float64)


class Subclass(torch.Tensor):
    """A tensor type of its own."""


def of_a_subclass():
    (param,) = parameters((5,))
    of_subclass = nn.Parameter(param.detach().as_subclass(Subclass))
    of_subclass.grad = param.grad
    return [of_subclass]


UNCOVERED = {
    "float64": lambda: parameters((5,), dtype=torch.float64),
    "float16": lambda: parameters((5,), dtype=torch.float16),
    "complex": lambda: parameters((5,), dtype=torch.complex64),
    "sparse": sparse,
    "strided": strided,
    "laid out otherwise": laid_out_otherwise,
    "overlapping": overlapping,
    "with one gradient": with_one_gradient,
    "mixed": mixed,
    "of a subclass": of_a_subclass,
}


@pytest.mark.parametrize("name", ["momentum", "Adam"])
@pytest.mark.parametrize("make", UNCOVERED.values(), ids=list(UNCOVERED))
def test_what_the_kernel_does_not_cover_gets_the_bits_of_torch(kernel_calls, make, name):
    steps = 1 if make in (with_one_gradient, sparse) else 4
    if make is sparse and name == "Adam":
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            both(make, steps, **OPTIONS[name])
        return
    ours, stock = both(make, steps, **OPTIONS[name])
    assert True not in kernel_calls
    assert_same(ours, stock, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nesterov", "Adam"])
@pytest.mark.parametrize("asked", [{"foreach": True}, {"foreach": False}, {"fused": False}])
def test_an_implementation_that_is_asked_for_is_torchs(kernel_calls, asked, name):
    ours, stock = both(lambda: parameters(*SHAPES), **OPTIONS[name], **asked)
    assert kernel_calls == []
    assert_same(ours, stock, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nesterov", "Adam"])
def test_a_fused_implementation_is_ours(kernel_calls, name):
    ours, stock = both(lambda: parameters(*SHAPES), **OPTIONS[name], fused=True)
    assert kernel_calls == [True] * 4
    assert_same(ours, stock)


def test_a_parameter_that_is_there_twice_is_updated_twice():
    def make():
        params = parameters((5,))
        return [params[0], params[0]]

    with pytest.warns(UserWarning, match="duplicate"):
        assert_same(*both(make, **OPTIONS["plain"]), rtol=0, atol=0)


def test_a_group_that_takes_torchs_path_does_not_hold_up_others(kernel_calls):
    params = parameters((5,)) + parameters((5,), dtype=torch.float64) + parameters((4,))
    expected = [(param - param.grad).detach() for param in params]
    fastmlp.SGD([{"params": [param]} for param in params], lr=1.0).step()
    assert kernel_calls == [True, False, True]
    for param, right in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), right)


def test_a_differentiable_step_can_be_differentiated():
    gradients = []
    for kind in (fastmlp.SGD, torch.optim.SGD):
        leaf = torch.ones(3, requires_grad=True)
        param = leaf.clone()
        param.grad = leaf.square()
        optimizer = kind([param], lr=0.1, differentiable=True)
        optimizer.step()
        gradients.append(torch.autograd.grad(param.sum(), leaf)[0])
    assert torch.equal(*gradients)


def test_a_learning_rate_can_be_differentiated():
    gradients = []
    for kind in (fastmlp.SGD, torch.optim.SGD):
        lr = torch.tensor(0.1, requires_grad=True)
        param = torch.ones(3, requires_grad=True).clone()
        param.grad = torch.full((3,), 2.0)
        kind([param], lr=lr, differentiable=True).step()
        gradients.append(torch.autograd.grad(param.sum(), lr)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", [fastmlp.SGD, fastmlp.Adam])
def test_gradient_scaling_skips_a_step_with_infinities(kind):
    (param,) = parameters((3,))
    before = param.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = kind([param], lr=0.1, fused=True)
    scaler.scale((param * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, before)


@pytest.mark.parametrize("name", ["plain", "momentum", "Adam"])
def test_a_compiled_step_is_torchs(name):
    options = dict(OPTIONS[name])
    kinds = KINDS[options.pop("kind", "SGD")]

    def steps(kind, compiled):
        params = parameters((3,), (4,))
        optimizer = kind(params, **options)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            step()
        return optimizer

    torch._dynamo.reset()
    assert_same(steps(kinds[0], compiled=True), steps(kinds[1], compiled=False))


def test_a_compiled_training_step_learns_as_in_torch():
    torch._dynamo.reset()
    x = torch.randn(5, 3)
    results = []
    for kind in (fastmlp.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = kind(model.parameters(), **OPTIONS["momentum"])

        @torch.compile(backend="eager")
        def train(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

        for _ in range(3):
            train()
        results.append(optimizer)
    assert_same(*results)


# ---- habits


# The state of each kind: none, a momentum, and with Adam's means.
@pytest.mark.parametrize("name", ["plain", "nesterov", "Adam of tensors", "Adam with all", "AdamW"])
@pytest.mark.parametrize("order", [1, -1], ids=["ours first", "torch's first"])
def test_a_checkpoint_of_one_goes_on_in_the_other(name, order):
    options = dict(OPTIONS[name])
    kinds = KINDS[options.pop("kind", "SGD")][::order]
    params = parameters((5, 3), (4,))
    optimizer = kinds[0](params, **options)
    take_steps(optimizer, params)
    others = copy.deepcopy(params)
    other = (
        kinds[1](others, lr=1.0, betas=options["betas"]) if "betas" in options else kinds[1](others, lr=1.0)
    )
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, twin in zip(params, others, strict=True):
        twin.grad = param.grad.clone()
    take_steps(optimizer, params)
    take_steps(other, others)
    assert_same(optimizer, other)
    assert list(optimizer.state_dict()) == list(other.state_dict())
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert optimizer.state_dict()["state"].keys() == other.state_dict()["state"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_that_of_torch(kind):
    ours, stock = both(lambda: parameters((3,)), steps=0, kind=kind, lr=0.1)
    assert ours.state_dict() == stock.state_dict()
    assert ours.defaults == stock.defaults
    assert repr(ours) == repr(stock)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_goes_on_as_its_original(clone):
    params = parameters((5,))
    optimizer = fastmlp.SGD(params, **OPTIONS["momentum"])
    take_steps(optimizer, params)
    twin = clone(optimizer)
    for a, b in zip(params, tensors_of(twin)[0], strict=True):
        b.grad = a.grad.clone()
    take_steps(optimizer, params)
    take_steps(twin, tensors_of(twin)[0])
    assert_same(twin, optimizer, rtol=0, atol=0)


@pytest.mark.parametrize("uncovered", [False, True])
def test_hooks_run_once_around_a_step_with_its_arguments(uncovered):
    torch.optim.SGD(parameters((1,)), lr=1.0)  # torch hooks the step of a class once it has an instance
    params = parameters((3,), dtype=torch.float64 if uncovered else torch.float32)
    optimizer = fastmlp.SGD(params, lr=0.1)
    before, seen = params[0].detach().clone(), []

    def look(optimizer, args, kwargs):
        seen.append((torch.equal(params[0], before), args[1:], kwargs))

    removable = [register_optimizer_step_pre_hook(look), optimizer.register_step_pre_hook(look)]
    removable.append(optimizer.register_step_post_hook(look))
    optimizer.step()
    assert seen == [(True, (), {}), (True, (), {}), (False, (), {})]
    for handle in removable:
        handle.remove()
    optimizer.step()
    assert len(seen) == 3


def test_a_pre_hook_can_change_the_arguments():
    params = parameters((3,))
    optimizer = fastmlp.SGD(params, lr=0.1)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((args[0], lambda: 42), {}))
    assert optimizer.step() == 42


def test_the_profiler_sees_the_step():
    optimizer = fastmlp.SGD(parameters((3,)), lr=0.1)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert {"Optimizer.step#SGD.step", "fastmlp::optimize_"} <= {
        event.key for event in profile.key_averages()
    }


def test_the_profiler_sees_gradients_dropped():
    optimizer = fastmlp.SGD(parameters((3,)), lr=0.1)
    with torch.profiler.profile() as profile:
        optimizer.zero_grad()
    assert "Optimizer.zero_grad#SGD.zero_grad" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_leaves_gradients_as_torch_does(to_none):
    params = parameters((3,), (2, 2))
    gradients = [param.grad for param in params]
    fastmlp.Adam([{"params": params[:1]}, {"params": params[1:]}]).zero_grad(set_to_none=to_none)
    if to_none:
        assert [param.grad for param in params] == [None, None]
        assert all(gradient.abs().min() > 0 for gradient in gradients)
    else:
        assert all(param.grad is gradient for param, gradient in zip(params, gradients, strict=True))
        assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_a_closure_computes_gradients_before_the_step_and_its_loss_is_returned():
    (param,) = parameters((3,))
    param.grad = None
    optimizer = fastmlp.SGD([param], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    before = param.square().sum().item()
    with torch.no_grad():
        assert optimizer.step(closure).item() == before
    assert torch.equal(param.detach(), torch.zeros(3))


def test_a_scheduler_changes_the_learning_rate():
    params = parameters((3,))
    optimizer = fastmlp.SGD(params, lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    before = params[0].detach().clone()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before - 0.5 * params[0].grad)


def test_a_momentum_that_becomes_zero_is_no_longer_used():
    optimizers = both(lambda: parameters((3,)), **OPTIONS["nesterov"])
    for optimizer in optimizers:
        optimizer.param_groups[0]["momentum"] = 0.0
        take_steps(optimizer, tensors_of(optimizer)[0])
    assert_same(*optimizers)


def test_a_group_can_be_added():
    first, second = parameters((3,), (4,))
    before = second.detach().clone()
    optimizer = fastmlp.SGD([first], lr=1.0)
    optimizer.add_param_group({"params": [second], "lr": 2.0})
    optimizer.step()
    torch.testing.assert_close(second.detach(), before - 2 * second.grad)


def test_a_subclass_may_extend_the_step():
    class Counting(fastmlp.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    params = parameters((3,))
    before = params[0].detach().clone()
    optimizer = Counting(params, lr=1.0)
    optimizer.step()
    assert optimizer.steps == 1
    assert torch.equal(params[0], before - params[0].grad)


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"momentum": -0.5}, {"weight_decay": -1.0}, {"nesterov": True}]
)
def test_wrong_arguments_are_the_errors_of_torch(options):
    errors = []
    for kind in (fastmlp.SGD, torch.optim.SGD):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            kind(parameters((3,)), **options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def torchs_own(kind):
    """The optimizer's entry in PyTorch's own tests of optimizers, which need expecttest."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls is KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
def test_the_inputs_of_pytorchs_own_tests_give_what_torch_gives(instruction_set, dtype, kind):
    for case in torchs_own(kind).optim_inputs_func("cpu", dtype):
        assert_same(*both(lambda: parameters(*SHAPES, dtype=dtype), kind=kind, **case.kwargs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")  # one of them is a warning
def test_the_errors_of_pytorchs_own_tests_are_raised(kind):
    for case in torchs_own(kind).optim_error_inputs_func("cpu", torch.float32):
        arguments = case.optimizer_error_input
        with pytest.raises(case.error_type, match=case.error_regex):
            KINDS[kind][0](arguments.params, **arguments.kwargs)


# ---- torch's optimizers, fused in place


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_of_torchs_becomes_ours_and_goes_on(kernel_calls, kind):
    (param,), (twin,) = parameters((5,)), parameters((5,))
    stock, fused = KINDS[kind][1]([twin], lr=0.1), KINDS[kind][1]([param], lr=0.1)
    for optimizer in (stock, fused):
        optimizer.step()
    assert fastmlp.fuse(fused) is fused
    assert type(fused) is KINDS[kind][0]
    for optimizer in (stock, fused):
        optimizer.step()
    assert kernel_calls == [True]
    assert fastmlp.unfuse(fused) is fused
    assert type(fused) is KINDS[kind][1]
    for optimizer in (stock, fused):
        optimizer.step()
    assert kernel_calls == [True]
    assert_same(fused, stock)


@pytest.mark.filterwarnings("error")  # of a scheduler that sees no step
def test_a_scheduler_goes_on_with_an_optimizer_that_is_fused(kernel_calls):
    params = parameters((3,))
    optimizer = torch.optim.SGD(params, lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    fastmlp.fuse(optimizer)
    optimizer.step()
    scheduler.step()
    before = params[0].detach().clone()
    optimizer.step()
    assert kernel_calls == [True, True]
    torch.testing.assert_close(params[0].detach(), before - 0.5 * params[0].grad)
    StepLR(fastmlp.unfuse(optimizer), step_size=1)
    optimizer.step()
    assert kernel_calls == [True, True]


def test_a_step_set_on_an_optimizer_is_not_taken_away():
    optimizer = torch.optim.SGD(parameters((3,)), lr=1.0)
    step = optimizer.step = lambda: None
    with pytest.raises(ValueError, match="expected no step set on it"):
        fastmlp.fuse(optimizer)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.step is step


@pytest.mark.parametrize("make", [torch.optim.RMSprop, type("Own", (torch.optim.SGD,), {})])
def test_an_optimizer_that_is_not_known_stays_as_it_is(make):
    optimizer = make(parameters((3,)), lr=1.0)
    assert type(fastmlp.fuse(optimizer)) is make


# ---- the op


SGD = [0.1, 0.9, 0.0, 0.0, False, False, False]
ADAM = [0.1, 0.9, 0.999, 1e-8, 0.0, False, False]
ONES, COUNT = torch.ones(3), torch.zeros(())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sgd", [ONES], [], [], [], SGD), "grads: expected as many tensors as params, 1, got 0"),
        (("sgd", [ONES], [ONES], [ONES] * 2, [], SGD), "states: expected 0 or 1 for each of 1 params, got 2"),
        (("adam", [ONES], [ONES], [ONES], [COUNT], ADAM), "states: expected 2 or 3"),
        (("adam", [ONES], [ONES], [ONES] * 2, [], ADAM), "counts: expected 1"),
        (("adam", [ONES], [ONES], [ONES] * 2, [COUNT], SGD[:3]), "options: expected the 7 of adam, got 3"),
        (("lion", [ONES], [ONES], [ONES], [], SGD), "optimizer: expected 'sgd' or 'adam', got 'lion'"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(arguments, words):
    with pytest.raises((RuntimeError, ValueError), match=f"^{words}"):
        torch.ops.fastmlp.optimize_(*arguments)
    assert torch.equal(ONES, torch.ones(3))
    assert COUNT == 0


def test_a_step_on_meta_tensors_is_left_to_torch():
    tensors = [torch.ones(3, device="meta")]
    assert not torch.ops.fastmlp.optimize_("sgd", tensors, tensors, [], [], SGD)
    assert not torch.ops.fastmlp.optimize_by_numbers_("sgd", tensors, tensors, [], torch.ones(1))


@pytest.mark.parametrize(("name", "options", "kinds"), [("sgd", SGD, 1), ("adam", ADAM, 2)])
def test_a_step_by_numbers_in_memory_is_that_of_their_options(name, options, kinds):
    def drawn():
        torch.manual_seed(0)
        params, grads, *states = ([torch.rand(4, 3), torch.rand(5)] for _ in range(2 + kinds))
        return params, grads, [*chain(*states)]

    groups = [options, [0.2, *options[1:]]]
    counts = [torch.tensor(3.0), torch.tensor(5.0, dtype=torch.float64)] if name == "adam" else []
    ours, stock = drawn(), drawn()
    for i, each in enumerate(groups):
        own = [tensors[i::2] for tensors in stock]
        assert torch.ops.fastmlp.optimize_(name, *own, [c.clone() for c in counts[i : i + 1]], each)
    numbers = _C.count_up_numbers(name, [*chain(*groups)], [0, 1], counts, False)
    assert torch.ops.fastmlp.optimize_by_numbers_(name, *ours, numbers)
    torch.testing.assert_close(ours, stock, rtol=0, atol=0)
    assert [count.item() for count in counts] == [4, 6][: len(counts)]


@pytest.mark.parametrize(
    ("groups", "counts", "words"),
    [
        ([0], [], "counts: expected 1 tensors, got 0"),
        ([1], [COUNT], "groups: expected those of options, 7 each, got 1"),
        ([0, 0], [COUNT, COUNT.to("meta")], "counts: expected float32 or float64 of one element on the CPU"),
    ],
)
def test_numbers_of_wrong_arguments_are_none_and_count_nothing(groups, counts, words):
    with pytest.raises(RuntimeError, match=f"^{words}"):
        _C.count_up_numbers("adam", ADAM, groups, counts, False)
    assert COUNT == 0


def test_numbers_that_are_none_are_refused():
    with pytest.raises(RuntimeError, match=r"^numbers: expected contiguous uint8 of \d+ elements beside"):
        torch.ops.fastmlp.optimize_by_numbers_("sgd", [ONES], [ONES], [], torch.ones(3))
