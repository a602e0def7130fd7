"""An ensemble computes what its models compute, to the bit, and leaves them what they are."""

import copy
import pickle

import pytest
import torch
from reference import chain, gradients
from torch import nn

import fastmlp


def ensemble_of(count, *sizes, **options):
    return fastmlp.Ensemble([fastmlp.fuse(chain(*sizes, **options)) for _ in range(count)])


def one_by_one(ensemble, x):
    """The same, of calls of the models."""
    xs = [x] * len(ensemble.models) if x.dim() == 2 else x
    return torch.stack([model(own) for model, own in zip(ensemble.models, xs, strict=True)])


def is_together(y):
    return "EnsembleFunction" in y.grad_fn.next_functions[0][0].name()


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Small ones, and such that those left over are shared by all threads: by layers and by rows.
@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [(3, 5, (4, 7, 2)), (5, 70, (20, 130, 65)), (4, 1100, (9, 65, 33)), (3, 2, (2, 1030, 1030))],
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])  # of which backward reads y, and z
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "own"])
def test_output_and_gradients_are_the_models_to_the_bit(threads, count, batch, sizes, activation, is_shared):
    torch.manual_seed(0)
    ensemble = ensemble_of(count, *sizes, activation=activation)
    x = torch.randn(*(() if is_shared else (count,)), batch, sizes[0])
    wanted = [*ensemble.parameters()]
    y, *own = gradients(ensemble(x), *wanted)
    _, *right = gradients(one_by_one(ensemble, x), *wanted)
    assert is_together(y)
    torch.testing.assert_close(y, one_by_one(ensemble, x), rtol=0, atol=0)
    torch.testing.assert_close(own, right, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(ensemble(x), y)


def test_the_gradient_of_what_each_model_gets_is_its_own_and_of_what_they_share_the_sum():
    ensemble, x = ensemble_of(3, 4, 7, 2), torch.randn(3, 5, 4, requires_grad=True)
    _, own = gradients(ensemble(x), x)
    _, right = gradients(one_by_one(ensemble, x), x)
    assert torch.equal(own, right)
    shared = x.detach()[0].requires_grad_()
    _, own = gradients(ensemble(shared), shared)
    _, right = gradients(one_by_one(ensemble, shared), shared)
    torch.testing.assert_close(own, right)


@pytest.mark.parametrize("wanted", [[0], [3], [1, 10], [11]], ids=str)
def test_some_of_the_gradients_can_be_had_alone(wanted):
    ensemble, x = ensemble_of(3, 4, 7, 2), torch.randn(5, 4)
    some = [[*ensemble.parameters()][number] for number in wanted]
    own = torch.autograd.grad(ensemble(x).sum(), some)
    right = torch.autograd.grad(one_by_one(ensemble, x).sum(), some)
    assert all(torch.equal(a, b) for a, b in zip(own, right, strict=True))


@pytest.mark.parametrize(
    "frozen", [["0.weight"] * 3, ["0.bias"] * 3, [None, "2.weight", "0.weight"]], ids=str
)
def test_parameters_that_are_frozen_get_no_gradient(frozen):
    ensemble, x = ensemble_of(3, 4, 7, 2), torch.randn(5, 4)
    for model, name in zip(ensemble.models, frozen, strict=True):
        if name is not None:
            model.get_parameter(name).requires_grad_(False)
    y = ensemble(x)
    assert is_together(y)
    y.sum().backward()
    own = [parameter.grad for parameter in ensemble.parameters()]
    ensemble.zero_grad()
    one_by_one(ensemble, x).sum().backward()
    for grad, parameter in zip(own, ensemble.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=0)


def test_hidden_layers_may_be_of_other_widths():
    ensemble = fastmlp.Ensemble([fastmlp.fuse(chain(4, hidden, 2)) for hidden in (7, 80, 3)])
    x, wanted = torch.randn(5, 4), [*ensemble.parameters()]
    y, *own = gradients(ensemble(x), *wanted)
    assert is_together(y)
    torch.testing.assert_close([y, *own], [*gradients(one_by_one(ensemble, x), *wanted)], rtol=0, atol=0)
    batches = [batch_of(ensemble, None, 12) for _ in range(2)]
    assert_same_training(ensemble, nn.MSELoss(), lambda models: one_each(models, adam), batches)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "own"])
def test_gradients_of_gradients_are_right(activation, is_shared):
    models = [chain(3, 4, 2, activation=activation).double() for _ in range(2)]
    x = torch.randn(*(() if is_shared else (2,)), 5, 3, dtype=torch.float64)
    penalties = []
    for dtype, compute in ((torch.float32, fastmlp.Ensemble(models)), (torch.float64, None)):
        for model in models:
            model.to(dtype)
        own = x.to(dtype).requires_grad_()
        y = compute(own) if compute else one_by_one(fastmlp.Ensemble(models), own)
        (grad,) = torch.autograd.grad(y.square().sum(), own, create_graph=True)
        parameters = [parameter for model in models for parameter in model.parameters()]
        found = torch.autograd.grad(grad.square().sum(), [own, *parameters], materialize_grads=True)
        penalties.append([each.double() for each in found])
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 4).expand(3, 5, 4),
        torch.randn(3, 5, 8)[:, :, ::2],
        torch.randn(3, 4, 5).transpose(1, 2),
        torch.randn(5, 3, 4).transpose(0, 1),
        torch.randn(4, 5).t(),
        torch.randn(1, 4).expand(5, 4),
        torch.randn(0, 4),
        torch.randn(3, 0, 4),
    ],
    ids=lambda x: f"{list(x.shape)} {x.stride()}",
)
def test_x_may_lie_as_it_likes(x):
    ensemble = ensemble_of(3, 4, 7, 2)
    wanted = [*ensemble.parameters()]
    y, *own = gradients(ensemble(x), *wanted)
    right_y, *right = gradients(one_by_one(ensemble, x), *wanted)
    assert is_together(y)
    torch.testing.assert_close([y, *own], [right_y, *right], rtol=0, atol=0)


def of_other_activations():
    return [chain(4, 7, 2, activation=kind) for kind in (nn.ReLU, nn.Tanh)]


def of_other_layers():
    return [nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 2)) for _ in range(2)]


def in_double_precision():
    return [chain(4, 7, 2).double() for _ in range(2)]


def one_without_bias():
    return [nn.Sequential(nn.Linear(4, 2, bias=bias)) for bias in (True, False)]


def one_hooked():
    models = [chain(4, 7, 2) for _ in range(2)]
    models[1][0].register_forward_hook(lambda module, args, output: 2 * output)
    return models


OTHERS = [of_other_activations, of_other_layers, in_double_precision, one_without_bias, one_hooked]


@pytest.mark.parametrize("models", OTHERS)
def test_other_models_are_called_one_after_the_other(models):
    ensemble = fastmlp.Ensemble(models())
    x = torch.randn(5, 4, dtype=next(ensemble.parameters()).dtype)
    wanted = [parameter for parameter in ensemble.parameters() if parameter.requires_grad]
    y, *own = gradients(ensemble(x), *wanted)
    assert not is_together(y)
    torch.testing.assert_close([y, *own], [*gradients(one_by_one(ensemble, x), *wanted)])


def test_what_looks_on_sees_the_models():
    ensemble, x = ensemble_of(2, 4, 7, 2), torch.randn(5, 4)
    right = one_by_one(ensemble, x).detach()
    called = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module)):
        ensemble(x)
    assert [module for module in called if module in [*ensemble.models]] == [*ensemble.models]
    with torch.profiler.profile() as profile:
        ensemble(x)
    assert sum(event.name == "fastmlp::network_forward" for event in profile.events()) == 2
    with torch.autograd.graph.saved_tensors_hooks(lambda t: called.append(t) or t, lambda t: t):
        assert not is_together(ensemble(x))
    torch.testing.assert_close(torch.func.vmap(ensemble)(x.expand(3, 5, 4)), right.expand(3, 2, 5, 2))
    _, tangent = torch.func.jvp(ensemble, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: one_by_one(ensemble, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ensemble(x).dtype == torch.bfloat16


def test_gradients_of_a_batch_of_outputs_are_right():
    ensemble, directions = ensemble_of(2, 4, 7, 2), torch.randn(3, 2, 5, 2)
    parameters, y = [*ensemble.parameters()], ensemble(torch.randn(5, 4))
    each = [torch.autograd.grad(y, parameters, direction, retain_graph=True) for direction in directions]
    own = torch.autograd.grad(y, parameters, directions, is_grads_batched=True)
    torch.testing.assert_close(own, tuple(map(torch.stack, zip(*each, strict=True))))


def test_a_compiled_ensemble_is_the_same():
    ensemble, x = ensemble_of(2, 4, 7, 2), torch.randn(5, 4)
    compiled = torch.compile(ensemble, backend="aot_eager", fullgraph=True)
    y, *own = gradients(compiled(x), *ensemble.parameters())
    torch.testing.assert_close([y, *own], [*gradients(ensemble(x), *ensemble.parameters())])


def test_what_backward_reads_must_not_have_been_changed_meanwhile():
    ensemble, x = ensemble_of(2, 4, 7, 2), torch.randn(5, 4)
    y = ensemble(x)
    with torch.no_grad():
        ensemble.models[1][0].bias.add_(1)  # which it does not read
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        ensemble.models[1][2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bfloat16_is_computed_together():
    ensemble, x = ensemble_of(3, 4, 7, 2).bfloat16(), torch.randn(5, 4).bfloat16()
    before = fastmlp._C.instruction_set()
    fastmlp._C.use_instruction_set(before)  # asks for the kernels, on every processor
    y, *own = gradients(ensemble(x), *ensemble.parameters())
    assert is_together(y)
    torch.testing.assert_close(
        [y, *own], [*gradients(one_by_one(ensemble, x), *ensemble.parameters())], rtol=0, atol=0
    )


def test_what_fuse_makes_of_models_with_a_forward_is_computed_together():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    ensemble, x = fastmlp.Ensemble([Net(), Net()]), torch.randn(5, 4)
    right = ensemble(x)
    assert not is_together(right)
    y = fastmlp.fuse(ensemble)(x)
    assert is_together(y)
    torch.testing.assert_close(y, right)
    step = fastmlp.TrainStep(ensemble, nn.MSELoss(), one_for_all(ensemble.models, sgd))
    step(x, y[0].detach())
    assert fastmlp.why_not_fused(step) is None


def test_models_stay_modules_of_their_own():
    models = [chain(4, 7, 2) for _ in range(2)]
    ensemble, x = fastmlp.Ensemble(models), torch.randn(5, 4)
    assert [*ensemble.models] == models
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(*ensemble(x))
    ensemble.models[1] = chain(4, 7, 2)
    assert not torch.equal(*ensemble(x))
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(other(x), ensemble(x))


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"models: expected one or more, got none"):
        fastmlp.Ensemble([])
    with pytest.raises(TypeError, match=r"models\[1\]: expected a torch.nn.Module, got function"):
        fastmlp.Ensemble([chain(4, 2), lambda x: x])
    ensemble = ensemble_of(2, 4, 7, 2)
    for shape in ((4,), (3, 5, 4), (1, 2, 5, 4)):
        with pytest.raises(ValueError, match=r"x: expected shape \[batch, in_features\], or \[2, batch, in_"):
            ensemble(torch.randn(shape))
    with pytest.raises(RuntimeError, match=r"input: expected shape"):
        ensemble(torch.randn(5, 3))


# ---- steps


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr, amsgrad=True)


def adamw(parameters, lr):
    return fastmlp.AdamW(parameters, lr=lr, weight_decay=0.1)


def one_each(models, kind):
    return [kind(model.parameters(), lr=0.01 * (1 + index)) for index, model in enumerate(models)]


def one_for_all(models, kind):
    return kind([parameter for model in models for parameter in model.parameters()], lr=0.01)


def one_of_groups(models, kind):
    groups = [{"params": [*model.parameters()], "lr": 0.01 * (1 + n)} for n, model in enumerate(models)]
    return kind(groups, lr=0.01)


def batch_of(ensemble, loss, batch, is_shared=True):
    layers = [layer for layer in ensemble.models[0].modules() if isinstance(layer, nn.Linear)]
    lead = () if is_shared else (len(ensemble.models),)
    x = torch.randn(*lead, batch, layers[0].in_features)
    outputs = layers[-1].out_features
    if isinstance(loss, nn.CrossEntropyLoss):
        return x, torch.randint(outputs, (*lead, batch))
    return x, torch.rand(*lead, batch, outputs)


def assert_same_training(ensemble, loss, optimizers, batches, way="in one call", **options):
    """The step against a TrainStep of each model, to the bit; the step."""
    others, own_optimizers = copy.deepcopy((ensemble.models, optimizers(ensemble.models)))
    optimizer = optimizers(ensemble.models)
    step = fastmlp.TrainStep(ensemble, loss, optimizer, **options)
    each = own_optimizers if isinstance(own_optimizers, list) else [own_optimizers] * len(others)
    steps = [
        fastmlp.TrainStep(*pair, **options) for pair in zip(others, [loss] * len(others), each, strict=True)
    ]
    for x, target in batches:
        values = step(x, target)
        is_shared = x.dim() == 2
        right = [
            one(x if is_shared else x[n], target if is_shared else target[n]) for n, one in enumerate(steps)
        ]
        torch.testing.assert_close(values, torch.stack(right), rtol=0, atol=0)
        if options.get("max_grad_norm"):
            norms = torch.stack([one.grad_norm for one in steps])
            torch.testing.assert_close(step.grad_norm, norms, rtol=0, atol=0)
    assert way in repr(step)
    for own, right in zip(ensemble.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(own, right, rtol=0, atol=0)
    for own, right in zip(
        *(o if isinstance(o, list) else [o] for o in (optimizer, own_optimizers)), strict=True
    ):
        torch.testing.assert_close(own.state_dict(), right.state_dict(), rtol=0, atol=0)
    return step


@pytest.mark.parametrize(
    ("count", "batch", "sizes"), [(3, 5, (4, 7, 3)), (5, 70, (20, 130, 3)), (3, 1100, (9, 65, 3))]
)
@pytest.mark.parametrize(
    ("optimizers", "kind", "max_grad_norm", "is_shared"),
    [
        (one_each, sgd, None, True),
        (one_for_all, sgd, 0.1, False),
        (one_each, adam, 0.1, False),
        (one_of_groups, adam, None, True),
        (one_of_groups, sgd, 0.1, True),
        (one_for_all, adamw, 0.1, False),
    ],
)
def test_a_step_is_that_of_each_model_to_the_bit(
    threads, count, batch, sizes, optimizers, kind, max_grad_norm, is_shared
):
    torch.manual_seed(0)
    ensemble, loss = ensemble_of(count, *sizes, activation=nn.SiLU), nn.CrossEntropyLoss()
    batches = [batch_of(ensemble, loss, batch, is_shared) for _ in range(3)]
    assert_same_training(
        ensemble, loss, lambda models: optimizers(models, kind), batches, max_grad_norm=max_grad_norm
    )


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 2.0]), ignore_index=1, label_smoothing=0.1),
        nn.MSELoss(reduction="sum"),
        nn.HuberLoss(delta=0.25),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 0.0, 1.0])),
        nn.functional.l1_loss,
    ],
    ids=lambda loss: getattr(loss, "__name__", type(loss).__name__),
)
def test_a_step_with_any_loss_of_the_table_is_that_of_each_model(loss):
    ensemble = ensemble_of(3, 4, 7, 3)
    batches = [batch_of(ensemble, loss, 12) for _ in range(2)]
    assert_same_training(ensemble, loss, lambda models: one_each(models, sgd), batches)


def squared_and_largest(y, target):
    return (y - target).square().mean(), y.max()


def rmsprop(parameters, lr):
    return torch.optim.RMSprop(parameters, lr=lr)


def with_parameters_in_common():
    models = [chain(4, 7, 2) for _ in range(2)]
    models[1][2].weight = models[0][2].weight
    return models


def alike():
    return [chain(4, 7, 2) for _ in range(2)]


CLIPPED = {"max_grad_norm": 0.1}
NO_CHAINS = "models: they are no chains"
SLOWER = [
    (models, nn.MSELoss(), sgd, CLIPPED, NO_CHAINS) for models in OTHERS if models is not in_double_precision
]
SLOWER += [
    (in_double_precision, nn.MSELoss(), sgd, CLIPPED, "expected a float32 tensor"),
    (with_parameters_in_common, nn.MSELoss(), sgd, CLIPPED, "share no memory"),
    (alike, lambda y, target: (y - target).square().mean(), adam, CLIPPED, "loss: the kernels know"),
    (
        alike,
        nn.MSELoss(),
        rmsprop,
        CLIPPED,
        "optimizer: the kernels know SGD, Adam and AdamW, and not RMSprop",
    ),
    (alike, nn.MSELoss(), sgd, {"accumulate": 2}, "accumulate"),
]


@pytest.mark.parametrize(("models", "loss", "kind", "options", "why"), SLOWER)
def test_what_the_kernels_do_not_cover_is_trained_model_by_model(models, loss, kind, options, why):
    ensemble = fastmlp.Ensemble(models())
    dtype = next(ensemble.parameters()).dtype
    batches = [[each.to(dtype) for each in batch_of(ensemble, loss, 12)] for _ in range(3)]
    step = assert_same_training(
        ensemble, loss, lambda models: one_each(models, kind), batches, way="model by model", **options
    )
    assert why in fastmlp.why_not_fused(step)
    before = copy.deepcopy(ensemble.state_dict())
    step.strict = True
    with pytest.raises(ValueError, match=r"strict: expected no step that goes model by model, but "):
        step(*batches[0])
    torch.testing.assert_close(ensemble.state_dict(), before)


def test_what_a_loss_returns_beside_its_value_is_returned_for_each_model():
    ensemble = ensemble_of(2, 4, 7, 2)
    x, target = batch_of(ensemble, None, 5)
    right = [squared_and_largest(model(x), target) for model in ensemble.models]
    step = fastmlp.TrainStep(ensemble, squared_and_largest, one_each(ensemble.models, sgd))
    values, largest = step(x, target)
    torch.testing.assert_close(values, torch.stack([value.detach() for value, _ in right]))
    assert largest == tuple(each for _, each in right)


def test_a_target_that_is_no_class_changes_nothing():
    ensemble, loss = ensemble_of(3, 4, 7, 2), nn.CrossEntropyLoss()
    step = fastmlp.TrainStep(ensemble, loss, one_each(ensemble.models, adam))
    x, target = batch_of(ensemble, loss, 5, is_shared=False)
    step(x, target)
    before = copy.deepcopy((ensemble.state_dict(), [own.state_dict() for own in step.optimizer]))
    target[1, 3] = 2
    with pytest.raises(IndexError, match=r"target: expected classes from 0 to 1, got 2 in row 3 of model 1"):
        step(x, target)
    torch.testing.assert_close((ensemble.state_dict(), [own.state_dict() for own in step.optimizer]), before)


def test_models_losses_and_optimizers_may_be_exchanged_between_steps():
    ensemble = ensemble_of(2, 4, 7, 2)
    step = fastmlp.TrainStep(ensemble, nn.MSELoss(), one_each(ensemble.models, sgd))
    x, target = batch_of(ensemble, None, 5)
    step(x, target)
    for loss in (
        nn.L1Loss(),
        lambda y, target: (y - target).square().sum(),
    ):  # in one call, and model by model
        ensemble.models[1] = chain(4, 7, 2)
        step.optimizer, step.loss = one_each(ensemble.models, sgd), loss
        right = [loss(model(x), target).detach() for model in ensemble.models]
        before = copy.deepcopy(ensemble.state_dict())
        torch.testing.assert_close(step(x, target), torch.stack(right))
        changed = [not torch.equal(own, before[name]) for name, own in ensemble.state_dict().items()]
        assert all(changed)


def test_a_scheduler_of_one_model_sets_its_learning_rate():
    ensemble = ensemble_of(2, 4, 7, 2)
    optimizers = one_each(ensemble.models, torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda epoch: 1.0 if epoch == 0 else 0.0)
    step = fastmlp.TrainStep(ensemble, nn.MSELoss(), optimizers)
    x, target = batch_of(ensemble, None, 5)
    step(x, target)
    scheduler.step()
    before = copy.deepcopy(ensemble.state_dict())
    step(x, target)
    same = [torch.equal(before[name], own) for name, own in ensemble.state_dict().items()]
    assert same == [True] * 4 + [False] * 4


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("order", [None, torch.tensor([3, 0, 8, 8, 1])], ids=["all", "some"])
def test_a_run_is_its_steps(is_shared, order):
    ensemble = ensemble_of(2, 4, 7, 2)
    step = fastmlp.TrainStep(ensemble, nn.MSELoss(), one_each(ensemble.models, sgd))
    other, (x, target), seen = copy.deepcopy(step), batch_of(ensemble, None, 9, is_shared), []
    losses = step.run(
        x, target, batch_size=2, order=order, callback=lambda number, values: seen.append((number, values))
    )
    rows = torch.arange(9) if order is None else order
    right = [other(*(t[..., some, :] for t in (x, target))) for some in rows.split(2)]
    assert torch.equal(losses, torch.stack(right))
    assert [number for number, _ in seen] == [*range(len(right))]
    assert all(map(torch.equal, ensemble.parameters(), other.model.parameters()))
    with pytest.raises(ValueError, match=r"rates: expected None"):
        step.run(x, target, batch_size=2, rates=[0.1])


def test_the_losses_of_a_run_are_as_exact_as_the_models():
    ensemble = fastmlp.Ensemble(in_double_precision())
    step = fastmlp.TrainStep(ensemble, nn.MSELoss(), one_each(ensemble.models, sgd))
    other, (x, target) = copy.deepcopy(step), (t.double() for t in batch_of(ensemble, None, 6))
    right = [other(*(t[..., rows, :] for t in (x, target))) for rows in (slice(0, 4), slice(4, 6))]
    assert torch.equal(step.run(x, target, batch_size=4), torch.stack(right))
    assert step.run(x[..., :0, :], target[..., :0, :], batch_size=4).shape == (0, 2)


def test_autograd_notices_that_a_step_has_changed_parameters():
    ensemble = ensemble_of(2, 4, 7, 2)
    x, target = batch_of(ensemble, None, 5)
    y = ensemble(x)
    fastmlp.TrainStep(ensemble, nn.MSELoss(), one_each(ensemble.models, sgd))(x, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_step_of_an_ensemble_can_be_copied_and_pickled():
    ensemble = ensemble_of(2, 4, 7, 2)
    x, target = batch_of(ensemble, None, 5)
    step = fastmlp.TrainStep(ensemble, nn.MSELoss(), one_each(ensemble.models, adam), max_grad_norm=1.0)
    step(x, target)
    others = copy.deepcopy(step), pickle.loads(pickle.dumps(step))
    values = [each(x, target) for each in (step, *others) for _ in range(2)]
    assert all(torch.equal(values[n], values[n % 2]) for n in range(6))
    assert fastmlp.why_not_fused(others[0]) is None


def test_what_a_step_cannot_be_of_is_refused_by_name():
    ensemble, loss = ensemble_of(2, 4, 7, 2), nn.MSELoss()
    optimizers = one_each(ensemble.models, sgd)
    with pytest.raises(ValueError, match=r"optimizer: expected one, or one for each of 2 models, got 1"):
        fastmlp.TrainStep(ensemble, loss, optimizers[:1])
    with pytest.raises(
        TypeError, match=r"optimizer: expected a torch.optim.Optimizer or a list of them, got str"
    ):
        fastmlp.TrainStep(ensemble, loss, "adam")
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got NoneType"):
        fastmlp.TrainStep(ensemble, loss, [optimizers[0], None])
    with pytest.raises(ValueError, match=r"optimizer: expected one LBFGS for each model"):
        fastmlp.TrainStep(ensemble, loss, torch.optim.LBFGS(ensemble.parameters()))
    step = fastmlp.TrainStep(ensemble, loss, optimizers)
    x, target = batch_of(ensemble, loss, 5, is_shared=False)
    with pytest.raises(
        ValueError, match=r"x: expected shape \[batch, in_features\], or \[2, batch, in_features\]"
    ):
        step(x[:1], target)
    with pytest.raises(ValueError, match=r"target: expected shape \[2, ...\], as x has one for each"):
        step(x, target[0])
    with pytest.raises(RuntimeError, match=r"expected gradients to be enabled"), torch.no_grad():
        step(x, target)
