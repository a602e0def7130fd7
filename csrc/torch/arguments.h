// What Python gives, as the ops take it.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <vector>

#include "ops.h"

namespace fastmlp {

using Objects = c10::ArrayRef<PyObject*>;

// A list or tuple of Python.
inline bool is_list(PyObject* o) { return PyList_Check(o) || PyTuple_Check(o); }
inline Objects items_of(PyObject* list) {
  return {PySequence_Fast_ITEMS(list), size_t(PySequence_Fast_GET_SIZE(list))};
}

inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// Of a dict. Borrowed; null where it is not there.
inline PyObject* get(PyObject* dict, PyObject* key) {
  PyObject* const found = dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (!found && PyErr_Occurred()) throw python_error();
  return found;
}

// Other tensor types carry semantics of their own, which torch's functions in Python know.
inline bool is_plain(PyObject* o) { return THPVariable_CheckExact(o); }

inline OptionalTensor tensor_or_none(PyObject* o) {
  return o == Py_None ? std::nullopt : OptionalTensor(THPVariable_Unpack(o));
}

inline std::vector<Tensor> tensors(PyObject* list) {
  std::vector<Tensor> result;
  for (PyObject* const t : items_of(list)) result.push_back(THPVariable_Unpack(t));
  return result;
}

inline std::string string_of(PyObject* o) {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(o, &size);
  if (!text) throw python_error();
  return {text, size_t(size)};
}

// The activations of a list, as the ops take them.
struct NamedActivations {
  explicit NamedActivations(c10::ArrayRef<PyObject*> list) {
    for (PyObject* const activation : list) {
      c10::SmallVector<double, 2> given;
      if (PyTuple_Check(activation) && PyTuple_GET_SIZE(activation) > 0) {
        names.push_back(string_of(PyTuple_GET_ITEM(activation, 0)));
        for (PyObject* const number : items_of(activation).slice(1))
          given.push_back(PyFloat_AsDouble(number));
        if (PyErr_Occurred()) throw python_error();
      } else {
        names.push_back(activation == Py_None ? "identity" : string_of(activation));
      }
      const Numbers own = parameters_of(names.back(), given);
      parameters.append(own.begin(), own.end());
    }
  }
  c10::SmallVector<std::string, 4> names;
  c10::SmallVector<double, 4> parameters;
};

}  // namespace fastmlp
