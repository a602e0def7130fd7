// Layers as Python has them, and the shortest way to what they make of an input.
#pragma once

#include <torch/csrc/utils/object_ptr.h>

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

// Runs layers on the CPU, and lets other threads of Python in where it takes long enough for that. The thread keeps the
// memory that this takes, but for large ones.
void run_here(Forward* layers, int64_t count);

}  // namespace fastmlp
