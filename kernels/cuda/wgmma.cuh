// Hopper's warpgroup products and tensor copies: wgmma with A (weights) in registers and B (x) in
// shared memory, where a row holds 64 numbers and 16-byte chunks are permuted by the 128-byte
// swizzle that the tensor copy writes.
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace flute {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FLUTE_HAS_WGMMA 1
#else
#define FLUTE_HAS_WGMMA 0
#endif

constexpr int kSwizzleColumns = 64;                    // numbers of k in a swizzled row
constexpr int kSwizzleRowBytes = kSwizzleColumns * 2;  // 8 rows are one swizzle pattern: 1 KiB

#if FLUTE_HAS_WGMMA
// Matrix descriptors count in 16 bytes: n bytes further on are n >> kDescriptorShift.
constexpr int kDescriptorShift = 4;
// Those of x, columns [0, 16) of the 64 at `address`, a multiple of 1 KiB: the low
// half varies, 16 columns further on by `kDescriptorStep`. The high half says that rows are
// swizzled in 128 bytes and groups of eight rows 1 KiB apart. (Shared addresses have less than 18
// bits.)
__device__ __forceinline__ uint32_t x_descriptor(uint32_t address) {
  return 1u << 16 | address >> kDescriptorShift;
}
constexpr uint32_t kDescriptorStep = 16 * 2 >> kDescriptorShift;

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Registers of each thread of a warpgroup that multiplies, and of one that only brings data.
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
// Keeps the compiler from moving uses of accumulators across a wait.
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; i++) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void pin(uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// Four 8 x 8 matrices of an accumulator to shared memory, transposed: lane 8 i + j names the place
// of column j of matrix i, and that column's 8 values become contiguous there.
__device__ __forceinline__ void store_transposed(uint32_t to, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// One box of a 2-d tensor map: columns from c0, rows from c1; counted on the barrier.
__device__ __forceinline__ void tensor_copy(uint32_t to, const CUtensorMap* map, int c0, int c1,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// d[64 x Columns] = (accumulate ? d : 0) + a[64 x 16] * b[16 x Columns], asynchronous.
//
// Warp w of the warpgroup holds rows 16 w .. 16 w + 15 of a as mma.m16n8k16 does. Column 8 i + c,
// row g or g + 8 of d: d[4 i ..], as four accumulators of an m16n8 product.
template <typename T, int Columns>
__device__ __forceinline__ void wgmma(float (&d)[Columns / 2], const uint32_t (&a)[4], uint32_t b,
                                      int accumulate);

// Operand lists. D: names of accumulators; the five others follow them.
#define FLUTE_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLUTE_D8 FLUTE_D0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLUTE_D16 \
  FLUTE_D8 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLUTE_D32                                                                     \
  FLUTE_D16                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLUTE_D48                                                                              \
  FLUTE_D32                                                                                    \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FLUTE_D64                                                                                \
  FLUTE_D48                                                                                      \
  ", "                                                                                           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLUTE_F8(i)                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLUTE_F16 FLUTE_F8(0), FLUTE_F8(8)
#define FLUTE_F32 FLUTE_F16, FLUTE_F8(16), FLUTE_F8(24)
#define FLUTE_F64 FLUTE_F32, FLUTE_F8(32), FLUTE_F8(40), FLUTE_F8(48), FLUTE_F8(56)
#define FLUTE_F96 FLUTE_F64, FLUTE_F8(64), FLUTE_F8(72), FLUTE_F8(80), FLUTE_F8(88)
#define FLUTE_F128 FLUTE_F96, FLUTE_F8(96), FLUTE_F8(104), FLUTE_F8(112), FLUTE_F8(120)
#define FLUTE_DEFINE_WGMMA(TYPE, NAME, COLUMNS, D, A, B, FLAG, ACCUMULATORS)                   \
  template <>                                                                                  \
  __device__ __forceinline__ void wgmma<TYPE, COLUMNS>(                                        \
      float (&d)[COLUMNS / 2], const uint32_t (&a)[4], uint32_t b, int accumulate) {           \
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, " FLAG ", 0;\nmov.b64 b, {" B \
                 ", 0x40000040};\n"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" D  \
                 "}, {" A "}, b, p, 1, 1, 0;\n}\n"                                             \
                 : ACCUMULATORS                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate));       \
  }
#define FLUTE_DEFINE_WGMMAS(TYPE, NAME)                                                           \
  FLUTE_DEFINE_WGMMA(TYPE, NAME, 16, FLUTE_D0, "%8, %9, %10, %11", "%12", "%13", FLUTE_F8(0))     \
  FLUTE_DEFINE_WGMMA(TYPE, NAME, 32, FLUTE_D8, "%16, %17, %18, %19", "%20", "%21", FLUTE_F16)     \
  FLUTE_DEFINE_WGMMA(TYPE, NAME, 64, FLUTE_D16, "%32, %33, %34, %35", "%36", "%37", FLUTE_F32)    \
  FLUTE_DEFINE_WGMMA(TYPE, NAME, 128, FLUTE_D32, "%64, %65, %66, %67", "%68", "%69", FLUTE_F64)   \
  FLUTE_DEFINE_WGMMA(TYPE, NAME, 192, FLUTE_D48, "%96, %97, %98, %99", "%100", "%101", FLUTE_F96) \
  FLUTE_DEFINE_WGMMA(TYPE, NAME, 256, FLUTE_D64, "%128, %129, %130, %131", "%132", "%133",        \
                     FLUTE_F128)
FLUTE_DEFINE_WGMMAS(__half, "f16")
FLUTE_DEFINE_WGMMAS(__nv_bfloat16, "bf16")
#undef FLUTE_DEFINE_WGMMAS
#undef FLUTE_DEFINE_WGMMA
#undef FLUTE_F128
#undef FLUTE_F96
#undef FLUTE_F64
#undef FLUTE_F32
#undef FLUTE_F16
#undef FLUTE_F8
#undef FLUTE_D64
#undef FLUTE_D48
#undef FLUTE_D32
#undef FLUTE_D16
#undef FLUTE_D8
#undef FLUTE_D0
#endif  // FLUTE_HAS_WGMMA

}  // namespace flute
