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
// Processors with BF16 but without VBMI (Cooper Lake) use the AVX-512 kernels.
//
// Compiled with -mavx512bf16 -mavx512vbmi: only intrinsics and headers whose functions are
// internal.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tiles.h"

namespace flute::cpu {
namespace {

constexpr int kLanes = 32;

// C, the codes of one lane: a field must fit in 16 bits, and a block of 32*C weights must not hold
// more than the two groups whose tables fit in one register.
int codes_per_lane(const Layer& layer) {
  return layer.group % 64 == 0 || layer.groups == 1 ? 4 : 1;
}

// Where the field of each lane lies: the two bytes that hold it, and its first bit in them. Fields
// of up to 12 bits that begin at an odd multiple of their width never reach into a third byte.
template <int Field>
struct Layout {
  alignas(64) uint8_t bytes[64];
  alignas(64) uint16_t shifts[kLanes];

  constexpr Layout() : bytes(), shifts() {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int bit = Field * lane;
      shifts[lane] = bit % 8;
      bytes[2 * lane] = bit / 8;
      bytes[2 * lane + 1] = (bit / 8 + 1) % 64;  // bits above the field are never looked at
    }
  }
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
    const __m512i v = _mm512_maskz_loadu_epi32((1u << Field) - 1, p);
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(kLayout<Field>.bytes), v);
    return _mm512_srlv_epi16(bytes, _mm512_load_si512(kLayout<Field>.shifts));
  }
}

template <int Bits>
__m512 load_table(const Layer& layer) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = bf16_to_float(layer.table[i % (1 << Bits)]);
  return _mm512_loadu_ps(values);
}

__m512 scaled_products(__m512 table, const uint16_t* scale) {
  const __m512i both = _mm512_set1_epi16(short(*scale));
  const __m512i high = _mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000u)));
  return _mm512_mul_ps(table, _mm512_castsi512_ps(high));
}

// round(table * scale), twice 16 entries for each row. Two rows share a conversion: it runs on the
// pipes of vdpbf16ps, which bound M = 8, and the shuffles that repeat a half do not.
template <int R>
void scale_tables(__m512 table, const uint16_t* const (&scales)[R], int64_t group,
                  __m512i (&scaled)[R]) {
  int r = 0;
  for (; r + 2 <= R; r += 2) {
    const __m512 first = scaled_products(table, scales[r] + group);
    const __m512 second = scaled_products(table, scales[r + 1] + group);
    const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    scaled[r] = _mm512_shuffle_i64x2(rows, rows, 0x44);
    scaled[r + 1] = _mm512_shuffle_i64x2(rows, rows, 0xEE);
  }
  if (r < R) {
    const __m512 last = scaled_products(table, scales[r] + group);
    scaled[r] = (__m512i)_mm512_cvtne2ps_pbh(last, last);
  }
}

// One table for two groups of 64, each in its half of a block.
template <int R>
void scale_table_pairs(__m512 table, const uint16_t* const (&scales)[R], int64_t group,
                       __m512i (&scaled)[R]) {
  for (int r = 0; r < R; ++r) {
    const __m512 first = scaled_products(table, scales[r] + group);
    const __m512 second = scaled_products(table, scales[r] + group + 1);
    scaled[r] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  }
}

// Sends the lanes of the second half to the second half of the table.
__m512i pair_index(__m512i index) {
  const __m512i mask = _mm512_set1_epi16(15);
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  return _mm512_ternarylogic_epi32(index, mask, half, 0xEA);  // (index & mask) | half
}

__m512bh load_x(const uint16_t* x) {
  return (__m512bh)_mm512_loadu_si512(x);
}

// Pairs: groups of 64, two to a block of C = 4.
template <int Bits, int C, bool Pairs>
struct Tile {
  static constexpr int kWidth = 16, kElementBytes = 2;

  // 16 sums and their operands fit the 32 registers; R = 4 also hides the latency of vdpbf16ps.
  template <int M>
  static constexpr int rows() {
    return M == 8 ? 2 : 4;
  }

  template <int D, bool Pair, int R, int M>
  static inline __attribute__((always_inline)) void block(const uint32_t* const (&codes)[R],
                                                          int64_t offset, int64_t ahead,
                                                          const __m512i (&table)[R],
                                                          const uint16_t* x, __m512 (&sums)[R][M]) {
    __m512i fields[R];
    for (int r = 0; r < R; ++r) {
      fields[r] = load_fields<Bits * D>(codes[r] + offset);
      if (D == C)
        _mm_prefetch(reinterpret_cast<const char*>(codes[r] + offset + ahead), _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int c = 0; c < D; ++c) {
      __m512bh weights[R];
      for (int r = 0; r < R; ++r) {
        __m512i index = c == 0 ? fields[r] : _mm512_srli_epi16(fields[r], Bits * c);
        if (Pair) index = pair_index(index);
        weights[r] = (__m512bh)_mm512_permutexvar_epi16(index, table[r]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m512bh values = load_x(x + (c * M + m) * kLanes);
        for (int r = 0; r < R; ++r) sums[r][m] = _mm512_dpbf16_ps(sums[r][m], weights[r], values);
      }
    }
  }

  template <int R, int M>
  static void run(const Layer& layer, const Job& job, int64_t m, int64_t row, Span span,
                  float* partial) {
    const __m512 table = load_table<Bits>(layer);
    const uint16_t* x = static_cast<const uint16_t*>(job.packed) + m * layer.k;
    const uint32_t* codes[R];
    const uint16_t* scales[R];
    __m512 sums[R][M];
    for (int r = 0; r < R; ++r) {
      codes[r] = layer.row_codes(row + r);
      scales[r] = layer.row_scales(row + r);
      for (int j = 0; j < M; ++j)
        sums[r][j] =
            span.begin == 0 ? _mm512_setzero_ps() : _mm512_load_ps(partial + (r * M + j) * kWidth);
    }
    constexpr int kBlock = kLanes * C;
    const int64_t ahead = rows_ahead(layer);
    int64_t k = span.begin;
    __m512i scaled[R];
    for (int64_t group = k / layer.group; Pairs && k + kBlock <= span.end;
         group += 2, k += kBlock) {
      scale_table_pairs(table, scales, group, scaled);
      block<C, true>(codes, k / kUnit * Bits, ahead, scaled, x + k * M, sums);
    }
    for (int64_t group = k / layer.group; k < span.end; ++group) {
      scale_tables(table, scales, group, scaled);
      const int64_t stop = smaller((group + 1) * layer.group, span.end);
      for (; !Pairs && k + kBlock <= stop; k += kBlock)
        block<C, false>(codes, k / kUnit * Bits, ahead, scaled, x + k * M, sums);
      // What is left of a row that is no whole number of blocks; x is in order there.
      for (; k < stop; k += kLanes)
        block<1, false>(codes, k / kUnit * Bits, ahead, scaled, x + k * M, sums);
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j) _mm512_store_ps(partial + (r * M + j) * kWidth, sums[r][j]);
  }

  static float total(const float* partial) { return _mm512_reduce_add_ps(_mm512_load_ps(partial)); }
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

// Block order of x: value of code c of lane l, which is element C*l + c, goes to vector c, lane l.
void pack(const Layer& layer, const Job& job, int64_t m, void* packed) {
  if (!is_ours(layer, job.dtype)) return avx512_kernels().pack(layer, job, m, packed);
  const uint16_t* x = static_cast<const uint16_t*>(job.x) + m * layer.k;
  const Place place = place_of(job.m, m);
  const auto load = [&](int64_t v) { return _mm512_loadu_si512(x + v * kLanes); };
  const auto store = [&](int64_t v, __m512i values) {
    _mm512_store_si512(static_cast<uint16_t*>(packed) + place.vector(layer.k, v, kLanes), values);
  };
  const int lane_codes = codes_per_lane(layer);
  const int64_t vectors = layer.k / kLanes;
  int64_t v = 0;
  for (; lane_codes == 4 && v + 4 <= vectors; v += 4) {
    const Halves low = deinterleave(load(v), load(v + 1));
    const Halves high = deinterleave(load(v + 2), load(v + 3));
    const Halves even = deinterleave(low.even, high.even), odd = deinterleave(low.odd, high.odd);
    store(v, even.even);
    store(v + 1, odd.even);
    store(v + 2, even.odd);
    store(v + 3, odd.odd);
  }
  for (; v < vectors; ++v) store(v, load(v));
}

template <int Bits>
void gemm_bits(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  if (codes_per_lane(layer) == 1) return sweep<Tile<Bits, 1, false>>(layer, job, begin, end);
  if (layer.group == 64) return sweep<Tile<Bits, 4, true>>(layer, job, begin, end);
  sweep<Tile<Bits, 4, false>>(layer, job, begin, end);
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
