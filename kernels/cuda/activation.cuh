// Gated activations: what a decoder's MLP makes of its gate and up rows.
#pragma once

#include "flute/launch.h"
#include "ptx.cuh"

namespace flute {

// act(gate) * up in fp32. `activation` is one of launch.h's, the same in all threads.
__device__ __forceinline__ float activate(int activation, float gate, float up) {
  if (activation == FLUTE_SILU) return __fdividef(gate, 1.0f + __expf(-gate)) * up;
  constexpr float kSqrtHalf = 0.70710678f, kSqrtTwoOverPi = 0.79788456f;
  const float curve = activation == FLUTE_GELU
                          ? erff(gate * kSqrtHalf)
                          : tanhf(kSqrtTwoOverPi * (gate + 0.044715f * gate * gate * gate));
  return 0.5f * gate * (1.0f + curve) * up;
}

// A gated launch: blocks that compute the same rows of gate and of up form one cluster, the gate
// rows' blocks first. Which of the two halves this block has; 0 without an activation.
template <typename Params>
__device__ __forceinline__ int half_of_block(const Params& p, int block) {
  return p.activation ? block & 1 : 0;
}
// The block's number among all row blocks, from `block`, its number in the grid.
template <typename Params>
__device__ __forceinline__ int row_block(const Params& p, int block) {
  if (!p.activation) return block;
  return (block & 1 ? p.first_block[1] : 0) + (block >> 1);
}

// Two parts of equal rows: gate and up.
inline bool is_gated(const FluteMatrix& matrix) {
  return matrix.activation != FLUTE_NO_ACTIVATION;
}
inline bool can_gate(const FluteMatrix& matrix, int splits) {
  return matrix.activation > 0 && matrix.activation <= FLUTE_GELU && matrix.parts == 2 &&
         matrix.part_rows[0] == matrix.part_rows[1] && 2 * splits <= 8;
}

}  // namespace flute
