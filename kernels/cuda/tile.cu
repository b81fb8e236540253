// The entry of the tile kernels, and the second pass of those that split k.
#include <cuda_runtime.h>

#include "tile_launch.cuh"

namespace flute {
namespace {

constexpr int kSumThreads = 256;
constexpr int kSumEach = 4;  // elements of a thread

// y = sum of `splits` shares, in their order. Aligned: y takes four elements at a time.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float* workspace, T* y, int64_t size, int splits) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kSumEach;
  if (at >= size) return;
  const int count = static_cast<int>(min(size - at, static_cast<int64_t>(kSumEach)));
  float sum[kSumEach] = {};
#pragma unroll 4
  for (int split = 0; split < splits; split++) {
    const float* share = workspace + split * size + at;
    if (Aligned) {
      const float4 v = *reinterpret_cast<const float4*>(share);
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    } else {
#pragma unroll
      for (int i = 0; i < kSumEach; i++)
        if (i < count) sum[i] += share[i];
    }
  }
  store_four(y + at, make_float4(sum[0], sum[1], sum[2], sum[3]), count, Aligned);
}

template <typename T>
cudaError_t sum_shares(const void* workspace, void* y, int64_t size, int splits,
                       cudaStream_t stream) {
  constexpr int64_t kBlock = kSumThreads * kSumEach;
  const bool aligned = size % kSumEach == 0 && reinterpret_cast<uintptr_t>(y) % 8 == 0;
  const unsigned blocks = static_cast<unsigned>((size + kBlock - 1) / kBlock);
  const auto kernel = aligned ? sum_kernel<T, true> : sum_kernel<T, false>;
  kernel<<<blocks, kSumThreads, 0, stream>>>(static_cast<const float*>(workspace),
                                             static_cast<T*>(y), size, splits);
  return cudaGetLastError();
}

}  // namespace
}  // namespace flute

extern "C" {

int64_t flute_tile_workspace(const FluteMatrix* matrix, const FluteTileConfig* config, int32_t m) {
  return config->splits > 1 ? static_cast<int64_t>(config->splits) * m * matrix->n * 4 : 0;
}

int flute_tile(const FluteMatrix* matrix, const FluteTileConfig* config, int32_t m, const void* x,
               const void* records, const void* table, void* y, void* workspace, void* stream) {
  if (flute_record_words(matrix) < 0 || m < 1 || !flute::operands_aligned(x, table))
    return flute::kBadShape;
  if (matrix->activation != FLUTE_NO_ACTIVATION ||
      (config->splits > 1 && (!workspace || reinterpret_cast<uintptr_t>(workspace) % 16)))
    return flute::kBadConfig;
  auto* s = static_cast<cudaStream_t>(stream);
  const auto tile = matrix->bits == 4   ? flute::tile_w4
                    : matrix->bits == 3 ? flute::tile_w3
                                        : flute::tile_w2;
  const int error = tile(*matrix, *config, m, x, records, table, y, workspace, s);
  if (error || config->splits == 1) return error;
  const int64_t size = static_cast<int64_t>(m) * matrix->n;
  return matrix->dtype == FLUTE_BFLOAT16
             ? flute::sum_shares<__nv_bfloat16>(workspace, y, size, config->splits, s)
             : flute::sum_shares<__half>(workspace, y, size, config->splits, s);
}

}  // extern "C"
