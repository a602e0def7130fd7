// The ops as functions of the extension module.
#pragma once

#include <Python.h>

namespace fastmlp {

// network(input, weights, biases, activations): layers one after the other, in as few ops as can be. A list each, of
// tensors, of tensors or None, and of names or None. NotImplemented where one is of a tensor type of its own.
PyObject* network(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// The op train_step_, with its arguments in their order. NotImplemented as above.
PyObject* train_step(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastmlp
