// AVX-512 in fp32 lanes: any mix of activation and scale dtypes on machines without BF16, and
// everything that is not bf16 on machines with it. Also the exact dense weight, for `dequantize`
// and for large M.
//
// A half unit is 16 weights in natural order: one byte shuffle and one shift bring each code to
// its 32-bit lane, one vpermps looks it up. The table is repeated to 16 entries, so bits above the
// code do not matter.
//
// Compiled with -mavx512f -mavx512bw -mavx512vl: see half.h about functions in headers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tiles.h"

namespace flute::cpu {
namespace {

constexpr int kLanes = 16;

template <int Bits>
struct Layout {
  alignas(64) uint8_t bytes[2][64];
  alignas(64) uint32_t shifts[2][kLanes];

  constexpr Layout() : bytes(), shifts() {
    for (int i = 0; i < kUnit; ++i) {
      const int half = i / kLanes, lane = i % kLanes, bit = Bits * i;
      shifts[half][lane] = bit % 8;
      const bool spills = bit % 8 + Bits > 8;
      for (int b = 0; b < 4; ++b)
        bytes[half][4 * lane + b] = b == 0 || (b == 1 && spills) ? bit / 8 + b : 0x80;
    }
  }
};

template <int Bits>
inline constexpr Layout<Bits> kLayout{};

// The 4 * Bits bytes of a unit in every 128-bit quarter; nothing beyond them is read.
template <int Bits>
__m512i load_unit(const uint32_t* p) {
  if constexpr (Bits == 4) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else {
    return _mm512_broadcast_i32x4(_mm_maskz_loadu_epi32((1u << Bits) - 1, p));
  }
}

template <int Bits>
__m512 decode_half(__m512i unit, int half, __m512 table) {
  const __m512i fields = _mm512_shuffle_epi8(unit, _mm512_load_si512(kLayout<Bits>.bytes[half]));
  const __m512i index = _mm512_srlv_epi32(fields, _mm512_load_si512(kLayout<Bits>.shifts[half]));
  return _mm512_permutexvar_ps(index, table);
}

template <int Bits>
__m512 load_table(const Layer& layer) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = widen(layer.table[i % (1 << Bits)], layer.dtype);
  return _mm512_loadu_ps(values);
}

__m512i bf16_bits(__m512 v) {  // rounded to nearest even, in the low half of each lane
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_srli_epi32(_mm512_mask_or_epi32(sum, nan, u, _mm512_set1_epi32(0x400000)), 16);
}

__m512 round_lanes(__m512 v, Dtype round) {
  if (round == Dtype::kBFloat16) return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(v), 16));
  if (round == Dtype::kFloat16)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return v;
}

template <Dtype Scale>
__m512 scale_table(__m512 table, uint16_t scale) {
  const __m512 factor = Scale == Dtype::kBFloat16
                            ? _mm512_set1_ps(bf16_to_float(scale))
                            : _mm512_cvtph_ps(_mm256_set1_epi16(short(scale)));
  return round_lanes(_mm512_mul_ps(table, factor), Scale);
}

__m512 load_float(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat32) return _mm512_loadu_ps(static_cast<const float*>(data) + index);
  const uint16_t* p = static_cast<const uint16_t*>(data) + index;
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (dtype == Dtype::kFloat16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

template <int Bits, Dtype Scale>
struct Tile {
  static constexpr int kWidth = 16, kElementBytes = 4;

  template <int M>
  static constexpr int rows() {
    return M == 8 ? 2 : 4;
  }

  template <int R, int M>
  static void run(const Layer& layer, const Job& job, int64_t m, int64_t row, Span span,
                  float* partial) {
    const __m512 table = load_table<Bits>(layer);
    const float* x = static_cast<const float*>(job.packed) + m * layer.k;
    __m512 sums[R][M];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j)
        sums[r][j] =
            span.begin == 0 ? _mm512_setzero_ps() : _mm512_load_ps(partial + (r * M + j) * kWidth);
    const int64_t ahead = rows_ahead(layer);
    int64_t k = span.begin;
    for (int64_t group = k / layer.group; k < span.end; ++group) {
      __m512 scaled[R];
      for (int r = 0; r < R; ++r)
        scaled[r] = scale_table<Scale>(table, layer.row_scales(row + r)[group]);
      const int64_t stop = smaller((group + 1) * layer.group, span.end);
      for (; k < stop; k += kUnit) {
        __m512i units[R];
        for (int r = 0; r < R; ++r) {
          const uint32_t* codes = layer.row_codes(row + r) + k / kUnit * Bits;
          units[r] = load_unit<Bits>(codes);
          _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T1);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m512 weights[R];
          for (int r = 0; r < R; ++r) weights[r] = decode_half<Bits>(units[r], half, scaled[r]);
#pragma GCC unroll 8
          for (int j = 0; j < M; ++j) {
            const __m512 values = _mm512_load_ps(x + (k + half * kLanes) * M + j * kLanes);
            for (int r = 0; r < R; ++r)
              sums[r][j] = _mm512_fmadd_ps(weights[r], values, sums[r][j]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j) _mm512_store_ps(partial + (r * M + j) * kWidth, sums[r][j]);
  }

  static float total(const float* partial) { return _mm512_reduce_add_ps(_mm512_load_ps(partial)); }
};

bool computes_bf16(const Layer&, Dtype) {
  return false;
}

void pack(const Layer& layer, const Job& job, int64_t m, void* packed) {
  if (layer.pair) return portable_kernels().pack(layer, job, m, packed);
  const Place place = place_of(job.m, m);
  float* out = static_cast<float*>(packed);
  for (int64_t v = 0; v < layer.k / kLanes; ++v)
    _mm512_store_ps(out + place.vector(layer.k, v, kLanes),
                    load_float(job.x, job.dtype, m * layer.k + v * kLanes));
}

template <int Bits>
void gemm_bits(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  if (layer.dtype == Dtype::kBFloat16)
    sweep<Tile<Bits, Dtype::kBFloat16>>(layer, job, begin, end);
  else
    sweep<Tile<Bits, Dtype::kFloat16>>(layer, job, begin, end);
}

void gemm(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  if (layer.pair) return portable_kernels().gemm(layer, job, begin, end);
  switch (layer.bits) {
    case 2:
      return gemm_bits<2>(layer, job, begin, end);
    case 3:
      return gemm_bits<3>(layer, job, begin, end);
    default:
      return gemm_bits<4>(layer, job, begin, end);
  }
}

template <int Bits>
void dequantize_floats(const Layer& layer, int64_t begin, int64_t end, Dtype round, float* out) {
  const __m512 table = load_table<Bits>(layer);
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t* codes = layer.row_codes(row);
    for (int64_t group = 0; group < layer.groups; ++group) {
      const float scale = widen(layer.row_scales(row)[group], layer.dtype);
      const __m512 scaled = round_lanes(_mm512_mul_ps(table, _mm512_set1_ps(scale)), round);
      for (int64_t k = 0; k < layer.group; k += kUnit, codes += Bits, out += kUnit) {
        const __m512i unit = load_unit<Bits>(codes);
        _mm512_storeu_ps(out, decode_half<Bits>(unit, 0, scaled));
        _mm512_storeu_ps(out + kLanes, decode_half<Bits>(unit, 1, scaled));
      }
    }
  }
}

// The field of each of 32 codes in 16-bit lanes, for tables of 16-bit values.
template <int Bits>
struct WordLayout {
  alignas(64) uint8_t bytes[64];
  alignas(64) uint16_t shifts[kUnit];

  constexpr WordLayout() : bytes(), shifts() {
    for (int i = 0; i < kUnit; ++i) {
      const int bit = Bits * i;
      shifts[i] = bit % 8;
      bytes[2 * i] = bit / 8;
      bytes[2 * i + 1] = bit % 8 + Bits > 8 ? bit / 8 + 1 : 0x80;
    }
  }
};

template <int Bits>
inline constexpr WordLayout<Bits> kWordLayout{};

// Scaled entries are rounded once and looked up as 16-bit values: 4 times faster than rounding
// each weight, and what large M spends beside torch's GEMM.
template <int Bits>
void dequantize_halves(const Layer& layer, int64_t begin, int64_t end, Dtype round, uint16_t* out) {
  const __m512 table = load_table<Bits>(layer);
  const __m512i bytes = _mm512_load_si512(kWordLayout<Bits>.bytes);
  const __m512i shifts = _mm512_load_si512(kWordLayout<Bits>.shifts);
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t* codes = layer.row_codes(row);
    for (int64_t group = 0; group < layer.groups; ++group) {
      const float scale = widen(layer.row_scales(row)[group], layer.dtype);
      const __m512 product = _mm512_mul_ps(table, _mm512_set1_ps(scale));
      const __m256i half = round == Dtype::kBFloat16
                               ? _mm512_cvtepi32_epi16(bf16_bits(product))
                               : _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT);
      const __m512i scaled = _mm512_broadcast_i64x4(half);
      for (int64_t k = 0; k < layer.group; k += kUnit, codes += Bits, out += kUnit) {
        const __m512i fields = _mm512_shuffle_epi8(load_unit<Bits>(codes), bytes);
        const __m512i index = _mm512_srlv_epi16(fields, shifts);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, scaled));
      }
    }
  }
}

template <int Bits>
void dequantize_bits(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                     void* out) {
  if (out_dtype == Dtype::kFloat32)
    dequantize_floats<Bits>(layer, begin, end, round, static_cast<float*>(out));
  else
    dequantize_halves<Bits>(layer, begin, end, out_dtype, static_cast<uint16_t*>(out));
}

void dequantize(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                void* out) {
  if (layer.pair) return portable_kernels().dequantize(layer, begin, end, round, out_dtype, out);
  switch (layer.bits) {
    case 2:
      return dequantize_bits<2>(layer, begin, end, round, out_dtype, out);
    case 3:
      return dequantize_bits<3>(layer, begin, end, round, out_dtype, out);
    default:
      return dequantize_bits<4>(layer, begin, end, round, out_dtype, out);
  }
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels table = {"avx512", computes_bf16, pack, gemm, dequantize};
  return table;
}

}  // namespace flute::cpu
#endif
