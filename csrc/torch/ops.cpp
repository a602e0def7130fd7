// The ops: their schemas, the checks on their arguments, and their kernels for tensors on each device.
//
// Which path a call takes is decided in one place, why_not_fused(): the kernels behind kernels.h, or torch's
// own operations. Autograd is in autograd.cpp.
#include <ATen/FuncTorchTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fw_primal.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "../activation.h"
#include "backends.h"
#include "linear.h"

namespace fastmlp {

// ---- arguments

Activation parse_activation(std::string_view name) {
  if (name == "identity") return {Activation::identity};
  if (name == "relu") return {Activation::relu};
  if (name == "sigmoid") return {Activation::sigmoid};
  if (name == "tanh") return {Activation::tanh};
  TORCH_CHECK_VALUE(false, "activation: expected 'identity', 'relu', 'sigmoid' or 'tanh', got '", name, "'");
}

void check_same(std::string_view name, const Tensor& argument, const Tensor& input) {
  TORCH_CHECK(argument.device() == input.device(), name, ": expected a tensor on ", input.device(),
              ", the device of input, got one on ", argument.device());
  TORCH_CHECK(argument.scalar_type() == input.scalar_type(), name, ": expected dtype ", input.scalar_type(),
              ", the dtype of input, got ", argument.scalar_type());
}

namespace {

// The sizes of the gradient of the input.
c10::SymDimVector grad_x_sizes(const Tensor& grad_y, const Tensor& weight) {
  c10::SymDimVector sizes(grad_y.sym_sizes());
  sizes.back() = weight.sym_size(1);
  return sizes;
}

// Raises where what the wanted gradients are made of is not there, or does not fit.
void check_backward(const Tensor& grad_y, const OptionalTensor& input, const OptionalTensor& weight,
                    const OptionalTensor& y, Activation activation, Mask mask) {
  const auto check = [&](const char* name, const OptionalTensor& t, bool is_read) {
    TORCH_CHECK(t || !is_read, name, ": expected what the forward pass read or gave, got None");
    if (t) check_same(name, *t, grad_y);
  };
  check("input", input, mask[1]);
  check("weight", weight, mask[0]);
  check("y", y, activation != Activation::identity);
  TORCH_CHECK(grad_y.dim() >= 1, "grad_y: expected shape [..., out_features], got a tensor of no dimension");
  const auto rows = [](const Tensor& t) { return t.sym_sizes().slice(0, t.dim() - 1); };
  TORCH_CHECK(!input || (input->dim() >= 1 && rows(*input).equals(rows(grad_y))),
              "grad_y: expected the rows of the input, of shape ", input->sym_sizes(), ", got ",
              grad_y.sym_sizes());
  TORCH_CHECK(!weight || (weight->dim() == 2 && weight->sym_size(0) == grad_y.sym_size(-1)),
              "grad_y: expected shape [..., ", weight->sym_size(0), "] for a weight of shape ",
              weight->sym_sizes(), ", got ", grad_y.sym_sizes());
  TORCH_CHECK(!input || !weight || input->sym_size(-1) == weight->sym_size(1),
              "input: expected shape [..., in_features] for a weight of shape ", weight->sym_sizes(),
              ", got ", input->sym_sizes());
  TORCH_CHECK(!y || y->sym_sizes() == grad_y.sym_sizes(), "y: expected the shape of grad_y, ",
              grad_y.sym_sizes(), ", got ", y->sym_sizes());
}

Tensor activated(const Tensor& z, Activation activation) {
  switch (activation.kind) {
    case Activation::relu:
      return at::relu(z);
    case Activation::sigmoid:
      return at::sigmoid(z);
    case Activation::tanh:
      return at::tanh(z);
    default:
      return z;
  }
}

Tensor differentiated(const Tensor& grad_y, const OptionalTensor& y, Activation activation) {
  switch (activation.kind) {
    case Activation::relu:
      return at::threshold_backward(grad_y, *y, 0);
    case Activation::sigmoid:
      return at::sigmoid_backward(grad_y, *y);
    case Activation::tanh:
      return at::tanh_backward(grad_y, *y);
    default:
      return grad_y;
  }
}

}  // namespace

void check_arguments(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(input.dim() >= 1, "input: expected shape [..., in_features], got a tensor of no dimension");
  check_same("weight", weight, input);
  if (weight.dim() == 2)
    TORCH_CHECK(input.sym_size(-1) == weight.sym_size(1), "input: expected shape [..., ", weight.sym_size(1),
                "] for a weight of shape ", weight.sym_sizes(), ", got ", input.sym_sizes());
  if (!bias) return;
  check_same("bias", *bias, input);
  if (weight.dim() == 2 && bias->dim() == 1)
    TORCH_CHECK(bias->sym_size(0) == weight.sym_size(0) || bias->sym_size(0) == 1, "bias: expected shape [",
                weight.sym_size(0), "] for a weight of shape ", weight.sym_sizes(), ", got ",
                bias->sym_sizes());
}

const char* why_not_plain(const Tensor& t) {
  const auto functorch = c10::DispatchKey::FuncTorchDynamicLayerBackMode;
  if (at::functorch::functorchTLSAccessor() && c10::impl::tls_is_dispatch_key_included(functorch))
    return "a torch.func transform is active";
  if (t._fw_grad(0).defined()) return "forward-mode AD is active";
  if (t.layout() != c10::kStrided || t.unsafeGetTensorImpl()->is_nested())
    return "not every argument is a dense tensor";
  return nullptr;
}

namespace {

// Null where there are kernels for tensors of this kind.
const char* why_not_covered(const Tensor& t) {
  const auto dtype = t.scalar_type();
  if (t.is_cuda()) {
#ifdef FASTMLP_WITH_CUDA
    if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf)
      return "the CUDA kernels cover float32, bfloat16 and float16";
#else
    return "this build has no CUDA kernels";
#endif
  } else if (t.is_cpu() || t.is_meta()) {
    if (dtype != at::kFloat && dtype != at::kBFloat16) return "the CPU kernels cover float32 and bfloat16";
    if (!cpu::covers(dtype_of(t)))
      return "this processor multiplies tiles of bfloat16 (AMX), which the kernels do not use";
  } else {
    return "there are kernels for CPU and CUDA only";
  }
  return nullptr;
}

const char* why_not_rows(const Tensor& weight) {
  if (weight.dim() != 2) return "weight is not a matrix";
  if (weight.sym_size(1) > 1 && weight.sym_stride(1) != 1) return "weight is not stored by rows";
  return nullptr;
}

}  // namespace

const char* why_not_fused(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  for (const Tensor* t : {&input, &weight, bias ? &*bias : &input})
    if (const char* reason = why_not_plain(*t)) return reason;
  if (const char* reason = why_not_rows(weight)) return reason;
  if (bias && (bias->dim() != 1 || bias->sym_size(0) != weight.sym_size(0))) return "bias is broadcast";
  return why_not_covered(input);
}

const char* why_not_fused_backward(const Tensor& grad_y, const OptionalTensor& input,
                                   const OptionalTensor& weight) {
  for (const Tensor* t : {&grad_y, input ? &*input : &grad_y, weight ? &*weight : &grad_y})
    if (const char* reason = why_not_plain(*t)) return reason;
  const char* reason = weight ? why_not_rows(*weight) : nullptr;
  return reason ? reason : why_not_covered(grad_y);
}

// ---- the composite path

Tensor linear_composite(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        std::string_view activation) {
  const Activation g = parse_activation(activation);
  check_arguments(input, weight, bias);
  return activated(at::linear(input, weight, bias), g);
}

Gradients linear_backward_composite(const Tensor& grad_y, const OptionalTensor& input,
                                    const OptionalTensor& weight, const OptionalTensor& y,
                                    std::string_view activation, Mask mask) {
  const auto rows = [](const Tensor& t) {
    c10::SymInt M = 1;
    for (const auto& size : t.sym_sizes().slice(0, t.dim() - 1)) M = M * size;
    return t.dim() == 2 ? t : t.reshape_symint({M, t.sym_size(-1)});
  };
  const Tensor dz = differentiated(grad_y, y, parse_activation(activation));
  Gradients grads;
  if (mask[0]) std::get<0>(grads) = rows(dz).mm(*weight).reshape_symint(grad_x_sizes(grad_y, *weight));
  if (mask[1]) std::get<1>(grads) = rows(dz).t().mm(rows(*input));
  if (mask[2]) std::get<2>(grads) = rows(dz).sum(0);
  return grads;
}

// ---- the fused path

namespace {

template <class Device>
Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              std::string_view activation) {
  const Activation g = parse_activation(activation);
  check_arguments(input, weight, bias);
  if (why_not_fused(input, weight, bias)) return linear_composite(input, weight, bias, activation);
  const c10::DeviceGuard guard(input.device());
  const int64_t N = weight.size(0), K = weight.size(1);
  const int64_t M = rows_of(input);
  at::DimVector sizes(input.sizes());
  sizes.back() = N;
  Tensor y = empty(sizes, input.options());
  const Tensor x = as_matrix(input, M, K);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  const Forward p{.dtype = dtype_of(input),
                  .reduced = is_reduced(input),
                  .activation = g,
                  .M = M,
                  .N = N,
                  .K = K,
                  .x = x.const_data_ptr(),
                  .ldx = x.stride(0),
                  .weight = weight.const_data_ptr(),
                  .ldw = weight.stride(0),
                  .bias = b.defined() ? b.const_data_ptr() : nullptr,
                  .y = y.mutable_data_ptr()};
  run<Device>(&p, 1, input);
  return y;
}

template <class Device>
Gradients linear_backward(const Tensor& grad_y, const OptionalTensor& input, const OptionalTensor& weight,
                          const OptionalTensor& y, std::string_view activation, Mask mask) {
  const Activation g = parse_activation(activation);
  check_backward(grad_y, input, weight, y, g, mask);
  if (why_not_fused_backward(grad_y, input, weight))
    return linear_backward_composite(grad_y, input, weight, y, activation, mask);
  const c10::DeviceGuard guard(grad_y.device());
  const int64_t M = rows_of(grad_y), N = grad_y.size(-1);
  const int64_t K = weight ? weight->size(1) : input ? input->size(-1) : 0;
  const Tensor dy = grad_y.contiguous(), saved = y ? y->contiguous() : Tensor();
  const Tensor x = mask[1] ? as_matrix(*input, M, K) : Tensor();
  const auto output = [&](bool wanted, at::IntArrayRef sizes) {
    return wanted ? empty(sizes, grad_y.options()) : Tensor();
  };
  at::DimVector sizes(grad_y.sizes());
  sizes.back() = K;
  Tensor grad_x = output(mask[0], sizes), grad_weight = output(mask[1], {N, K}),
         grad_bias = output(mask[2], {N});
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  const Backward p{.dtype = dtype_of(grad_y),
                   .reduced = is_reduced(grad_y),
                   .activation = g,
                   .M = M,
                   .N = N,
                   .K = K,
                   .grad_y = dy.const_data_ptr(),
                   .saved = saved.defined() ? saved.const_data_ptr() : nullptr,
                   .x = x.defined() ? x.const_data_ptr() : nullptr,
                   .ldx = x.defined() ? x.stride(0) : K,
                   .weight = mask[0] ? weight->const_data_ptr() : nullptr,
                   .ldw = mask[0] ? weight->stride(0) : K,
                   .grad_x = data(grad_x),
                   .grad_weight = data(grad_weight),
                   .grad_bias = data(grad_bias)};
  run<Device>(&p, 1, grad_y);
  return {grad_x, grad_weight, grad_bias};
}

// ---- shapes alone, for tracing

Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   std::string_view activation) {
  parse_activation(activation);
  check_arguments(input, weight, bias);
  if (why_not_fused(input, weight, bias)) return linear_composite(input, weight, bias, activation);
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, input.options());
}

Gradients linear_backward_meta(const Tensor& grad_y, const OptionalTensor& input,
                               const OptionalTensor& weight, const OptionalTensor& y,
                               std::string_view activation, Mask mask) {
  check_backward(grad_y, input, weight, y, parse_activation(activation), mask);
  const auto output = [&](c10::SymIntArrayRef sizes) { return at::empty_symint(sizes, grad_y.options()); };
  Gradients grads;
  const c10::SymInt N = grad_y.sym_size(-1);
  if (mask[0]) std::get<0>(grads) = output(grad_x_sizes(grad_y, *weight));
  if (mask[1]) std::get<1>(grads) = output({N, input->sym_size(-1)});
  if (mask[2]) std::get<2>(grads) = output({N});
  return grads;
}

// ---- autocast: the arguments are cast as those of torch's own linear are

template <c10::DispatchKey autocast, c10::DeviceType device>
Tensor linear_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  return call_linear(cast(input), cast(weight), cast(bias), activation);
}

}  // namespace

Tensor call_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastmlp::linear", "").typed<decltype(call_linear)>();
  return op.call(input, weight, bias, activation);
}

Gradients call_linear_backward(const Tensor& grad_y, const OptionalTensor& input,
                               const OptionalTensor& weight, const OptionalTensor& y,
                               std::string_view activation, Mask mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::linear_backward", "")
                             .typed<decltype(call_linear_backward)>();
  return op.call(grad_y, input, weight, y, activation, mask);
}

TORCH_LIBRARY(fastmlp, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None, str activation='identity') -> Tensor");
  m.def(
      "linear_backward(Tensor grad_y, Tensor? input, Tensor? weight, Tensor? y, str activation, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def("why_not_fused(Tensor input, Tensor weight, Tensor? bias=None) -> str",
        [](const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
          const char* reason = why_not_fused(input, weight, bias);
          return std::string(reason ? reason : "");
        });
}

#define FASTMLP_IMPL(key, forward, backward) \
  TORCH_LIBRARY_IMPL(fastmlp, key, m) {      \
    m.impl("linear", forward);               \
    m.impl("linear_backward", backward);     \
  }

FASTMLP_IMPL(CPU, linear<Cpu>, linear_backward<Cpu>)
#ifdef FASTMLP_WITH_CUDA
FASTMLP_IMPL(CUDA, linear<Cuda>, linear_backward<Cuda>)
#endif
FASTMLP_IMPL(Meta, linear_meta, linear_backward_meta)
FASTMLP_IMPL(CompositeExplicitAutograd, linear_composite, linear_backward_composite)
FASTMLP_IMPL(FuncTorchBatched, linear_composite, linear_backward_composite)
FASTMLP_IMPL(Batched, linear_composite, linear_backward_composite)

// A graph that torch.jit.trace records is there for others to read: it holds torch's own operations.
TORCH_LIBRARY_IMPL(fastmlp, Tracer, m) { m.impl("linear", linear_composite); }

TORCH_LIBRARY_IMPL(fastmlp, AutocastCPU, m) {
  m.impl("linear", linear_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}
TORCH_LIBRARY_IMPL(fastmlp, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}
}  // namespace fastmlp
