// A training step of each of an ensemble's networks, in one call of the kernels. Each is checked as it would be alone, and
// nothing is changed before all have been.
#include <deque>

#include "call.h"
#include "ensemble.h"
#include "step.h"
#include "training.h"

namespace fastmlp {

PyObject* train_ensemble(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 10 && is_list(arguments[2]) && PyTuple_Check(arguments[5]) &&
          PyTuple_GET_SIZE(arguments[5]) == 6 && is_list(arguments[6]),
      "train_ensemble: expected 10 arguments, with lists of models and optimizers, and a loss of 6 items");
  if (!is_plain(arguments[3]) || !is_plain(arguments[4])) Py_RETURN_NOTIMPLEMENTED;
  const Tensor &x = THPVariable_Unpack(arguments[3]), &target = THPVariable_Unpack(arguments[4]);
  Networks own;
  if (!own.find(arguments[0], arguments[2], x)) Py_RETURN_NOTIMPLEMENTED;
  const bool is_shared = x.dim() == 2;
  if (!nobody_sees(target.key_set()) ||
      (!is_shared && (target.dim() == 0 || target.size(0) != int64_t(own.count))))
    Py_RETURN_NOTIMPLEMENTED;

  Chain::Objects parameters;  // network by network, layer by layer
  c10::SmallVector<int64_t, 8> has_bias;
  for (const Chain& chain : own.chains)
    for (size_t i = 0; i < own.layers; ++i) {
      parameters.push_back(chain.weights[i]);
      if (has_bias.size() < own.layers) has_bias.push_back(chain.biases[i] != Py_None);
      if (has_bias[i]) parameters.push_back(chain.biases[i]);
    }
  const size_t P = parameters.size() / own.count;
  const OptionalTensor norms = tensor_or_none(arguments[7]);
  const double max_norm = PyFloat_AsDouble(arguments[8]);
  const Objects optimizers = items_of(arguments[6]);  // one for all, or one each
  std::deque<Training> trainings(optimizers.size());
  for (size_t k = 0; k < trainings.size(); ++k) {
    const Objects all = parameters;
    const std::string why = trainings[k].collect(
        arguments[1], optimizers[k], trainings.size() == 1 ? all : all.slice(k * P, P), norms.has_value());
    if (!why.empty()) return PyUnicode_FromStringAndSize(why.data(), Py_ssize_t(why.size()));
  }

  const Objects loss = items_of(arguments[5]);
  const OptionalTensor weight = tensor_or_none(loss[2]), pos_weight = tensor_or_none(loss[3]);
  const std::string name = string_of(loss[0]);
  const bool mean = loss[1] == Py_True;
  const int64_t ignore_index = PyLong_AsLongLong(loss[4]);
  const double number = PyFloat_AsDouble(loss[5]);
  if (PyErr_Occurred()) throw python_error();
  const Tensor& workspace = THPVariable_Unpack(arguments[9]);
  Tensor values = at::detail::empty_cpu({int64_t(own.count)}, at::kFloat);
  const std::vector<Tensor> targets = is_shared ? std::vector<Tensor>(own.count, target) : target.unbind();
  std::vector<OptionalTensor> each_norm(own.count);
  if (norms)
    for (size_t n = 0; n < own.count; ++n) each_norm[n] = norms->select(0, int64_t(n));
  std::deque<StepArguments> steps_arguments;
  std::deque<CheckedStep> steps;
  std::vector<Step> calls;
  Memories memories = {memory_of(x), memory_of(target), memory_of(weight.value_or(Tensor())),
                       memory_of(pos_weight.value_or(Tensor()))};
  for (size_t n = 0; n < own.count; ++n) {
    const Training& training = trainings[n % trainings.size()];
    const size_t first = trainings.size() == 1 ? n * P : 0, kinds = training.row->states;
    const bool counts = training.row->counts;
    const at::IntArrayRef numbers = at::IntArrayRef(training.numbers).slice(first, P);
    if (std::all_of(numbers.begin(), numbers.end(), [](int64_t index) { return index < 0; }))
      Py_RETURN_NOTIMPLEMENTED;  // which will raise
    steps_arguments.push_back({.input = own.xs[n],
                               .target = targets[n],
                               .params = at::TensorList(training.params).slice(first, P),
                               .states = at::TensorList(training.states).slice(first * kinds, P * kinds),
                               .counts = at::TensorList(training.counts).slice(counts * first, counts * P),
                               .workspace = workspace,
                               .has_bias = has_bias,
                               .activations = own.named->names,
                               .parameters = own.named->parameters,
                               .loss = name,
                               .mean = mean,
                               .weight = weight,
                               .pos_weight = pos_weight,
                               .ignore_index = ignore_index,
                               .number = number,
                               .optimizer = training.row->name,
                               .options = training.options,
                               .numbers = numbers,
                               .left = {},
                               .norm = each_norm[n],
                               .max_norm = max_norm});
    const StepArguments& a = steps_arguments.back();
    calls.push_back(steps.emplace_back(a).prepare(values.mutable_data_ptr<float>() + n));
    for (const at::TensorList tensors : {a.params, a.states, a.counts})
      for (const Tensor& t : tensors) memories.push_back(memory_of(t));
  }
  TORCH_CHECK_VALUE(
      !overlap(std::move(memories)),
      "models: expected parameters that share no memory with one another, nor with x or target");
  const int threads = at::get_num_threads();
  const int64_t networks = int64_t(own.count), M = calls[0].layers->M,
                bytes = cpu::train_workspace(calls.data(), networks, threads);
  if (workspace.numel() < bytes) workspace.set_(empty({bytes}, workspace.options()));
  int64_t wrong = -1;
  {
    const pybind11::gil_scoped_release no_gil;
    wrong = cpu::train(calls.data(), networks, workspace.mutable_data_ptr(), threads);
  }
  TORCH_CHECK_INDEX(wrong < 0, "target: expected classes from 0 to ", calls[0].cross_entropy.C - 1, ", got ",
                    calls[size_t(wrong / M)].cross_entropy.target[wrong % M], " in row ", wrong % M,
                    " of model ", wrong / M);
  for (CheckedStep& step : steps) step.finish();
  for (Training& training : trainings) training.finish();
  return THPVariable_Wrap(std::move(values));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
