// Layers as Python has them, and the shortest way to what they make of an input.
#pragma once

#include <torch/csrc/utils/object_ptr.h>

#include <vector>

#include "arguments.h"
#include "backends.h"

namespace fastmlp {

// Layer by layer, after what reshapes their input. The objects are held: threads that go on meanwhile may drop them.
struct Chain {
  Chain() = default;
  Chain(const Chain&) = delete;
  Chain& operator=(const Chain&) = delete;
  ~Chain() {
    for (const auto* list : {&views, &weights, &biases, &activations})
      for (PyObject* const o : *list) Py_DECREF(o);
  }
  using Objects = c10::SmallVector<PyObject*, 8>;
  Objects views, weights, biases, activations;
};

// Whether each of the parts is layers alone, where nobody looks on: its chain then. `known` is what layers.py knows.
bool find_chains(PyObject* known, PyObject* parts, std::vector<Chain>& chains);

// Other threads of Python go on meanwhile.
struct Unlocked {
  explicit Unlocked(bool unlocks) : state(unlocks ? PyEval_SaveThread() : nullptr) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    if (state) PyEval_RestoreThread(state);
  }
  PyThreadState* const state;
};

// The attributes of a module that is called as its role (see layers.py) tells; null where it is not, or has hooks.
THPObjectPtr attributes_of(PyObject* role, PyObject* module);

// The input of the layers that the parts all are, one after the other, or that a module is; null, with nothing done, where they
// are not, or where somebody looks on. `known` is what layers.py knows.
THPObjectPtr find_unwatched(PyObject* known, PyObject* parts, PyObject* input, Chain& chain);

// What the layers make of the input, as the op network does; null, with nothing done, where a tensor is of a type of its own.
THPObjectPtr run_chain(PyObject* input, const Chain& chain);

// Whether the dispatcher would call an op's kernel for the CPU, for tensors of these keys, with nobody to see it but
// autograd.
bool nobody_sees(c10::DispatchKeySet keys);

// The kernel of the op network, where it covers the arguments, and the dispatcher would call it at once with nothing to be
// differentiated; else undefined.
Tensor run_unseen(const Tensor& input, Objects weights, Objects biases, Objects activations);

// From so many multiply-adds on a kernel lets other threads of Python in.
inline constexpr double long_enough = 1 << 16;

// Runs layers on the CPU. The thread keeps the memory that this takes, but for large ones.
void run_here(Forward* layers, int64_t count);

}  // namespace fastmlp
