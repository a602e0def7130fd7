// Networks beside one another: a thread takes whole ones, waits for nobody, and finds them again in its cache at the next
// call. Those left over, fewer than threads, are shared by all threads one after the other, where each is worth it; so are
// all that are too large for a core's caches, where threads would read their weights from memory again and again.
#include "loss.h"
#include "plan.h"

namespace fastmlp::cpu {
namespace {

constexpr int64_t most_weights = 1 << 20;  // 4 MiB of float32, which a core has of its caches

// What there is to one network, of its layers, or of a step that counts as one.
struct Work {
  double multiply_adds;
  int64_t barriers;
  Work(const Pass& pass) : Work(Plan(pass, nullptr, 1)) {}
  Work(const Plan& plan) : multiply_adds(plan.multiply_adds), barriers(plan.barriers) {}
};
Work work(const Forward* layers, int64_t count) { return Pass{.forward = layers, .forwards = count}; }
Work work(const Backward* layers, int64_t count) { return Pass{.backward = layers, .backwards = count}; }
Work work(const Step* s, int64_t) {
  Work w = work(s->layers, s->count);
  w.multiply_adds *= 3, w.barriers = 2 * w.barriers + 2;
  return w;
}

template <class Layer>
int64_t weights(const Layer* layers, int64_t count) {
  int64_t sum = 0;
  for (const Layer* p = layers; p != layers + count; ++p) sum += p->N * p->K;
  return sum;
}
int64_t weights(const Step* s, int64_t) { return weights(s->layers, s->count); }

int64_t bytes(const Forward* layers, int64_t count, int threads) {
  return forward_workspace(layers, count, threads);
}
int64_t bytes(const Backward* layers, int64_t count, int threads) {
  return backward_workspace(layers, count, threads);
}
int64_t bytes(const Step* s, int64_t, int threads) { return train_workspace(*s, threads); }

void run(const Forward* layers, int64_t count, void* workspace, int threads) {
  forward(layers, count, workspace, threads);
}
void run(const Backward* layers, int64_t count, void* workspace, int threads) {
  backward(layers, count, workspace, threads);
}
void run(const Step* s, int64_t, void* workspace, int threads) { train(*s, workspace, threads); }

template <class Layer>
struct Networks {
  const Layer* layers;
  int64_t count, networks;
  int threads;
  double multiply_adds = 0;  // of a network
  int64_t alone = networks;

  Networks(const Layer* layers, int64_t count, int64_t networks, int threads)
      : layers(layers), count(count), networks(networks), threads(threads) {
    if (networks == 0) return;
    const Work one = work(layers, count);
    multiply_adds = one.multiply_adds;
    if (weights(layers, count) > most_weights) alone = 0;
    else if (pays(threads, multiply_adds, one.barriers)) alone -= networks % threads;
  }

  int64_t most_bytes(int threads) const {
    int64_t most = 0;
    for (int64_t n = 0; n < networks; ++n) most = std::max(most, bytes(layers + n * count, count, threads));
    return ceil_div(most, cache_line) * cache_line;
  }
  int64_t workspace() const {
    return std::max(alone ? threads * most_bytes(1) : 0, alone < networks ? most_bytes(threads) : 0);
  }

  void run_all(void* workspace) const {
    const auto run_one = [&](int64_t n, void* memory, int threads) {
      run(layers + n * count, count, memory, threads);
    };
    const int64_t each = most_bytes(1);
    share(threads, multiply_adds * double(alone), 0, [&](int rank, int size) {
      const Range own = part(alone, 1, rank, size);
      for (int64_t n = own.begin; n < own.end; ++n)
        run_one(n, static_cast<char*>(workspace) + rank * each, 1);
    });
    for (int64_t n = alone; n < networks; ++n) run_one(n, workspace, threads);
  }
};

}  // namespace

int64_t forward_workspace(const Forward* layers, int64_t count, int64_t networks, int threads) {
  return Networks<Forward>{layers, count, networks, threads}.workspace();
}

void forward(const Forward* layers, int64_t count, int64_t networks, void* workspace, int threads) {
  Networks<Forward>{layers, count, networks, threads}.run_all(workspace);
}

int64_t backward_workspace(const Backward* layers, int64_t count, int64_t networks, int threads) {
  return Networks<Backward>{layers, count, networks, threads}.workspace();
}

void backward(const Backward* layers, int64_t count, int64_t networks, void* workspace, int threads) {
  Networks<Backward>{layers, count, networks, threads}.run_all(workspace);
}

int64_t train_workspace(const Step* steps, int64_t networks, int threads) {
  return Networks<Step>{steps, 1, networks, threads}.workspace();
}

// All targets are looked at before anything is changed.
int64_t train(const Step* steps, int64_t networks, void* workspace, int threads) {
  int64_t wrong = -1, rows = 0;
  for (const Step* s = steps; s != steps + networks; rows += s++->layers->M) {
    divisor(*s, wrong);
    if (wrong >= 0) return rows + wrong;
  }
  Networks<Step>{steps, 1, networks, threads}.run_all(workspace);
  return -1;
}

}  // namespace fastmlp::cpu
