// Finding in the time of a few dictionary look-ups what takes nn.Module.__getattr__, which is Python, longer than a small
// layer takes. What is found is held: to make a dictionary, or a list, may collect garbage, which may run any code.
#include "lookup.h"

#include <torch/csrc/utils/object_ptr.h>

namespace fastmlp {
namespace {

THPObjectPtr item(PyObject* dict, PyObject* name) {
  PyObject* const found = dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
  if (!found) PyErr_Clear();
  return THPObjectPtr::dup(found);
}

// Null where it cannot be found without code of the object's class.
THPObjectPtr found(PyObject* object, PyObject* name, PyObject* getattr, PyObject* getattribute) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("__getattr__"), PyUnicode_InternFromString("__getattribute__"),
      PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
      PyUnicode_InternFromString("_modules")};
  if (!PyUnicode_CheckExact(name)) return {};
  if (PyModule_CheckExact(object)) return item(PyModule_GetDict(object), name);
  PyTypeObject* const type = Py_TYPE(object);
  if (_PyType_Lookup(type, names[0]) != getattr || _PyType_Lookup(type, names[1]) != getattribute ||
      _PyType_Lookup(type, name))
    return {};
  THPObjectPtr own(PyObject_GenericGetDict(object, nullptr));
  if (!own) PyErr_Clear();
  THPObjectPtr value = item(own, name);
  for (int holder = 2; !value && holder < 5; ++holder) value = item(item(own, names[holder]), name);
  return value;
}

}  // namespace

PyObject* attribute(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "attribute: expected 4 arguments, got %zd", count);
  THPObjectPtr value = found(arguments[0], arguments[1], arguments[2], arguments[3]);
  return value ? value.release() : THPObjectPtr::dup(Py_NotImplemented).release();
}

PyObject* find(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  for (const int tuple : {0, 1, 3})
    if (count != 4 || !PyTuple_Check(arguments[tuple]))
      return PyErr_Format(PyExc_TypeError, "find: expected calls, roots, variables and kinds");
  PyObject *const calls = arguments[0], *const roots = arguments[1], *const variables = arguments[2];
  const auto kind = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(arguments[3], i); };
  THPObjectPtr list(PyList_New(PyTuple_GET_SIZE(calls)));
  for (Py_ssize_t i = 0; list && i < PyTuple_GET_SIZE(calls); ++i) {
    PyObject* const call = PyTuple_GET_ITEM(calls, i);
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(call));
    THPObjectPtr value;
    if (type == kind(1)) {
      value = THPObjectPtr::dup(call);
    } else if (type == kind(0)) {
      PyObject *const root = PyTuple_GET_ITEM(call, 0), *const names = PyTuple_GET_ITEM(call, 1);
      if (PyLong_CheckExact(root)) {
        Py_ssize_t number = PyLong_AsSsize_t(root);
        if (number < 0) number += PyTuple_GET_SIZE(roots);
        if (number >= 0 && number < PyTuple_GET_SIZE(roots))
          value = THPObjectPtr::dup(PyTuple_GET_ITEM(roots, number));
      } else {
        value = item(variables, root);
      }
      for (Py_ssize_t j = 0; value && j < PyTuple_GET_SIZE(names); ++j)
        value = found(value, PyTuple_GET_ITEM(names, j), kind(2), kind(3));
    }
    if (!value) Py_RETURN_NONE;
    PyList_SET_ITEM(list.get(), i, value.release());
  }
  return list.release();
}

PyObject* is_unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyFunction_Check(arguments[0]) || !PyFunction_Check(arguments[2]))
    return PyErr_Format(PyExc_TypeError, "is_unchanged: expected a function, its code and a function");
  PyObject *const function = arguments[0], *const other = arguments[2];
  return PyBool_FromLong(PyFunction_GET_CODE(function) == arguments[1] &&
                         PyFunction_GET_DEFAULTS(function) == PyFunction_GET_DEFAULTS(other) &&
                         PyFunction_GET_KW_DEFAULTS(function) == PyFunction_GET_KW_DEFAULTS(other));
}

}  // namespace fastmlp
