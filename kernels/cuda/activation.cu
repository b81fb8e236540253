// A gated product's second step, where the launch before it could not do it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "activation.cuh"
#include "launch_common.cuh"

namespace flute {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 8;  // columns of a thread: 16 bytes of 16-bit values

template <typename T>
__device__ __forceinline__ T rounded(float value) {
  if constexpr (sizeof(T) == 2)
    return narrow<T>(value);
  else
    return value;
}

// Wide: of 16 bits, n is a multiple of kEach and both pointers of 16 bytes. A block takes the rows
// from blockIdx.y in steps of the grid.
template <typename T, bool Wide>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(int activation, int64_t m, int64_t n, const T* x, T* y) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
#if FLUTE_HAS_BULK
  allow_next_launch();
  wait_for_previous_launch();
#endif
  if (column >= n) return;
  for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
    const T *gate = x + 2 * row * n + column, *up = gate + n;
    T* to = y + row * n + column;
    if constexpr (Wide) {
      const uint4 g = *reinterpret_cast<const uint4*>(gate);
      const uint4 u = *reinterpret_cast<const uint4*>(up);
      const uint32_t gates[4] = {g.x, g.y, g.z, g.w}, ups[4] = {u.x, u.y, u.z, u.w};
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 a = widen<T>(gates[i]), b = widen<T>(ups[i]);
        out[i] = narrow_pair<T>(activate(activation, a.x, b.x), activate(activation, a.y, b.y));
      }
      *reinterpret_cast<uint4*>(to) = make_uint4(out[0], out[1], out[2], out[3]);
    } else {
      for (int i = 0; i < kEach && column + i < n; i++)
        to[i] = rounded<T>(
            activate(activation, static_cast<float>(gate[i]), static_cast<float>(up[i])));
    }
  }
}

template <typename T>
int launch_activate(int activation, int64_t m, int64_t n, const void* x, void* y,
                    cudaStream_t stream) {
  constexpr int64_t kBlock = kThreads * kEach, kMostRows = 65535;
  constexpr bool kCanBeWide = sizeof(T) == 2;
  const bool wide = kCanBeWide && n % kEach == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(y) % 16 == 0;
  const auto kernel = wide ? activate_kernel<T, kCanBeWide> : activate_kernel<T, false>;
  static std::atomic<int> versions[2][kMaxDevices];
  DeviceLimits device;
  if (const int error = device.load()) return error;
  if (const int error = device.prepare(kernel, versions[wide])) return error;
  const dim3 grid(static_cast<unsigned>((n + kBlock - 1) / kBlock),
                  static_cast<unsigned>(m < kMostRows ? m : kMostRows));
  return launch_kernel(kernel, grid, kThreads, 0, 1, device.ptx_version >= 90, stream, activation,
                       m, n, static_cast<const T*>(x), static_cast<T*>(y));
}

}  // namespace
}  // namespace flute

extern "C" int flute_activate(int32_t activation, int32_t dtype, int64_t m, int64_t n,
                              const void* x, void* y, void* stream) {
  if (activation < FLUTE_SILU || activation > FLUTE_GELU || m < 1 || n < 1) return flute::kBadShape;
  auto* s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case FLUTE_BFLOAT16:
      return flute::launch_activate<__nv_bfloat16>(activation, m, n, x, y, s);
    case FLUTE_FLOAT16:
      return flute::launch_activate<__half>(activation, m, n, x, y, s);
    case FLUTE_FLOAT32:
      return flute::launch_activate<float>(activation, m, n, x, y, s);
  }
  return flute::kBadShape;
}
