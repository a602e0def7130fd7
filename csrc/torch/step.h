// A training step of a network: forward, loss, backward and update, in one call of the CPU backend.
#pragma once

#include <c10/util/FunctionRef.h>

#include <string_view>

#include "backends.h"
#include "ops.h"
#include "optimizer.h"

namespace fastmlp {

// The arguments of the op train_step_, in its order. The parameters are numbered layer by layer, each weight before its
// bias; of each there are its states, a count where the optimizer has one, and the number of its options, which may be
// those of others too, or -1 where it stays as it is. `number` is the label smoothing, or the loss's bound. For a loss
// that is given, the target is the gradient of the output, and `left` what layers have left for backward.
struct StepArguments {
  const Tensor &input, &target;
  at::TensorList params, states, counts;
  const Tensor& workspace;
  at::IntArrayRef has_bias;
  Names activations;
  Numbers parameters;
  std::string_view loss;
  bool mean;
  const OptionalTensor &weight, &pos_weight;
  int64_t ignore_index;
  double number;
  std::string_view optimizer;
  Numbers options;
  at::IntArrayRef numbers;
  c10::ArrayRef<OptionalTensor> left;
  const OptionalTensor& norm;
  double max_norm;
};

// A step whose arguments have been checked, and which may be taken more than once. The arguments are to outlive it.
class CheckedStep {
 public:
  explicit CheckedStep(const StepArguments&);
  CheckedStep(const CheckedStep&) = delete;
  CheckedStep& operator=(const CheckedStep&) = delete;

  const int threads = at::get_num_threads();
  double multiply_adds() const;
  // Whether it reads the rows of these tensors where they are, one after the other.
  bool reads(const Tensor& x_rows, const Tensor& target_rows) const;
  // Another batch of as many rows, from now on.
  void move_to(const void* x_rows, const void* target_rows);
  // Takes it. Raises IndexError for a class that is none, with nothing changed.
  void take(float* value);
  // On a GPU so many steps in one launch, each of the rows behind the last one's, with the losses one after the other.
  // Before the numbers of a step are taken, set_rates(step) is called.
  void take(float* values, int64_t steps, c10::function_ref<void(int64_t)> set_rates);
  // The same in parts: the step as options and counts are now, and what it leaves when it has been taken.
  const Step& prepare(float* value);
  void finish();

 private:
  template <class T>
  using List = c10::SmallVector<T, 8>;

  void take_parameter(Trained& to);
  void optimize(int64_t steps_before = 0);

  const StepArguments& a;
  const OptimizerRow& row;
  Tensor x, targets, weighs, pos_weighs;
  List<Forward> layers;
  List<Trained> weights, biases;
  List<Trained*> trained;  // by parameter
  List<Optimizer> optimizers;
  Step step;
  int64_t bytes = 0;  // of the workspace, once a step has been taken
};

Tensor take_step(const StepArguments&);  // the loss, undefined where it is given

// The op: through the dispatcher, where tracing, profilers or modes are to see the call.
Tensor call_train_step(const StepArguments&);

}  // namespace fastmlp
