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

// A name, and where a dict is expected to have it: a look there takes half the time of a search.
struct Key {
  explicit Key(const char* text, Py_ssize_t at = 0) : Key(interned(text), at) {}
  Key(PyObject* name, Py_ssize_t at) : name(name), at(at) {}
  PyObject* name;
  Py_ssize_t at;
};
inline PyObject* get(PyObject* dict, const Key& key) {
  Py_ssize_t at = key.at;
  PyObject *found, *value;
  if (dict && PyDict_Check(dict) && PyDict_Next(dict, &at, &found, &value) && found == key.name) return value;
  return get(dict, key.name);
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

inline std::string_view view_of(PyObject* string) {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(string, &size);
  if (!text) throw python_error();
  return {text, size_t(size)};
}
inline std::string string_of(PyObject* string) { return std::string(view_of(string)); }

// An activation of a list: None, a name, or a tuple of a name and numbers. Its name lives as long as that.
struct GivenActivation {
  explicit GivenActivation(PyObject* activation) {
    if (activation == Py_None) return;
    if (PyTuple_Check(activation) && PyTuple_GET_SIZE(activation) > 0) {
      for (PyObject* const number : items_of(activation).slice(1))
        numbers.push_back(PyFloat_AsDouble(number));
      if (PyErr_Occurred()) throw python_error();
      activation = PyTuple_GET_ITEM(activation, 0);
    }
    name = view_of(activation);
  }
  std::string_view name = "identity";
  c10::SmallVector<double, 2> numbers;
};

// The activations of a list, as the ops take them.
struct NamedActivations {
  explicit NamedActivations(Objects list) {
    for (PyObject* const o : list) {
      const GivenActivation activation(o);
      names.emplace_back(activation.name);
      const Numbers own = parameters_of(activation.name, activation.numbers);
      parameters.append(own.begin(), own.end());
    }
  }
  c10::SmallVector<std::string, 4> names;
  c10::SmallVector<double, 4> parameters;
};

}  // namespace fastmlp
