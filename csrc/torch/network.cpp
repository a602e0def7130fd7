// A network as one op and one autograd node:
//
//   h_0 = x     z_i = h_{i-1} W_iᵀ + b_i     h_i = g_i(z_i)     y = h_L
//
// network_forward returns y, and then what each layer leaves for network_backward: z_i where g_i' is a function of it,
// else h_i. The last layer leaves nothing but z_L, since h_L is y. These tensors are outputs of the autograd node too,
// though nobody is given them: gradients of gradients reach the arguments through them. Each is an allocation of its
// own: the allocator gives very large blocks back to the system, and their pages would be new in every step.
//
// Gradients of gradients need no code of their own: where a gradient is itself to be differentiated,
// network_backward takes torch's own operations.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "backends.h"
#include "network.h"
#include "together.h"

namespace fastmlp {

// ---- through the dispatcher

std::vector<Tensor> call_network_forward(const Tensor& input, TensorList weights,
                                         const OptionalTensors& biases, Names activations,
                                         Numbers parameters) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::network_forward", "")
                             .typed<decltype(call_network_forward)>();
  return op.call(input, weights, biases, activations, parameters);
}

std::vector<Tensor> call_network_backward(const Tensor& grad_y, const OptionalTensor& input,
                                          const OptionalTensors& weights, const OptionalTensors& saved,
                                          Names activations, Numbers parameters, at::IntArrayRef wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::network_backward", "")
                             .typed<decltype(call_network_backward)>();
  return op.call(grad_y, input, weights, saved, activations, parameters, wanted);
}

Tensor call_network(const Tensor& input, TensorList weights, const OptionalTensors& biases, Names activations,
                    Numbers parameters) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastmlp::network", "").typed<decltype(call_network)>();
  return op.call(input, weights, biases, activations, parameters);
}

namespace {

// ---- the composite path: torch's own differentiable operations

// Returns y; to `left` goes, where it is wanted, what the layers leave for backward.
Tensor run_composite(const Network& n, std::vector<Tensor>* left) {
  check(n);
  Tensor h = n.input;
  for (size_t i = 0; i < n.size; ++i) {
    const Tensor z = at::linear(h, n.weights[i], n.biases[i]);
    h = n.activations[i].forward(z);
    if (left && n.leaves(i)) left->push_back(n.activations[i].reads_z() ? z : h);
  }
  return h;
}

Tensor network_composite(const Network& n) { return run_composite(n, nullptr); }
std::vector<Tensor> network_forward_composite(const Network& n) {
  std::vector<Tensor> outputs(1);
  outputs[0] = run_composite(n, &outputs);
  return outputs;
}

}  // namespace

Tensor network_by_layers(const Network& n) {
  if (n.size == 1) return network_composite(n);
  check(n);
  Tensor h = n.input;
  for (size_t i = 0; i < n.size; ++i)
    h = call_network(h, n.weights.slice(i, 1), OptionalTensors({n.biases[i]}), n.names.slice(i, 1),
                     n.activations[i].parameters);
  return h;
}

std::vector<Tensor> run_composite(const Backpropagation& b, TensorList grad_outputs) {
  const auto rows = [](const Tensor& t) {
    c10::SymInt M = 1;
    for (const auto& size : t.sym_sizes().slice(0, t.dim() - 1)) M = M * size;
    return t.dim() == 2 ? t : t.reshape_symint({M, t.sym_size(-1)});
  };
  const auto sum = [](const Tensor& a, const Tensor& b) {
    return !a.defined() ? b : !b.defined() ? a : a + b;
  };
  c10::SmallVector<Tensor, 16> grads(b.is_wanted.size());
  Tensor grad = grad_outputs[0];  // of h_i, then of z_i
  for (size_t i = b.size; i-- > b.lowest;) {
    const LayerActivation& g = b.activations[i];
    const Tensor of_left = i + 1 < grad_outputs.size() ? grad_outputs[i + 1] : Tensor();
    if (!g.reads_z()) grad = sum(grad, of_left);
    if (grad.defined()) grad = g.backward(grad, b.saved[i].value_or(Tensor()));
    if (g.reads_z()) grad = sum(grad, of_left);
    if (!grad.defined()) continue;
    const Tensor dz = rows(grad);
    if (b.wants_weight(i)) {
      const bool is_z = i > 0 && b.activations[i - 1].reads_z();
      grads[1 + i] = dz.t().mm(rows(is_z ? b.activations[i - 1].forward(*b.x(i)) : *b.x(i)));
    }
    if (b.wants_bias(i)) grads[1 + b.size + i] = dz.sum(0);
    if (b.wants_x(i)) {
      c10::SymDimVector sizes(grad.sym_sizes());
      sizes.back() = b.weights[i]->sym_size(1);
      grad = dz.mm(*b.weights[i]).reshape_symint(sizes);
    }
  }
  if (b.is_wanted[0]) grads[0] = grad;
  return b.only_wanted(grads);
}

std::vector<Tensor> network_backward_composite(const Backpropagation& b) {
  check(b);
  return run_composite(b, b.grad_y);
}

namespace {

// ---- the fused path

at::DimVector sizes_of_rows(const Tensor& t, int64_t columns) {
  at::DimVector sizes(t.sizes());
  sizes.back() = columns;
  return sizes;
}

void* data_of(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// Runs layers, which read what is alive, or has them wait for those of other networks.
template <class Device, class Layer>
void run_layers(const Layer* layers, size_t count, const Tensor& like, at::TensorList alive) {
  if (std::is_same_v<Device, Cpu> && Together::current) Together::current->add(layers, count, alive);
  else run<Device>(layers, int64_t(count), like);
}

// As run_composite.
template <class Device>
Tensor run_fused(const Network& n, std::vector<Tensor>* left) {
  const c10::DeviceGuard guard(n.input.device());
  const int64_t M = rows_of(n.input);
  const bool reduced = is_reduced(n.input);
  const Tensor x = as_matrix(n.input, M, n.input.size(-1));
  Tensor y;
  c10::SmallVector<Tensor, 4> biases(n.size);  // alive, as x is, until the kernels have run
  c10::SmallVector<Forward, 4> layers;
  for (size_t i = 0; i < n.size; ++i) {
    const Tensor& weight = n.weights[i];
    const auto output = [&] { return empty(sizes_of_rows(n.input, weight.size(0)), n.input.options()); };
    Tensor h, z;
    if (left && n.leaves(i)) left->push_back((n.activations[i].reads_z() ? z : h) = output());
    if (i + 1 == n.size) y = h = output();
    if (n.biases[i]) biases[i] = n.biases[i]->contiguous();
    layers.push_back({.dtype = dtype_of(n.input),
                      .reduced = reduced,
                      .activation = n.activations[i].kernel_for(n.input.scalar_type()),
                      .M = M,
                      .N = weight.size(0),
                      .K = weight.size(1),
                      .x = i ? layers.back().y : x.const_data_ptr(),
                      .ldx = i ? weight.size(1) : x.stride(0),
                      .weight = weight.const_data_ptr(),
                      .ldw = weight.stride(0),
                      .bias = biases[i].defined() ? biases[i].const_data_ptr() : nullptr,
                      .y = data_of(h),
                      .z = data_of(z)});
  }
  biases.push_back(x);
  run_layers<Device>(layers.data(), n.size, n.input, biases);
  return y;
}

template <class Device>
Tensor network_fused(const Network& n) {
  check(n);
  return why_not_fused(n) ? network_by_layers(n) : run_fused<Device>(n, nullptr);
}

template <class Device>
std::vector<Tensor> network_forward_fused(const Network& n) {
  check(n);
  const char* reason = why_not_fused(n);
  TORCH_CHECK(!reason, "network_forward: expected arguments that the kernels cover, but ", reason);
  std::vector<Tensor> outputs(1);
  outputs[0] = run_fused<Device>(n, &outputs);
  return outputs;
}

template <class Device>
std::vector<Tensor> network_backward_fused(const Backpropagation& b) {
  check(b);
  if (why_not_fused(b)) return run_composite(b, b.grad_y);
  const c10::DeviceGuard guard(b.grad_y.device());
  const int64_t M = rows_of(b.grad_y);
  c10::SmallVector<Tensor, 16> grads(b.is_wanted.size());
  c10::SmallVector<Tensor, 8> alive = {b.grad_y.contiguous()};  // until the kernels have run
  c10::SmallVector<Backward, 4> layers;
  const auto output = [&](size_t number, at::IntArrayRef sizes) {
    grads[number] = empty(sizes, b.grad_y.options());
    return grads[number].mutable_data_ptr();
  };
  const bool reduced = is_reduced(b.grad_y);
  int64_t N = b.grad_y.size(-1);
  for (size_t i = b.size; i-- > b.lowest;) {
    Backward p{};
    p.dtype = dtype_of(b.grad_y);
    p.reduced = reduced;
    p.activation = b.activations[i].kernel_for(b.grad_y.scalar_type());
    p.M = M, p.N = N;
    p.grad_y = i + 1 == b.size ? alive[0].const_data_ptr() : nullptr;
    if (b.activations[i].reads != Reads::nothing)
      p.saved = alive.emplace_back(b.saved[i]->contiguous()).const_data_ptr();
    if (b.wants_x(i)) {
      const Tensor& weight = *b.weights[i];
      p.K = weight.size(1);
      p.weight = weight.const_data_ptr();
      p.ldw = weight.stride(0);
      if (i == 0) p.grad_x = output(0, sizes_of_rows(b.grad_y, p.K));
    }
    if (b.wants_weight(i)) {
      const OptionalTensor& x = b.x(i);
      p.K = x->size(-1);
      p.x = alive.emplace_back(as_matrix(*x, M, p.K)).const_data_ptr();
      p.ldx = alive.back().stride(0);
      if (i > 0 && b.activations[i - 1].reads_z())
        p.x_activation = b.activations[i - 1].kernel_for(b.grad_y.scalar_type());
      p.grad_weight = output(1 + i, {N, p.K});
    }
    if (b.wants_bias(i)) p.grad_bias = output(1 + b.size + i, {N});
    layers.push_back(p);
    N = p.K;
  }
  if (!layers.empty()) run_layers<Device>(layers.data(), layers.size(), b.grad_y, alive);
  return b.only_wanted(grads);
}

// ---- shapes alone, for tracing

Tensor empty_rows(const Tensor& like, const c10::SymInt& columns) {
  c10::SymDimVector sizes(like.sym_sizes());
  sizes.back() = columns;
  return at::empty_symint(sizes, like.options());
}

Tensor network_meta(const Network& n) {
  check(n);
  return why_not_fused(n) ? network_by_layers(n) : empty_rows(n.input, n.weights.back().sym_size(0));
}

std::vector<Tensor> network_forward_meta(const Network& n) {
  std::vector<Tensor> outputs = {network_meta(n)};
  for (size_t i = 0; i < n.size; ++i)
    if (n.leaves(i)) outputs.push_back(empty_rows(n.input, n.weights[i].sym_size(0)));
  return outputs;
}

std::vector<Tensor> network_backward_meta(const Backpropagation& b) {
  check(b);
  c10::SmallVector<Tensor, 16> grads(b.is_wanted.size());
  c10::SymInt N = b.grad_y.sym_size(-1);
  for (size_t i = b.size; i-- > b.lowest;) {
    const c10::SymInt K = b.wants_x(i)        ? b.weights[i]->sym_size(1)
                          : b.wants_weight(i) ? b.x(i)->sym_size(-1)
                                              : 0;
    if (b.wants_x(i) && i == 0) grads[0] = empty_rows(b.grad_y, K);
    if (b.wants_weight(i)) grads[1 + i] = at::empty_symint({N, K}, b.grad_y.options());
    if (b.wants_bias(i)) grads[1 + b.size + i] = at::empty_symint({N}, b.grad_y.options());
    N = K;
  }
  return b.only_wanted(grads);
}

// ---- autocast: the arguments are cast as those of torch's own linear are

template <c10::DispatchKey autocast, c10::DeviceType device>
Tensor network_autocast(const Network& n) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  OptionalTensors biases;
  for (size_t i = 0; i < n.size; ++i) biases.push_back(cast(n.biases[i]));
  return call_network(cast(n.input), cast(n.weights), biases, n.names, n.parameters);
}

// ---- registration

// Whether all products of a layer are left to torch's library, with passes of the kernels around them.
bool is_librarys([[maybe_unused]] const Tensor& input, [[maybe_unused]] const Tensor& weight) {
#ifdef FASTMLP_WITH_CUDA
  if (!input.is_cuda()) return false;
  const c10::DeviceGuard guard(input.device());
  const double operations = 2.0 * rows_of(input) * weight.size(0) * weight.size(1);
  const auto is_its = [&](cuda::Kind kind) {
    return cuda::owner_of(kind, dtype_of(input), is_reduced(input), operations) == cuda::Owner::library;
  };
  return is_its(cuda::Kind::forward) && is_its(cuda::Kind::dW) && is_its(cuda::Kind::dx);
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY(fastmlp, m) {
  m.def(
      "network(Tensor input, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters) "
      "-> Tensor");
  m.def(
      "network_forward(Tensor input, Tensor[] weights, Tensor?[] biases, str[] activations, "
      "float[] parameters) -> Tensor[]");
  m.def(
      "network_backward(Tensor grad_y, Tensor? input, Tensor?[] weights, Tensor?[] saved, "
      "str[] activations, float[] parameters, int[] wanted) -> Tensor[]");
  m.def("why_not_fused(Tensor input, Tensor weight, Tensor? bias=None) -> str",
        [](const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
          const char* reason =
              why_not_fused({input, weight, OptionalTensors({bias}), std::string("identity"), {}});
          if (!reason && is_librarys(input, weight))
            reason = "torch's library computes products of this size";
          return std::string(reason ? reason : "");
        });
}

#define FASTMLP_NETWORK(key, whole, forward, backward) \
  TORCH_LIBRARY_IMPL(fastmlp, key, m) {                \
    m.impl("network", forward_op<whole>);              \
    m.impl("network_forward", forward_op<forward>);    \
    m.impl("network_backward", backward_op<backward>); \
  }
FASTMLP_NETWORK(CPU, network_fused<Cpu>, network_forward_fused<Cpu>, network_backward_fused<Cpu>)
#ifdef FASTMLP_WITH_CUDA
FASTMLP_NETWORK(CUDA, network_fused<Cuda>, network_forward_fused<Cuda>, network_backward_fused<Cuda>)
#endif
FASTMLP_NETWORK(Meta, network_meta, network_forward_meta, network_backward_meta)
FASTMLP_NETWORK(CompositeExplicitAutograd, network_composite, network_forward_composite,
                network_backward_composite)
FASTMLP_NETWORK(FuncTorchBatched, network_composite, network_forward_composite, network_backward_composite)
FASTMLP_NETWORK(Batched, network_composite, network_forward_composite, network_backward_composite)
#undef FASTMLP_NETWORK

// A graph that torch.jit.trace records is there for others to read: it holds torch's own operations.
TORCH_LIBRARY_IMPL(fastmlp, Tracer, m) { m.impl("network", forward_op<network_composite>); }
TORCH_LIBRARY_IMPL(fastmlp, AutocastCPU, m) {
  m.impl("network", forward_op<network_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>>);
}
TORCH_LIBRARY_IMPL(fastmlp, AutocastCUDA, m) {
  m.impl("network", forward_op<network_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>>);
}

}  // namespace fastmlp
