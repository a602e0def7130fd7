// The op sgd_: one step of gradient descent for all parameters of a group, in one kernel.
//
// It returns whether it has been done: false, with nothing changed, where the kernels do not cover the tensors.
// A step is not differentiated, whoever calls it: grad mode does not matter, as under torch.no_grad().
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <vector>

#include "backends.h"

namespace fastmlp {
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

template <class Device>
bool covers(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 ||
         (dtype == at::kHalf && !std::is_same_v<Device, Cpu>);
}

bool is_covered(TensorList params, TensorList grads, TensorList momentum_buffers) {
  const auto fits = [&](const Tensor& t, const Tensor& param) {
    return t.scalar_type() == params[0].scalar_type() && t.device() == params[0].device() &&
           is_laid_out_as(t, param);
  };
  for (size_t i = 0; i < params.size(); ++i)
    if (!fits(params[i], params[i]) || !fits(grads[i], params[i]) ||
        (!momentum_buffers.empty() && !fits(momentum_buffers[i], params[i])))
      return false;
  return true;
}

template <class Device>
bool sgd_(TensorList params, TensorList grads, TensorList momentum_buffers, double lr, double momentum,
          double dampening, double weight_decay, bool nesterov, bool maximize, bool first) {
  TORCH_CHECK(grads.size() == params.size(), "grads: expected as many tensors as params, ", params.size(),
              ", got ", grads.size());
  const size_t buffers = momentum == 0 ? 0 : params.size();
  TORCH_CHECK(momentum_buffers.size() == buffers, "momentum_buffers: expected ", buffers, " tensors for ",
              params.size(), " params and a momentum of ", momentum, ", got ", momentum_buffers.size());
  if (params.empty()) return true;
  if (!covers<Device>(params[0].scalar_type()) || !is_covered(params, grads, momentum_buffers)) return false;

  std::vector<Update> updates(params.size());
  std::vector<Memory> memories;
  for (const TensorList tensors : {params, grads, momentum_buffers})
    for (const Tensor& t : tensors) memories.push_back(memory_of(t));
  if (overlap(std::move(memories))) return false;
  for (size_t i = 0; i < params.size(); ++i)
    updates[i] = {params[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                  buffers ? momentum_buffers[i].mutable_data_ptr() : nullptr, params[i].numel()};

  // So that autograd notices where it has saved one of them; raises for a tensor that may not be written.
  for (const Tensor& t : params) t.unsafeGetTensorImpl()->bump_version();
  for (const Tensor& t : momentum_buffers) t.unsafeGetTensorImpl()->bump_version();
  const Sgd sgd{.dtype = dtype_of(params[0]),
                .lr = float(lr),
                .momentum = float(momentum),
                .undamped = float(1 - dampening),
                .weight_decay = float(weight_decay),
                .nesterov = nesterov,
                .maximize = maximize,
                .first = first};
  const c10::DeviceGuard guard(params[0].device());
  Device::run(sgd, updates.data(), int64_t(updates.size()));
  return true;
}

bool not_covered(TensorList, TensorList, TensorList, double, double, double, double, bool, bool, bool) {
  return false;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> bool");
  using Key = c10::DispatchKey;
  for (const Key key : {Key::CompositeExplicitAutograd, Key::FuncTorchBatched, Key::Batched, Key::Negative,
                        Key::Conjugate, Key::ZeroTensor})
    m.impl("sgd_", torch::dispatch(key, not_covered));
}

TORCH_LIBRARY_IMPL(fastmlp, CPU, m) { m.impl("sgd_", sgd_<Cpu>); }
#ifdef FASTMLP_WITH_CUDA
TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) { m.impl("sgd_", sgd_<Cuda>); }
#endif
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) { m.impl("sgd_", torch::CppFunction::makeFallthrough()); }

}  // namespace fastmlp
