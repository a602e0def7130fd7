// The cross-entropy of logits and class indices as one op and one autograd node. Where a gradient will be asked
// for, the forward pass computes it beside the loss, in float32, and the backward pass scales it by grad_loss.
//
// What the kernels do not cover is torch's own cross_entropy_loss.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "backends.h"
#include "checks.h"

namespace fastmlp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using LossAndGrad = std::tuple<Tensor, Tensor>;
using Options = std::tuple<int64_t, int64_t, double>;  // reduction, ignore_index, label_smoothing

Reduction parse_reduction(std::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  TORCH_CHECK_VALUE(false, name, " is not a valid value for reduction");
}
static_assert(int(Reduction::none) == at::Reduction::None && int(Reduction::mean) == at::Reduction::Mean &&
              int(Reduction::sum) == at::Reduction::Sum);

// Whether the kernels cover these arguments: logits [N, C] and classes [N], or [C] and [].
bool is_fused(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
              double label_smoothing) {
  if (why_not_plain(input) || why_not_plain(target) || target.device() != input.device() ||
      why_not_covered(input))
    return false;
  if (target.scalar_type() != at::kLong || input.dim() > 2 || input.dim() != target.dim() + 1) return false;
  if (target.dim() == 1 && target.sym_size(0) != input.sym_size(0)) return false;
  if (input.sym_size(-1) == 0 || !(label_smoothing >= 0 && label_smoothing <= 1)) return false;
  return !weight || (!why_not_plain(*weight) && !weight->requires_grad() &&
                     weight->scalar_type() == input.scalar_type() && weight->device() == input.device() &&
                     weight->dim() == 1 && weight->sym_size(0) == input.sym_size(-1));
}

Tensor cross_entropy_composite(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                               std::string_view reduction, int64_t ignore_index, double label_smoothing) {
  return at::cross_entropy_loss(input, target, weight, int64_t(parse_reduction(reduction)), ignore_index,
                                label_smoothing);
}

// ---- through the dispatcher

Tensor call_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                          std::string_view reduction, int64_t ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::cross_entropy", "")
                             .typed<decltype(call_cross_entropy)>();
  return op.call(input, target, weight, reduction, ignore_index, label_smoothing);
}

LossAndGrad call_cross_entropy_forward(const Tensor& input, const Tensor& target,
                                       const OptionalTensor& weight, std::string_view reduction,
                                       int64_t ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::cross_entropy_forward", "")
                             .typed<decltype(call_cross_entropy_forward)>();
  return op.call(input, target, weight, reduction, ignore_index, label_smoothing);
}

// ---- the fused path

template <class Device>
LossAndGrad run_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              std::string_view reduction, int64_t ignore_index, double label_smoothing,
                              bool wants_grad) {
  const c10::DeviceGuard guard(input.device());
  const Reduction reduced = parse_reduction(reduction);
  const Tensor z = input.contiguous(), t = target.contiguous();
  const Tensor w = weight ? weight->to(at::kFloat).contiguous() : Tensor();
  Tensor loss = at::empty(reduced == Reduction::none ? t.sizes() : at::IntArrayRef(), z.options());
  Tensor grad = wants_grad ? at::empty(z.sizes(), z.options().dtype(at::kFloat)) : Tensor();
  const CrossEntropy p{.dtype = dtype_of(z),
                       .reduction = reduced,
                       .N = t.numel(),
                       .C = z.size(-1),
                       .input = z.const_data_ptr(),
                       .target = t.const_data_ptr<int64_t>(),
                       .weight = w.defined() ? w.const_data_ptr<float>() : nullptr,
                       .ignore_index = ignore_index,
                       .label_smoothing = float(label_smoothing),
                       .loss = loss.mutable_data_ptr(),
                       .grad = wants_grad ? grad.mutable_data_ptr<float>() : nullptr};
  run<Device>(&p, 1, z);
  return {loss, grad};
}

template <class Device>
Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     std::string_view reduction, int64_t ignore_index, double label_smoothing) {
  if (!is_fused(input, target, weight, label_smoothing))
    return cross_entropy_composite(input, target, weight, reduction, ignore_index, label_smoothing);
  return std::get<0>(
      run_cross_entropy<Device>(input, target, weight, reduction, ignore_index, label_smoothing, false));
}

template <class Device>
LossAndGrad cross_entropy_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                  std::string_view reduction, int64_t ignore_index, double label_smoothing) {
  TORCH_CHECK(is_fused(input, target, weight, label_smoothing),
              "cross_entropy_forward: the kernels do not cover these arguments");
  return run_cross_entropy<Device>(input, target, weight, reduction, ignore_index, label_smoothing, true);
}

// ---- shapes alone, for tracing

Tensor cross_entropy_meta(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                          std::string_view reduction, int64_t ignore_index, double label_smoothing) {
  if (!is_fused(input, target, weight, label_smoothing))
    return cross_entropy_composite(input, target, weight, reduction, ignore_index, label_smoothing);
  const bool reduces = parse_reduction(reduction) != Reduction::none;
  return at::empty_symint(reduces ? c10::SymIntArrayRef() : target.sym_sizes(), input.options());
}

LossAndGrad cross_entropy_forward_meta(const Tensor& input, const Tensor& target,
                                       const OptionalTensor& weight, std::string_view reduction,
                                       int64_t ignore_index, double label_smoothing) {
  return {cross_entropy_meta(input, target, weight, reduction, ignore_index, label_smoothing),
          at::empty_symint(input.sym_sizes(), input.options().dtype(at::kFloat))};
}

// ---- autocast and autograd

// In float32, as torch's own.
template <c10::DispatchKey autocast, c10::DeviceType device>
Tensor cross_entropy_autocast(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              std::string_view reduction, int64_t ignore_index, double label_smoothing) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, device); };
  return call_cross_entropy(cast(input), cast(target), cast(weight), reduction, ignore_index,
                            label_smoothing);
}

// q of kernels.h, [N, C].
Tensor weighed_target(const Tensor& like, const Tensor& target, const Tensor& weight,
                      const Options& options) {
  const auto [reduction, ignore_index, label_smoothing] = options;
  const Tensor t = target.unsqueeze(-1), ignored = t.eq(ignore_index);
  Tensor q = at::zeros_like(like).scatter(-1, t.masked_fill(ignored, 0), 1);
  const Tensor w = weight.defined() ? weight : at::ones_like(like);
  const Tensor total = (q * w).masked_fill(ignored, 0).sum();
  q = w * (q * (1 - label_smoothing) + label_smoothing / like.sym_size(-1));
  if (reduction == at::Reduction::Mean) q = q / total;
  return q.masked_fill(ignored, 0);
}

// The node has two outputs, the loss and its gradient dz = p Σ_c q_c - q. Nobody is given the second, but gradients of
// gradients reach the logits through it: p is had from it, and no logits are kept for them.
struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const OptionalTensor& weight, std::string_view reduction, int64_t ignore_index,
                               double label_smoothing) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad] =
        call_cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing);
    ctx->save_for_backward({grad, target, weight.value_or(Tensor())});
    ctx->set_materialize_grads(false);
    ctx->saved_data["options"] = Options(int64_t(parse_reduction(reduction)), ignore_index, label_smoothing);
    ctx->saved_data["dtype"] = input.scalar_type();
    return {loss, grad};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &g = grad_outputs[0], &v = grad_outputs[1], &grad = saved[0];
    const auto dtype = ctx->saved_data["dtype"].toScalarType();
    variable_list grads(6);
    const auto options = [&] { return ctx->saved_data["options"].to<Options>(); };
    if (g.defined() && is_given_away(g, grad)) grads[0] = grad.detach();
    else if (g.defined()) {
      const Tensor ignored = saved[1].eq(std::get<1>(options())).unsqueeze(-1);  // 0, whatever it is times
      grads[0] = (grad * g.unsqueeze(-1)).to(dtype).masked_fill(ignored, 0);
    }
    if (v.defined()) {  // by dz's derivative, Σ_c q_c (diag(p) - p pᵀ)
      const Tensor q = weighed_target(grad, saved[1], saved[2], options()), sum = q.sum(-1, true);
      const Tensor p_sum = grad + q, p = p_sum / sum.masked_fill(sum.eq(0), 1);
      const Tensor more = (p_sum * (v - (p * v).sum(-1, true))).to(dtype);
      grads[0] = grads[0].defined() ? grads[0] + more : more;
    }
    return grads;
  }

 private:
  // Whether the saved gradient is the result as it is, and nobody will ask for it again.
  static bool is_given_away(const Tensor& grad_loss, const Tensor& grad) {
    return !at::GradMode::is_enabled() && grad_loss.is_cpu() && grad_loss.dim() == 0 &&
           grad_loss.scalar_type() == at::kFloat && !torch::autograd::get_current_graph_task_keep_graph() &&
           !at::isTensorSubclassLike(grad_loss) && !at::isTensorSubclassLike(grad) &&
           grad_loss.item<float>() == 1;
  }
};

Tensor cross_entropy_autograd(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              std::string_view reduction, int64_t ignore_index, double label_smoothing) {
  if (!is_fused(input, target, weight, label_smoothing))
    return cross_entropy_composite(input, target, weight, reduction, ignore_index, label_smoothing);
  if (at::GradMode::is_enabled() && input.requires_grad())
    return CrossEntropyFunction::apply(input, target, weight, reduction, ignore_index, label_smoothing)[0];
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, str reduction='mean', "
      "int ignore_index=-100, float label_smoothing=0.0) -> Tensor");
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor, Tensor)");
}

#define FASTMLP_IMPL(key, whole, forward)     \
  TORCH_LIBRARY_IMPL(fastmlp, key, m) {       \
    m.impl("cross_entropy", whole);           \
    m.impl("cross_entropy_forward", forward); \
  }

FASTMLP_IMPL(CPU, cross_entropy<Cpu>, cross_entropy_forward<Cpu>)
#ifdef FASTMLP_WITH_CUDA
FASTMLP_IMPL(CUDA, cross_entropy<Cuda>, cross_entropy_forward<Cuda>)
#endif
FASTMLP_IMPL(Meta, cross_entropy_meta, cross_entropy_forward_meta)
#undef FASTMLP_IMPL

#define FASTMLP_COMPOSITE(key) \
  TORCH_LIBRARY_IMPL(fastmlp, key, m) { m.impl("cross_entropy", cross_entropy_composite); }
FASTMLP_COMPOSITE(CompositeExplicitAutograd)
FASTMLP_COMPOSITE(FuncTorchBatched)
FASTMLP_COMPOSITE(Batched)
FASTMLP_COMPOSITE(Tracer)
#undef FASTMLP_COMPOSITE
TORCH_LIBRARY_IMPL(fastmlp, AutocastCPU, m) {
  m.impl("cross_entropy", cross_entropy_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}
TORCH_LIBRARY_IMPL(fastmlp, AutocastCUDA, m) {
  m.impl("cross_entropy", cross_entropy_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) { m.impl("cross_entropy", cross_entropy_autograd); }

}  // namespace fastmlp
