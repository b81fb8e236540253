// The checkpoint format as plain C++: flute_vllm/format.py is the owner and
// tests/test_cpu_kernel.py::test_constants_mirror_format compares these constants with it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLUTE_HOST_DEVICE __host__ __device__
#else
#define FLUTE_HOST_DEVICE
#endif

namespace flute {

constexpr int kUnit = 32;  // weights whose codes fill whole 32-bit words at every bit width
constexpr int kMinBits = 2;
constexpr int kMaxBits = 4;
constexpr int kGroupSizes[] = {32, 64, 128, 256};
constexpr int kPerRow = -1;  // group_size that stands for one scale for each row

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

// Rows of one quantized matrix that share a table. Row numbers given to kernels are absolute, so
// the parts of a fused layer differ in `table` only.
struct Layer {
  const uint32_t* codes;   // [rows, words_per_row]: one little-endian bit stream a row
  const uint16_t* scales;  // [rows, groups] fp16 or bf16
  const uint16_t* table;   // [2^bits], or [2^(2 bits), 2] when `pair`
  Dtype dtype;             // of scales and table
  int bits;
  bool pair;
  int64_t k;
  int64_t group;  // weights that share a scale: k for kPerRow
  int64_t words_per_row;
  int64_t groups;

  FLUTE_HOST_DEVICE const uint32_t* row_codes(int64_t row) const {
    return codes + row * words_per_row;
  }
  FLUTE_HOST_DEVICE const uint16_t* row_scales(int64_t row) const { return scales + row * groups; }
};

}  // namespace flute
