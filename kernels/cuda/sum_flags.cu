#include <map>
#include <mutex>
#include <tuple>

#include "errors.h"
#include "sum_flags.h"

namespace flute {
namespace {

constexpr int kSets = 4096;
__device__ uint32_t all_flags[kSets * kSumFlags];  // zero when the library is loaded

// Streams and captures that have flags, in the order of their coming.
struct Owners {
  std::mutex mutex;
  std::map<int, uint32_t*> memory;                                        // of each device
  std::map<std::tuple<int, cudaStream_t, unsigned long long>, int> sets;  // device, stream, capture
  std::map<int, int> used;
};

}  // namespace

int sum_flags(int device, cudaStream_t stream, uint32_t** flags) {
  static Owners* owners = new Owners;  // never destroyed: other threads may launch to the end
  unsigned long long capture_id = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture_id))
    return error;
  if (status == cudaStreamCaptureStatusNone) capture_id = 0;
  const std::lock_guard<std::mutex> lock(owners->mutex);
  uint32_t*& memory = owners->memory[device];
  if (memory == nullptr) {
    void* address = nullptr;
    if (const cudaError_t error = cudaGetSymbolAddress(&address, all_flags)) return error;
    memory = static_cast<uint32_t*>(address);
  }
  const auto key = std::make_tuple(device, stream, capture_id);
  auto found = owners->sets.find(key);
  if (found == owners->sets.end()) {
    int& used = owners->used[device];
    if (used == kSets) return kNoFlags;
    found = owners->sets.emplace(key, used++).first;
  }
  *flags = memory + found->second * kSumFlags;
  return 0;
}

}  // namespace flute
