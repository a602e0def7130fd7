// The ops called from Python as torch's own functions are: tensors are unpacked and the dispatcher is called, with
// nothing converted. Through torch.ops, which graphs hold, the conversion of a small network's arguments takes longer
// than the network.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "call.h"
#include "linear.h"

namespace fastmlp {
namespace {

// A list or tuple of Python.
struct Items {
  explicit Items(PyObject* o) : size(PySequence_Fast_GET_SIZE(o)), items(PySequence_Fast_ITEMS(o)) {}
  static bool is(PyObject* o) { return PyList_Check(o) || PyTuple_Check(o); }
  Py_ssize_t size;
  PyObject** items;
};

OptionalTensor tensor_or_none(PyObject* o) {
  return o == Py_None ? std::nullopt : OptionalTensor(THPVariable_Unpack(o));
}

std::string name_of(PyObject* activation) {
  if (activation == Py_None) return "identity";
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(activation, &size);
  if (!text) throw python_error();
  return {text, size_t(size)};
}

Tensor run(const Tensor& input, const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases,
           const std::vector<std::string>& activations) {
  Tensor h = input;
  const size_t L = weights.size();
  for (size_t begin = 0; begin < L;) {
    // A run of layers that is one op: the same activation between them, none at the end.
    size_t end = begin;
    if (activations[begin] != "identity")
      while (end + 1 < L && activations[end] == activations[begin] &&
             biases[end + 1].has_value() == biases[begin].has_value())
        ++end;
    if (end == begin || activations[end] != "identity") {
      h = call_linear(h, weights[begin], biases[begin], activations[begin]);
      begin += 1;
      continue;
    }
    std::vector<Tensor> of_run;
    for (size_t i = begin; biases[begin] && i <= end; ++i) of_run.push_back(*biases[i]);
    h = call_mlp(h, at::TensorList(weights).slice(begin, end + 1 - begin), of_run, activations[begin]);
    begin = end + 1;
  }
  return h;
}

}  // namespace

PyObject* network(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 4 && Items::is(arguments[1]) && Items::is(arguments[2]) && Items::is(arguments[3]),
      "network: expected input and lists of weights, biases and activations");
  const Items weights(arguments[1]), biases(arguments[2]), activations(arguments[3]);
  TORCH_CHECK(weights.size > 0, "weights: expected one for each layer, got none");
  TORCH_CHECK(biases.size == weights.size, "biases: expected ", weights.size,
              ", as many as weights, or none, got ", biases.size);
  TORCH_CHECK(activations.size == weights.size, "activations: expected ", weights.size,
              ", as many as weights, got ", activations.size);
  // Other tensor types carry semantics of their own, which torch's functions in Python know.
  const auto is_plain = [](PyObject* o) { return THPVariable_CheckExact(o); };
  if (!is_plain(arguments[0])) Py_RETURN_NOTIMPLEMENTED;
  std::vector<Tensor> unpacked;
  std::vector<OptionalTensor> unpacked_biases;
  std::vector<std::string> names;
  unpacked.reserve(weights.size), unpacked_biases.reserve(weights.size), names.reserve(weights.size);
  for (Py_ssize_t i = 0; i < weights.size; ++i) {
    if (!is_plain(weights.items[i]) || !(biases.items[i] == Py_None || is_plain(biases.items[i])))
      Py_RETURN_NOTIMPLEMENTED;
    unpacked.push_back(THPVariable_Unpack(weights.items[i]));
    unpacked_biases.push_back(tensor_or_none(biases.items[i]));
    names.push_back(name_of(activations.items[i]));
  }
  const Tensor& input = THPVariable_Unpack(arguments[0]);
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = run(input, unpacked, unpacked_biases, names);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
