// Activations in float32, written so that any compiler makes vectors of them: no branch and no call
// in the loops but those of the exact GELU, which has no short formula.
#include "gated.h"

#include <algorithm>
#include <cmath>

#include "half.h"

namespace flute::cpu {
namespace {

constexpr int64_t kBlock = 256;  // values at a time: three blocks stay in the first level of cache

// e^x within 2 units in the last place; 0 below e^-86, +inf beyond float32, NaN for NaN.
inline float exponential(float x) {
  constexpr float kHighest = 88.72283f, kLowest = -86.0f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = std::min(std::max(x, kLowest), kHighest);
  const float shifted = bounded * 1.44269504f + kRounder;
  const float n = shifted - kRounder;
  // ln 2 in two parts, the first (355 / 512) short enough for exact products.
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  // (e^r - 1 - r) / r^2 at six Chebyshev nodes of [-ln 2 / 2, ln 2 / 2].
  float p = 1.98909911e-4f;
  p = p * r + 1.39336498e-3f;
  p = p * r + 8.33331048e-3f;
  p = p * r + 4.16664667e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 5.00000000e-1f;
  const float mantissa = p * r * r + r + 1.0f;
  // 2^n in two factors: n may be 128, which is one more than an exponent holds.
  const uint32_t exponent = float_to_bits(shifted) - float_to_bits(kRounder);
  const float half = bits_to_float(((exponent - 1) << 23) + 0x3F800000u);
  const float value = mantissa * half * 2.0f;
  const float capped = x > kHighest ? INFINITY : value;
  return x < kLowest ? 0.0f : capped;
}

struct Silu {
  static float of(float x) { return x / (1.0f + exponential(-x)); }
};

struct GeluTanh {
  // (1 + tanh(u)) / 2 is the logistic function of 2u, without the cancellation for u below zero.
  static float of(float x) {
    constexpr float kTwoOverSqrt = 1.59576912f;  // 2 sqrt(2 / pi)
    const float u = kTwoOverSqrt * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-u));
  }
};

struct Gelu {
  static float of(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.707106781f)); }
};

template <Dtype dtype>
void load(const void* data, int64_t begin, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = load_value(data, dtype, begin + i);
}

template <class Function, Dtype dtype>
void run(const void* gate, const void* up, void* out, int64_t count) {
  float gates[kBlock], ups[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    load<dtype>(gate, begin, size, gates);
    load<dtype>(up, begin, size, ups);
    for (int64_t i = 0; i < size; ++i) gates[i] = Function::of(gates[i]) * ups[i];
    for (int64_t i = 0; i < size; ++i) store_value(out, dtype, begin + i, gates[i]);
  }
}

template <class Function>
void run_any(Dtype dtype, const void* gate, const void* up, void* out, int64_t count) {
  if (dtype == Dtype::kFloat32)
    run<Function, Dtype::kFloat32>(gate, up, out, count);
  else if (dtype == Dtype::kBFloat16)
    run<Function, Dtype::kBFloat16>(gate, up, out, count);
  else
    run<Function, Dtype::kFloat16>(gate, up, out, count);
}

}  // namespace

void multiply_gated(Activation activation, Dtype dtype, const void* gate, const void* up, void* out,
                    int64_t count) {
  if (activation == Activation::kSilu)
    run_any<Silu>(dtype, gate, up, out, count);
  else if (activation == Activation::kGeluTanh)
    run_any<GeluTanh>(dtype, gate, up, out, count);
  else
    run_any<Gelu>(dtype, gate, up, out, count);
}

}  // namespace flute::cpu
