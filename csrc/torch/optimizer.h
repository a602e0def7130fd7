// The optimizers by name: how many options, and tensors of state, a parameter has, and what is made of them for kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "../kernels.h"

namespace fastmlp {

struct OptimizerRow {
  const char* name;
  Optimizer::Kind kind;
  size_t options;  // sgd   lr, momentum, dampening, weight_decay, nesterov, maximize, first
                   // adam  lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize
  size_t states;   // the most: sgd   momentum_buffer          adam  exp_avg, exp_avg_sq, max_exp_avg_sq
  bool counts;     // whether each parameter has a count of its steps
};

// Raises ValueError for an unknown name.
const OptimizerRow& optimizer_row(std::string_view name);

Optimizer optimizer_of(const OptimizerRow& row, at::ArrayRef<double> options, Dtype dtype, size_t states);

// Of the step that is the count's, from 1 on.
Rates rates_of(const OptimizerRow& row, at::ArrayRef<double> options, double count);

// A parameter's count of steps, as torch.optim keeps it on the CPU: one element of float32, or of float64 where that was
// torch's default.
bool is_count(const at::Tensor& t);
double count_of(const at::Tensor& t);
void count_up(const at::Tensor& t);

// The StepNumbers of parameters, in uint8 on the CPU: of each the number of its options among all, and a count where the
// optimizer has one, which is counted up.
at::Tensor count_up_numbers(std::string_view name, at::ArrayRef<double> options, at::IntArrayRef groups,
                            at::TensorList counts, bool pinned);

}  // namespace fastmlp
