// A training step of CUDA's in one launch, on the emulator: the C functions that test_whole_step.py calls.
#include <vector>

#ifdef FASTMLP_BARRIER
static bool repeats;  // whether each block does all rows of the last layer
#define FASTMLP_REPEATS repeats
#endif
#include "../csrc/cuda/step.cuh"

using namespace fastmlp;

extern "C" {
const char* activations() {
#define FASTMLP_NAME(name, Type) #name " "
  return FASTMLP_ACTIVATIONS(FASTMLP_NAME);
}
const char* complaint() { return emulator::complaint; }
uint64_t launches() { return emulator::launches; }

// Blocks; of each hidden layer the units of a block; the predicted microseconds.
int64_t plan(int64_t M, const int64_t* widths, int64_t layers, int clips, int64_t multiprocessors,
             int64_t shared_bytes, double barrier, int64_t* units, double* microseconds) {
  cuda::whole_step::Shape shape{M, layers, {}, clips != 0};
  std::copy_n(widths, layers + 1, shape.widths);
  const cuda::whole_step::Plan p = cuda::whole_step::plan(shape, {multiprocessors, shared_bytes, barrier});
  std::copy_n(p.units, layers - 1, units);
  *microseconds = p.microseconds;
  return p.blocks;
}

// A network of parameters that are each a weight and a bias, or null; of each of them the states one after the other.
struct Request {
  int64_t layers;
  const int64_t* widths;
  const Activation* activations;
  float *const *params, *const *states;
  const bool* trained;
  Optimizer optimizer;
  Rates rates;
  const StepNumbers* numbers;  // of each parameter, of each step; or null
  Step step;
  int multiprocessors;
  unsigned order;
  int64_t at_once;  // steps of a launch
  bool repeats;
};

int64_t train(const Request* r, int64_t M, const float* x, int64_t ldx) {
  emulator::order = r->order;
  emulator::multiprocessors = r->multiprocessors;
  repeats = r->repeats;
  std::vector<Forward> layers;
  std::vector<Trained> trained(2 * r->layers);
  Optimizer optimizer = r->optimizer;
  optimizer.in_memory = r->numbers;
  for (int64_t l = 0; l < r->layers; ++l) {
    const int64_t K = r->widths[l], N = r->widths[l + 1];
    for (int64_t i = 2 * l; i < 2 * l + 2; ++i) {
      Trained& t = trained[i / 2 + i % 2 * r->layers];
      if (r->trained[i]) t.optimizer = &optimizer;
      t.update = {r->params[i], nullptr, {}, i % 2 ? N : N * K, {r->rates}};
      if (r->numbers) t.update.numbers = r->numbers + i;
      for (int k = 0; k < most_states; ++k) t.update.states[k] = r->states[most_states * i + k];
    }
    layers.push_back({.dtype = Dtype::float32,
                      .reduced = false,
                      .activation = r->activations[l],
                      .M = M,
                      .N = N,
                      .K = K,
                      .x = l ? nullptr : x,
                      .ldx = l ? K : ldx,
                      .weight = r->params[2 * l],
                      .ldw = K,
                      .bias = r->params[2 * l + 1],
                      .y = nullptr});
  }
  Step step = r->step;
  step.count = r->layers;
  step.layers = layers.data(), step.weights = trained.data(), step.biases = trained.data() + r->layers;
  std::vector<char> memory(cuda::whole_step::workspace(step) + 15, char(0xff));  // NaN
  char* const workspace = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  *reinterpret_cast<unsigned*>(workspace) = 0;
  const int64_t numbers_step = step.numbers_step;
  for (int64_t left = step.steps; left > 0; left -= r->at_once) {
    step.steps = std::min(left, r->at_once);
    if (const int error = cuda::whole_step::run(step, workspace, nullptr)) return error;
    layers[0].x = static_cast<const float*>(layers[0].x) + step.steps * step.x_step;
    step.cross_entropy.target += step.steps * step.target_step;
    step.pointwise.target += step.steps * step.target_step;
    step.value += step.steps;
    if (r->numbers)
      for (Trained& t : trained) t.update.numbers += step.steps * numbers_step;
  }
  return 0;
}
}
