// The ops as functions of the extension module.
#pragma once

#include <Python.h>

namespace fastmlp {

// network(input, weights, biases, activations): the op network. A list each, of tensors, of tensors or None, and of
// activations: None, a name, or a tuple of a name and numbers. NotImplemented where one is of a tensor type of its own.
PyObject* network(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// apply(known, parts, input): what the parts make of the input one after the other. NotImplemented, with nothing done, where
// they are not all layers, or where somebody looks on. `known` is what layers.py knows.
PyObject* apply(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// call_directly(known, class): from now on Python calls modules of the class, whose role is known, past nn.Module's call and
// forward, where they are layers alone and nobody could tell. Until their __call__ is assigned to.
PyObject* call_directly(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// find_layers(known, parts, input, layers): the input of the layers that the parts all are, which then have been appended to
// the three lists of weights, biases and activations. NotImplemented where they are not.
PyObject* find_layers(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// ensemble(known, models, input): what each of the models, which are layers alone and of equal shapes, makes of the input, or of
// its own in the input's first of three dimensions. NotImplemented, with nothing done, where they are not, or somebody looks on.
PyObject* ensemble(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// train_ensemble(known, optimizers, models, x, target, loss, own, norm, max_norm, workspace): a training step of each of the
// models, and their losses. As train_step; `own` is a list of one optimizer for all of them, or one for each, and norm has
// an element for each, or is None.
PyObject* train_ensemble(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// is_untouched(known): whether there are no hooks for all modules, and torch's functions are what they have been.
PyObject* is_untouched(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// train_step(known, optimizers, model, x, target, loss, left, optimizer, norm, max_norm, workspace, run): the op train_step_,
// with what the optimizer has for the layers that the model is; `model` is a tuple of it, or of the three lists of them.
// What is to be found in the optimizer is left there. `loss` is a tuple of the op's six arguments. Returns the loss; or,
// with nothing changed, why the optimizer cannot be taken, and NotImplemented where the model is no such layers, or
// somebody looks on. With a run (see step.cpp) in place of None it takes steps for a while, of which x and target are the
// first's, and returns how many.
PyObject* train_step(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// known_loss(losses, loss): that tuple for a loss that the kernels know, else None. `losses` is what step.py knows.
PyObject* known_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// why_not_trained(optimizers, optimizer, parameters, knows_all): why the optimizer cannot be taken, or None; without the
// latter two, for any parameters.
PyObject* why_not_trained(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// collect(optimizers, optimizer, parameters, knows_all): that reason; or the kernels' name of the optimizer, and lists of the
// parameters that it trains, of the tuple of states of each, and of the counts, and as count_up_numbers takes them the options
// and their numbers.
PyObject* collect(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// options(name, group), keys(name, group): of an optimizer that the kernels know by this name. The numbers in the kernels'
// order, [None] where one is none; and the names of a parameter's states, as a tuple.
PyObject* options(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* keys(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// differentiate_down_to(node, value, parameters): see ops.h. None where the node is another; else the gradient of the
// output or None, a list of what the layers have left, and one of the gradients that parameters have by other ways.
PyObject* differentiate_down_to(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// optimize(name, params, grads, states, counts, options): the op optimize_. False too where one is of a tensor type of its own.
PyObject* optimize(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// count_up_numbers(name, options, groups, counts, pinned): see optimizer.h.
PyObject* count_up_numbers(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// places(*lists): bytes that are equal where tensors (or None) are the same ones, on the same device, of the same dtype,
// sizes and strides, at the same address, and require gradients and have hooks as before; and float32 is multiplied as
// before. What a captured kernel depends on.
PyObject* places(PyObject*, PyObject* const* lists, Py_ssize_t count);

// batch(x, target, parameter): bytes that are equal where x and target are of the same shapes and dtypes. None where one is
// on another device than the parameter, or requires a gradient.
PyObject* batch(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// leave(parameters, gradients, tensors): what a replayed graph leaves, which autograd has not seen: the parameters'
// gradients, and that tensors have been written.
PyObject* leave(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// clip_grad_norm(parameters, max_norm, error_if_nonfinite): the op clip_grad_norm_ for the gradients of a list of tensors.
// NotImplemented too, and where the op gives None.
PyObject* clip_grad_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// snapshot(weights, biases, activations): a network for predict(), of float32 on the CPU, whose parameters have no gaps.
PyObject* snapshot(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// predict(snapshot, x, out): what the network makes of x [..., K], in out or a new array of the kind of x. NotImplemented
// where x is not float32 on the CPU with rows of adjacent elements. Raises ValueError where a shape does not fit.
PyObject* predict(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastmlp
