// The op clip_grad_norm_: gradients scaled down to a norm of max_norm together, as torch.nn.utils.clip_grad_norm_ does it
// for the 2-norm; the norm that they had, of their dtype and device.
//
// It returns None, with nothing changed, where the kernels do not cover the tensors, and, if that is an error, where the
// norm is not finite: torch's own function will then do it, or raise.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "backends.h"
#include "checks.h"
#include "ops.h"

namespace fastmlp {

OptionalTensor call_clip_grad_norm(at::TensorList grads, double max_norm, bool error_if_nonfinite) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::clip_grad_norm_", "")
                             .typed<decltype(call_clip_grad_norm)>();
  return op.call(grads, max_norm, error_if_nonfinite);
}

namespace {

bool can_clip(at::TensorList grads) {
  const Tensor& first = grads[0];
  const at::ScalarType dtype = first.scalar_type();
  if (why_not_covered(first)) return false;
  // Autocast makes torch's norm float32 on CUDA.
  if (first.is_cuda() && dtype != at::kFloat && at::autocast::is_autocast_enabled(at::kCUDA)) return false;
  Memories memories;
  memories.reserve(grads.size());
  for (const Tensor& grad : grads) {
    if (grad.scalar_type() != dtype || grad.device() != first.device() || why_not_plain(grad) ||
        !grad.is_non_overlapping_and_dense() ||
        (grad.is_inference() && !c10::InferenceMode::is_enabled()))  // which may not be written
      return false;
    memories.push_back(memory_of(grad));
  }
  return !overlap(std::move(memories));
}

template <class Device>
OptionalTensor clip_grad_norm_(at::TensorList grads, double max_norm, bool error_if_nonfinite) {
  if (grads.empty() || !can_clip(grads)) return std::nullopt;
  const c10::DeviceGuard guard(grads[0].device());
  const Tensor norm = at::empty({}, grads[0].options());
  std::vector<Gradient> gradients;
  gradients.reserve(grads.size());
  for (const Tensor& grad : grads) gradients.push_back({grad.mutable_data_ptr(), grad.numel()});
  const int64_t count = int64_t(gradients.size());
  const Clip clip{dtype_of(norm), max_norm, error_if_nonfinite, norm.mutable_data_ptr()};
  const int64_t bytes = Device::workspace(clip, gradients.data(), count);
  const Tensor workspace = bytes ? empty({bytes}, norm.options().dtype(at::kByte)) : Tensor();
  Device::run(clip, gradients.data(), count, bytes ? workspace.mutable_data_ptr() : nullptr);
  if (error_if_nonfinite && !std::isfinite(norm.item<double>())) return std::nullopt;
  for (const Tensor& grad : grads) grad.unsafeGetTensorImpl()->bump_version();
  return norm;
}

OptionalTensor not_clipped(at::TensorList, double, bool) { return std::nullopt; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def("clip_grad_norm_(Tensor(a!)[] grads, float max_norm, bool error_if_nonfinite=False) -> Tensor?");
  using Key = c10::DispatchKey;
  for (const Key key : {Key::CompositeExplicitAutograd, Key::FuncTorchBatched, Key::Batched, Key::Negative,
                        Key::Conjugate, Key::ZeroTensor, Key::Functionalize})
    m.impl("clip_grad_norm_", torch::dispatch(key, not_clipped));
}

TORCH_LIBRARY_IMPL(fastmlp, CPU, m) { m.impl("clip_grad_norm_", clip_grad_norm_<Cpu>); }
#ifdef FASTMLP_WITH_CUDA
TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) { m.impl("clip_grad_norm_", clip_grad_norm_<Cuda>); }
#endif
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) { m.impl("clip_grad_norm_", torch::CppFunction::makeFallthrough()); }

}  // namespace fastmlp
