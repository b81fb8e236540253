// Scalar fp16 and bf16 conversions, round to nearest even, subnormals kept.
//
// Everything is in an anonymous namespace: each ISA translation unit compiles its own copy, so the
// linker can never keep a copy with AVX-512 instructions for a machine that lacks them.
#pragma once

#include <cstdint>
#include <cstring>

#include "flute/format.h"

namespace flute::cpu {
namespace {

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

inline float bf16_to_float(uint16_t h) {
  return bits_to_float(uint32_t(h) << 16);
}

inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t((u >> 16) | 0x40);  // keep NaN a NaN
  return uint16_t((u + 0x7FFFu + ((u >> 16) & 1)) >> 16);
}

inline float fp16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7FFF;
  if (body >= 0x7C00) return bits_to_float(sign | 0x7F800000u | (body & 0x3FF) << 13);
  // A subnormal is its integer times 2^-24; the product is exact in fp32.
  if (body < 0x400) return bits_to_float(sign | float_to_bits(float(body) * 0x1p-24f));
  return bits_to_float(sign | ((body << 13) + (112u << 23)));
}

inline uint16_t float_to_fp16(float f) {
  const uint32_t u = float_to_bits(f), magnitude = u & 0x7FFFFFFFu;
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  if (magnitude > 0x7F800000u) return sign | 0x7E00;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: subnormal in fp16
    // Adding 0.5 leaves the value in units of 2^-24 in the mantissa, rounded by the FPU.
    return sign | uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u);
  }
  return sign | uint16_t((magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1)) >> 13);
}

inline float widen(uint16_t value, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? bf16_to_float(value) : fp16_to_float(value);
}

inline float round_to(float value, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return bf16_to_float(float_to_bf16(value));
  if (dtype == Dtype::kFloat16) return fp16_to_float(float_to_fp16(value));
  return value;
}

inline float load_value(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[index];
  return widen(static_cast<const uint16_t*>(data)[index], dtype);
}

inline void store_value(void* data, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == Dtype::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
  }
}

}  // namespace
}  // namespace flute::cpu
