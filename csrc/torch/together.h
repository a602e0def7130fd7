// Networks that are computed together.
#pragma once

#include <tuple>

#include "backends.h"

namespace fastmlp {

// In its life what this thread would have the CPU's kernels compute of networks waits, until run() has them do it side by
// side. Until then what they would write is undefined.
class Together {
 public:
  inline static thread_local Together* current = nullptr;

  Together() { current = this; }
  ~Together() { current = nullptr; }
  Together(const Together&) = delete;
  Together& operator=(const Together&) = delete;

  // A network, of these layers, which read what is alive.
  template <class Layer>
  void add(const Layer* layers, size_t size, at::TensorList alive) {
    if (size != count) run();
    count = size;
    auto& to = std::get<std::vector<Layer>>(waiting);
    to.insert(to.end(), layers, layers + size);
    kept.insert(kept.end(), alive.begin(), alive.end());
  }

  void run() {
    const int threads = at::get_num_threads();
    const auto run_all = [&](auto& layers, auto workspace_of, auto run) {
      if (layers.empty()) return;
      const int64_t size = int64_t(count), networks = int64_t(layers.size() / count);
      const at::Tensor workspace = empty({workspace_of(layers.data(), size, networks, threads)}, at::kByte);
      run(layers.data(), size, networks, workspace.mutable_data_ptr(), threads);
      layers.clear();
    };
    run_all(
        std::get<std::vector<Forward>>(waiting), [](auto... a) { return cpu::forward_workspace(a...); },
        [](auto... a) { cpu::forward(a...); });
    run_all(
        std::get<std::vector<Backward>>(waiting), [](auto... a) { return cpu::backward_workspace(a...); },
        [](auto... a) { cpu::backward(a...); });
    kept.clear();
  }

 private:
  std::tuple<std::vector<Forward>, std::vector<Backward>> waiting;
  size_t count = 0;  // layers of each
  std::vector<at::Tensor> kept;
};

}  // namespace fastmlp
