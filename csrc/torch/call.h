// The ops as functions of the extension module.
#pragma once

#include <Python.h>

namespace fastmlp {

// network(input, weights, biases, activations): the op network. A list each, of tensors, of tensors or None, and of
// activations: None, a name, or a tuple of a name and numbers. NotImplemented where one is of a tensor type of its own.
PyObject* network(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// The op train_step_, with its arguments in their order, but activations and parameters as above. NotImplemented too.
PyObject* train_step(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastmlp
