// What the bindings of the CUDA kernels share.
#pragma once

#include "bindings.h"

namespace flute {

// torch's current stream on a device, a cudaStream_t.
void* current_stream(int32_t device);

// Raises with the kernel's own words unless `error` is 0. `argument`: of the op, for the message.
void check_kernel(const char* op, int error, const char* argument = "qweight");

// Contiguous, and where a kernel can read 16 bytes at a time.
Tensor readable(const Tensor& tensor);

// launch.h's number of float16, bfloat16 or float32.
int32_t dtype_number(ScalarType type);

}  // namespace flute
