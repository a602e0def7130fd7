// The op optimize_: one step of an optimizer for all parameters of a group, in one kernel. optimize_by_numbers_ finds what
// options and counts make of it in a tensor, the StepNumbers of each parameter, so that a CUDA graph may hold it.
//
// They return whether it has been done: false, with nothing changed, where the kernels do not cover the tensors.
// A step is not differentiated, whoever calls it: grad mode does not matter, as under torch.no_grad().
#include "optimizer.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "backends.h"
#include "checks.h"
#include "ops.h"

namespace fastmlp {

const OptimizerRow& optimizer_row(std::string_view name) {
  static constexpr OptimizerRow rows[] = {{"sgd", Optimizer::sgd, 7, 1, false},
                                          {"adam", Optimizer::adam, 7, 3, true}};
  for (const OptimizerRow& row : rows)
    if (name == row.name) return row;
  TORCH_CHECK_VALUE(false, "optimizer: expected 'sgd' or 'adam', got '", name, "'");
}

Optimizer optimizer_of(const OptimizerRow& row, at::ArrayRef<double> o, Dtype dtype, size_t states) {
  if (row.kind == Optimizer::sgd)
    return {.kind = row.kind,
            .dtype = dtype,
            .states = int(states),
            .weight_decay = float(o[3]),
            .momentum = float(o[1]),
            .undamped = float(1 - o[2]),
            .momentum_square = 0,
            .undamped_square = 0,
            .eps = 0,
            .kept = 1,
            .maximize = o[5] != 0,
            .nesterov = o[4] != 0,
            .first = o[6] != 0};
  const bool decoupled = o[5] != 0;
  return {.kind = row.kind,
          .dtype = dtype,
          .states = int(states),
          .weight_decay = decoupled ? 0 : float(o[4]),
          .momentum = float(o[1]),
          .undamped = float(1 - o[1]),
          .momentum_square = float(o[2]),
          .undamped_square = float(1 - o[2]),
          .eps = float(o[3]),
          .kept = decoupled ? float(1 - o[0] * o[4]) : 1,
          .maximize = o[6] != 0,
          .nesterov = false,
          .first = false};
}

Rates rates_of(const OptimizerRow& row, at::ArrayRef<double> o, double count) {
  if (row.kind == Optimizer::sgd) return {float(o[0]), 0};
  return {float(o[0] / (1 - std::pow(o[1], count))), float(1 / std::sqrt(1 - std::pow(o[2], count)))};
}

bool is_count(const at::Tensor& t) {
  return t.is_cpu() && t.numel() == 1 && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

double count_of(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? *t.const_data_ptr<float>() : *t.const_data_ptr<double>();
}

void count_up(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) *t.mutable_data_ptr<float>() += 1;
  else *t.mutable_data_ptr<double>() += 1;
  t.unsafeGetTensorImpl()->bump_version();
}

namespace {

using at::Tensor;
using at::TensorList;

bool is_dense(const Tensor& t) {
  return t.layout() == c10::kStrided && !t.unsafeGetTensorImpl()->is_nested() &&
         t.is_non_overlapping_and_dense();
}

// Whether equal places in memory hold equal places of the tensors.
bool is_laid_out_as(const Tensor& t, const Tensor& param) {
  return is_dense(t) && t.sizes() == param.sizes() &&
         (t.strides() == param.strides() || (t.is_contiguous() && param.is_contiguous()));
}

// Whether all are laid out as the parameters, one list after the other.
bool is_covered(TensorList params, TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor &t = tensors[i], &param = params[i % params.size()];
    if (t.scalar_type() != params[0].scalar_type() || t.device() != params[0].device() ||
        !is_laid_out_as(t, param))
      return false;
  }
  return true;
}

// How many states each parameter has: `states` are those of a kind for all parameters, then those of the next kind.
size_t kinds_of(const OptimizerRow& row, TensorList params, TensorList states) {
  const size_t P = params.size(), kinds = P ? states.size() / P : row.states;
  TORCH_CHECK(states.size() == kinds * P && kinds <= row.states && kinds + 1 >= row.states,
              "states: expected ", row.states - 1, " or ", row.states, " for each of ", P, " params, got ",
              states.size());
  return kinds;
}

// All but the numbers of each; nothing where the kernels do not cover the tensors.
std::optional<std::vector<Update>> updates_of(TensorList params, TensorList grads, TensorList states,
                                              TensorList counts) {
  const size_t P = params.size();
  TORCH_CHECK(grads.size() == P, "grads: expected as many tensors as params, ", P, ", got ", grads.size());
  std::vector<Update> updates(P);
  if (P == 0) return updates;
  for (const Tensor& count : counts)
    if (!is_count(count)) return std::nullopt;
  if (why_not_covered(params[0])) return std::nullopt;
  for (const TensorList tensors : {params, grads, states})
    if (!is_covered(params, tensors)) return std::nullopt;
  Memories memories;
  for (const TensorList tensors : {params, grads, states, counts})
    for (const Tensor& t : tensors) memories.push_back(memory_of(t));
  if (overlap(std::move(memories))) return std::nullopt;
  for (size_t i = 0; i < P; ++i) {
    Update& u = updates[i];
    u.param = params[i].mutable_data_ptr();
    u.grad = grads[i].const_data_ptr();
    for (size_t k = 0; k < states.size() / P; ++k) u.states[k] = states[k * P + i].mutable_data_ptr();
    u.size = params[i].numel();
  }
  return updates;
}

// So that autograd notices where it has saved one of them; raises for a tensor that may not be written.
void bump_versions(TensorList params, TensorList states) {
  for (const TensorList tensors : {params, states})
    for (const Tensor& t : tensors) t.unsafeGetTensorImpl()->bump_version();
}

template <class Device>
bool optimize_(std::string_view name, TensorList params, TensorList grads, TensorList states,
               TensorList counts, at::ArrayRef<double> options) {
  const OptimizerRow& row = optimizer_row(name);
  const size_t P = params.size(), kinds = kinds_of(row, params, states);
  TORCH_CHECK(options.size() == row.options, "options: expected the ", row.options, " of ", name, ", got ",
              options.size());
  TORCH_CHECK(counts.size() == (row.counts ? P : 0), "counts: expected ", row.counts ? P : 0,
              " tensors, got ", counts.size());
  std::optional<std::vector<Update>> updates = updates_of(params, grads, states, counts);
  if (!updates || P == 0) return updates.has_value();
  for (size_t i = 0; i < P; ++i)
    (*updates)[i].rates = rates_of(row, options, row.counts ? count_of(counts[i]) + 1 : 0);
  bump_versions(params, states);
  for (const Tensor& count : counts) count_up(count);
  const c10::DeviceGuard guard(params[0].device());
  Device::run(optimizer_of(row, options, dtype_of(params[0]), kinds), updates->data(), int64_t(P));
  return true;
}

// On CUDA the numbers are read when the kernel runs.
template <class Device>
bool optimize_by_numbers_(std::string_view name, TensorList params, TensorList grads, TensorList states,
                          const Tensor& numbers) {
  const OptimizerRow& row = optimizer_row(name);
  const size_t P = params.size(), kinds = kinds_of(row, params, states);
  TORCH_CHECK(numbers.scalar_type() == at::kByte && numbers.is_contiguous() &&
                  size_t(numbers.numel()) == P * sizeof(StepNumbers) &&
                  (P == 0 || numbers.device() == params[0].device()),
              "numbers: expected contiguous uint8 of ", P * sizeof(StepNumbers),
              " elements beside params, got ", numbers.scalar_type(), " on ", numbers.device(), " of shape ",
              numbers.sizes());
  std::optional<std::vector<Update>> updates = updates_of(params, grads, states, {});
  if (!updates || P == 0) return updates.has_value();
  bump_versions(params, states);
  const c10::DeviceGuard guard(params[0].device());
  const StepNumbers* own = static_cast<const StepNumbers*>(numbers.const_data_ptr());
  const auto of_params = [&](Optimizer o) {
    o.kind = row.kind, o.dtype = dtype_of(params[0]), o.states = int(kinds);
    return o;
  };
  if constexpr (std::is_same_v<Device, Cpu>) {
    for (Update& u : *updates) {
      u.rates = own->rates;
      Device::run(of_params((own++)->optimizer), &u, 1);
    }
  } else {
    for (Update& u : *updates) u.numbers = own++;
    Optimizer in_memory{};
    in_memory.in_memory = true;
    Device::run(of_params(in_memory), updates->data(), int64_t(P));
  }
  return true;
}

bool not_covered(std::string_view, TensorList, TensorList, TensorList, TensorList, at::ArrayRef<double>) {
  return false;
}
bool not_covered_by_numbers(std::string_view, TensorList, TensorList, TensorList, const Tensor&) {
  return false;
}

}  // namespace

bool call_optimize(std::string_view name, TensorList params, TensorList grads, TensorList states,
                   TensorList counts, at::ArrayRef<double> options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::optimize_", "")
                             .typed<decltype(call_optimize)>();
  return op.call(name, params, grads, states, counts, options);
}

Tensor count_up_numbers(std::string_view name, at::ArrayRef<double> options, at::IntArrayRef groups,
                        TensorList counts, bool pinned) {
  const OptimizerRow& row = optimizer_row(name);
  TORCH_CHECK(counts.size() == (row.counts ? groups.size() : 0), "counts: expected ",
              row.counts ? groups.size() : 0, " tensors, got ", counts.size());
  for (const int64_t group : groups)
    TORCH_CHECK(0 <= group && row.options * (group + 1) <= options.size(),
                "groups: expected those of options, ", row.options, " each, got ", group);
  for (const Tensor& count : counts)
    TORCH_CHECK(is_count(count), "counts: expected float32 or float64 of one element on the CPU");
  const Tensor numbers =
      at::detail::empty_cpu({int64_t(groups.size() * sizeof(StepNumbers))}, at::kByte, pinned);
  StepNumbers* to = static_cast<StepNumbers*>(numbers.mutable_data_ptr());
  for (size_t i = 0; i < groups.size(); ++i) {
    const at::ArrayRef<double> own = options.slice(row.options * size_t(groups[i]), row.options);
    if (row.counts) count_up(counts[i]);
    *to++ = {optimizer_of(row, own, Dtype::float32, 0),
             rates_of(row, own, row.counts ? count_of(counts[i]) : 0)};
  }
  return numbers;
}

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def(
      "optimize_(str name, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] counts, "
      "float[] options) -> bool");
  m.def(
      "optimize_by_numbers_(str name, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor "
      "numbers) "
      "-> bool");
  using Key = c10::DispatchKey;
  for (const Key key : {Key::CompositeExplicitAutograd, Key::FuncTorchBatched, Key::Batched, Key::Negative,
                        Key::Conjugate, Key::ZeroTensor}) {
    m.impl("optimize_", torch::dispatch(key, not_covered));
    m.impl("optimize_by_numbers_", torch::dispatch(key, not_covered_by_numbers));
  }
}

TORCH_LIBRARY_IMPL(fastmlp, CPU, m) {
  m.impl("optimize_", optimize_<Cpu>);
  m.impl("optimize_by_numbers_", optimize_by_numbers_<Cpu>);
}
#ifdef FASTMLP_WITH_CUDA
TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) {
  m.impl("optimize_", optimize_<Cuda>);
  m.impl("optimize_by_numbers_", optimize_by_numbers_<Cuda>);
}
#endif
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) {
  m.impl("optimize_", torch::CppFunction::makeFallthrough());
  m.impl("optimize_by_numbers_", torch::CppFunction::makeFallthrough());
}

}  // namespace fastmlp
