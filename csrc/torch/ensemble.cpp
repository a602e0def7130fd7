// Networks side by side: what each of them is to compute waits for the others, and then all are one call of the kernels. So
// forward, backward, and what backward reads are those of the networks by themselves.
#include "ensemble.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/unbind.h>

#include <algorithm>

#include "call.h"

namespace fastmlp {
namespace {

bool are_equal(PyObject* a, PyObject* b) {
  const int result = PyObject_RichCompareBool(a, b, Py_EQ);
  if (result < 0) throw python_error();
  return result;
}

}  // namespace

bool Networks::find(PyObject* known, PyObject* models, const Tensor& input) {
  if (!find_chains(known, models, chains) || chains.empty()) return false;
  const Chain& first = chains.front();
  count = chains.size(), layers = first.weights.size();
  const bool is_one_each = input.dim() == 3 && input.size(0) == int64_t(count);
  if (layers == 0 || (input.dim() != 2 && !is_one_each)) return false;
  c10::DispatchKeySet keys = input.key_set();
  bool has_tangent = input._fw_grad(0).defined();
  requires_grad = input.requires_grad();
  const auto read = [&](PyObject* o) {
    const Tensor& t = THPVariable_Unpack(o);
    keys = keys | t.key_set(), has_tangent |= t._fw_grad(0).defined(), requires_grad |= t.requires_grad();
    return t;
  };
  for (const Chain& own : chains) {
    if (own.weights.size() != layers || !own.views.empty()) return false;
    OptionalTensors& own_biases = biases.emplace_back();
    for (size_t i = 0; i < layers; ++i) {
      PyObject *const weight = own.weights[i], *const bias = own.biases[i];
      const bool has_bias = bias != Py_None;
      if (!is_plain(weight) || (has_bias && !is_plain(bias)) || has_bias != (first.biases[i] != Py_None) ||
          !are_equal(own.activations[i], first.activations[i]))
        return false;
      weights.push_back(read(weight));
      own_biases.push_back(has_bias ? OptionalTensor(read(bias)) : std::nullopt);
    }
  }
  if (has_tangent || !nobody_sees(keys)) return false;
  named.emplace(first.activations);
  xs = is_one_each ? input.unbind() : std::vector<Tensor>(count, input);
  return true;
}

PyObject* ensemble(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && is_list(arguments[1]),
                   "ensemble: expected what is known, models and an input");
  Networks own;
  if (!is_plain(arguments[2]) || at::SavedTensorDefaultHooks::get_hooks() ||
      !own.find(arguments[0], arguments[1], THPVariable_Unpack(arguments[2])))
    Py_RETURN_NOTIMPLEMENTED;
  std::vector<Tensor> ys;
  if (own.requires_grad && at::GradMode::is_enabled()) {
    for (size_t n = 0; n < own.count; ++n)
      if (why_not_fused(own[n])) Py_RETURN_NOTIMPLEMENTED;
    const pybind11::gil_scoped_release no_gil;
    ys = call_networks(own);
  } else {
    Together together;
    for (size_t n = 0; n < own.count; ++n) {
      const Chain& chain = own.chains[n];
      ys.push_back(run_unseen(own.xs[n], chain.weights, chain.biases, chain.activations));
      if (!ys.back().defined()) Py_RETURN_NOTIMPLEMENTED;
    }
    const pybind11::gil_scoped_release no_gil;
    together.run();
  }
  if (std::any_of(ys.begin(), ys.end(), [&](const Tensor& y) { return y.sizes() != ys[0].sizes(); }))
    Py_RETURN_NOTIMPLEMENTED;  // which will raise
  return THPVariable_Wrap(at::stack(ys));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
