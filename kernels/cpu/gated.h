// The activation of a gated layer, on float32 values.
#pragma once

#include <cstdint>

#include "flute/format.h"

namespace flute::cpu {

// flute_vllm/ops.py has the same numbers.
enum class Activation : int { kSilu = 1, kGeluTanh = 2, kGelu = 3 };

// out[i] = act(gate[i]) * up[i], rounded once. gate, up and out are arrays of `dtype`, and out may
// be neither of the others.
void multiply_gated(Activation activation, Dtype dtype, const void* gate, const void* up, void* out,
                    int64_t count);

}  // namespace flute::cpu
