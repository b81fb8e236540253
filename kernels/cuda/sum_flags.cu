#include <cstdio>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

#include "sum_flags.h"

namespace flute {
namespace {

// A set serves a launch of 136 blocks of two warpgroups. A model of 80 layers captured piece by
// piece in the 32 sizes that vLLM has from 136 to 512 rows needs 2,560 of them, twice that with
// LoRA. All are 9 MB of device memory, zero from the start; a graph that is gone does not give its
// own back.
constexpr int kFlags = 272, kSets = 8192;
__device__ uint32_t all_flags[kSets * kFlags];

// A capture or 0, a stream, and the thread for which cudaStreamPerThread stands.
using Owner = std::tuple<unsigned long long, cudaStream_t, std::thread::id>;

struct Device {
  uint32_t* memory = nullptr;
  std::map<Owner, int> sets;
};
struct Devices {
  std::mutex mutex;
  std::map<int, Device> known;
};

void say_used_up(int device) {
  std::fprintf(
      stderr,
      "WARNING flute: on GPU %d %d streams and captured graphs have used all flags for sums "
      "that blocks share: products of some hundred rows on further ones take up to 1.5 times "
      "as long. Capture fewer sizes, or start the process anew\n",
      device, kSets);
}

}  // namespace

int sum_flags(int count, cudaStream_t stream, uint32_t** flags) {
  static Devices* const devices = new Devices;  // for as long as threads may launch
  *flags = nullptr;
  if (count > kFlags) return 0;
  int number = 0;
  unsigned long long capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaGetDevice(&number)) return error;
  if (const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture)) return error;
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  const bool of_thread = stream == cudaStreamPerThread;
  const Owner owner(capture, stream, of_thread ? std::this_thread::get_id() : std::thread::id());

  const std::lock_guard<std::mutex> lock(devices->mutex);
  Device& device = devices->known[number];
  if (device.memory == nullptr) {
    void* address = nullptr;
    if (const cudaError_t error = cudaGetSymbolAddress(&address, all_flags)) return error;
    device.memory = static_cast<uint32_t*>(address);
  }
  auto found = device.sets.find(owner);
  if (found == device.sets.end()) {
    static bool said = false;
    const int used = static_cast<int>(device.sets.size());
    if (used == kSets) {
      if (!said) say_used_up(number);
      said = true;
      return 0;
    }
    found = device.sets.emplace(owner, used).first;
  }
  *flags = device.memory + found->second * kFlags;
  return 0;
}

}  // namespace flute
