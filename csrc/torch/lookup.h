// Attributes looked up as Python does, but only where that runs no code of the user's.
#pragma once

#include <Python.h>

namespace fastmlp {

// attribute(object, name, getattr, getattribute): object.name, of a Python module, or of an nn.Module whose class has
// nothing under that name, this __getattr__ (nn.Module's) and this __getattribute__ (object's). Else NotImplemented.
PyObject* attribute(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// find(calls, roots, variables, (Path, Method, getattr, getattribute)): the list of what the calls call. A Path is a tuple
// of a root, the number of one of the roots (-1 the last) or the name of one of the variables, and the names of
// attributes; a Method stands for itself. None where there is another call, or one that is not found.
PyObject* find(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// is_unchanged(function, code, other): whether the function still has this code, and the defaults of the other one.
PyObject* is_unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastmlp
