// The ops called from Python as torch's own functions are: tensors are unpacked and the dispatcher is called, with
// nothing converted. Through torch.ops, which graphs hold, the conversion of a small network's arguments takes longer
// than the network.
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "backends.h"
#include "call.h"
#include "optimizer.h"

namespace fastmlp {
namespace {

bool are_plain(PyObject* list) {
  const auto items = items_of(list);
  return std::all_of(items.begin(), items.end(), is_plain);
}

// The numbers of a list, as `convert` has them.
template <class T>
std::vector<T> numbers(PyObject* list, T (*convert)(PyObject*)) {
  std::vector<T> result;
  for (PyObject* const number : items_of(list)) result.push_back(convert(number));
  if (PyErr_Occurred()) throw python_error();
  return result;
}
int64_t integer(PyObject* o) { return PyLong_AsLongLong(o); }

}  // namespace

PyObject* differentiate_down_to(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && THPVariable_Check(arguments[1]) && is_list(arguments[2]),
                   "differentiate_down_to: expected a node, a tensor and a list of parameters");
  if (!torch::autograd::THPCppFunction_Check(arguments[0])) Py_RETURN_NONE;
  const auto node = reinterpret_cast<torch::autograd::THPCppFunction*>(arguments[0])->cdata;
  const Tensor& value = THPVariable_Unpack(arguments[1]);
  const std::vector<Tensor> params = tensors(arguments[2]);
  std::optional<Arrival> arrival;
  {
    const pybind11::gil_scoped_release no_gil;
    arrival = differentiate_down_to(*node, value, params);
  }
  if (!arrival) Py_RETURN_NONE;
  const auto list = [](const std::vector<Tensor>& tensors) {  // None where one is undefined
    THPObjectPtr list(PyList_New(Py_ssize_t(tensors.size())));
    for (size_t i = 0; list && i < tensors.size(); ++i)
      PyList_SET_ITEM(list.get(), Py_ssize_t(i), THPVariable_Wrap(tensors[i]));
    return list;
  };
  const THPObjectPtr grad_y(THPVariable_Wrap(arrival->grad_y)), left = list(arrival->left),
                                                                others = list(arrival->others);
  return PyTuple_Pack(3, grad_y.get(), left.get(), others.get());
  END_HANDLE_TH_ERRORS
}

PyObject* optimize(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "optimize: expected the 6 arguments of the op optimize_, got ", count);
  for (int list = 1; list < 6; ++list)
    TORCH_CHECK_TYPE(is_list(arguments[list]), "optimize: expected a list for argument ", list);
  for (int list = 1; list < 5; ++list)
    if (!are_plain(arguments[list])) Py_RETURN_FALSE;
  const std::string name = string_of(arguments[0]);
  const std::vector<Tensor> params = tensors(arguments[1]), grads = tensors(arguments[2]),
                            states = tensors(arguments[3]), counts = tensors(arguments[4]);
  const std::vector<double> options = numbers(arguments[5], PyFloat_AsDouble);
  bool is_done = false;
  {
    const pybind11::gil_scoped_release no_gil;
    is_done = call_optimize(name, params, grads, states, counts, options);
  }
  return PyBool_FromLong(is_done);
  END_HANDLE_TH_ERRORS
}

PyObject* count_up_numbers(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 5 && is_list(arguments[1]) && is_list(arguments[2]) && is_list(arguments[3]),
      "count_up_numbers: expected a name, lists of options, groups and counts, and whether it is pinned");
  return THPVariable_Wrap(count_up_numbers(string_of(arguments[0]), numbers(arguments[1], PyFloat_AsDouble),
                                           numbers(arguments[2], integer), tensors(arguments[3]),
                                           PyObject_IsTrue(arguments[4])));
  END_HANDLE_TH_ERRORS
}

PyObject* places(PyObject*, PyObject* const* lists, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject* const hooks[] = {PyUnicode_InternFromString("_backward_hooks"),
                                    PyUnicode_InternFromString("_post_accumulate_grad_hooks")};
  c10::SmallVector<int64_t, 128> words{is_reduced_on(at::kCUDA), is_reduced_on(at::kCPU)};
  for (PyObject* const list : c10::ArrayRef<PyObject*>(lists, size_t(count))) {
    TORCH_CHECK_TYPE(is_list(list), "places: expected lists of tensors or None");
    words.push_back(PySequence_Fast_GET_SIZE(list));
    for (PyObject* const o : items_of(list)) {
      words.push_back(o != Py_None);
      if (o == Py_None) continue;
      TORCH_CHECK_TYPE(THPVariable_Check(o), "places: expected lists of tensors or None");
      const Tensor& t = THPVariable_Unpack(o);
      const bool is_strided = t.layout() == c10::kStrided && !t.unsafeGetTensorImpl()->is_nested();
      words.push_back(int64_t(reinterpret_cast<intptr_t>(t.unsafeGetTensorImpl())));
      words.push_back(int64_t(t.scalar_type()) << 32 | int64_t(t.device().type()) << 24 |
                      int64_t(uint8_t(t.device().index())) << 16 | int64_t(t.layout()) << 8 |
                      int64_t(is_strided) << 1 | int64_t(t.requires_grad()));
      for (PyObject* const name : hooks)
        if (t.requires_grad()) {
          THPObjectPtr own(PyObject_GetAttr(o, name));
          if (!own) throw python_error();
          words.push_back(PyObject_IsTrue(own));
        }
      if (!is_strided) continue;
      words.push_back(int64_t(reinterpret_cast<intptr_t>(t.const_data_ptr())));
      words.push_back(t.dim());
      words.append(t.sizes().begin(), t.sizes().end());
      words.append(t.strides().begin(), t.strides().end());
    }
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   Py_ssize_t(words.size() * sizeof(int64_t)));
  END_HANDLE_TH_ERRORS
}

PyObject* batch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && std::all_of(arguments, arguments + 3, THPVariable_Check),
                   "batch: expected x, target and a parameter");
  c10::SmallVector<int64_t, 8> words;
  for (PyObject* const o : {arguments[0], arguments[1]}) {
    const Tensor& t = THPVariable_Unpack(o);
    if (t.device() != THPVariable_Unpack(arguments[2]).device() || t.requires_grad()) Py_RETURN_NONE;
    words.append({int64_t(t.scalar_type()), t.dim()});
    words.append(t.sizes().begin(), t.sizes().end());
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   Py_ssize_t(words.size() * sizeof(int64_t)));
  END_HANDLE_TH_ERRORS
}

PyObject* leave(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && is_list(arguments[0]) && is_list(arguments[1]) && is_list(arguments[2]),
                   "leave: expected lists of parameters, gradients and tensors");
  const auto params = items_of(arguments[0]), grads = items_of(arguments[1]);
  TORCH_CHECK_VALUE(params.size() == grads.size(), "leave: expected as many gradients as parameters");
  for (size_t i = 0; i < params.size(); ++i)
    THPVariable_Unpack(params[i]).mutable_grad() = THPVariable_Unpack(grads[i]);
  for (PyObject* const t : items_of(arguments[2]))
    THPVariable_Unpack(t).unsafeGetTensorImpl()->bump_version();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* clip_grad_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && is_list(arguments[0]),
                   "clip_grad_norm: expected a list of parameters, max_norm and error_if_nonfinite");
  c10::SmallVector<Tensor, 8> grads;
  for (PyObject* const parameter : items_of(arguments[0])) {
    if (!is_plain(parameter)) Py_RETURN_NOTIMPLEMENTED;
    const Tensor& grad = THPVariable_Unpack(parameter).grad();
    if (!grad.defined()) continue;
    if (!is_plain(THPObjectPtr(THPVariable_Wrap(grad)))) Py_RETURN_NOTIMPLEMENTED;
    if (why_not_plain(grad)) Py_RETURN_NOTIMPLEMENTED;  // beneath a transform of torch.func the op sees none
    grads.push_back(grad);
  }
  const double max_norm = PyFloat_AsDouble(arguments[1]);
  const int error_if_nonfinite = PyObject_IsTrue(arguments[2]);
  if (PyErr_Occurred()) throw python_error();
  OptionalTensor norm;
  if (!grads.empty()) {
    const pybind11::gil_scoped_release no_gil;
    norm = call_clip_grad_norm(grads, max_norm, error_if_nonfinite);
  }
  if (!norm) Py_RETURN_NOTIMPLEMENTED;
  return THPVariable_Wrap(*std::move(norm));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
