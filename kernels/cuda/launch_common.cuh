// What every launch does: ask the device once, describe x to the tensor copy engine, launch with
// the attributes of clusters and of programmatic dependent launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

#include "ahead.cuh"
#include "errors.h"
#include "flute/launch.h"
#include "lut.cuh"

namespace flute {

constexpr int kMaxDevices = 64;
constexpr int kMaxGridY = 65535;  // blocks of a launch, by CUDA

inline int log2_of(int power) {
  return power <= 1 ? 0 : 1 + log2_of(power / 2);
}

// The current device, and which of the compiled versions of a kernel it runs.
struct DeviceLimits {
  int device = 0, shared_limit = 0, multiprocessors = 0, ptx_version = 0;

  int load() {
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
      return error;
    return cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  // `versions`: of this kernel, one for each device; asked and prepared once.
  template <typename Kernel>
  int prepare(Kernel* kernel, std::atomic<int>* versions) {
    if (device < kMaxDevices) ptx_version = versions[device].load(std::memory_order_relaxed);
    if (ptx_version != 0) return 0;
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error == cudaSuccess)
      error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit);
    if (error == cudaSuccess)  // all of it even for blocks that need half: two are to fit
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    ptx_version = code.ptxVersion;
    if (device < kMaxDevices) versions[device].store(ptx_version, std::memory_order_relaxed);
    return 0;
  }
  // Shared memory of a block of which a multiprocessor takes two.
  int half_limit(int* bytes) const {
    const cudaError_t error =
        cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    *bytes = *bytes / 2 - kSharedReserved;
    return error;
  }
  int slot() const { return device < kMaxDevices ? device : 0; }
  // Clusters of `size` blocks that the device runs at once; asked once and `known` from then on.
  template <typename Kernel>
  int clusters_at_once(Kernel* kernel, int threads, int shared_bytes, int size,
                       std::atomic<int>& known, int* clusters) const {
    *clusters = known.load(std::memory_order_relaxed);
    if (*clusters > 0) return 0;
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3(size), launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = shared_bytes;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    launch.attrs = &attribute, launch.numAttrs = 1;
    if (const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &launch))
      return error;
    if (*clusters < 1) return kBadConfig;
    known.store(*clusters, std::memory_order_relaxed);
    return 0;
  }
};

// Boxes of 64 columns and `box_rows` rows of x [m, k], swizzled for wgmma; zeros outside of x.
inline int map_rows(CUtensorMap* map, const void* x, int m, int k, int dtype, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // by name: the library also loads where there is no driver
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<Encode>(ok ? function : nullptr);
  }();
  if (encode == nullptr) return kNoTensorMaps;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(m)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(k) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encode(
      map,
      dtype == FLUTE_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(x), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kBadShape;
}

// `blocks` of a launch, on a device that runs `at_once` of them.
inline Ahead make_ahead(const FluteAhead* ahead, int blocks, int at_once) {
  Ahead made{};
  if (ahead == nullptr || ahead->records == nullptr) return made;
  const int64_t bytes = ahead->bytes < ahead->total ? ahead->bytes : ahead->total;
  if (bytes < kAheadChunk) return made;  // so the stride below is a chunk or more
  made.from = static_cast<const uint8_t*>(ahead->records);
  made.chunks = static_cast<uint32_t>(bytes / kAheadChunk);
  made.stride = static_cast<uint32_t>(ahead->total / made.chunks) & ~15u;
  made.first_block = blocks > at_once ? blocks - at_once : 0;
  return made;
}

template <typename... Parameters, typename... Arguments>
int launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                  int cluster, bool overlap, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t launch = {};
  launch.gridDim = grid;
  launch.blockDim = dim3(threads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  cudaLaunchAttribute attributes[2];
  launch.attrs = attributes;
  if (cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    launch.numAttrs++;
  }
  if (overlap) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    launch.numAttrs++;
  }
  const cudaError_t error =
      cudaLaunchKernelEx(&launch, kernel, static_cast<Arguments&&>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // ours to tell, not for torch's next kernel
  return error;
}

}  // namespace flute
