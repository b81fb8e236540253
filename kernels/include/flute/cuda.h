// CUDA kernels as plain functions, so that .cu files need no torch and bindings need no CUDA.
#pragma once

#include <cstdint>

#include "flute/format.h"

namespace flute::cuda {

// Rows [begin, end) of the dense weight, row `begin` first in `out`: products rounded to `round`,
// stored as `out_dtype`. `stream` is a cudaStream_t. Returns nullptr, or what CUDA reports.
const char* dequantize(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                       void* out, void* stream);

}  // namespace flute::cuda
