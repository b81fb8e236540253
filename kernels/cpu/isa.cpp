// Chooses the instruction set: what the processor has, what FLUTE_CPU_ISA asks for.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace flute::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512_bf16"};

std::atomic<int> requested{-1};

int detect() {
#if defined(__x86_64__)
  // The builtin also asks the operating system (XGETBV), so a masked-out register file counts.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (avx512 && bf16) return kAvx512Bf16;
  if (avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

std::string usable_names() {
  std::string names = "auto";
  for (int isa = best_isa(); isa >= 0; --isa) names += std::string(", ") + kNames[isa];
  return names;
}

[[noreturn]] void fail(const std::string& what, const std::string& where, const std::string& why) {
  throw std::runtime_error("flute: " + what + "\n  where: " + where + "\n  why: " + why +
                           "\n  fix: use one of " + usable_names());
}

void check_runs(int isa, const std::string& where) {
  if (isa > best_isa()) {
    fail(std::string("cannot run the ") + kNames[isa] + " kernels", where,
         std::string("this machine has nothing above ") + kNames[best_isa()]);
  }
}

int from_environment() {
  const char* wish = std::getenv("FLUTE_CPU_ISA");
  if (wish == nullptr || *wish == '\0' || std::strcmp(wish, "auto") == 0) return best_isa();
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (std::strcmp(wish, kNames[isa]) == 0) {
      check_runs(isa, std::string("FLUTE_CPU_ISA=") + wish);
      return isa;
    }
  }
  fail("unknown instruction set", std::string("FLUTE_CPU_ISA=") + wish,
       std::string("'") + wish + "' names none of the kernels");
}

}  // namespace

const char* isa_name(int isa) {
  return kNames[isa];
}

int best_isa() {
  static const int best = detect();
  return best;
}

bool has_amx_bf16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

int current_isa() {
  const int isa = requested.load(std::memory_order_relaxed);
  if (isa >= 0) return isa;
  // A throwing initializer runs again at the next call, so a bad value fails every time.
  static const int chosen = from_environment();
  return chosen;
}

void request_isa(int isa) {
  if (isa < 0 || isa >= kIsaCount) {
    fail("unknown instruction set", "flute::cpu_isa",
         "level " + std::to_string(isa) + " is not in 0.." + std::to_string(kIsaCount - 1));
  }
  check_runs(isa, "flute::cpu_isa");
  requested.store(isa, std::memory_order_relaxed);
}

const Kernels& kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case kAvx512Bf16:
      return avx512_bf16_kernels();
    case kAvx512:
      return avx512_kernels();
    case kAvx2:
      return avx2_kernels();
#endif
    default:
      return portable_kernels();
  }
}

}  // namespace flute::cpu
