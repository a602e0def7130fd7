// Which tensors the kernels may read.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastmlp {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Null for a dense tensor that no transform is at work on, or the reason why no kernel may read it.
const char* why_not_plain(const Tensor& t);

// Null where there are kernels for the tensor's device and dtype, or the reason why there are none.
const char* why_not_covered(const Tensor& t);

}  // namespace fastmlp
