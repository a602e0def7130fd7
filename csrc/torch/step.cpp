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

namespace fastmlp {
namespace {

using at::TensorList;

Loss parse_loss(std::string_view name) {
  if (name == "cross_entropy") return Loss::cross_entropy;
  if (name == "mse") return Loss::mse;
  if (name == "bce_with_logits") return Loss::bce_with_logits;
  TORCH_CHECK_VALUE(false, "loss: expected 'cross_entropy', 'mse' or 'bce_with_logits', got '", name, "'");
}

// How one parameter is changed: torch.optim.SGD's options, and whether it is changed at all.
enum Flag : int64_t { trained = 1, nesterov = 2, maximize = 4, first = 8 };

Sgd sgd_of(at::ArrayRef<double> options, int64_t flags) {
  return {.dtype = Dtype::float32,
          .lr = float(options[0]),
          .momentum = float(options[1]),
          .undamped = float(1 - options[2]),
          .weight_decay = float(options[3]),
          .nesterov = bool(flags & Flag::nesterov),
          .maximize = bool(flags & Flag::maximize),
          .first = bool(flags & Flag::first)};
}

void check_parameter(size_t index, const Tensor& t, const Tensor& momentum) {
  TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous(), "params[", index,
              "]: expected a contiguous float32 tensor on the CPU");
  TORCH_CHECK(
      !t.is_inference() && !momentum.is_inference(), "params[", index,
      "]: expected tensors made outside of torch.inference_mode, which alone may be written outside of it");
  if (momentum.numel() == 0) return;
  TORCH_CHECK(momentum.is_cpu() && momentum.scalar_type() == at::kFloat && momentum.is_contiguous() &&
                  momentum.sizes() == t.sizes(),
              "momenta[", index, "]: expected a contiguous float32 tensor on the CPU of shape ", t.sizes());
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

Tensor train_step_(const Tensor& input, const Tensor& target, TensorList params, TensorList momenta,
                   const Tensor& workspace, at::IntArrayRef has_bias, Names activations, Numbers parameters,
                   std::string_view loss_name, bool mean, const OptionalTensor& weight,
                   const OptionalTensor& pos_weight, int64_t ignore_index, double label_smoothing,
                   at::ArrayRef<double> options, at::IntArrayRef flags) {
  const Loss loss = parse_loss(loss_name);
  const size_t L = has_bias.size(), P = params.size();
  size_t expected = L;
  for (const int64_t has : has_bias) expected += has != 0;
  TORCH_CHECK(
      L > 0 && activations.size() == L && P == expected && momenta.size() == P && flags.size() == P &&
          options.size() == 4 * P,
      "train_step_: expected one activation for each layer, and momenta, flags and 4 options for each of ",
      expected, " params");
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
  std::vector<Sgd> sgds(P);
  std::vector<Trained> weights(L), biases(L);
  int64_t width = input.size(-1);
  for (size_t i = 0, at = 0; i < L; ++i) {
    const auto take = [&](Trained& to) {
      check_parameter(at, params[at], momenta[at]);
      sgds[at] = sgd_of(options.slice(4 * at, 4), flags[at]);
      to = {flags[at] & Flag::trained ? &sgds[at] : nullptr, params[at].mutable_data_ptr<float>(),
            momenta[at].numel() ? momenta[at].mutable_data_ptr<float>() : nullptr};
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
    layers.push_back({.dtype = Dtype::float32,
                      .reduced = is_reduced(input),
                      .activation = layer_activations[i].kernel,
                      .M = M,
                      .N = weight.size(0),
                      .K = width,
                      .x = i ? nullptr : x.const_data_ptr(),
                      .ldx = i ? width : x.stride(0),
                      .weight = weights[i].param,
                      .ldw = width,
                      .bias = biases[i].param,
                      .y = nullptr});
    width = weight.size(0);
  }

  const bool classes = loss == Loss::cross_entropy;
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
  for (const TensorList tensors : {params, momenta})
    for (const Tensor& t : tensors) memories.push_back(memory_of(t));
  TORCH_CHECK_VALUE(
      !overlap(std::move(memories)),
      "params: expected tensors that share no memory with one another, nor with input or target");
  Tensor value = at::empty({}, input.options());
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
                                    .label_smoothing = float(label_smoothing),
                                    .loss = nullptr,
                                    .grad = nullptr},
                  .pointwise = {.N = width,
                                .target = classes ? nullptr : targets.const_data_ptr<float>(),
                                .weight = floats_of(weighs),
                                .pos_weight = floats_of(pos_weighs),
                                .mean = mean},
                  .value = value.mutable_data_ptr<float>()};
  // Kept by the caller from step to step: a block as large would come from the system as new pages each time.
  const int threads = at::get_num_threads();
  const int64_t bytes = cpu::train_workspace(step, threads);
  if (workspace.numel() < bytes) workspace.set_(empty({bytes}, workspace.options()));
  const int64_t wrong = cpu::train(step, workspace.mutable_data_ptr(), threads);
  TORCH_CHECK_INDEX(wrong < 0, "target: expected classes from 0 to ", width - 1, ", got ",
                    targets.const_data_ptr<int64_t>()[wrong], " in row ", wrong);
  for (size_t i = 0; i < P; ++i)  // so that autograd notices where it has saved one of them
    if (flags[i] & Flag::trained) {
      params[i].unsafeGetTensorImpl()->bump_version();
      if (momenta[i].numel()) momenta[i].unsafeGetTensorImpl()->bump_version();
    }
  return value;
}

}  // namespace

Tensor call_train_step(const Tensor& input, const Tensor& target, TensorList params, TensorList momenta,
                       const Tensor& workspace, at::IntArrayRef has_bias, Names activations,
                       Numbers parameters, std::string_view loss, bool mean, const OptionalTensor& weight,
                       const OptionalTensor& pos_weight, int64_t ignore_index, double label_smoothing,
                       at::ArrayRef<double> options, at::IntArrayRef flags) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::train_step_", "")
                             .typed<decltype(call_train_step)>();
  return op.call(input, target, params, momenta, workspace, has_bias, activations, parameters, loss, mean,
                 weight, pos_weight, ignore_index, label_smoothing, options, flags);
}

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def(
      "train_step_(Tensor input, Tensor target, Tensor(a!)[] params, Tensor(b!)[] momenta, "
      "Tensor(c!) workspace, int[] has_bias, str[] activations, float[] parameters, str loss, bool mean, "
      "Tensor? weight, "
      "Tensor? pos_weight, int ignore_index, float label_smoothing, float[] options, int[] flags) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastmlp, CPU, m) { m.impl("train_step_", train_step_); }
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) { m.impl("train_step_", torch::CppFunction::makeFallthrough()); }

}  // namespace fastmlp
