// What the bindings of the CUDA kernels share.
#pragma once

#include "bindings.h"

namespace flute {

// torch's current stream on a device, a cudaStream_t.
void* current_stream(int32_t device);

// Raises with the kernel's own words unless `error` is 0.
void check_kernel(const char* op, int error);

}  // namespace flute
