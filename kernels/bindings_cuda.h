// What the bindings of the CUDA kernels share.
#pragma once

#include "bindings.h"

namespace flute {

// torch's current stream on a device, a cudaStream_t.
void* current_stream(int32_t device);

// Raises with the kernel's own words unless `error` is 0. `argument`: of the op, for the message.
void check_kernel(const char* op, int error, const char* argument = "qweight");

}  // namespace flute
