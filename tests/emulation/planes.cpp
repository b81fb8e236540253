// Runs kernels/cuda/planes_operands.cuh on the CPU, a warp as fibers: a tile of random codes, table
// and scales times x, against loops in double. Exits with 0 when all sums agree: to 2^-18 of the
// sum of their products' sizes, and where x is not exact in fixed point, to what half a unit
// explains.
#include <cuda_runtime.h>

#include <cstdio>
#include <random>

static dim3 threadIdx;

#include "planes_operands.cuh"

namespace flute {

constexpr uint32_t kRecordAt = kSharedStart, kXAt = kSharedStart + 2048;
uint8_t shared[16384];

template <int Bits_, typename T_>
struct Shape {
  using T = T_;
  static constexpr int kBits = Bits_;
};

std::mt19937 rng(0);

// Kinds of x: 0 to 12: all values but two are smaller by so many powers of two.
enum { kAnyValues = 13, kZeros, kSubnormal, kInfinite, kNoNumber, kKinds };

template <typename S>
bool agrees(int kind) {
  using T = typename S::T;
  constexpr int kCodes = 1 << S::kBits;
  alignas(16) T table[kCodes], x[kTileK];
  T scales[kTileRows];
  static uint32_t code[kTileRows][kTileK];
  const float unit = ldexpf(.01f, static_cast<int>(rng() % 9) - 4);
  for (T& value : table) value = T((static_cast<int>(rng() % 255) - 127) * unit);
  for (T& scale : scales) scale = T(.01f + rng() % 100 * .001f);
  for (T& value : x) {
    const int below = kind < kAnyValues && (&value - x) % 64 ? kind : 0;
    value = T(ldexpf(static_cast<int>(rng() % 255) - 127, -below));
    if (kind == kAnyValues) value = T((static_cast<int>(rng() % 60001) - 30000) * 1e-4f);
    if (kind == kZeros) value = T(0);
    if (kind == kSubnormal) memcpy(&value, "\1\0", 2);
  }
  if (kind == kInfinite) x[rng() % kTileK] = T(INFINITY);
  if (kind == kNoNumber) x[rng() % kTileK] = T(NAN);
  shared_size = sizeof(shared);
  uint8_t* record = at_shared(kRecordAt, 1);
  memset(record, 0, record_bytes(S::kBits, 1));
  for (int lane = 0; lane < 32; lane++)
    for (int f = 0; f < kFragments; f++)
      for (int n = 0; n < 8; n++) {
        uint32_t& c = code[code_row(lane, n)][code_column(lane, f, n)];
        c = rng() % kCodes;
        for (int b = 0; b < S::kBits; b++) {
          const int bit = code_bit(S::kBits, lane, f, n, b);
          record[bit / 8] |= (c >> b & 1) << bit % 8;
        }
      }
  for (int row = 0; row < kTileRows; row++)
    memcpy(record + code_bytes(S::kBits) + 2 * scale_index(1, row, 0), &scales[row], 2);

  static float y[kTileRows];
  run_block(32, [&] {
    const int lane = current_fiber().index, g = lane / 4, t = lane % 4;
    const float top = t == 3 ? -4 : 4;
    Moebius<S::kBits> moebius;
    moebius.template load<T>(table);
    const PlaneMaker<T> maker(lane);
    maker.make(kXAt, maker.load(x + maker.column(lane)));
    warp_barrier();
    PlaneX of_x;
    of_x.load(kXAt, lane);
    Codes<S::kBits> codes;
    codes.load(kRecordAt, lane);
    const Planes<S::kBits> planes(codes);
    const uint32_t of_rows = load_shared(kRecordAt + code_bytes(S::kBits) + g * 4);
    PlaneSums sums;
    multiply_planes<S>(sums, planes, of_rows, of_x, top, moebius);
    if (of_x.second_unit != 0) {
      of_x.load_second(kXAt, lane);
      multiply_planes<S>(sums, planes, of_rows, of_x, top, moebius);
    }
    float two[2];
    sums.finish(two, moebius, t);
    if (t < 2) y[g + 8 * t] = two[t];
  });
  for (int n = 0; n < kTileRows; n++) {
    double sum = 0, size = 0, weights = 0, largest = 0, most = 0;
    for (int k = 0; k < kTileK; k++) {
      const double value = static_cast<float>(x[k]);
      const double w = static_cast<double>(static_cast<float>(table[code[n][k]])) *
                       static_cast<float>(scales[n]);
      sum += value * w, size += fabs(value * w), weights += fabs(w);
      largest = fmax(largest, fabs(value)), most = fmax(most, fabs(w));
    }
    // Planes of a negative number, and of a code whose value is 0, cancel out only in fp32.
    double allowed = size * 0x1p-18 + largest * most * 0x1p-16;
    if (kind == kAnyValues) allowed += weights * largest * 0x1p-14;
    if (kind == kSubnormal) allowed += weights * 0x1p-100;  // fixed point begins above them
    const bool none = kind == kInfinite || kind == kNoNumber;
    if (none ? y[n] == y[n] : !(fabs(y[n] - sum) <= allowed)) {
      printf("%d bits, kind %d: [%d] is %g, not %g\n", S::kBits, kind, n, y[n], sum);
      return false;
    }
  }
  return true;
}

}  // namespace flute

int main() {
  using namespace flute;
  for (int kind = 0; kind < kKinds; kind++)
    if (!agrees<Shape<2, __nv_bfloat16>>(kind) || !agrees<Shape<2, __half>>(kind)) return 1;
  return 0;
}
