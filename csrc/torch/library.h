// Products by torch's library; see set_products in kernels.h.
#pragma once

#include <c10/core/Device.h>

#include "../kernels.h"

namespace fastmlp {

// All pointers are on the device, which is the current one; so is the stream.
void multiply(const cuda::Product&, c10::Device device);

}  // namespace fastmlp
