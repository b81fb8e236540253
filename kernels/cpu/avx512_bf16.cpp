// AVX-512 with BF16: bf16 activations and bf16 scales. Weights never leave 16-bit lanes.
//
// A block is 32*C consecutive weights, C codes for each 16-bit lane. One shuffle and one shift
// bring the field of C codes to its lane; then each code costs a table look-up (vpermw) and a
// vdpbf16ps, with a shift between two codes. No masks: the table is repeated, so that the bits of
// later codes above an index do not matter. x is reordered once per call to the order of lanes.
//
// vdpbf16ps and vcvtne2ps2bf16 treat subnormal inputs as zero and the former rounds each of its
// two additions; neither is visible at the magnitudes of a model (below 2^-126).
//
// Compiled with -mavx512bf16: only intrinsics and headers whose functions are internal.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tiles.h"

namespace flute::cpu {
namespace {

constexpr int kLanes = 32;

// C, the codes of one lane: a block must not cross a group, and a field must fit in 16 bits.
int codes_per_lane(const Layer& layer) {
  if (layer.group % 128 == 0 || layer.groups == 1) return 4;
  return layer.group % 64 == 0 ? 2 : 1;
}

// Where the field of each lane lies. 128-bit quarter q of the register is given the four dwords
// from `first(q)` of the block; the shuffle then works within the quarter.
template <int Field>
struct Layout {
  alignas(64) uint32_t dwords[16];
  alignas(64) uint8_t bytes[64];
  alignas(64) uint16_t shifts[kLanes];

  constexpr Layout() : dwords(), bytes(), shifts() {
    for (int i = 0; i < 16; ++i) {
      const int dword = first(i / 4) + i % 4;
      dwords[i] = dword < Field ? dword : 0;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int bit = Field * lane, low = bit / 8 - 4 * first(lane / 8);
      shifts[lane] = bit % 8;
      bytes[2 * lane] = low;
      bytes[2 * lane + 1] = bit % 8 + Field > 8 ? low + 1 : 0x80;  // 0x80: zero, not out of range
    }
  }
  // A block has Field dwords; up to four are simply repeated in each quarter.
  static constexpr int first(int quarter) { return Field <= 4 ? 0 : Field * quarter / 4; }
};

template <int Field>
inline constexpr Layout<Field> kLayout{};

// The block at p, field of lane l in the low bits of 16-bit lane l. Reads 4 * Field bytes, so the
// last block of the last row never reads past the tensor.
template <int Field>
__m512i load_fields(const uint32_t* p) {
  if constexpr (Field == 16) {
    return _mm512_loadu_si512(p);
  } else if constexpr (Field == 8) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else {
    __m512i v;
    if constexpr (Field == 4) {
      v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else if constexpr (Field == 2) {
      v = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    } else {
      v = _mm512_maskz_loadu_epi32((1u << Field) - 1, p);
      v = _mm512_permutexvar_epi32(_mm512_load_si512(kLayout<Field>.dwords), v);
    }
    v = _mm512_shuffle_epi8(v, _mm512_load_si512(kLayout<Field>.bytes));
    return _mm512_srlv_epi16(v, _mm512_load_si512(kLayout<Field>.shifts));
  }
}

template <int Bits>
__m512 load_table(const Layer& layer) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = bf16_to_float(layer.table[i % (1 << Bits)]);
  return _mm512_loadu_ps(values);
}

// round(table * scale), twice 16 entries.
__m512i scale_table(__m512 table, const uint16_t* scale) {
  const __m512i both = _mm512_set1_epi16(short(*scale));
  const __m512i high = _mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000u)));
  const __m512 product = _mm512_mul_ps(table, _mm512_castsi512_ps(high));
  return (__m512i)_mm512_cvtne2ps_pbh(product, product);
}

__m512bh load_x(const uint16_t* x) {
  return (__m512bh)_mm512_loadu_si512(x);
}

template <int Bits, int C>
struct Tile {
  // 16 sums and their operands fit the 32 registers; R = 4 also hides the latency of vdpbf16ps.
  template <int M>
  static constexpr int rows() {
    return M == 8 ? 2 : 4;
  }

  template <int D, int R, int M>
  static inline __attribute__((always_inline)) void block(const uint32_t* const (&codes)[R],
                                                          int64_t offset, const __m512i (&table)[R],
                                                          const uint16_t* x, int64_t stride,
                                                          __m512 (&sums)[R][M]) {
    __m512i fields[R];
    for (int r = 0; r < R; ++r) fields[r] = load_fields<Bits * D>(codes[r] + offset);
#pragma GCC unroll 4
    for (int c = 0; c < D; ++c) {
      __m512bh weights[R];
      for (int r = 0; r < R; ++r) {
        const __m512i index = c == 0 ? fields[r] : _mm512_srli_epi16(fields[r], Bits * c);
        weights[r] = (__m512bh)_mm512_permutexvar_epi16(index, table[r]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m512bh values = load_x(x + m * stride + c * kLanes);
        for (int r = 0; r < R; ++r) sums[r][m] = _mm512_dpbf16_ps(sums[r][m], weights[r], values);
      }
    }
  }

  template <int R, int M>
  static void run(const Layer& layer, const Job& job, int64_t m, int64_t row, float* out) {
    const __m512 table = load_table<Bits>(layer);
    const uint16_t* x = static_cast<const uint16_t*>(job.packed) + m * layer.k;
    const uint32_t* codes[R];
    const uint16_t* scales[R];
    __m512 sums[R][M];
    for (int r = 0; r < R; ++r) {
      codes[r] = layer.row_codes(row + r);
      scales[r] = layer.row_scales(row + r);
      for (int j = 0; j < M; ++j) sums[r][j] = _mm512_setzero_ps();
    }
    constexpr int kBlock = kLanes * C;
    int64_t k = 0;
    for (int64_t group = 0; group < layer.groups; ++group) {
      __m512i scaled[R];
      for (int r = 0; r < R; ++r) scaled[r] = scale_table(table, scales[r] + group);
      const int64_t stop = k + layer.group;
      for (; k + kBlock <= stop; k += kBlock)
        block<C>(codes, k / kUnit * Bits, scaled, x + k, layer.k, sums);
      // Only with one scale for each row can a group end within a block; x is in order there.
      for (; k < stop; k += kLanes) block<1>(codes, k / kUnit * Bits, scaled, x + k, layer.k, sums);
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j) out[r * M + j] = _mm512_reduce_add_ps(sums[r][j]);
  }
};

bool computes_bf16(const Layer& layer, Dtype x) {
  return x == Dtype::kBFloat16 && layer.dtype == Dtype::kBFloat16;
}

bool is_ours(const Layer& layer, Dtype x) {
  return computes_bf16(layer, x) && !layer.pair;
}

struct Halves {
  __m512i even, odd;
};

alignas(64) constexpr uint16_t kEven[kLanes] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                44, 46, 48, 50, 52, 54, 56, 58, 60, 62};

Halves deinterleave(__m512i a, __m512i b) {
  const __m512i even = _mm512_load_si512(kEven);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi16(1));
  return {_mm512_permutex2var_epi16(a, even, b), _mm512_permutex2var_epi16(a, odd, b)};
}

// Block order of x: value of code c of lane l, which is element C*l + c, goes to 32*c + l.
void pack(const Layer& layer, const Job& job, int64_t m, void* packed) {
  if (!is_ours(layer, job.dtype)) return avx512_kernels().pack(layer, job, m, packed);
  const uint16_t* x = static_cast<const uint16_t*>(job.x) + m * layer.k;
  uint16_t* out = static_cast<uint16_t*>(packed) + m * layer.k;
  const int lane_codes = codes_per_lane(layer);
  const int64_t blocks = lane_codes == 1 ? 0 : layer.k / (kLanes * lane_codes);
  for (int64_t b = 0; b < blocks; ++b, x += kLanes * lane_codes, out += kLanes * lane_codes) {
    Halves low = deinterleave(_mm512_loadu_si512(x), _mm512_loadu_si512(x + kLanes));
    if (lane_codes == 2) {
      _mm512_storeu_si512(out, low.even);
      _mm512_storeu_si512(out + kLanes, low.odd);
      continue;
    }
    const Halves high =
        deinterleave(_mm512_loadu_si512(x + 2 * kLanes), _mm512_loadu_si512(x + 3 * kLanes));
    const Halves even = deinterleave(low.even, high.even), odd = deinterleave(low.odd, high.odd);
    _mm512_storeu_si512(out, even.even);
    _mm512_storeu_si512(out + kLanes, odd.even);
    _mm512_storeu_si512(out + 2 * kLanes, even.odd);
    _mm512_storeu_si512(out + 3 * kLanes, odd.odd);
  }
  const int64_t rest = layer.k - blocks * kLanes * lane_codes;
  for (int64_t k = 0; k < rest; k += kLanes)
    _mm512_storeu_si512(out + k, _mm512_loadu_si512(x + k));
}

template <int Bits>
void gemm_bits(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  switch (codes_per_lane(layer)) {
    case 4:
      return sweep<Tile<Bits, 4>>(layer, job, begin, end);
    case 2:
      return sweep<Tile<Bits, 2>>(layer, job, begin, end);
    default:
      return sweep<Tile<Bits, 1>>(layer, job, begin, end);
  }
}

void gemm(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  if (!is_ours(layer, job.dtype)) return avx512_kernels().gemm(layer, job, begin, end);
  switch (layer.bits) {
    case 2:
      return gemm_bits<2>(layer, job, begin, end);
    case 3:
      return gemm_bits<3>(layer, job, begin, end);
    default:
      return gemm_bits<4>(layer, job, begin, end);
  }
}

// Dense rows go through the exact conversions of the AVX-512 kernels: they keep subnormals.
void dequantize(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                void* out) {
  avx512_kernels().dequantize(layer, begin, end, round, out_dtype, out);
}

}  // namespace

const Kernels& avx512_bf16_kernels() {
  static const Kernels table = {"avx512_bf16", computes_bf16, pack, gemm, dequantize};
  return table;
}

}  // namespace flute::cpu
#endif
