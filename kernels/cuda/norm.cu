// A decoder's residual sum and RMS norm as one launch that lets the GEMM behind it begin at once.
//
// What a GEMM does before it needs x (its table, its first weights) takes as long as a norm of few
// rows: side by side, the norm costs nothing. A kernel of another library lets nothing begin early.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch_common.cuh"

namespace flute {
namespace {

constexpr int kEach = 8;  // values of a 16-byte access
constexpr int kMostThreads = 1024;

__device__ __forceinline__ float sum_of_block(float value, float* shared) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(~0u, value, i);
  if (lane == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < warps ? shared[lane] : 0;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(~0u, value, i);
  return value;
}

// One row a block; each thread holds `Vectors` times eight values of it.
template <typename T, int Vectors>
__global__ void __launch_bounds__(kMostThreads)
    rms_norm_kernel(const uint4* x, const uint4* residual, const uint4* weight, uint4* y,
                    uint4* sums, int vectors, float epsilon, float weight_offset) {
  extern __shared__ float shared[];  // one of each warp
  const int64_t row = static_cast<int64_t>(blockIdx.x) * vectors;
  uint4 w[Vectors];
#pragma unroll
  for (int i = 0; i < Vectors; i++) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < vectors) w[i] = weight[at];
  }
#if FLUTE_HAS_BULK
  allow_next_launch();
  wait_for_previous_launch();
#endif
  float2 value[Vectors][kEach / 2];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < Vectors; i++) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at >= vectors) continue;
    const uint4 a = x[row + at];
    uint4 b = make_uint4(0, 0, 0, 0);
    if (residual != nullptr) b = residual[row + at];
    const uint32_t first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 p = widen<T>(first[j]), q = widen<T>(second[j]);
      value[i][j] = make_float2(p.x + q.x, p.y + q.y);
      squares += value[i][j].x * value[i][j].x + value[i][j].y * value[i][j].y;
      out[j] = narrow_pair<T>(value[i][j].x, value[i][j].y);
    }
    if (residual != nullptr) sums[row + at] = make_uint4(out[0], out[1], out[2], out[3]);
  }
  const float scale = rsqrtf(sum_of_block(squares, shared) / (vectors * kEach) + epsilon);
#pragma unroll
  for (int i = 0; i < Vectors; i++) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at >= vectors) continue;
    const uint32_t factor[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 f = widen<T>(factor[j]);
      out[j] = narrow_pair<T>(value[i][j].x * scale * (f.x + weight_offset),
                              value[i][j].y * scale * (f.y + weight_offset));
    }
    y[row + at] = make_uint4(out[0], out[1], out[2], out[3]);
  }
}

struct Norm {
  int32_t m;
  int vectors;
  float epsilon, weight_offset;
  const void *x, *residual, *weight;
  void *y, *sums;
};

template <typename T, int Vectors>
int launch_norm(const Norm& norm, cudaStream_t stream) {
  static std::atomic<int> versions[kMaxDevices];
  DeviceLimits device;
  if (const int error = device.load()) return error;
  const auto kernel = rms_norm_kernel<T, Vectors>;
  if (const int error = device.prepare(kernel, versions)) return error;
  const int threads = (ceil_div(norm.vectors, Vectors) + 31) / 32 * 32;
  return launch_kernel(
      kernel, dim3(norm.m), threads, threads / 32 * sizeof(float), 1, device.ptx_version >= 90,
      stream, static_cast<const uint4*>(norm.x), static_cast<const uint4*>(norm.residual),
      static_cast<const uint4*>(norm.weight), static_cast<uint4*>(norm.y),
      static_cast<uint4*>(norm.sums), norm.vectors, norm.epsilon, norm.weight_offset);
}

template <typename T>
int launch_norm_of(const Norm& norm, cudaStream_t stream) {
  const auto launch = norm.vectors <= kMostThreads       ? launch_norm<T, 1>
                      : norm.vectors <= 2 * kMostThreads ? launch_norm<T, 2>
                                                         : launch_norm<T, 4>;
  return launch(norm, stream);
}

}  // namespace
}  // namespace flute

extern "C" int flute_rms_norm(int32_t dtype, int32_t m, int32_t n, float epsilon,
                              float weight_offset, const void* x, const void* residual,
                              const void* weight, void* y, void* sums, void* stream) {
  bool aligned = true;
  for (const void* pointer :
       {x, residual, weight, const_cast<const void*>(y), const_cast<const void*>(sums)})
    aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  if (m < 1 || n < 1 || n % flute::kEach || n > FLUTE_MAX_NORM || !aligned ||
      (residual == nullptr) != (sums == nullptr))
    return flute::kBadShape;
  const flute::Norm norm = {m,        n / flute::kEach, epsilon, weight_offset, x,
                            residual, weight,           y,       sums};
  auto* s = static_cast<cudaStream_t>(stream);
  if (dtype == FLUTE_BFLOAT16) return flute::launch_norm_of<__nv_bfloat16>(norm, s);
  if (dtype == FLUTE_FLOAT16) return flute::launch_norm_of<__half>(norm, s);
  return flute::kBadShape;
}
