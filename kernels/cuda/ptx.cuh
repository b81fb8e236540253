// The PTX that the kernels use, one small function per instruction. No policy here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flute {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FLUTE_HAS_BULK 1  // bulk copies, clusters, programmatic dependent launch
#else
#define FLUTE_HAS_BULK 0
#endif

// Calls body with Constant<0> .. Constant<Count - 1>, for what must be known to the compiler.
template <int Value>
struct Constant {
  static constexpr int value = Value;
};
template <int Count, int From = 0, typename Body>
__device__ __forceinline__ void for_constants(Body&& body) {
  if constexpr (From < Count) {
    body(Constant<From>{});
    for_constants<Count, From + 1>(body);
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- shared memory -----------------------------------------------------------------------------
// `load_table` is not volatile: a table never changes while codes are decoded, so the compiler may
// schedule these loads freely. Their addresses depend on codes, which keeps them after the barrier.
// `At`: added to the address by the load itself.
template <int At = 0>
__device__ __forceinline__ uint32_t load_table(uint32_t address) {
  uint32_t value;
  asm("ld.shared.b32 %0, [%1+%2];" : "=r"(value) : "r"(address), "n"(At));
  return value;
}

template <int At = 0>
__device__ __forceinline__ uint2 load_table2(uint32_t address) {
  uint2 value;
  asm("ld.shared.v2.b32 {%0, %1}, [%2+%3];" : "=r"(value.x), "=r"(value.y) : "r"(address), "n"(At));
  return value;
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared2(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ float load_shared_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_float4(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_shared4(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- asynchronous copies -----------------------------------------------------------------------
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if FLUTE_HAS_BULK
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Four bytes that the launch before may have written.
__device__ __forceinline__ uint32_t load_global(const void* from) {
  uint32_t r;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(r) : "l"(from) : "memory");
  return r;
}

// 16 bytes of global memory to shared memory, zeros where `valid` is false.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Arrives on the barrier once all copies issued so far by this thread have landed.
__device__ __forceinline__ void copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// This thread's copies since the last commit become a group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Pending` of this thread's groups, the newest, are under way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A value that is the same in all lanes, so that the compiler knows it, may keep it in a uniform
// register, and does not compute it anew.
__device__ __forceinline__ int same_for_all(int value) {
  return __shfl_sync(~0u, value, 0);
}

#if FLUTE_HAS_BULK
// True in one lane of the warp. Unlike a comparison of the lane's number, known to the compiler as
// one lane, so that it makes no loop over lanes around a copy.
__device__ __forceinline__ bool elect_one() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(chosen));
  return chosen != 0;
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Arrives; the phase then also waits for so many bytes.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// One thread: `bytes` contiguous bytes to shared memory, which the barrier already expects.
__device__ __forceinline__ void bulk_copy_expected(uint32_t to, const void* from, uint32_t bytes,
                                                   uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// The same, and the barrier hears of it: this thread's arrival.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
  barrier_expect(barrier, bytes);
  bulk_copy_expected(to, from, bytes, barrier, policy);
}

// `bytes` contiguous bytes to L2; both are multiples of 16.
__device__ __forceinline__ void prefetch_bulk(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// A word that tells other blocks of the device that what was written before it is there.
__device__ __forceinline__ void store_release(uint32_t* to, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void allow_next_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void wait_for_previous_launch() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
#endif

// All threads of `warps` warps that use the same id, 1..15.
__device__ __forceinline__ void warps_sync(int id, int warps) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(warps * 32) : "memory");
}

// 0, but the compiler does not know: the mask of the lanes below this one never has the last.
__device__ __forceinline__ uint32_t zero_in_each_lane() {
  uint32_t below;
  asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  return below >> 31;
}

// ---- arithmetic --------------------------------------------------------------------------------
// (a & b) | c in one instruction
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// bits of a where the mask is set, of b elsewhere
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(r) : "r"(a), "r"(b), "r"(mask));
  return r;
}

// unlike __byte_perm, keeps the selector as it is
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// d += a * b on the tensor cores: 16 x 16 by 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]);

#define FLUTE_DEFINE_MULTIPLY(TYPE, NAME)                                               \
  template <>                                                                           \
  __device__ __forceinline__ void multiply<TYPE>(float (&d)[4], const uint32_t (&a)[4], \
                                                 const uint32_t (&b)[2]) {              \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                          \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
FLUTE_DEFINE_MULTIPLY(__half, "f16")
FLUTE_DEFINE_MULTIPLY(__nv_bfloat16, "bf16")
#undef FLUTE_DEFINE_MULTIPLY

// d[row, column] += how many bits the row of a and the column of b share: 16 x 128 by 128 x 8.
__device__ __forceinline__ void multiply_bits(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Of all lanes of a warp; and what the lane has whose number differs by `distance`, a power of two.
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t value) {
  return __reduce_max_sync(~0u, value);
}
__device__ __forceinline__ int sum_of_lanes(int value) {
  return __reduce_add_sync(~0u, value);
}
__device__ __forceinline__ bool any_lane(bool value) {
  return __any_sync(~0u, value);
}
template <typename V>
__device__ __forceinline__ V lane_across(V value, int distance) {
  return __shfl_xor_sync(~0u, value, distance);
}

// Leaves the value as it is, but ptxas cannot know: it does not compute it anew at each use.
__device__ __forceinline__ void computed_once(uint32_t& value, int lane) {
  asm volatile("shfl.sync.idx.b32 %0, %0, %1, 31, -1;" : "+r"(value) : "r"(lane) : "memory");
}

__device__ __forceinline__ uint32_t rotate_left(uint32_t word, int bits) {
  return __funnelshift_l(word, word, bits);
}

// Two products of 16-bit floats, each rounded once.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t r;  // sm_80 has no plain product; adding -0 changes nothing
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  return r;
}

// Two 16-bit floats of a word, low half first, as fp32.
template <typename T>
__device__ __forceinline__ float2 widen(uint32_t word);
template <>
__device__ __forceinline__ float2 widen<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ __forceinline__ float2 widen<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// The larger of |a| and |b|; no number where one of them is none.
__device__ __forceinline__ float larger_size(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(fabsf(a)), "f"(fabsf(b)));
  return r;
}

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ void add(float4& a, float4 b) {
  a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}

// Two floats as a word of 16-bit floats, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t narrow_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace flute
