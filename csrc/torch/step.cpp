// The op train_step_: forward, loss, backward and update of a network, in one call of the backend.
//
// The parameters are numbered layer by layer, each weight before its bias. Nothing is changed before every argument
// has been checked.
#include "step.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <optional>

#ifdef FASTMLP_WITH_CUDA
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

#include "call.h"
#include "chain.h"
#include "network.h"
#include "training.h"

namespace fastmlp {
namespace {

using at::TensorList;

Loss parse_loss(std::string_view name) {
  static constexpr std::pair<std::string_view, Loss> losses[] = {{"cross_entropy", Loss::cross_entropy},
                                                                 {"mse", Loss::mse},
                                                                 {"l1", Loss::l1},
                                                                 {"smooth_l1", Loss::smooth_l1},
                                                                 {"huber", Loss::huber},
                                                                 {"bce_with_logits", Loss::bce_with_logits},
                                                                 {"given", Loss::given}};
  for (const auto& [known, loss] : losses)
    if (name == known) return loss;
  TORCH_CHECK_VALUE(false, "loss: expected one that the kernels know, or 'given', got '", name, "'");
}

// A state of no element is none.
void check_parameter(size_t index, const Tensor& t, TensorList states, c10::Device device) {
  const auto fits = [&](const Tensor& own) {
    return own.device() == device && own.scalar_type() == at::kFloat && own.is_contiguous();
  };
  TORCH_CHECK(fits(t), "params[", index, "]: expected a contiguous float32 tensor on ", device);
  TORCH_CHECK(
      !t.is_inference(), "params[", index,
      "]: expected a tensor made outside of torch.inference_mode, which alone may be written outside of it");
  for (const Tensor& state : states) {
    if (state.numel() == 0) continue;
    TORCH_CHECK(fits(state) && state.sizes() == t.sizes() && !state.is_inference(), "states of params[",
                index, "]: expected contiguous float32 tensors on ", device, " of shape ", t.sizes(),
                ", made outside of torch.inference_mode");
  }
}

// The weights of a loss as a vector over the outputs, which one that is the same for all of a batch expands to.
Tensor over_outputs(const char* name, const OptionalTensor& values, int64_t outputs, bool expands,
                    c10::Device device) {
  if (!values) return {};
  const bool is_vector = values->dim() > 0 && values->size(-1) == outputs && values->numel() == outputs;
  TORCH_CHECK(values->device() == device && values->scalar_type() == at::kFloat &&
                  ((is_vector && (expands || values->dim() == 1)) || (expands && values->numel() == 1)),
              name, ": expected float32 on ", device, " of shape [", outputs, "], one for each output, got ",
              values->scalar_type(), " on ", values->device(), " of shape ", values->sizes());
  return values->reshape({-1}).expand({outputs}).contiguous();
}

const float* floats_of(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// As one launch; there a class that is none fails an assertion.
void run_on_gpu([[maybe_unused]] const Step& step, [[maybe_unused]] const Tensor& workspace) {
#ifdef FASTMLP_WITH_CUDA
  const int64_t bytes = cuda::train_workspace(step);
  TORCH_CHECK(bytes >= 0, "train_step_: expected a step on a GPU that is small enough for one launch");
  if (workspace.numel() < bytes) workspace.set_(at::zeros({bytes}, workspace.options()));
  void* const memory = workspace.mutable_data_ptr();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  c10::cuda::CUDACachingAllocator::recordStream(workspace.storage().data_ptr(), stream);
  C10_CUDA_CHECK(static_cast<cudaError_t>(cuda::train(step, memory, stream.stream())));
#endif
}

// What a layer has left for a loss whose gradient is given.
const float* left_of(c10::ArrayRef<OptionalTensor> left, size_t i, int64_t M, int64_t N) {
  const OptionalTensor& t = left[i];
  if (!t) return nullptr;
  TORCH_CHECK(t->is_cpu() && t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == M * N,
              "left[", i, "]: expected contiguous float32 on the CPU of ", M, " x ", N,
              " elements, got shape ", t->sizes());
  return t->const_data_ptr<float>();
}

}  // namespace

CheckedStep::CheckedStep(const StepArguments& a) : a(a), row(optimizer_row(a.optimizer)) {
  const Loss loss = parse_loss(a.loss);
  const size_t L = a.has_bias.size(), P = a.params.size();
  size_t expected = L;
  for (const int64_t has : a.has_bias) expected += has != 0;
  TORCH_CHECK(
      L > 0 && a.activations.size() == L && P == expected && a.states.size() == row.states * P &&
          a.counts.size() == (row.counts ? P : 0) && a.numbers.size() == P,
      "train_step_: expected one activation for each layer, and states, counts and a number of options of ",
      a.optimizer, " for each of ", expected, " params");
  for (const int64_t index : a.numbers)
    TORCH_CHECK(-1 <= index && row.options * (index + 1) <= a.options.size(),
                "numbers: expected those of options, ", row.options, " each, got ", index);
  const bool given = loss == Loss::given;
  TORCH_CHECK(a.left.size() == (given ? L : 0), "left: expected ", given ? L : 0, " tensors, got ",
              a.left.size());
  const Tensor &input = a.input, &target = a.target;
  const c10::Device device = input.device();
  const OptionalTensor& norm = a.norm;
  TORCH_CHECK(!norm || (norm->device() == device && norm->scalar_type() == at::kFloat && norm->numel() == 1),
              "norm: expected one float32 on ", device);
  TORCH_CHECK((a.max_norm > 0) == norm.has_value(),
              "max_norm: expected a positive number where norm is given, else 0, got ", a.max_norm);
  TORCH_CHECK(input.scalar_type() == at::kFloat && input.layout() == c10::kStrided && input.dim() >= 1,
              "input: expected a float32 tensor of shape [..., in_features], got ", input.scalar_type(),
              " on ", device, " of shape ", input.sizes());
  TORCH_CHECK(!input.requires_grad(),
              "input: expected a tensor that requires no gradient, since a step computes none");
  TORCH_CHECK(
      a.workspace.device() == device && a.workspace.scalar_type() == at::kByte && a.workspace.is_contiguous(),
      "workspace: expected a contiguous uint8 tensor on ", device);

  const int64_t M = rows_of(input);
  x = as_matrix(input, M, input.size(-1));
  const LayerActivations activations = parse_activations(a.activations, a.parameters);
  const bool reduced = is_reduced(input);
  optimizers.resize(P), weights.resize(L), biases.resize(L), layers.reserve(L), trained.reserve(P);
  int64_t width = input.size(-1);
  for (size_t i = 0; i < L; ++i) {
    const size_t at = trained.size();
    const Tensor& weight = a.params[at];
    const bool fits = weight.dim() == 2 && weight.size(1) == width;
    TORCH_CHECK(i > 0 || fits, "input: expected shape [..., in_features] for a first weight of shape ",
                weight.sizes(), ", got ", input.sizes());
    TORCH_CHECK(fits, "params[", at, "]: expected shape [*, ", width, "], got ", weight.sizes());
    TORCH_CHECK(!a.has_bias[i] || a.params[at + 1].sizes().equals({weight.size(0)}), "params[", at + 1,
                "]: expected shape [", weight.size(0), "], got ", a.params[at + 1].sizes());
    take_parameter(weights[i]);
    if (a.has_bias[i]) take_parameter(biases[i]);
    const float* const kept = given ? left_of(a.left, i, M, weight.size(0)) : nullptr;
    const bool is_z = activations[i].reads_z();
    layers.push_back({.dtype = Dtype::float32,
                      .reduced = reduced,
                      .activation = activations[i].kernel,
                      .M = M,
                      .N = weight.size(0),
                      .K = width,
                      .x = i ? nullptr : x.const_data_ptr(),
                      .ldx = i ? width : x.stride(0),
                      .weight = weights[i].update.param,
                      .ldw = width,
                      .bias = biases[i].update.param,
                      .y = is_z ? nullptr : const_cast<float*>(kept),
                      .z = is_z ? const_cast<float*>(kept) : nullptr});
    width = weight.size(0);
  }

  const bool classes = loss == Loss::cross_entropy;
  TORCH_CHECK((loss != Loss::smooth_l1 && loss != Loss::huber) || a.number > 0,
              "number: expected a positive bound of the loss, got ", a.number);
  at::DimVector sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = width;
  if (classes) sizes.pop_back();
  TORCH_CHECK(!classes || input.dim() == 2,
              "input: expected shape [batch, in_features] for cross-entropy, got ", input.sizes());
  TORCH_CHECK(!classes || width > 0, "params: expected a class or more, got a last weight of shape ",
              a.params.back().sizes());
  TORCH_CHECK(target.device() == device && target.scalar_type() == (classes ? at::kLong : at::kFloat),
              "target: expected ", classes ? at::kLong : at::kFloat, " on ", device, ", got ",
              target.scalar_type(), " on ", target.device());
  TORCH_CHECK(target.sizes() == at::IntArrayRef(sizes), "target: expected shape ", at::IntArrayRef(sizes),
              ", got ", target.sizes());
  targets = target.contiguous();
  weighs = over_outputs("weight", a.weight, width, !classes, device);
  pos_weighs = over_outputs("pos_weight", a.pos_weight, width, !classes, device);
  Memories memories = {memory_of(x), memory_of(targets), memory_of(weighs), memory_of(pos_weighs)};
  for (const TensorList tensors : {a.params, a.states, a.counts})
    for (const Tensor& t : tensors) memories.push_back(memory_of(t));
  TORCH_CHECK_VALUE(
      !overlap(std::move(memories)),
      "params: expected tensors that share no memory with one another, nor with input or target");
  TORCH_CHECK(input.is_cpu() || !given, "loss: expected one that the kernels know on ", device,
              ", got given");
  step = {.count = int64_t(L),
          .layers = layers.data(),
          .weights = weights.data(),
          .biases = biases.data(),
          .loss = loss,
          .cross_entropy = {.dtype = Dtype::float32,
                            .reduction = a.mean ? Reduction::mean : Reduction::sum,
                            .N = M,
                            .C = width,
                            .input = nullptr,
                            .target = classes ? targets.const_data_ptr<int64_t>() : nullptr,
                            .weight = floats_of(weighs),
                            .ignore_index = a.ignore_index,
                            .label_smoothing = float(a.number),
                            .loss = nullptr,
                            .grad = nullptr},
          .pointwise = {.N = width,
                        .target = classes ? nullptr : targets.const_data_ptr<float>(),
                        .weight = floats_of(weighs),
                        .pos_weight = floats_of(pos_weighs),
                        .bound = float(a.number),
                        .mean = a.mean},
          .gradient = given ? targets.const_data_ptr<float>() : nullptr,
          .value = nullptr,
          .max_norm = a.max_norm,
          .norm = norm ? norm->mutable_data_ptr<float>() : nullptr};
}

// The next one.
void CheckedStep::take_parameter(Trained& to) {
  const size_t at = trained.size();
  trained.push_back(&to);
  const Tensor& t = a.params[at];
  const TensorList states = a.states.slice(row.states * at, row.states);
  check_parameter(at, t, states, a.input.device());
  to.update.param = t.mutable_data_ptr<float>();
  to.update.size = t.numel();
  if (a.numbers[at] < 0) return;
  to.optimizer = &optimizers[at];
  for (size_t k = 0; k < row.states && states[k].numel(); ++k)
    to.update.states[k] = states[k].mutable_data_ptr<float>();
  TORCH_CHECK(!row.counts || is_count(a.counts[at]), "counts[", at,
              "]: expected a float32 or float64 of one element on the CPU, got ", a.counts[at].toString(),
              " of shape ", a.counts[at].sizes());
}

// As options are now, and counts after so many steps.
void CheckedStep::optimize(int64_t steps_before) {
  double last = -1;
  for (size_t i = 0; i < trained.size(); ++i) {
    if (!trained[i]->optimizer) continue;
    const auto options = a.options.slice(row.options * size_t(a.numbers[i]), row.options);
    void* const* const own = trained[i]->update.states;
    void* const* const states = std::find(own, own + row.states, nullptr);
    optimizers[i] = optimizer_of(row, options, Dtype::float32, size_t(states - own));
    const double count = row.counts ? count_of(a.counts[i]) + 1 + double(steps_before) : 0;
    // Powers take longer than all else, and are mostly the last parameter's.
    const bool is_last = i > 0 && count == last && a.numbers[i] == a.numbers[i - 1];
    trained[i]->update.rates = is_last ? trained[i - 1]->update.rates : rates_of(row, options, count);
    last = count;
  }
}

double CheckedStep::multiply_adds() const {
  double weights = 0;
  for (const Forward& p : layers) weights += double(p.N) * double(p.K);
  return 3 * double(layers.front().M) * weights;
}

const Step& CheckedStep::prepare(float* value) {
  optimize();
  step.value = value;
  return step;
}

bool CheckedStep::reads(const Tensor& x_rows, const Tensor& target_rows) const {
  const auto is = [](const Tensor& own, const Tensor& t) {
    return own.is_contiguous() && t.is_contiguous() && own.dim() > 0 && t.dim() > 0 &&
           own.size(0) == t.size(0) && own.const_data_ptr() == t.const_data_ptr();
  };
  return is(x, x_rows) && is(targets, target_rows);
}

void CheckedStep::move_to(const void* x_rows, const void* target_rows) {
  layers.front().x = x_rows;
  step.cross_entropy.target = static_cast<const int64_t*>(target_rows);
  step.pointwise.target = static_cast<const float*>(target_rows);
}

void CheckedStep::take(float* value) {
  prepare(value);
  int64_t wrong = -1;
  if (a.input.is_cpu()) {
    if (!bytes) bytes = cpu::train_workspace(step, threads);
    // Kept by the caller from step to step: a block as large would come from the system as new pages each time.
    if (a.workspace.numel() < bytes) a.workspace.set_(empty({bytes}, a.workspace.options()));
    wrong = cpu::train(step, a.workspace.mutable_data_ptr(), threads);
  } else {
    run_on_gpu(step, a.workspace);
  }
  TORCH_CHECK_INDEX(wrong < 0, "target: expected classes from 0 to ", step.cross_entropy.C - 1, ", got ",
                    step.cross_entropy.target[wrong], " in row ", wrong);
  finish();
}

void CheckedStep::take(float* values, int64_t steps, c10::function_ref<void(int64_t)> set_rates) {
  const size_t P = trained.size();
  const Tensor told =
      at::detail::empty_cpu({steps * int64_t(P * sizeof(StepNumbers))}, at::kByte, /*pin_memory=*/true);
  StepNumbers* to = static_cast<StepNumbers*>(told.mutable_data_ptr());
  for (int64_t number = 0; number < steps; ++number) {
    set_rates(number), optimize(number);
    for (size_t i = 0; i < P; ++i) *to++ = {optimizers[i], trained[i]->update.rates};
  }
  const Tensor numbers = told.to(a.input.device(), /*non_blocking=*/true);
  for (size_t i = 0; i < P; ++i) {
    optimizers[i].in_memory = true;
    trained[i]->update.numbers = static_cast<const StepNumbers*>(numbers.const_data_ptr()) + i;
  }
  step.value = values, step.steps = steps, step.numbers_step = int64_t(P);
  step.x_step = x.numel(), step.target_step = targets.numel();
  run_on_gpu(step, a.workspace);
  for (int64_t number = 0; number < steps; ++number) finish();
}

void CheckedStep::finish() {
  const auto changed = [](const Tensor& t) {  // so that autograd notices where it has saved one of them
    if (t.numel()) t.unsafeGetTensorImpl()->bump_version();
  };
  for (size_t i = 0; i < trained.size(); ++i) {
    if (!trained[i]->optimizer) continue;
    changed(a.params[i]);
    for (const Tensor& state : a.states.slice(row.states * i, row.states)) changed(state);
    if (row.counts) count_up(a.counts[i]);
  }
}

namespace {

Tensor train_step_(const Tensor& input, const Tensor& target, TensorList params, TensorList states,
                   TensorList counts, const Tensor& workspace, at::IntArrayRef has_bias, Names activations,
                   Numbers parameters, std::string_view loss, bool mean, const OptionalTensor& weight,
                   const OptionalTensor& pos_weight, int64_t ignore_index, double number,
                   std::string_view optimizer, Numbers options, at::IntArrayRef numbers,
                   const OptionalTensors& left, const OptionalTensor& norm, double max_norm) {
  return take_step({input,       target,     params,  states,  counts,     workspace,  has_bias,
                    activations, parameters, loss,    mean,    weight,     pos_weight, ignore_index,
                    number,      optimizer,  options, numbers, read(left), norm,       max_norm});
}

// Whether the dispatcher would call the kernel at once.
bool is_unseen(const StepArguments& a) {
  c10::DispatchKeySet keys = a.input.key_set() | a.target.key_set() | a.workspace.key_set();
  for (const TensorList tensors : {a.params, a.states, a.counts})
    for (const Tensor& t : tensors) keys = keys | t.key_set();
  for (const OptionalTensor* const t : {&a.weight, &a.pos_weight, &a.norm})
    if (*t) keys = keys | (*t)->key_set();
  for (const OptionalTensor& t : a.left)
    if (t) keys = keys | t->key_set();
  return nobody_sees(keys);
}

}  // namespace

Tensor take_step(const StepArguments& a) {
  CheckedStep step(a);
  const c10::DeviceGuard guard(a.input.device());
  const Tensor value = a.loss == "given" ? Tensor() : empty({}, a.input.options());
  const Unlocked unlocked(PyGILState_Check() && step.multiply_adds() >= long_enough);
  step.take(value.defined() ? value.mutable_data_ptr<float>() : nullptr);
  return value;
}

Tensor call_train_step(const StepArguments& a) {
  if (is_unseen(a)) return take_step(a);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::train_step_", "")
                             .typed<decltype(train_step_)>();
  OptionalTensors left;
  for (const OptionalTensor& t : a.left) left.push_back(t);
  const pybind11::gil_scoped_release no_gil;
  return op.call(a.input, a.target, a.params, a.states, a.counts, a.workspace, a.has_bias, a.activations,
                 a.parameters, a.loss, a.mean, a.weight, a.pos_weight, a.ignore_index, a.number, a.optimizer,
                 a.options, a.numbers, left, a.norm, a.max_norm);
}

namespace {

// Whether a step is one call of a kernel, as far as device, dtype and shapes tell. On a GPU that is one launch; not while
// the caller captures a graph, in which the optimizer's numbers would stay as they are.
bool is_one_call(const Tensor& input, Objects weights, [[maybe_unused]] bool clips) {
  if (at::autocast::is_autocast_enabled(input.device().type())) return false;
#ifdef FASTMLP_WITH_CUDA
  if (input.is_cuda() && input.scalar_type() == at::kFloat && input.dim() > 0) {
    c10::SmallVector<int64_t, 9> widths = {input.size(-1)};
    for (PyObject* const w : weights) widths.push_back(is_plain(w) ? THPVariable_Unpack(w).size(0) : 0);
    const c10::DeviceGuard guard(input.device());
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None &&
           cuda::is_one_launch(rows_of(input), widths.data(), int64_t(weights.size()), clips);
  }
#endif
  return input.is_cpu();
}

// Steps one after the other, each of a batch of the next rows of x and target, or of the rows that come next in `order`,
// which are gathered in the first step's input and target.
struct Run {
  explicit Run(PyObject* tuple) {
    TORCH_CHECK_TYPE(PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == 8, "run: expected 8 items");
    const Objects items = items_of(tuple);
    for (const size_t i : {0, 1, 2, 3, 4})
      TORCH_CHECK_TYPE(is_plain(items[i]) || (i > 2 && items[i] == Py_None), "run: expected tensors");
    x = THPVariable_Unpack(items[0]), target = THPVariable_Unpack(items[1]);
    losses = THPVariable_Unpack(items[2]);
    order = tensor_or_none(items[3]), rates = tensor_or_none(items[4]);
    begin = PyLong_AsLongLong(items[5]), steps = PyLong_AsLongLong(items[6]);
    number = PyLong_AsLongLong(items[7]);
    if (PyErr_Occurred()) throw python_error();
  }
  // Whether the steps are of rows as the batch's, and all that they read and write is there.
  bool is_covered(const Tensor& batch) const {
    const auto covers = [&](const Tensor& t, at::ScalarType dtype, int64_t size) {
      return t.device() == batch.device() && t.is_contiguous() && t.scalar_type() == dtype && t.dim() > 0 &&
             t.size(0) >= size;
    };
    const int64_t rows = batch.dim() > 1 ? batch.size(0) : 0, end = begin + steps * rows;
    const int64_t of_data = order ? 0 : end;
    return rows > 0 && begin >= 0 && steps > 0 && number >= 0 && covers(x, at::kFloat, of_data) &&
           covers(target, target.scalar_type(), of_data) && target.size(0) >= x.size(0) &&
           covers(losses, at::kFloat, number + steps) && (!order || covers(*order, at::kLong, end)) &&
           (!rates || (rates->is_cpu() && rates->is_contiguous() && rates->scalar_type() == at::kDouble &&
                       rates->dim() == 2 && rates->size(0) >= number + steps));
  }
  // Those of a step.
  Numbers rates_of(int64_t step) const {
    if (!rates) return {};
    return {rates->const_data_ptr<double>() + (number + step) * rates->size(1), size_t(rates->size(1))};
  }

  Tensor x, target, losses;
  OptionalTensor order, rates;
  int64_t begin, steps,
      number;  // of the first step: its first row, of which the number tells its loss and rates
};

// Takes the next steps of a run on a GPU in one launch, and returns how many. Python sees to signals between launches, which
// therefore take a few milliseconds at most. The batches of an order are gathered before: for all steps at once that costs
// less than a step, whose kernel would else find each row of x twice by its number.
int64_t take_launch(CheckedStep& step, int64_t rows, const Run& run, Training& training, float* losses) {
  constexpr int64_t most = 128, most_gathered = 64 << 20;  // bytes
  Tensor x = run.x.slice(0, run.begin), target = run.target.slice(0, run.begin);
  int64_t steps = training.begins() ? 1 : std::min(run.steps, most);
  if (run.order) {
    const int64_t of_row = int64_t(run.x.nbytes()) / std::max<int64_t>(run.x.size(0), 1);
    steps = std::clamp<int64_t>(most_gathered / std::max<int64_t>(rows * of_row, 1), 1, steps);
    const Tensor order = run.order->slice(0, run.begin, run.begin + steps * rows);
    x = run.x.index_select(0, order), target = run.target.index_select(0, order);
  }
  step.move_to(x.const_data_ptr(), target.const_data_ptr());
  step.take(losses, steps, [&](int64_t number) { training.set_rates(run.rates_of(number)); });
  return steps;
}

// Takes as many steps as there is time for, and returns how many: 0 where the first is to be taken by itself, or raises. The
// caller then sees to signals, and to what other threads of Python may have changed.
int64_t take_steps(const StepArguments& a, const Tensor& batch, const Run& run, Training& training) {
  constexpr std::chrono::milliseconds time(10);
  const auto row_of = [](const Tensor& t) { return t.size(0) ? int64_t(t.nbytes()) / t.size(0) : 0; };
  const int64_t rows = batch.size(0), x_row = row_of(run.x), target_row = row_of(run.target);
  CheckedStep step(a);
  Memories memories = {memory_of(run.x), memory_of(run.target), memory_of(run.losses),
                       memory_of(run.order.value_or(Tensor()))};
  for (const TensorList tensors : {a.params, a.states, a.counts})
    for (const Tensor& t : tensors) memories.push_back(memory_of(t));
  if (!step.reads(batch, a.target) || rows != a.target.size(0) || overlap(std::move(memories))) return 0;
  const char *const x = static_cast<const char*>(run.x.const_data_ptr()),
                    *const target = static_cast<const char*>(run.target.const_data_ptr());
  float* const losses = run.losses.mutable_data_ptr<float>() + run.number;
  const c10::DeviceGuard guard(a.input.device());
  const Unlocked unlocked(true);
  const auto end = std::chrono::steady_clock::now() + time;
  int64_t done = 0;
  try {
    if (!a.input.is_cpu()) return take_launch(step, rows, run, training, losses);
    do {
      const int64_t begin = run.begin + done * rows;
      if (run.order) {
        const int64_t *const order = run.order->const_data_ptr<int64_t>() + begin, count = run.x.size(0);
        for (int64_t i = 0; i < rows; ++i)
          TORCH_CHECK_INDEX(0 <= order[i] && order[i] < count, "order: expected rows from 0 to ", count - 1,
                            ", got ", order[i]);
        cpu::gather(x, order, rows, x_row, a.input.mutable_data_ptr(), step.threads);
        cpu::gather(target, order, rows, target_row, a.target.mutable_data_ptr(), step.threads);
      } else {
        step.move_to(x + begin * x_row, target + begin * target_row);
      }
      training.set_rates(run.rates_of(done));
      step.take(losses + done);
      ++done;
    } while (done < run.steps && !training.begins() && std::chrono::steady_clock::now() < end);
  } catch (const std::exception&) {  // which the step by itself will meet again
  }
  return done;
}

}  // namespace

PyObject* train_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12 && PyTuple_Check(arguments[2]) && PyTuple_Check(arguments[5]) &&
                       PyTuple_GET_SIZE(arguments[5]) == 6 && is_list(arguments[6]),
                   "train_step: expected 12 arguments, a loss of 6 items and a list of what is left");
  PyObject *const model = arguments[2], *const target = arguments[4];
  Chain chain;
  THPObjectPtr x;
  if (PyTuple_GET_SIZE(model) == 3) {
    Chain::Objects* const lists[] = {&chain.weights, &chain.biases, &chain.activations};
    for (int i = 0; i < 3; ++i)
      for (PyObject* const o : items_of(PyTuple_GET_ITEM(model, i))) lists[i]->push_back(Py_NewRef(o));
    x = THPObjectPtr::dup(arguments[3]);
    TORCH_CHECK_TYPE(is_plain(x) && is_plain(target), "input, target: expected tensors of torch's own type");
  } else {
    if (!is_plain(target)) Py_RETURN_NOTIMPLEMENTED;
    x = find_unwatched(arguments[0], model, arguments[3], chain);
    if (!x || !is_plain(x)) Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor& input = THPVariable_Unpack(x);
  const OptionalTensor norm = tensor_or_none(arguments[8]);
  if (!is_one_call(input, chain.weights, norm.has_value())) Py_RETURN_NOTIMPLEMENTED;

  Chain::Objects parameters;
  c10::SmallVector<int64_t, 8> has_bias;
  for (size_t i = 0; i < chain.weights.size(); ++i) {
    parameters.push_back(chain.weights[i]);
    has_bias.push_back(chain.biases[i] != Py_None);
    if (has_bias.back()) parameters.push_back(chain.biases[i]);
  }
  std::optional<Run> run;
  if (arguments[11] != Py_None) run.emplace(arguments[11]);
  if (run && !run->is_covered(THPVariable_Unpack(arguments[3]))) return PyLong_FromLong(0);
  Training training;
  const std::string why = training.collect(arguments[1], arguments[7], parameters, norm.has_value(),
                                           run ? run->rates_of(0) : Numbers{});
  if (!why.empty()) return PyUnicode_FromStringAndSize(why.data(), Py_ssize_t(why.size()));
  const Objects loss = items_of(arguments[5]);
  const OptionalTensor weight = tensor_or_none(loss[2]), pos_weight = tensor_or_none(loss[3]);
  Tensors left;
  for (PyObject* const t : items_of(arguments[6])) left.push_back(tensor_or_none(t));
  const NamedActivations activations(chain.activations);
  const std::string name = string_of(loss[0]);
  const StepArguments step{.input = input,
                           .target = THPVariable_Unpack(target),
                           .params = training.params,
                           .states = training.states,
                           .counts = training.counts,
                           .workspace = THPVariable_Unpack(arguments[10]),
                           .has_bias = has_bias,
                           .activations = activations.names,
                           .parameters = activations.parameters,
                           .loss = name,
                           .mean = loss[1] == Py_True,
                           .weight = weight,
                           .pos_weight = pos_weight,
                           .ignore_index = PyLong_AsLongLong(loss[4]),
                           .number = PyFloat_AsDouble(loss[5]),
                           .optimizer = training.row->name,
                           .options = training.options,
                           .numbers = training.numbers,
                           .left = left,
                           .norm = norm,
                           .max_norm = PyFloat_AsDouble(arguments[9])};
  if (PyErr_Occurred()) throw python_error();
  if (run) {
    const int64_t done =
        is_unseen(step) ? take_steps(step, THPVariable_Unpack(arguments[3]), *run, training) : 0;
    if (done) training.finish();
    return PyLong_FromLongLong(done);
  }
  Tensor value = call_train_step(step);
  training.finish();
  return THPVariable_Wrap(std::move(value));
  END_HANDLE_TH_ERRORS
}

PyObject* known_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static PyObject *const buffers = interned("_buffers"), *const weight = interned("weight"),
                         *const pos_weight = interned("pos_weight"),
                         *const ignore_index = interned("ignore_index"),
                         *const reduction = interned("reduction"), *const none = PyLong_FromLong(0);
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "known_loss: expected what is known and a loss");
  PyObject *const losses = arguments[0], *const loss = arguments[1];
  const bool is_function = PyFunction_Check(loss);
  PyObject* const row = get(losses, is_function ? loss : reinterpret_cast<PyObject*>(Py_TYPE(loss)));
  if (!row || is_function) return Py_NewRef(row ? row : Py_None);
  THPObjectPtr own = attributes_of(PyTuple_GET_ITEM(row, 0), loss);
  PyObject* const how = own ? get(own, reduction) : nullptr;
  const bool is_mean = how && PyUnicode_Check(how) && PyUnicode_CompareWithASCIIString(how, "mean") == 0;
  if (!is_mean && !(how && PyUnicode_Check(how) && PyUnicode_CompareWithASCIIString(how, "sum") == 0))
    Py_RETURN_NONE;
  PyObject* const tensors = get(own, buffers);
  const auto item = [](PyObject* dict, PyObject* key, PyObject* otherwise) {
    PyObject* const found = get(dict, key);
    return found ? found : otherwise;
  };
  return PyTuple_Pack(6, PyTuple_GET_ITEM(row, 1), is_mean ? Py_True : Py_False,
                      item(tensors, weight, Py_None), item(tensors, pos_weight, Py_None),
                      item(own, ignore_index, none), item(own, PyTuple_GET_ITEM(row, 2), none));
  END_HANDLE_TH_ERRORS
}

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def(
      "train_step_(Tensor input, Tensor target, Tensor(a!)[] params, Tensor(b!)[] states, "
      "Tensor(c!)[] counts, Tensor(d!) workspace, int[] has_bias, str[] activations, float[] parameters, "
      "str loss, bool mean, Tensor? weight, Tensor? pos_weight, int ignore_index, float number, "
      "str optimizer, float[] options, int[] numbers, Tensor?[] left, Tensor(e!)? norm, float max_norm) -> "
      "Tensor");
}
TORCH_LIBRARY_IMPL(fastmlp, CPU, m) { m.impl("train_step_", train_step_); }
#ifdef FASTMLP_WITH_CUDA
TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) { m.impl("train_step_", train_step_); }
#endif
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) { m.impl("train_step_", torch::CppFunction::makeFallthrough()); }

}  // namespace fastmlp
