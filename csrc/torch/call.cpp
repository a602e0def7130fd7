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

// Other tensor types carry semantics of their own, which torch's functions in Python know.
bool is_plain(PyObject* o) { return THPVariable_CheckExact(o); }

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

Tensor output_of(const Tensor& input, const std::vector<Tensor>& weights,
                 const std::vector<OptionalTensor>& biases, const std::vector<std::string>& activations) {
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

std::vector<Tensor> tensors(PyObject* list) {
  const Items items(list);
  std::vector<Tensor> result;
  for (Py_ssize_t i = 0; i < items.size; ++i) result.push_back(THPVariable_Unpack(items.items[i]));
  return result;
}

// The numbers of a list, as `convert` has them.
template <class T>
std::vector<T> numbers(PyObject* list, T (*convert)(PyObject*)) {
  const Items items(list);
  std::vector<T> result;
  for (Py_ssize_t i = 0; i < items.size; ++i) result.push_back(convert(items.items[i]));
  if (PyErr_Occurred()) throw python_error();
  return result;
}
int64_t integer(PyObject* o) { return PyLong_AsLongLong(o); }

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
    y = output_of(input, unpacked, unpacked_biases, names);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* train_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 17, "train_step: expected the 17 arguments of the op train_step_, got ", count);
  for (const int list : {2, 3, 4, 6, 7, 15, 16})
    TORCH_CHECK_TYPE(Items::is(arguments[list]), "train_step: expected a list for argument ", list);
  if (!is_plain(arguments[0]) || !is_plain(arguments[1])) Py_RETURN_NOTIMPLEMENTED;
  for (const int list : {2, 3, 4})
    for (const Items items(arguments[list]); PyObject* t : c10::ArrayRef(items.items, items.size))
      if (!is_plain(t)) Py_RETURN_NOTIMPLEMENTED;
  const std::vector<Tensor> params = tensors(arguments[2]), states = tensors(arguments[3]),
                            counts = tensors(arguments[4]);
  const std::vector<int64_t> has_bias = numbers(arguments[6], integer),
                             trained = numbers(arguments[16], integer);
  const std::vector<double> options = numbers(arguments[15], PyFloat_AsDouble);
  c10::List<std::string> activations;
  for (const Items items(arguments[7]); PyObject* name : c10::ArrayRef(items.items, items.size))
    activations.push_back(name_of(name));
  const Tensor &input = THPVariable_Unpack(arguments[0]), &target = THPVariable_Unpack(arguments[1]),
               &workspace = THPVariable_Unpack(arguments[5]);
  const std::string loss = name_of(arguments[8]), optimizer = name_of(arguments[14]);
  const bool mean = PyObject_IsTrue(arguments[9]);
  const OptionalTensor weight = tensor_or_none(arguments[10]), pos_weight = tensor_or_none(arguments[11]);
  const int64_t ignore_index = integer(arguments[12]);
  const double label_smoothing = PyFloat_AsDouble(arguments[13]);
  if (PyErr_Occurred()) throw python_error();
  Tensor value;
  {
    const pybind11::gil_scoped_release no_gil;
    value = call_train_step(input, target, params, states, counts, workspace, has_bias,
                            std::move(activations), loss, mean, weight, pos_weight, ignore_index,
                            label_smoothing, optimizer, options, trained);
  }
  return THPVariable_Wrap(std::move(value));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
