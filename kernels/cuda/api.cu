// The entry of the decode kernels, and the text of errors.
#include <cuda_runtime.h>

#include "decode_launch.cuh"
#include "sm90_launch.cuh"

namespace {

bool are_operands_legal(const FluteMatrix* matrix, int32_t m, const void* x, const void* records,
                        const void* table) {
  return flute_record_words(matrix) >= 0 && m >= 1 && m <= FLUTE_MAX_M &&
         flute::operands_aligned(x, table) &&
         reinterpret_cast<uintptr_t>(records) % flute::kLine == 0;
}

}  // namespace

extern "C" {

int flute_decode(const FluteMatrix* matrix, const FluteDecodeConfig* config, int32_t m,
                 const void* x, const void* records, const void* table, void* y,
                 const FluteAhead* ahead, void* stream) {
  if (!are_operands_legal(matrix, m, x, records, table)) return flute::kBadShape;
  auto* s = static_cast<cudaStream_t>(stream);
  switch (matrix->bits) {
    case 4:
      return flute::decode_w4(*matrix, *config, m, x, records, table, y, ahead, s);
    case 3:
      return flute::decode_w3(*matrix, *config, m, x, records, table, y, ahead, s);
    case 2:
      return flute::decode_w2(*matrix, *config, m, x, records, table, y, ahead, s);
  }
  return flute::kBadShape;
}

int flute_planes(const FluteMatrix* matrix, const FluteDecodeConfig* config, int32_t m,
                 const void* x, const void* records, const void* table, void* y,
                 const FluteAhead* ahead, void* stream) {
  if (!are_operands_legal(matrix, m, x, records, table)) return flute::kBadShape;
  if (matrix->bits != 2) return flute::kBadConfig;
  return flute::planes_w2(*matrix, *config, m, x, records, table, y, ahead,
                          static_cast<cudaStream_t>(stream));
}

int64_t flute_sm90_workspace(const FluteSm90Config* config) {
  flute::DeviceLimits device;
  if (config->splits != 0 || device.load()) return 0;
  return flute::prefill_workspace(*config, device.multiprocessors);
}

int flute_sm90_gemm(const FluteMatrix* matrix, const FluteSm90Config* config, int32_t m,
                    const void* x, const void* records, const void* table, void* y, void* workspace,
                    const FluteAhead* ahead, void* stream) {
  if (flute_record_words(matrix) < 0 || m < 1 || !flute::operands_aligned(x, table))
    return flute::kBadShape;
  auto* s = static_cast<cudaStream_t>(stream);
  switch (matrix->bits) {
    case 4:
      return flute::sm90_w4(*matrix, *config, m, x, records, table, y, workspace, ahead, s);
    case 3:
      return flute::sm90_w3(*matrix, *config, m, x, records, table, y, workspace, ahead, s);
    case 2:
      return flute::sm90_w2(*matrix, *config, m, x, records, table, y, workspace, ahead, s);
  }
  return flute::kBadShape;
}

const char* flute_error_text(int error) {
  switch (error) {
    case flute::kBadShape:
      return "shape, dtype, bits or group size outside the format";
    case flute::kBadConfig:
      return "launch configuration not possible on this device";
    case flute::kNoTensorMaps:
      return "this driver has no tensor maps: it is older than CUDA 12";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"
