// The op train_step_: forward, loss, backward and update of a network, in one call of the backend.
//
// The parameters are numbered layer by layer, each weight before its bias. Nothing is changed before every argument
// has been checked.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "backends.h"
#include "ops.h"
#include "optimizer.h"

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
void check_parameter(size_t index, const Tensor& t, TensorList states) {
  TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous(), "params[", index,
              "]: expected a contiguous float32 tensor on the CPU");
  TORCH_CHECK(
      !t.is_inference(), "params[", index,
      "]: expected a tensor made outside of torch.inference_mode, which alone may be written outside of it");
  for (const Tensor& state : states) {
    if (state.numel() == 0) continue;
    TORCH_CHECK(state.is_cpu() && state.scalar_type() == at::kFloat && state.is_contiguous() &&
                    state.sizes() == t.sizes() && !state.is_inference(),
                "states of params[", index, "]: expected contiguous float32 tensors on the CPU of shape ",
                t.sizes(), ", made outside of torch.inference_mode");
  }
}

// The weights of a loss as a vector over the outputs, which one that is the same for all of a batch expands to.
Tensor over_outputs(const char* name, const OptionalTensor& values, int64_t outputs, bool expands) {
  if (!values) return {};
  const bool is_vector = values->dim() > 0 && values->size(-1) == outputs && values->numel() == outputs;
  TORCH_CHECK(values->is_cpu() && values->scalar_type() == at::kFloat &&
                  ((is_vector && (expands || values->dim() == 1)) || (expands && values->numel() == 1)),
              name, ": expected float32 on the CPU of shape [", outputs, "], one for each output, got ",
              values->scalar_type(), " on ", values->device(), " of shape ", values->sizes());
  return values->reshape({-1}).expand({outputs}).contiguous();
}

const float* floats_of(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// What a layer has left for a loss whose gradient is given.
const float* left_of(const OptionalTensors& left, size_t i, int64_t M, int64_t N) {
  const OptionalTensor t = left.get(i);
  if (!t) return nullptr;
  TORCH_CHECK(t->is_cpu() && t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == M * N,
              "left[", i, "]: expected contiguous float32 on the CPU of ", M, " x ", N,
              " elements, got shape ", t->sizes());
  return t->const_data_ptr<float>();
}

// Of each parameter: its states, a count where the optimizer has one, and the number of its options, which may be those
// of others too; -1 for one that stays as it is. `number` is the label smoothing, or the loss's bound. For a
// loss that is given, the target is the gradient of the output, and `left` what layers have left for backward.
Tensor train_step_(const Tensor& input, const Tensor& target, TensorList params, TensorList states,
                   TensorList counts, const Tensor& workspace, at::IntArrayRef has_bias, Names activations,
                   Numbers parameters, std::string_view loss_name, bool mean, const OptionalTensor& weight,
                   const OptionalTensor& pos_weight, int64_t ignore_index, double number,
                   std::string_view optimizer, at::ArrayRef<double> options, at::IntArrayRef numbers,
                   const OptionalTensors& left, const OptionalTensor& norm, double max_norm) {
  const Loss loss = parse_loss(loss_name);
  const OptimizerRow& row = optimizer_row(optimizer);
  const size_t L = has_bias.size(), P = params.size();
  size_t expected = L;
  for (const int64_t has : has_bias) expected += has != 0;
  TORCH_CHECK(
      L > 0 && activations.size() == L && P == expected && states.size() == row.states * P &&
          counts.size() == (row.counts ? P : 0) && numbers.size() == P,
      "train_step_: expected one activation for each layer, and states, counts and a number of options of ",
      optimizer, " for each of ", expected, " params");
  for (const int64_t index : numbers)
    TORCH_CHECK(-1 <= index && row.options * (index + 1) <= options.size(),
                "numbers: expected those of options, ", row.options, " each, got ", index);
  const bool given = loss == Loss::given;
  TORCH_CHECK(left.size() == (given ? L : 0), "left: expected ", given ? L : 0, " tensors, got ",
              left.size());
  TORCH_CHECK(!norm || (norm->is_cpu() && norm->scalar_type() == at::kFloat && norm->numel() == 1),
              "norm: expected one float32 on the CPU");
  TORCH_CHECK((max_norm > 0) == norm.has_value(),
              "max_norm: expected a positive number where norm is given, else 0, got ", max_norm);
  TORCH_CHECK(input.is_cpu() && input.scalar_type() == at::kFloat && input.layout() == c10::kStrided &&
                  input.dim() >= 1,
              "input: expected a float32 tensor on the CPU of shape [..., in_features], got ",
              input.scalar_type(), " on ", input.device(), " of shape ", input.sizes());
  TORCH_CHECK(!input.requires_grad(),
              "input: expected a tensor that requires no gradient, since a step computes none");
  TORCH_CHECK(workspace.is_cpu() && workspace.scalar_type() == at::kByte && workspace.is_contiguous(),
              "workspace: expected a contiguous uint8 tensor on the CPU");

  const int64_t M = rows_of(input);
  const Tensor x = as_matrix(input, M, input.size(-1));
  const LayerActivations layer_activations = parse_activations(activations, parameters);
  std::vector<Forward> layers;
  std::vector<Optimizer> optimizers(P);
  std::vector<Trained> weights(L), biases(L);
  int64_t width = input.size(-1);
  for (size_t i = 0, at = 0; i < L; ++i) {
    const auto take = [&](Trained& to) {
      const TensorList own = states.slice(row.states * at, row.states);
      check_parameter(at, params[at], own);
      to = {};
      to.update.param = params[at].mutable_data_ptr<float>();
      to.update.size = params[at].numel();
      if (numbers[at] >= 0) {
        const at::ArrayRef<double> given = options.slice(row.options * numbers[at], row.options);
        size_t kinds = 0;
        for (; kinds < row.states && own[kinds].numel(); ++kinds)
          to.update.states[kinds] = own[kinds].mutable_data_ptr<float>();
        TORCH_CHECK(!row.counts || is_count(counts[at]), "counts[", at,
                    "]: expected a float32 or float64 of one element on the CPU, got ", counts[at].toString(),
                    " of shape ", counts[at].sizes());
        to.update.rates = rates_of(row, given, row.counts ? count_of(counts[at]) + 1 : 0);
        optimizers[at] = optimizer_of(row, given, Dtype::float32, kinds);
        to.optimizer = &optimizers[at];
      }
      ++at;
    };
    const Tensor& weight = params[at];
    const bool fits = weight.dim() == 2 && weight.size(1) == width;
    TORCH_CHECK(i > 0 || fits, "input: expected shape [..., in_features] for a first weight of shape ",
                weight.sizes(), ", got ", input.sizes());
    TORCH_CHECK(fits, "params[", at, "]: expected shape [*, ", width, "], got ", weight.sizes());
    TORCH_CHECK(!has_bias[i] || params[at + 1].sizes().equals({weight.size(0)}), "params[", at + 1,
                "]: expected shape [", weight.size(0), "], got ", params[at + 1].sizes());
    take(weights[i]);
    if (has_bias[i]) take(biases[i]);
    else biases[i] = {};
    const float* const kept = given ? left_of(left, i, M, weight.size(0)) : nullptr;
    const bool is_z = layer_activations[i].reads_z();
    layers.push_back({.dtype = Dtype::float32,
                      .reduced = is_reduced(input),
                      .activation = layer_activations[i].kernel,
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
  TORCH_CHECK((loss != Loss::smooth_l1 && loss != Loss::huber) || number > 0,
              "number: expected a positive bound of the loss, got ", number);
  at::DimVector sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = width;
  if (classes) sizes.pop_back();
  TORCH_CHECK(!classes || input.dim() == 2,
              "input: expected shape [batch, in_features] for cross-entropy, got ", input.sizes());
  TORCH_CHECK(!classes || width > 0, "params: expected a class or more, got a last weight of shape ",
              params.back().sizes());
  TORCH_CHECK(target.is_cpu() && target.scalar_type() == (classes ? at::kLong : at::kFloat),
              "target: expected ", classes ? at::kLong : at::kFloat, " on the CPU, got ",
              target.scalar_type(), " on ", target.device());
  TORCH_CHECK(target.sizes() == at::IntArrayRef(sizes), "target: expected shape ", at::IntArrayRef(sizes),
              ", got ", target.sizes());
  const Tensor targets = target.contiguous(), weighs = over_outputs("weight", weight, width, !classes),
               pos_weighs = over_outputs("pos_weight", pos_weight, width, !classes);
  std::vector<Memory> memories = {memory_of(x), memory_of(targets), memory_of(weighs), memory_of(pos_weighs)};
  for (const TensorList tensors : {params, states, counts})
    for (const Tensor& t : tensors) memories.push_back(memory_of(t));
  TORCH_CHECK_VALUE(
      !overlap(std::move(memories)),
      "params: expected tensors that share no memory with one another, nor with input or target");
  Tensor value = given ? Tensor() : at::empty({}, input.options());
  const Step step{.count = int64_t(L),
                  .layers = layers.data(),
                  .weights = weights.data(),
                  .biases = biases.data(),
                  .loss = loss,
                  .cross_entropy = {.dtype = Dtype::float32,
                                    .reduction = mean ? Reduction::mean : Reduction::sum,
                                    .N = M,
                                    .C = width,
                                    .input = nullptr,
                                    .target = classes ? targets.const_data_ptr<int64_t>() : nullptr,
                                    .weight = floats_of(weighs),
                                    .ignore_index = ignore_index,
                                    .label_smoothing = float(number),
                                    .loss = nullptr,
                                    .grad = nullptr},
                  .pointwise = {.N = width,
                                .target = classes ? nullptr : targets.const_data_ptr<float>(),
                                .weight = floats_of(weighs),
                                .pos_weight = floats_of(pos_weighs),
                                .bound = float(number),
                                .mean = mean},
                  .gradient = given ? targets.const_data_ptr<float>() : nullptr,
                  .value = given ? nullptr : value.mutable_data_ptr<float>(),
                  .max_norm = max_norm,
                  .norm = norm ? norm->mutable_data_ptr<float>() : nullptr};
  // Kept by the caller from step to step: a block as large would come from the system as new pages each time.
  const int threads = at::get_num_threads();
  const int64_t bytes = cpu::train_workspace(step, threads);
  if (workspace.numel() < bytes) workspace.set_(empty({bytes}, workspace.options()));
  const int64_t wrong = cpu::train(step, workspace.mutable_data_ptr(), threads);
  TORCH_CHECK_INDEX(wrong < 0, "target: expected classes from 0 to ", width - 1, ", got ",
                    targets.const_data_ptr<int64_t>()[wrong], " in row ", wrong);
  const auto changed = [](const Tensor& t) {  // so that autograd notices where it has saved one of them
    if (t.numel()) t.unsafeGetTensorImpl()->bump_version();
  };
  for (size_t i = 0; i < P; ++i) {
    if (numbers[i] < 0) continue;
    changed(params[i]);
    for (const Tensor& state : states.slice(row.states * i, row.states)) changed(state);
    if (row.counts) count_up(counts[i]);
  }
  return value;
}

}  // namespace

Tensor call_train_step(const Tensor& input, const Tensor& target, TensorList params, TensorList states,
                       TensorList counts, const Tensor& workspace, at::IntArrayRef has_bias,
                       Names activations, Numbers parameters, std::string_view loss, bool mean,
                       const OptionalTensor& weight, const OptionalTensor& pos_weight, int64_t ignore_index,
                       double number, std::string_view optimizer, at::ArrayRef<double> options,
                       at::IntArrayRef numbers, const OptionalTensors& left, const OptionalTensor& norm,
                       double max_norm) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::train_step_", "")
                             .typed<decltype(call_train_step)>();
  return op.call(input, target, params, states, counts, workspace, has_bias, activations, parameters, loss,
                 mean, weight, pos_weight, ignore_index, number, optimizer, options, numbers, left, norm,
                 max_norm);
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
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) { m.impl("train_step_", torch::CppFunction::makeFallthrough()); }

}  // namespace fastmlp
