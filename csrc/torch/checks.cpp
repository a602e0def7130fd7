#include "checks.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/ops/_fw_primal.h>

#include <ostream>
#include <string>

#include "backends.h"
#include "network.h"

namespace fastmlp {

const char* why_not_plain(const Tensor& t) {
  const auto functorch = c10::DispatchKey::FuncTorchDynamicLayerBackMode;
  if (at::functorch::functorchTLSAccessor() && c10::impl::tls_is_dispatch_key_included(functorch))
    return "a torch.func transform is active";
  if (t._fw_grad(0).defined()) return "forward-mode AD is active";
  if (t.layout() != c10::kStrided || t.unsafeGetTensorImpl()->is_nested())
    return "not every argument is a dense tensor";
  if (t.is_neg()) return "a tensor is negated lazily";
  return nullptr;
}

#ifdef FASTMLP_WITH_CUDA
namespace {

// That the kernels are built for other architectures: "800,900" are sm_80 and sm_90.
const char* why_not_on_this_gpu() {
  static const std::string reason = [] {
    std::string names = "sm_";
    for (const char* c = cuda::architectures(); *c; ++c) {
      if (*c == ',') names += ", sm_";
      else if (c[1] && c[1] != ',') names += *c;
    }
    return "the kernels are built for " + names + " and not for this GPU";
  }();
  return reason.c_str();
}

}  // namespace
#endif

const char* why_not_covered(const Tensor& t) {
  const auto dtype = t.scalar_type();
  if (t.is_cuda()) {
#ifdef FASTMLP_WITH_CUDA
    if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf)
      return "the CUDA kernels cover float32, bfloat16 and float16";
    if (!cuda::runs_on(t.get_device())) return why_not_on_this_gpu();
#else
    return "this build has no CUDA kernels";
#endif
  } else if (t.is_cpu() || t.is_meta()) {
    if (dtype != at::kFloat && dtype != at::kBFloat16) return "the CPU kernels cover float32 and bfloat16";
  } else {
    return "there are kernels for CPU and CUDA only";
  }
  return nullptr;
}

namespace {

// What errors call the argument of a layer: a single one's is functional.linear's.
struct Name {
  const char *one, *many;
  size_t layer, layers;
};
std::ostream& operator<<(std::ostream& out, const Name& name) {
  return name.layers == 1 ? out << name.one : out << name.many << '[' << name.layer << ']';
}

template <class ArgumentName>
void check_same(const ArgumentName& name, const Tensor& argument, const Tensor& input) {
  TORCH_CHECK(argument.device() == input.device(), name, ": expected a tensor on ", input.device(),
              ", the device of input, got one on ", argument.device());
  TORCH_CHECK(argument.scalar_type() == input.scalar_type(), name, ": expected dtype ", input.scalar_type(),
              ", the dtype of input, got ", argument.scalar_type());
}

}  // namespace

// What is broadcast or of fewer dimensions is left to the composite path, which computes what torch's own does.
void check(const Network& n) {
  TORCH_CHECK(n.input.dim() >= 1, "input: expected shape [..., in_features], got a tensor of no dimension");
  for (size_t i = 0; i < n.size; ++i) {
    const Name weight_name{"weight", "weights", i, n.size}, bias_name{"bias", "biases", i, n.size};
    const Tensor& weight = n.weights[i];
    const OptionalTensor& bias = n.biases[i];
    check_same(weight_name, weight, n.input);
    if (bias) check_same(bias_name, *bias, n.input);
    if (weight.dim() != 2) continue;
    const Tensor* const below = i ? &n.weights[i - 1] : nullptr;
    TORCH_CHECK(below || n.input.sym_size(-1) == weight.sym_size(1), "input: expected shape [..., ",
                weight.sym_size(1), "] for a weight of shape ", weight.sym_sizes(), ", got ",
                n.input.sym_sizes());
    TORCH_CHECK(!below || below->dim() != 2 || weight.sym_size(1) == below->sym_size(0), weight_name,
                ": expected shape [*, ", below->sym_size(0), "] after a weight of shape ", below->sym_sizes(),
                ", got ", weight.sym_sizes());
    TORCH_CHECK(
        !bias || bias->dim() != 1 || bias->sym_size(0) == weight.sym_size(0) || bias->sym_size(0) == 1,
        bias_name, ": expected shape [", weight.sym_size(0), "] for a weight of shape ", weight.sym_sizes(),
        ", got ", bias->sym_sizes());
  }
}

// What the wanted gradients are made of is to be there, and to fit.
void check(const Backpropagation& b) {
  TORCH_CHECK(b.grad_y.dim() >= 1,
              "grad_y: expected shape [..., out_features], got a tensor of no dimension");
  const auto check_read = [&](const Name& name, const OptionalTensor& t) {
    TORCH_CHECK(t, name, ": expected what the forward pass read or gave, got None");
    check_same(name, *t, b.grad_y);
  };
  c10::SymDimVector rows(b.grad_y.sym_sizes());  // with the features of a layer after them
  for (size_t i = b.size; i-- > b.lowest;) {
    const OptionalTensor &weight = b.weights[i], &saved = b.saved[i], &x = b.x(i);
    const Name weight_name{"weight", "weights", i, b.size}, saved_name{"saved", "saved", i, b.size};
    if (b.activations[i].reads != Reads::nothing) {
      check_read(saved_name, saved);
      TORCH_CHECK(saved->sym_sizes().equals(rows), saved_name, ": expected shape ", c10::SymIntArrayRef(rows),
                  ", got ", saved->sym_sizes());
    }
    if (b.wants_x(i)) {
      check_read(weight_name, weight);
      TORCH_CHECK(weight->dim() == 2 && weight->sym_size(0) == rows.back(), weight_name, ": expected shape [",
                  rows.back(), ", *], got ", weight->sym_sizes());
      rows.back() = weight->sym_size(1);
    }
    if (b.wants_weight(i)) {
      const Name x_name{"input", "saved", i - 1, i ? b.size : 1};
      check_read(x_name, x);
      if (!b.wants_x(i)) rows.back() = x->dim() ? x->sym_size(-1) : 0;
      TORCH_CHECK(x->sym_sizes().equals(rows), x_name, ": expected shape ", c10::SymIntArrayRef(rows),
                  ", got ", x->sym_sizes());
    }
  }
}

const char* why_not_multiplied(const Tensor& t) {
  if (const char* reason = why_not_covered(t)) return reason;
  if (!t.is_cuda() && !cpu::covers(dtype_of(t)))
    return "this processor multiplies tiles of bfloat16 (AMX), which the kernels do not use";
  return nullptr;
}

namespace {

const char* why_not_read(const Tensor& weight) {
  if (const char* reason = why_not_plain(weight)) return reason;
  if (weight.dim() != 2) return "weight is not a matrix";
  if (weight.sym_size(1) > 1 && weight.sym_stride(1) != 1) return "weight is not stored by rows";
  return nullptr;
}

}  // namespace

const char* why_not_fused(const Network& n) {
  if (const char* reason = why_not_plain(n.input)) return reason;
  for (size_t i = 0; i < n.size; ++i) {
    if (const char* reason = why_not_read(n.weights[i])) return reason;
    const OptionalTensor& bias = n.biases[i];
    if (!bias) continue;
    if (const char* reason = why_not_plain(*bias)) return reason;
    if (bias->dim() != 1 || bias->sym_size(0) != n.weights[i].sym_size(0)) return "bias is broadcast";
  }
  return why_not_multiplied(n.input);
}

const char* why_not_fused(const Backpropagation& b) {
  if (const char* reason = why_not_plain(b.grad_y)) return reason;
  for (size_t i = b.lowest; i < b.size; ++i) {
    const OptionalTensor &x = b.x(i), &weight = b.weights[i];
    const char* reason = x ? why_not_plain(*x) : nullptr;
    if (!reason && weight) reason = why_not_read(*weight);
    if (reason) return reason;
  }
  return why_not_multiplied(b.grad_y);
}

}  // namespace fastmlp
