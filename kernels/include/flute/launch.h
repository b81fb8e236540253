// What the CUDA side offers: plain C, no torch, no exceptions. Every function returns 0 or an error
// that flute_error_text turns into words. Pointers are device pointers unless said otherwise.
#ifndef FLUTE_LAUNCH_H_
#define FLUTE_LAUNCH_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLUTE_API __attribute__((visibility("default")))
#define FLUTE_MAX_PARTS 16
#define FLUTE_MAX_M 32
#define FLUTE_MAX_NORM 32768

enum { FLUTE_FLOAT16 = 0, FLUTE_BFLOAT16 = 1, FLUTE_FLOAT32 = 2 };  // the last: flute_activate's

// Of a gated product, act(gate) * up: as torch's silu, gelu(approximate="tanh") and gelu.
enum { FLUTE_NO_ACTIVATION = 0, FLUTE_SILU = 1, FLUTE_GELU_TANH = 2, FLUTE_GELU = 3 };

// One quantized matrix [n, k]; the parts of a fused matrix follow one another along n.
typedef struct {
  int32_t n, k;
  int32_t bits;                        // 2, 3, 4
  int32_t group_size;                  // 32, 64, 128, 256, or -1: one scale per row
  int32_t dtype;                       // of x, y, scales and table
  int32_t pair_table;                  // 0: table [parts, 2^bits]; 1: [parts, 2^(2 bits), 2];
                                       // either begins at a multiple of four bytes
  int32_t parts;                       // 1 .. FLUTE_MAX_PARTS
  int32_t part_rows[FLUTE_MAX_PARTS];  // sums to n
  int32_t activation;                  // if not 0: the parts are gate and up, both of n / 2 rows,
                                       // and y [m, n / 2] = act(x gate^T) * x up^T; on compute
                                       // capability 9.0, from launches whose 2 * splits blocks fit
                                       // a cluster and, of flute_sm90_gemm, where row_tiles are no
                                       // more than 4 * row_groups and columns below 192
} FluteMatrix;

// How a decode launch is cut; flute_vllm/tuning/ chooses it.
typedef struct {
  int32_t row_tiles;  // 16-row tiles that one block computes
  int32_t row_warps;  // groups of a block's warps that share these tiles: 1, 2, 4, 8, 16; within a
                      // group the warps split k
  int32_t splits;     // blocks of a cluster that split k: 1, 2, 4 or 8
  int32_t slots;      // requests in flight per warp; 0: as many as serve
  int32_t warps;      // of a block: 16, or 8 for up to 8 rows of x where two blocks shall fit a
                      // multiprocessor (code for compute capability 9.0 and later)
  int32_t overlap;    // 0: start after the previous kernel. n > 0: programmatic dependent launch
                      // with n of the slots requested before the previous kernel has finished
} FluteDecodeConfig;

// How a launch of the Hopper kernel for more rows of x is cut; flute_vllm/tuning/ chooses it.
typedef struct {
  int32_t columns;     // rows of x that a block computes: 16, 32, 64, 128; 192, 256
  int32_t warpgroups;  // of a block, that multiply: 4, or 8 for 16 and 32 columns
  int32_t row_tiles;   // 16-row tiles of w that a block computes
  int32_t row_groups;  // groups of warpgroups that share these tiles: 1, 2, 4, 8; in a group they
                       // split k
  int32_t splits;      // blocks of a cluster that split k: 1, 2, 4 or 8
  int32_t stages;      // of weights in shared memory: one k tile each with 8 warpgroups, else two
  int32_t x_stages;    // k tiles of x there, for each of the warpgroups that split k
  int32_t overlap;     // as above, in steps
  // With 192 or 256 columns another kernel runs, for tables of single values only: warpgroups and
  // row_groups are 2, row_tiles 8; splits (1, 2) blocks share a tile of y if the last round has
  // few, or with splits 0 all blocks share the tiles that fill no round; x_stages are halves of
  // k tiles.
} FluteSm90Config;

// What a launch asks L2 to fetch as it ends: `bytes` of the `total` bytes of the records that are
// read next, spread evenly over them. Only a hint, used by devices that have bulk copies.
typedef struct {
  const void* records;
  int64_t total, bytes;
} FluteAhead;

// Words (int32) of the internal layout of a matrix; -1 where a shape has none, as it is not legal
// or would take 64 GiB and more. Records begin at a multiple of 128 bytes.
FLUTE_API int64_t flute_record_words(const FluteMatrix* matrix);

// Canonical qweight int32 [n, k/32*bits] and scales [n, groups] to the internal layout.
FLUTE_API int flute_repack(const FluteMatrix* matrix, const void* qweight, const void* scales,
                           void* records, void* stream);

// Internal layout to w [n, k] = round(table[code] * scale).
FLUTE_API int flute_dequantize(const FluteMatrix* matrix, const void* records, const void* table,
                               void* w, void* stream);

// y [m, n] = x [m, k] * w^T, 1 <= m <= FLUTE_MAX_M. x must be 16-byte aligned and contiguous.
// `ahead` (on the host) may be null.
FLUTE_API int flute_decode(const FluteMatrix* matrix, const FluteDecodeConfig* config, int32_t m,
                           const void* x, const void* records, const void* table, void* y,
                           const FluteAhead* ahead, void* stream);

// The same from bit planes, on compute capability 9.0: m = 1, 2 bits, groups of 128 and longer,
// tables of single values; warps are 32, row_warps up to that. Each 128 columns of x are rounded to
// 15 bits: a value is off by at most 2^-14 of the largest of them, or 2^-28 where the others are
// much smaller than that one. What is infinite or not a number in x makes all of y not a number.
FLUTE_API int flute_planes(const FluteMatrix* matrix, const FluteDecodeConfig* config, int32_t m,
                           const void* x, const void* records, const void* table, void* y,
                           const FluteAhead* ahead, void* stream);

// Bytes of the workspace that flute_sm90_gemm needs on the current device: 0 unless splits are 0.
FLUTE_API int64_t flute_sm90_workspace(const FluteSm90Config* config);

// The same for any m, on compute capability 9.0. `workspace` is aligned to 16 bytes, its contents
// are any; launches that may run at the same time need different ones. It may be null where it
// needs no bytes.
FLUTE_API int flute_sm90_gemm(const FluteMatrix* matrix, const FluteSm90Config* config, int32_t m,
                              const void* x, const void* records, const void* table, void* y,
                              void* workspace, const FluteAhead* ahead, void* stream);

// y [m, n] = act(x[:, :n]) * x[:, n:] for x [m, 2 n], all contiguous: a gated product's second step
// where its launch has none.
FLUTE_API int flute_activate(int32_t activation, int32_t dtype, int64_t m, int64_t n, const void* x,
                             void* y, void* stream);

// y [m, n] = v / sqrt(mean of v^2 + epsilon) * (weight [n] + weight_offset), where v = x + residual
// in fp32 and sums [m, n] = v rounded; or v = x, if residual and sums are null. 16 bits,
// contiguous, aligned to 16 bytes; n a multiple of 8, at most FLUTE_MAX_NORM. As a GEMM's records,
// weight is read before the launches ahead have ended: none of them may write it.
FLUTE_API int flute_rms_norm(int32_t dtype, int32_t m, int32_t n, float epsilon,
                             float weight_offset, const void* x, const void* residual,
                             const void* weight, void* y, void* sums, void* stream);

FLUTE_API const char* flute_error_text(int error);

// ---- any number of rows of x, on sm_80 and later ------------------------------------------------

// How a tile launch is cut; flute_vllm/tuning/tile.py chooses it.
typedef struct {
  int32_t tokens;        // rows of x in a block, beside 128 rows of w: 64 or 128
  int32_t splits;        // shares of k, summed in a second pass: 1 .. tiles of 128 columns
  int32_t x_slots;       // steps of x in shared memory, 2 .. 5
  int32_t record_slots;  // k tiles of w there, at most 8; a k tile has tokens / 64 steps, and
                         // x_slots - 1 <= (record_slots - 1) * steps
} FluteTileConfig;

// Bytes of the workspace that flute_tile needs: 0 without splits.
FLUTE_API int64_t flute_tile_workspace(const FluteMatrix* matrix, const FluteTileConfig* config,
                                       int32_t m);

// y [m, n] = x [m, k] * w^T with w = round(table[code] * scale), m >= 1. x and workspace must be
// 16-byte aligned, x contiguous.
FLUTE_API int flute_tile(const FluteMatrix* matrix, const FluteTileConfig* config, int32_t m,
                         const void* x, const void* records, const void* table, void* y,
                         void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // FLUTE_LAUNCH_H_
