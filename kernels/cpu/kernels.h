// What an instruction set offers, and how one is chosen.
#pragma once

#include <cstdint>

#include "flute/format.h"

namespace flute::cpu {

// One call of gemm: y[m, row] = sum over k of x[m, k] * W[row, k].
struct Job {
  const void* x;  // [m, k] contiguous
  Dtype dtype;    // of x and y
  int64_t m;
  void* y;             // [m, ldy]
  int64_t ldy;         // distance of two rows of y, in elements
  const void* packed;  // what Kernels::pack made of x; 64-byte aligned
};

struct Kernels {
  const char* name;
  // True when packed x is bf16 for this layer, so that a dense GEMM in bf16 is as exact and fast.
  bool (*computes_bf16)(const Layer& layer, Dtype x);
  // Converts and reorders row m of x for `gemm`; `packed` has room for m * k floats.
  void (*pack)(const Layer& layer, const Job& job, int64_t m, void* packed);
  // Rows [begin, end) of the weight for every row of x. A result depends on its own row of x and
  // of the weight only, never on how the caller cuts rows into ranges.
  void (*gemm)(const Layer& layer, const Job& job, int64_t begin, int64_t end);
  // Rows [begin, end) of the dense weight to `out` (row `begin` first). Products are rounded to
  // `round`, then stored as `out_dtype`, which is `round` or float32.
  void (*dequantize)(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                     void* out);
};

// Each level includes the ones before it.
enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kIsaCount = 4 };

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif

const char* isa_name(int isa);
int best_isa();             // highest level this machine runs
int current_isa();          // FLUTE_CPU_ISA, or the best; throws std::runtime_error if unusable
void request_isa(int isa);  // for tests and benchmarks; throws when this machine cannot run it
const Kernels& kernels();   // of current_isa()
bool has_amx_bf16();        // torch's dense GEMM uses it

}  // namespace flute::cpu
