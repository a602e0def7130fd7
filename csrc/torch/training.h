// What an optimizer of torch's, an object of Python's, has for the parameters of a model.
#pragma once

#include <torch/csrc/utils/object_ptr.h>

#include <string>
#include <utility>

#include "arguments.h"
#include "optimizer.h"

namespace fastmlp {

// As the op train_step_ takes it; `optimizers` is what optim.py knows.
class Training {
 public:
  // Collects it, anew at each call. Returns nothing, or why no kernel takes the parameters so; one that the optimizer does
  // not know is a reason where `knows_all`. `rates`, if any, are learning rates in place of the groups' own:
  // one for all, or one each.
  std::string collect(PyObject* optimizers, PyObject* optimizer, Objects parameters, bool knows_all,
                      Numbers rates = {});
  // Leaves with the optimizer, after a step, the states that are new.
  void finish();

  const OptimizerRow* row = nullptr;
  c10::SmallVector<Tensor, 8> params;
  c10::SmallVector<Tensor, 16> states;  // row->states of each parameter; none is one of no element
  c10::SmallVector<Tensor, 8> counts;   // of each parameter, where the optimizer counts
  c10::SmallVector<double, 16>
      options;  // row->options of each group, and once more where it has a first step
  c10::SmallVector<int64_t, 8> numbers;  // of each parameter's options; -1 where it is not trained
  bool has_state(size_t number) const;   // or it is none, of no element
  // Whether there is a state that is new.
  bool begins() const { return !made.empty(); }
  // Other rates from now on, but for a parameter whose state is new.
  void set_rates(Numbers rates);

 private:
  THPObjectPtr optimizer;
  std::vector<std::pair<THPObjectPtr, THPObjectPtr>> made;  // parameters, and their states that are new
};

// Why the kernels do not know how an optimizer changes parameters; nothing where they do.
std::string why_not_known(PyObject* optimizers, PyObject* optimizer);

}  // namespace fastmlp
