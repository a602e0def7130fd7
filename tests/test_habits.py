"""Habits: what people do with PyTorch's modules, done with ours. Results are stock's; the path is recorded.

The marker of a test is its row in docs/compatibility.md: what is done, the path that the layers then take,
and what else there is to say. A class is a table.
"""

import ast
import copy
import io
import os
import pickle
import subprocess
import sys
from functools import partial

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from compatibility import recorded_paths
from reference import MODULES
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fastmlp
from fastmlp import _C

X, TARGET = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3

habit_is = pytest.mark.habit


def stock_of(model):
    """Torch's own modules in the place of ours, with copies of the parameters."""
    layers = []
    for layer in model:
        has_bias = layer.bias is not None
        layers.append(nn.Linear(layer.in_features, layer.out_features, has_bias, dtype=layer.weight.dtype))
        layers[-1].load_state_dict(layer.state_dict())
        if layer.activation is not None:
            layers.append(MODULES[layer.activation]())
    return nn.Sequential(*layers)


@pytest.fixture(params=["one op", pytest.param("an op for each layer", marks=pytest.mark.slow)])
def ours(request):
    model = fastmlp.MLP(7, 5, 3, activation="tanh")
    return model if request.param == "one op" else nn.Sequential(*model)


@pytest.fixture
def stock(ours):
    return stock_of(ours)


def loss_and_gradients(model, call=None, x=X):
    """What a training step computes; `call` is the model as it is called, where that is not itself."""
    loss = F.cross_entropy((call or model)(x), TARGET[: len(x)])
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


def assert_close(ours, stocks):
    torch.testing.assert_close(ours, stocks, rtol=1e-4, atol=1e-5)


def assert_same_training(habit, ours, stock, call=lambda model: model, x=X):
    """Both give the same loss and gradients; `call` makes of a model what is called in its place."""
    with habit.holds():
        results = loss_and_gradients(ours, call(ours), x)
    assert_close(results, loss_and_gradients(stock, call(stock), x))


class TestCompiling:
    """Compiling and exporting"""

    @pytest.fixture(autouse=True)
    def _forget(self):
        torch.compiler.reset()

    @habit_is(
        "`torch.compile(fullgraph=True)`", "fused", "One op in one graph; it does not fuse with others."
    )
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_a_compiled_model_trains(self, habit, ours, stock, mode):
        compiled = torch.compile(ours, fullgraph=True, mode=mode)
        loss_and_gradients(ours, compiled)
        with habit.holds():
            results = loss_and_gradients(ours, compiled)
        assert_close(results, loss_and_gradients(stock))

    @habit_is("A compiled model and batches of other sizes", "fused", "Compiled again as often as stock's.")
    @pytest.mark.parametrize("dynamic", [None, True])
    def test_another_batch_compiles_no_more_often_than_stocks(self, habit, ours, stock, dynamic):
        counts = []
        for model in (ours, stock):
            torch.compiler.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
            for batch in (4, 6, 3, 5, 4):
                results = loss_and_gradients(model, compiled, X[:batch])
                assert_close(results, loss_and_gradients(stock, x=X[:batch]))
            counts.append(counter.frame_count)
            if model is ours:
                with habit.holds():
                    loss_and_gradients(ours, compiled, X[:5])
        assert counts[0] == counts[1] <= 2

    @habit_is("`torch.compile` under `torch.autocast`", "fused")
    def test_a_compiled_model_is_cast(self, habit, ours, stock):
        _C.use_instruction_set(
            _C.instruction_set()
        )  # asks for the kernels where there are bfloat16 tiles too
        compiled = torch.compile(ours, fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compiled(X)
            with habit.holds():
                y = compiled(X)
            expected = stock(X)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)

    @habit_is("`TrainStep` in a compiled function", "fused", "A break in the graph.")
    def test_a_step_in_a_compiled_function_trains_as_outside(self, habit):
        def trained(wrap):
            torch.manual_seed(0)
            model = fastmlp.MLP(7, 5, 3)
            optimizer = fastmlp.SGD(model.parameters(), lr=0.1, momentum=0.9)
            step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
            call = wrap(lambda x: step(x + 1, TARGET) * 2)
            losses = [call(X) for _ in range(3)]
            with recorded_paths() as seen:
                losses.append(call(X))
            return seen, losses, list(model.parameters())

        seen, *results = trained(partial(torch.compile, backend="aot_eager"))
        habit.saw(seen)
        assert_close(results, list(trained(lambda call: call)[1:]))

    @habit_is(
        "`torch.export`, strict or not, with a dynamic batch",
        "composite",
        "Programs hold PyTorch's own operations: who reads one needs no fastmlp.",
    )
    @pytest.mark.parametrize("strict", [True, False])
    def test_an_exported_program_can_be_saved_and_loaded(self, habit, ours, stock, strict):
        batch = torch.export.Dim("batch")
        program = torch.export.export(ours, (X,), dynamic_shapes=({0: batch},), strict=strict)
        assert "fastmlp" not in str(program.graph)
        file = io.BytesIO()
        torch.export.save(program.run_decompositions(), file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        with habit.holds():
            y = loaded(X[:4])
        assert_close(y, stock(X[:4]))

    @pytest.mark.slow
    @habit_is("AOTInductor: `aoti_compile_and_package`", "composite", "Runs where no fastmlp is.")
    def test_a_packaged_model_runs_without_us(self, habit, tmp_path):
        model, dynamic = fastmlp.MLP(7, 5, 3), ({0: torch.export.Dim("batch", min=1, max=64)},)
        with recorded_paths() as seen:
            program = torch.export.export(model, (X,), dynamic_shapes=dynamic)
        habit.saw(seen)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        code = (
            f"import torch; print(torch._inductor.aoti_load_package({package!r})(torch.ones(2, 7)).tolist())"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert_close(torch.tensor(ast.literal_eval(result.stdout)), model(torch.ones(2, 7)))

    @habit_is(
        "ONNX: `torch.onnx.export`, by either exporter", "composite", "ONNX Runtime gives stock's numbers."
    )
    @pytest.mark.parametrize("dynamo", [True, False])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_an_exported_file_runs_in_onnx_runtime(self, habit, ours, stock, tmp_path, dynamo):
        path = str(tmp_path / "model.onnx")
        with recorded_paths() as seen:
            torch.onnx.export(ours, (X,), path, dynamo=dynamo)
        habit.saw(seen)
        session = onnxruntime.InferenceSession(path)
        (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        assert_close(torch.from_numpy(y), stock(X))

    @habit_is("`torch.jit.trace`", "composite", "The graph holds PyTorch's own operations.")
    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_a_model_can_be_traced_to_torchscript(self, habit, ours, stock):
        traced = torch.jit.trace(ours, X)
        assert "fastmlp::" not in str(traced.inlined_graph)
        with habit.holds():
            y = traced(X[:4])
        assert_close(y, stock(X[:4]))

    @habit_is("`torch.jit.script`", "refused", "`torch.export` or `torch.jit.trace` instead.")
    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_a_model_cannot_be_scripted(self, habit, ours):
        with habit.refused(Exception, "Unsupported annotation"):
            torch.jit.script(ours)

    @habit_is("`torch.fx.symbolic_trace`", "composite", "The graph is that of stock modules.")
    def test_a_symbolic_trace_shows_torchs_operations(self, habit, ours, stock):
        traced = torch.fx.symbolic_trace(ours)
        assert_same_training(habit, ours, stock, lambda model: traced if model is ours else model)

    @habit_is(
        "FX quantization and feature extraction of what `fastmlp.fuse` gives",
        "composite",
        "The nodes are those of the stock model.",
    )
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_a_fused_model_is_traced_node_by_node_as_stocks(self, habit, stock):
        stock.eval()
        models = stock, fastmlp.fuse(copy.deepcopy(stock))
        traces = [torch.fx.symbolic_trace(model) for model in models]
        nodes = [[(node.op, str(node.target)) for node in trace.graph.nodes] for trace in traces]
        assert nodes[0] == nodes[1]
        config = torch.ao.quantization.get_default_qconfig_mapping()
        quantized = []
        for model in models:
            prepared = prepare_fx(copy.deepcopy(model), config, (X,))
            prepared(X)
            quantized.append(convert_fx(prepared))
        kinds = [[type(module).__name__ for module in model.modules()] for model in quantized]
        assert kinds[0] == kinds[1]
        assert_close(quantized[1](X), quantized[0](X))
        with habit.holds():
            traces[1](X)


class TestDifferentiation:
    """Differentiation"""

    @habit_is("`backward(retain_graph=True)`, again and again", "fused")
    def test_a_retained_graph_gives_the_same_gradients_again(self, habit, ours):
        loss, parameters = ours(X).square().sum(), list(ours.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        with habit.holds():
            second = torch.autograd.grad(loss, parameters)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @habit_is("`create_graph=True`: gradients of gradients", "composite", "The forward pass is fused.")
    def test_gradients_can_be_differentiated(self, habit, ours, stock):
        def penalty(model, x):
            with recorded_paths() as forward:
                y = model(x).square().sum()
            with recorded_paths() as backward:
                norm = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
            gradients = torch.autograd.grad(norm, model.parameters(), allow_unused=True)
            return forward, backward, (norm, *gradients)

        forward, backward, results = penalty(ours, X.clone().requires_grad_())
        assert forward == {"fused"}
        habit.saw(backward)
        assert_close(results, penalty(stock, X.clone().requires_grad_())[2])

    @habit_is("`torch.utils.checkpoint`, reentrant or not", "fused")
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_model_can_be_checkpointed(self, habit, ours, stock, reentrant):
        def call(model):
            return lambda x: checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

        def gradients(model):
            model.zero_grad()
            F.cross_entropy(call(model)(X), TARGET).backward()
            return [parameter.grad for parameter in model.parameters()]

        with habit.holds():
            results = gradients(ours)
        assert_close(results, gradients(stock))

    @habit_is("`torch.autograd.graph.save_on_cpu`, `saved_tensors_hooks`", "fused")
    def test_what_backward_needs_can_be_packed(self, habit, ours, stock):
        def unchanged(t):
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged):
            assert_same_training(habit, ours, stock)
        with torch.autograd.graph.save_on_cpu():
            assert_same_training(habit, ours, stock)

    @habit_is("`torch.autograd.detect_anomaly`", "fused")
    @pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
    def test_anomaly_detection_names_a_nan(self, habit, ours, stock):
        with torch.autograd.detect_anomaly():
            assert_same_training(habit, ours, stock)
            with pytest.raises(RuntimeError, match="returned nan values"):
                ours(X * torch.nan).sum().backward()

    @habit_is("`torch.no_grad`, `torch.inference_mode`", "fused")
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_inference_gives_the_bits_of_training(self, habit, ours, mode):
        expected = ours(X)
        with mode(), habit.holds():
            y = ours(X)
        assert y.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(y, expected)

    @habit_is(
        "`torch.use_deterministic_algorithms(True)`", "fused", "Results are the same to the bit anyhow."
    )
    def test_deterministic_algorithms_are_what_there_is(self, habit, ours):
        expected = loss_and_gradients(ours)
        torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with NaN
        try:
            with habit.holds():
                results = loss_and_gradients(ours)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    @habit_is("`torch.func.functional_call`", "fused")
    def test_a_model_can_be_called_with_other_parameters(self, habit, ours, stock):
        def call(model):
            others = {name: 2 * p for name, p in model.named_parameters()}
            return lambda x: torch.func.functional_call(model, others, (x,))

        assert_same_training(habit, ours, stock, call)

    @habit_is("`torch.func.grad`, `jvp`, `jacrev`, `hessian`", "composite")
    @pytest.mark.parametrize("name", ["grad", "jvp", "jacrev", "hessian"])
    def test_a_model_can_be_transformed(self, habit, ours, stock, name):
        def transformed(model):
            def loss(x):
                return F.cross_entropy(model(x), TARGET)

            transform = getattr(torch.func, name)
            return transform(loss, (X,), (X,)) if name == "jvp" else transform(loss)(X)

        with habit.holds():
            results = transformed(ours)
        assert_close(results, transformed(stock))

    @habit_is("Per-sample gradients: `vmap(grad(...))`", "composite")
    def test_each_sample_can_have_a_gradient(self, habit, ours, stock):
        def per_sample(model):
            def loss(parameters, x, target):
                return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), target)

            parameters = {name: p.detach() for name, p in model.named_parameters()}
            gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, X, TARGET)
            return list(gradients.values())

        with habit.holds():
            results = per_sample(ours)
        assert_close(results, per_sample(stock))

    @habit_is("Ensembles: `stack_module_state` and `vmap`", "composite")
    def test_models_can_be_stacked(self, habit):
        models = [fastmlp.MLP(7, 5, 3) for _ in range(4)]
        stacked = torch.func.stack_module_state(models)
        with habit.holds():
            y = torch.func.vmap(lambda *state: torch.func.functional_call(models[0], state, (X,)))(*stacked)
        assert_close(y, torch.stack([stock_of(model)(X) for model in models]))

    @habit_is("Forward-mode AD: `torch.autograd.forward_ad`", "composite")
    def test_a_tangent_passes_through(self, habit, ours, stock):
        from torch.autograd import forward_ad

        def tangent(model):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent

        with habit.holds():
            result = tangent(ours)
        assert_close(result, tangent(stock))


class TestModules:
    """Modules and their parameters"""

    @habit_is("`copy.deepcopy`, `pickle`", "fused")
    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_a_model_can_be_copied(self, habit, ours, stock, duplicate):
        assert_same_training(habit, duplicate(ours), stock)

    @habit_is("`torch.save` of a `state_dict`, to and from stock modules", "fused")
    def test_a_checkpoint_fits_stock_modules_layer_by_layer(self, habit, ours, stock, tmp_path):
        torch.save(ours.state_dict(), tmp_path / "model.pt")
        fresh = fastmlp.MLP(7, 5, 3, activation="tanh")
        fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        assert_same_training(habit, fresh, stock)
        for layer, other in zip(fresh, (stock[0], stock[2]), strict=True):
            other.load_state_dict(layer.state_dict())
            layer.load_state_dict(other.state_dict())

    @habit_is(
        "`torch.save` of a whole model",
        "fused",
        "With `weights_only=True`, under `torch.serialization.safe_globals([fastmlp.MLP, fastmlp.Linear])`.",
    )
    def test_a_whole_model_can_be_saved(self, habit, ours, stock, tmp_path):
        torch.save(ours, tmp_path / "model.pt")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "model.pt", weights_only=True)
        with torch.serialization.safe_globals([fastmlp.MLP, fastmlp.Linear, nn.Sequential]):
            assert_same_training(habit, torch.load(tmp_path / "model.pt", weights_only=True), stock)

    @habit_is('`device="meta"`, `to_empty`, `skip_init`, `load_state_dict(assign=True)`', "fused")
    @pytest.mark.parametrize("way", ["to_empty", "skip_init", "assign"])
    def test_a_model_can_be_made_without_memory(self, habit, ours, stock, way):
        if way == "skip_init":
            model = torch.nn.utils.skip_init(fastmlp.MLP, 7, 5, 3, activation="tanh")
        else:
            model = fastmlp.MLP(7, 5, 3, activation="tanh", device="meta")
            assert model(X.to("meta")).shape == (6, 3)
        if way == "to_empty":
            model.to_empty(device="cpu")
        model.load_state_dict(copy.deepcopy(ours.state_dict()), assign=way == "assign")
        assert_same_training(habit, model, stock)

    @habit_is("`parametrizations.weight_norm`, `spectral_norm`, own parametrizations", "fused")
    @pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "own"])
    def test_a_weight_can_be_parametrized(self, habit, ours, stock, name):
        class Symmetric(nn.Module):
            def forward(self, weight):
                return weight - weight.mean()

        for model in (ours, stock):
            torch.manual_seed(0)  # spectral_norm begins with random vectors
            if name == "own":
                parametrize.register_parametrization(model[0], "weight", Symmetric())
            else:
                getattr(parametrizations, name)(model[0])
        assert_same_training(habit, ours, stock)

    @habit_is("`torch.nn.utils.weight_norm`, `spectral_norm`, the older ones", "fused")
    @pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_a_weight_can_be_normed_by_a_hook(self, habit, ours, stock, name):
        for model in (ours, stock):
            torch.manual_seed(0)
            getattr(torch.nn.utils, name)(model[0])
        assert_same_training(habit, ours, stock)

    @habit_is("`torch.nn.utils.prune`", "fused")
    def test_a_weight_can_be_pruned(self, habit, ours, stock):
        for model in (ours, stock):
            layers = [(m, "weight") for m in model if isinstance(m, nn.Linear)]
            prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.5)
        assert_same_training(habit, ours, stock)

    @habit_is("Forward and backward hooks, pre-hooks too", "fused", "An `MLP` then computes layer by layer.")
    def test_hooks_see_what_stocks_see(self, habit, ours, stock):
        def seen_by(model, layer, activation):
            x, seen = X.clone().requires_grad_(), {}
            layer.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
            layer.register_full_backward_hook(lambda _, grads, __: seen.update(grad_x=grads[0]))
            activation.register_forward_hook(lambda _, __, y: seen.update(y=y))
            activation.register_full_backward_pre_hook(lambda _, grads: seen.update(grad_y=grads[0]))
            model(x).square().sum().backward()
            return seen

        with habit.holds():
            seen = seen_by(ours, ours[0], ours[0])
        expected = seen_by(stock, stock[0], stock[1])
        assert_close(seen, expected)
        assert set(seen) == {"x", "y", "grad_x", "grad_y"}

    @habit_is("`requires_grad_(False)`: frozen layers", "fused")
    @pytest.mark.parametrize("frozen", [0, 1])
    def test_a_layer_can_be_frozen(self, habit, ours, stock, frozen):
        for model, layer in ((ours, ours[frozen]), (stock, stock[2 * frozen])):
            layer.requires_grad_(False)
            model.zero_grad()
        with habit.holds():
            ours(X).square().sum().backward()
        stock(X).square().sum().backward()
        for parameter, other in zip(ours.parameters(), stock.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            if parameter.grad is not None:
                assert_close(parameter.grad, other.grad)

    @habit_is("`torch.optim.swa_utils.AveragedModel`", "fused")
    def test_a_model_can_be_averaged(self, habit, ours, stock):
        averages = [torch.optim.swa_utils.AveragedModel(model) for model in (ours, stock)]
        for model, average in zip((ours, stock), averages, strict=True):
            for factor in (1, 2):
                with torch.no_grad():
                    model[0].weight *= factor
                average.update_parameters(model)
        with habit.holds():
            y = averages[0](X)
        assert_close(y, averages[1](X))


class TestDtypes:
    """Dtypes"""

    @pytest.fixture(autouse=True)
    def _kernels_for_bfloat16(self):
        _C.use_instruction_set(_C.instruction_set())

    @habit_is(
        "`torch.autocast` to bfloat16",
        "fused",
        "Cast as `F.linear` is. All bfloat16 is composite on processors that multiply tiles of it (AMX).",
    )
    def test_autocast_casts_as_for_stock(self, habit, ours, stock):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with habit.holds():
                results = loss_and_gradients(ours)
            expected = loss_and_gradients(stock)
        assert [t.dtype for t in results] == [t.dtype for t in expected]
        torch.testing.assert_close(results, expected, rtol=3e-2, atol=3e-2)

    @habit_is("`torch.amp.GradScaler`, with `fastmlp.SGD`", "fused", "A step with infinities is left out.")
    def test_a_scaled_loss_trains_as_stocks_does(self, habit, ours, stock):
        def train(model, kind):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
            optimizer = kind(model.parameters(), lr=0.01, momentum=0.9)
            for _ in range(10):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = 8 * F.cross_entropy(model(X), TARGET)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            return scaler.get_scale(), list(model.parameters())

        before = copy.deepcopy(list(ours.parameters()))
        with habit.holds():
            scale, parameters = train(ours, fastmlp.SGD)
        expected_scale, expected = train(stock, torch.optim.SGD)
        assert scale == expected_scale < 2.0**127
        assert not torch.equal(parameters[0], before[0])
        torch.testing.assert_close(parameters, expected, rtol=5e-2, atol=5e-2)

    @habit_is("`model.bfloat16()`", "fused")
    def test_a_model_of_bfloat16_is_fused(self, habit, ours, stock):
        with habit.holds():
            y = ours.bfloat16()(X.bfloat16())
        torch.testing.assert_close(y, stock.bfloat16()(X.bfloat16()), rtol=3e-2, atol=3e-2)

    @habit_is("`model.double()`; on the CPU, `model.half()`", "composite")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_other_floats_are_torchs(self, habit, ours, stock, dtype):
        with habit.holds():
            y = ours.to(dtype)(X.to(dtype))
        torch.testing.assert_close(y, stock.to(dtype)(X.to(dtype)))

    @habit_is("Integers, complex numbers", "composite", "Where stock raises an error, so do we, of its type.")
    @pytest.mark.parametrize(
        ("dtype", "activation"),
        [
            *((torch.int64, None), (torch.int64, "relu"), (torch.uint8, "sigmoid")),
            *((torch.complex64, activation) for activation in (None, "relu", "tanh")),
        ],
    )
    def test_numbers_of_other_kinds_are_torchs(self, habit, dtype, activation):
        x, weight = torch.ones(2, 3).to(dtype), torch.ones(4, 3).to(dtype)
        with habit.holds():
            assert_same_outcome(
                partial(fastmlp.functional.linear, x, weight, None, activation),
                lambda: MODULES[activation]()(F.linear(x, weight)),
            )

    @habit_is("Booleans", "refused", "As by stock.")
    def test_booleans_are_refused(self, habit):
        x = torch.ones(2, 2, dtype=torch.bool)
        with pytest.raises(NotImplementedError):
            F.linear(x, x)
        with habit.refused(NotImplementedError, "Bool"):
            fastmlp.functional.linear_relu(x, x)

    @habit_is("An input of another dtype than the weight", "refused", "As by stock, but for autocast.")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
    def test_dtypes_do_not_mix(self, habit, ours, stock, dtype):
        with pytest.raises(RuntimeError):
            stock(X.to(dtype))
        with habit.refused(RuntimeError, r"weights?(\[0\])?: expected dtype .* the dtype of input"):
            ours(X.to(dtype))

    @habit_is("Tensor subclasses", "composite", "In the input or among the parameters of a layer.")
    @pytest.mark.parametrize("where", ["input", "parameter"])
    def test_a_subclass_is_torchs(self, habit, where):
        class Subclass(torch.Tensor):
            pass

        ours, x = fastmlp.MLP(7, 5), X
        stock = stock_of(ours)
        if where == "input":
            x = X.as_subclass(Subclass)
        else:
            ours[0].bias = nn.Parameter(ours[0].bias.detach().as_subclass(Subclass))
        with habit.holds():
            y = ours(x)
        assert type(y) is Subclass
        assert_close(y.as_subclass(torch.Tensor), stock(X))


def assert_same_outcome(call, stock):
    """The same result, or an error of the same type."""
    try:
        expected = stock()
    except Exception as error:
        with pytest.raises(type(error)):
            call()
    else:
        torch.testing.assert_close(call(), expected)


def train_in_two_processes(rank, size, folder, base):
    """Trains in each way, and raises where the result is not that of one process; the paths go to a file."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, half = init_device_mesh("cpu", (size,)), slice(rank * 3, rank * 3 + 3)

    def sharded(model):
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def tensor_parallel(model):
        return parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})

    def train(model, part):
        optimizer = fastmlp.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with recorded_paths() as seen:
            for _ in range(3):
                loss = F.cross_entropy(model(X[part]), TARGET[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return seen

    ways = {
        "ddp": (nn.parallel.DistributedDataParallel, half),
        "fsdp": (sharded, half),
        "tensor parallel": (tensor_parallel, slice(None)),
    }
    alone, seen = copy.deepcopy(base), {}
    train(alone, slice(None))
    for way, (change, part) in ways.items():
        model = change(copy.deepcopy(base))
        seen[way] = train(model, part)
        for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            assert_close(whole.detach(), expected.detach())
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is done: at a usual exit, threads of torch's that still end may abort the process


@pytest.fixture(scope="module")
def seen_in_processes(tmp_path_factory):
    """The paths taken in each way to train in two processes."""
    folder = str(tmp_path_factory.mktemp("processes"))
    base = fastmlp.MLP(7, 6, 4, activation="tanh")
    torch.multiprocessing.spawn(train_in_two_processes, (2, folder, base), nprocs=2)
    first, second = (torch.load(f"{folder}/{rank}.pt") for rank in range(2))
    assert first == second
    return first


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
class TestProcesses:
    """Several processes"""

    @habit_is("`DistributedDataParallel`", "fused")
    def test_data_parallel_training_is_that_of_one_process(self, habit, seen_in_processes):
        habit.saw(seen_in_processes["ddp"])

    @habit_is("FSDP2: `fully_shard`", "fused", "`fastmlp.SGD` leaves sharded parameters to torch.")
    def test_fully_sharded_training_is_that_of_one_process(self, habit, seen_in_processes):
        habit.saw(seen_in_processes["fsdp"])

    @habit_is("Tensor parallel: `parallelize_module`", "composite")
    def test_tensor_parallel_training_is_that_of_one_process(self, habit, seen_in_processes):
        habit.saw(seen_in_processes["tensor parallel"])


class TestLibraries:
    """Other tools"""

    @habit_is("`torch.ao.quantization.quantize_dynamic`", "fused", "Our layers are left as they are.")
    @pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
    def test_quantization_leaves_our_layers_alone(self, habit, ours, stock):
        quantized = torch.ao.quantization.quantize_dynamic(ours, {nn.Linear}, dtype=torch.qint8)
        assert_same_training(habit, quantized, stock)

    @habit_is(
        "`torch.nn.utils.fusion.fuse_linear_bn_eval`",
        "fused",
        "Of a layer without activation and the batch norm after it.",
    )
    def test_batch_norm_can_be_folded_into_a_layer(self, habit):
        layer, norm = fastmlp.Linear(7, 5).eval(), nn.BatchNorm1d(5)
        norm(torch.randn(20, 5))
        folded = fusion.fuse_linear_bn_eval(layer, norm.eval())
        with habit.holds():
            y = folded(X)
        assert_close(y, norm(layer(X)))

    @habit_is("`torch.utils.flop_counter`", "fused", "Counts what it counts for stock.")
    def test_operations_are_counted(self, habit, ours, stock):
        from torch.utils.flop_counter import FlopCounterMode

        with habit.holds(), FlopCounterMode(display=False) as counter:
            loss_and_gradients(ours)
        with FlopCounterMode(display=False) as expected:
            loss_and_gradients(stock)
        assert counter.get_total_flops() == expected.get_total_flops() > 0


def test_lora_adapts_layers_without_an_activation_and_fused_models():
    peft = pytest.importorskip("peft")

    def adapted(model, *names):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(names)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which is zero at first
                nn.init.normal_(parameter)
        return model

    ours = fastmlp.MLP(7, 5, 3)
    stock = stock_of(ours)
    for model, names in ((fastmlp.fuse(copy.deepcopy(stock)), "02"), (copy.deepcopy(ours), "1")):
        lora = adapted(model, *names)
        expected = adapted(copy.deepcopy(stock), *("02" if names == "02" else "2"))(X)
        assert_close(lora(X), expected)
        assert_close(lora.merge_and_unload()(X), expected)
