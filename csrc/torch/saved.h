// What a layer saves for its backward pass: what that will read, as stock's layer does, and nothing else.
//
//   x for dW     W for dx     y for g'
//
// torch.utils.checkpoint pairs what the first forward pass saves with what the second one does, by order and shape.
// A hook or a mode may send one of them through stock's operations and the other through ours. So where saved tensors
// are watched, they are stock's in order and orientation: x and Wᵀ of addmm (of mm, without bias, Wᵀ and x), then y,
// each for itself even where it is the next layer's x.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>

#include <vector>

namespace fastmlp {

enum Saved : int64_t { saves_x = 1, saves_weight = 2, saves_y = 4 };

struct SavedLayers {
  std::vector<int64_t> what;  // of each layer: the sum of what it saves
  bool has_bias;
  bool watched = at::SavedTensorDefaultHooks::get_hooks().has_value();

  // Calls visit(layer, x, weight or y) in the order of saving.
  template <class Visit>
  void each(Visit visit) const {
    for (size_t i = 0; i < what.size(); ++i) {
      const bool is_there = i > 0 && !watched && (what[i - 1] & saves_y);  // x is the y of the layer below
      const bool x = (what[i] & saves_x) && !is_there, weight = what[i] & saves_weight;
      if (x && has_bias) visit(i, saves_x);
      if (weight) visit(i, saves_weight);
      if (x && !has_bias) visit(i, saves_x);
      if (what[i] & saves_y) visit(i, saves_y);
    }
  }

  // A weight as it is saved: still a function of the parameter, for gradients of gradients.
  at::Tensor oriented(const at::Tensor& weight) const {
    const at::AutoGradMode guard(true);
    return watched ? weight.t() : weight;
  }
  // And as it was.
  at::Tensor restored(const at::Tensor& saved) const { return watched ? saved.t() : saved; }

  c10::IValue packed() const {
    std::vector<int64_t> data = what;
    data.insert(data.end(), {has_bias, watched});
    return data;
  }
  static SavedLayers unpacked(const c10::IValue& value) {
    std::vector<int64_t> data = value.toIntVector();
    const bool watched = data.back(), has_bias = *(data.end() - 2);
    data.resize(data.size() - 2);
    return {std::move(data), has_bias, watched};
  }
};

}  // namespace fastmlp
