#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

#include "sum_flags.h"

namespace flute {
namespace {

// A set serves a launch of 160 blocks of two warpgroups. A model of 80 layers that is captured
// piece by piece in 30 sizes needs 2,400 sets. All of them are 5 MB of device memory, zero from the
// start; none is given back, as nobody tells when a graph is gone.
constexpr int kFlags = 320, kSets = 4096;
__device__ uint32_t all_flags[kSets * kFlags];

struct Owners {
  std::mutex mutex;
  std::map<int, uint32_t*> memory;  // of each device
  std::map<int, int> used;          // sets of it
  std::map<std::tuple<int, cudaStream_t, unsigned long long>, int>
      sets;  // of device, stream, capture
};

}  // namespace

int sum_flags(int count, cudaStream_t stream, uint32_t** flags) {
  static Owners* const owners = new Owners;  // for as long as threads may launch
  *flags = nullptr;
  if (count > kFlags) return 0;
  int device = 0;
  unsigned long long capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture)) return error;
  if (status == cudaStreamCaptureStatusNone) capture = 0;

  const std::lock_guard<std::mutex> lock(owners->mutex);
  uint32_t*& memory = owners->memory[device];
  if (memory == nullptr) {
    void* address = nullptr;
    if (const cudaError_t error = cudaGetSymbolAddress(&address, all_flags)) return error;
    memory = static_cast<uint32_t*>(address);
  }
  const auto key = std::make_tuple(device, stream, capture);
  auto found = owners->sets.find(key);
  if (found == owners->sets.end()) {
    int& used = owners->used[device];
    if (used == kSets) {
      static bool said = false;
      if (!said)
        std::fprintf(stderr,
                     "WARNING flute: %d streams and captured graphs have used all flags for shared "
                     "sums: launches of some hundred rows take up to a fifth longer from now on\n",
                     kSets);
      said = true;
      return 0;
    }
    found = owners->sets.emplace(key, used++).first;
  }
  *flags = memory + found->second * kFlags;
  return 0;
}

}  // namespace flute
