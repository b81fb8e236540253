// Stands in for kernels/cuda/ptx.cuh: the instructions of the tile kernel on a CPU, for a block
// whose threads are fibers (fibers.h). Asynchronous copies land as late as the program allows, or
// at once: a missing wait shows in the first case, a slot that is refilled too early in the second.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fibers.h"

#define FLUTE_HAS_BULK 0

namespace flute {

using std::max;
using std::min;

constexpr uint32_t kSharedStart = 1024;
extern uint8_t shared[];
inline size_t shared_size = 0;

inline uint8_t* at_shared(uint32_t address, size_t bytes) {
  if (address < kSharedStart || address - kSharedStart + bytes > shared_size || address % bytes)
    fail("shared memory access out of range or not aligned");
  return shared + (address - kSharedStart);
}
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared) + kSharedStart;
}
template <typename V>
V load_shared_as(uint32_t address) {
  V value;
  memcpy(&value, at_shared(address, sizeof(V)), sizeof(V));
  return value;
}
template <typename V>
void store_shared_as(uint32_t address, V value) {
  memcpy(at_shared(address, sizeof(V)), &value, sizeof(V));
}
template <int At = 0>
uint32_t load_table(uint32_t address) {
  return load_shared_as<uint32_t>(address + At);
}
template <int At = 0>
uint2 load_table2(uint32_t address) {
  return load_shared_as<uint2>(address + At);
}
inline uint32_t load_shared(uint32_t address) {
  return load_shared_as<uint32_t>(address);
}
inline uint2 load_shared2(uint32_t address) {
  return load_shared_as<uint2>(address);
}
inline uint4 load_shared4(uint32_t address) {
  return load_shared_as<uint4>(address);
}
inline float load_shared_float(uint32_t address) {
  return load_shared_as<float>(address);
}
inline float4 load_shared_float4(uint32_t address) {
  return load_shared_as<float4>(address);
}
inline void store_shared_float(uint32_t address, float v) {
  store_shared_as(address, v);
}
inline void store_shared_float4(uint32_t address, float4 v) {
  store_shared_as(address, v);
}
inline void store_shared(uint32_t address, uint32_t v) {
  store_shared_as(address, v);
}
inline void store_shared4(uint32_t address, uint4 v) {
  store_shared_as(address, v);
}

// ---- a warp together: each lane leaves something, then all read --------------------------------
struct Exchange {
  uint32_t words[2][32][8];
};
inline Exchange exchanges[32];

inline const uint32_t (*exchange(const uint32_t* words, int count))[8] {
  Fiber& fiber = current_fiber();
  auto& buffer = exchanges[fiber.index / 32].words[fiber.exchanges++ & 1];
  memcpy(buffer[fiber.index % 32], words, 4 * count);
  warp_barrier();
  return buffer;
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const auto* rows = exchange(&address, 1);
  const int lane = current_fiber().index % 32;
  for (int i = 0; i < 4; i++) {
    at_shared(rows[i * 8 + lane / 4][0], 16);
    r[i] = load_shared_as<uint32_t>(rows[i * 8 + lane / 4][0] + lane % 4 * 4);
  }
  warp_barrier();  // no lane runs ahead of the loads of another
}

template <typename T>
float2 widen(uint32_t word) {
  T two[2];
  memcpy(two, &word, 4);
  return make_float2(static_cast<float>(two[0]), static_cast<float>(two[1]));
}
inline uint32_t load_global(const void* from) {
  uint32_t word;
  memcpy(&word, from, sizeof(word));
  return word;
}
inline void computed_once(uint32_t&, int) {}
inline float larger_size(float a, float b) {
  return a != a || b != b ? NAN : fmaxf(fabsf(a), fabsf(b));
}
template <typename T>
T narrow(float value) {
  return T(value);
}

template <typename T>
uint32_t narrow_pair(float low, float high) {
  const T two[2] = {T(low), T(high)};
  uint32_t word;
  memcpy(&word, two, 4);
  return word;
}

template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* lanes = exchange(words, 6);
  const int lane = current_fiber().index % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k += 2) {
      const float2 x = widen<T>(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)]);
      const float2 y = widen<T>(lanes[column * 4 + k % 8 / 2][4 + k / 8]);
      d[i] += x.x * y.x + x.y * y.y;
    }
  }
}
inline void multiply_bits(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  const uint32_t words[3] = {a[0], a[1], b};
  const auto* lanes = exchange(words, 3);
  const int lane = current_fiber().index % 32;
  for (int i = 0; i < 4; i++)
    for (int t = 0; t < 4; t++)
      d[i] += __builtin_popcount(lanes[lane / 4 * 4 + t][i / 2] &
                                 lanes[(lane % 4 * 2 + i % 2) * 4 + t][2]);
}
inline uint32_t largest_of_lanes(uint32_t value) {
  const auto* lanes = exchange(&value, 1);
  uint32_t largest = 0;
  for (int i = 0; i < 32; i++) largest = max(largest, lanes[i][0]);
  return largest;
}
inline int sum_of_lanes(int value) {
  const auto* lanes = exchange(reinterpret_cast<uint32_t*>(&value), 1);
  uint32_t sum = 0;  // may wrap, as the instruction does
  for (int i = 0; i < 32; i++) sum += lanes[i][0];
  return static_cast<int>(sum);
}
inline bool any_lane(bool value) {
  return sum_of_lanes(value) > 0;
}
template <typename V>
V lane_across(V value, int distance) {
  uint32_t word;
  memcpy(&word, &value, 4);
  word = exchange(&word, 1)[current_fiber().index % 32 ^ distance][0];
  memcpy(&value, &word, 4);
  return value;
}
inline uint32_t rotate_left(uint32_t word, int bits) {
  return word << (bits & 31) | word >> (-bits & 31);
}
template <typename T>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const float2 x = widen<T>(a), y = widen<T>(b);
  const T two[2] = {T(x.x * y.x), T(x.y * y.y)};
  uint32_t word;
  memcpy(&word, two, 4);
  return word;
}

// ---- asynchronous copies -----------------------------------------------------------------------
inline bool copies_land_late = true;

inline void land(const Copy& copy) {
  uint8_t* to = at_shared(copy.to, 16);
  if (copy.valid)
    memcpy(to, copy.from, 16);
  else
    memset(to, 0, 16);
}
inline void copy16(uint32_t to, const void* from, bool valid = true) {
  const Copy copy = {to, from, valid};
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("copy from an address that is not aligned");
  if (copies_land_late)
    current_fiber().copies.push_back(copy);
  else
    land(copy);
}
inline void commit_copies() {
  Fiber& fiber = current_fiber();
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int Pending>
void wait_copies() {
  auto& groups = current_fiber().groups;
  while (groups.size() > Pending) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.pop_front();
  }
}

inline uint32_t zero_in_each_lane() {
  return 0;
}

// ---- arithmetic --------------------------------------------------------------------------------
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  return (a & b) | c;
}
inline uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
  return (a & mask) | (b & ~mask);
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t which = selector >> (4 * i), byte = bytes >> (which & 7) * 8 & 255;
    r |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);  // bit 3: the sign everywhere
  }
  return r;
}

}  // namespace flute

inline int __shfl_sync(unsigned, int value, int lane) {
  const uint32_t word = value;
  return flute::exchange(&word, 1)[lane][0];
}
inline int same_for_all(int value) {
  return __shfl_sync(~0u, value, 0);
}
inline float __uint_as_float(uint32_t word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}
template <typename V>
V __ldg(const V* p) {
  return *p;
}
