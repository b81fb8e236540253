// Dense weight from the canonical layout: one warp decodes one unit of 32 weights at a time, lane
// i the weight i. Written to be plain; the table of a row is read through the cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "flute/cuda.h"

namespace flute::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

__device__ float widen(uint16_t value, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? __uint_as_float(uint32_t(value) << 16)
                                   : __half2float(__ushort_as_half(value));
}

__device__ float round_to(float value, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return __bfloat162float(__float2bfloat16_rn(value));
  if (dtype == Dtype::kFloat16) return __half2float(__float2half_rn(value));
  return value;
}

__device__ void store(void* out, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::kFloat32)
    static_cast<float*>(out)[index] = value;
  else if (dtype == Dtype::kBFloat16)
    static_cast<__nv_bfloat16*>(out)[index] = __float2bfloat16_rn(value);
  else
    static_cast<__half*>(out)[index] = __float2half_rn(value);
}

__device__ int read_code(const uint32_t* words, int bits, int lane) {
  const int bit = bits * lane, word = bit / 32, shift = bit % 32;
  // At 3 bits two codes straddle words; the next word exists then (lane 31 ends a word).
  const uint32_t next = shift + bits > 32 ? words[word + 1] : 0;
  return int(__funnelshift_r(words[word], next, shift) & ((1u << bits) - 1));
}

__global__ void dequantize_kernel(Layer layer, int64_t begin, int64_t units, Dtype round,
                                  Dtype out_dtype, void* out) {
  const int lane = threadIdx.x % kUnit;
  const int64_t row_units = layer.k / kUnit;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kUnit);
  int64_t unit = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kUnit;
  for (; unit < units; unit += warps) {
    const int64_t row = begin + unit / row_units, k = unit % row_units * kUnit;
    const uint32_t* words = layer.row_codes(row) + k / kUnit * layer.bits;
    const int code = read_code(words, layer.bits, lane);
    int entry = code;
    if (layer.pair) {
      const int other = __shfl_xor_sync(0xFFFFFFFFu, code, 1);
      const int first = lane % 2 ? other : code, second = lane % 2 ? code : other;
      entry = 2 * (first << layer.bits | second) + lane % 2;
    }
    const float scale = widen(layer.row_scales(row)[k / layer.group], layer.dtype);
    const float product = __fmul_rn(widen(layer.table[entry], layer.dtype), scale);
    store(out, out_dtype, (row - begin) * layer.k + k + lane, round_to(product, round));
  }
}

}  // namespace

const char* dequantize(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                       void* out, void* stream) {
  const int64_t units = (end - begin) * (layer.k / kUnit);
  if (units <= 0) return nullptr;
  const int64_t wanted = (units * kUnit + kThreads - 1) / kThreads;
  const int blocks = int(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  dequantize_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      layer, begin, units, round, out_dtype, out);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flute::cuda
