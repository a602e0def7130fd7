// The products of the CUDA backend that are left to torch's library: the calls that torch.nn.Linear makes, on its own
// settings for their precision.
#include "library.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

namespace fastmlp {
namespace {

at::Tensor matrix(const void* data, at::IntArrayRef sizes, at::IntArrayRef strides,
                  const at::TensorOptions& options) {
  return at::for_blob(const_cast<void*>(data), sizes)
      .strides(strides)
      .options(options)
      .target_device(options.device())  // or CUDA would be asked where the memory is
      .make_tensor();
}

}  // namespace

void multiply(const cuda::Product& p, c10::Device device) {
  constexpr at::ScalarType types[] = {at::kFloat, at::kBFloat16, at::kHalf};
  const auto options = at::TensorOptions(device).dtype(types[int(p.dtype)]);
  const at::AutoDispatchBelowAutograd guard;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor a = matrix(p.a.data, {p.rows, p.K}, p.a.strides, options);
  const at::Tensor b = matrix(p.b.data, {p.K, p.columns}, p.b.strides, options);
  at::Tensor c = matrix(p.c, {p.rows, p.columns}, {p.columns, 1}, options);
  if (p.bias) at::addmm_out(c, matrix(p.bias, {p.columns}, {1}, options), a, b);
  else at::mm_out(c, a, b);
}

}  // namespace fastmlp
