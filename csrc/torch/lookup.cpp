// Finding in the time of a few dictionary look-ups what takes nn.Module.__getattr__, which is Python, longer than a small
// layer takes. References are borrowed: nothing here runs Python code that could drop them.
#include "lookup.h"

namespace fastmlp {
namespace {

PyObject* item(PyObject* dict, PyObject* name) {
  return dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
}

PyObject* found(PyObject* object, PyObject* name, PyObject* getattr, PyObject* getattribute) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("__getattr__"), PyUnicode_InternFromString("__getattribute__"),
      PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
      PyUnicode_InternFromString("_modules")};
  if (!PyUnicode_CheckExact(name)) return nullptr;
  if (PyModule_CheckExact(object)) return item(PyModule_GetDict(object), name);
  PyTypeObject* const type = Py_TYPE(object);
  if (_PyType_Lookup(type, names[0]) != getattr || _PyType_Lookup(type, names[1]) != getattribute ||
      _PyType_Lookup(type, name))
    return nullptr;
  PyObject* const own = PyObject_GenericGetDict(object, nullptr);
  if (!own) return nullptr;
  PyObject* value = item(own, name);
  for (int holder = 2; !value && holder < 5; ++holder) value = item(item(own, names[holder]), name);
  Py_DECREF(own);  // which the object holds
  return value;
}

}  // namespace

PyObject* attribute(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "attribute: expected 4 arguments, got %zd", count);
  PyObject* value = found(arguments[0], arguments[1], arguments[2], arguments[3]);
  PyErr_Clear();
  if (!value) value = Py_NotImplemented;
  Py_INCREF(value);
  return value;
}

PyObject* find(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(arguments[0]) || !PyTuple_Check(arguments[1]))
    return PyErr_Format(PyExc_TypeError, "find: expected paths, roots, variables and two functions");
  PyObject *const paths = arguments[0], *const roots = arguments[1], *const variables = arguments[2];
  PyObject* const list = PyList_New(PyTuple_GET_SIZE(paths));
  for (Py_ssize_t i = 0; list && i < PyTuple_GET_SIZE(paths); ++i) {
    PyObject *const path = PyTuple_GET_ITEM(paths, i), *const root = PyTuple_GET_ITEM(path, 0),
                    *const names = PyTuple_GET_ITEM(path, 1);
    PyObject* value = nullptr;
    if (PyLong_CheckExact(root)) {
      Py_ssize_t number = PyLong_AsSsize_t(root);
      if (number < 0) number += PyTuple_GET_SIZE(roots);
      if (number >= 0 && number < PyTuple_GET_SIZE(roots)) value = PyTuple_GET_ITEM(roots, number);
    } else if (PyDict_CheckExact(variables)) {
      value = item(variables, root);
    }
    for (Py_ssize_t j = 0; value && j < PyTuple_GET_SIZE(names); ++j)
      value = found(value, PyTuple_GET_ITEM(names, j), arguments[3], arguments[4]);
    if (!value) {
      PyErr_Clear();
      Py_DECREF(list);
      Py_RETURN_NONE;
    }
    Py_INCREF(value);
    PyList_SET_ITEM(list, i, value);
  }
  return list;
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
