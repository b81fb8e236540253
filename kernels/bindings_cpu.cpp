// The ops on CPU tensors: which kernel, cut over torch's threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include "bindings.h"
#include "cpu/gated.h"
#include "cpu/kernels.h"

namespace flute {
namespace {

namespace ts = torch::stable;

// From this many rows of x, a dense GEMM on decoded blocks beats decoding beside the sums: at 32
// rows the latter still wins on Zen 4 (benchmarks/results/cpu/linear.json). Where there is the
// matrix unit AMX, the dense GEMM should win earlier (an estimate, not measured).
int64_t dense_rows() {
  static const int64_t rows = cpu::has_amx_bf16() ? 12 : 40;
  return rows;
}

// Decoded weight at a time: small enough for the last level of cache, and not smaller, because each
// block waits for all threads twice.
constexpr int64_t kScratchBytes = 8 << 20;
// Multiply-adds that are worth a thread: below, waking it costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 18;
// An activation costs about as much as this many multiply-adds.
constexpr int64_t kWorkOfActivation = 16;

using Buffer = std::unique_ptr<void, decltype(&std::free)>;

Buffer allocate(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  void* data = std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
  if (data == nullptr) {
    fail("gemm", "x", text("no memory for ", bytes, " bytes of scratch"), "use a smaller batch");
  }
  return Buffer(data, &std::free);
}

int64_t rows_per_thread(int64_t work_per_row) {
  return std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_row));
}

void dequantize_rows(const Weight& weight, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                     void* out) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t row_bytes = weight.layer.k * (out_dtype == Dtype::kFloat32 ? 4 : 2);
  ts::parallel_for(begin, end, rows_per_thread(weight.layer.k), [&](int64_t from, int64_t to) {
    weight.for_each_part(from, to, [&](const Layer& layer, int64_t first, int64_t last) {
      kernels.dequantize(layer, first, last, round, out_dtype,
                         static_cast<char*>(out) + (first - begin) * row_bytes);
    });
  });
}

// Decodes beside the multiplication; the codes are read once.
void fused_gemm(const Weight& weight, cpu::Job job) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t k = weight.layer.k;
  const Buffer packed = allocate(job.m * k * int64_t(sizeof(float)));
  ts::parallel_for(0, job.m, rows_per_thread(k), [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) kernels.pack(weight.layer, job, m, packed.get());
  });
  job.packed = packed.get();
  ts::parallel_for(0, weight.n, rows_per_thread(k * job.m), [&](int64_t from, int64_t to) {
    weight.for_each_part(from, to, [&](const Layer& layer, int64_t first, int64_t last) {
      kernels.gemm(layer, job, first, last);
    });
  });
}

// aten::mm.out, which headers of the stable ABI do not wrap.
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{ts::detail::from(a), ts::detail::from(b),
                                    ts::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = ts::detail::to<Tensor>(stack[0]);  // releases the returned handle
}

// Decodes a block of rows to a bounded scratch, then torch multiplies. fp16 goes through fp32:
// torch's fp16 GEMM on CPUs without FP16 arithmetic is slower than its fp32 one.
void dense_gemm(const Weight& weight, const Tensor& x, Dtype dtype, Tensor y) {
  const bool bf16 = cpu::kernels().computes_bf16(weight.layer, dtype);
  const Dtype dense = bf16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  const int64_t k = weight.layer.k, row_bytes = k * (bf16 ? 2 : 4);
  const int64_t block = std::min(weight.n, std::max<int64_t>(64, kScratchBytes / row_bytes));
  const Tensor activations = dense == dtype ? x : ts::to(x, ScalarType::Float);
  Tensor scratch = ts::new_empty(x, {block, k}, to_scalar_type(dense));
  for (int64_t begin = 0; begin < weight.n; begin += block) {
    const int64_t rows = std::min(block, weight.n - begin);
    dequantize_rows(weight, begin, begin + rows, weight.layer.dtype, dense,
                    scratch.mutable_data_ptr());
    const Tensor columns = ts::transpose(ts::narrow(scratch, 0, 0, rows), 0, 1);
    Tensor out = ts::narrow(y, 1, begin, rows);
    if (dense == dtype)
      multiply_into(out, activations, columns);
    else
      ts::copy_(out, ts::matmul(activations, columns));
  }
}

Tensor product(const Tensor& x, const Weight& weight, Dtype dtype) {
  Tensor y = empty_output(x, weight.n);
  const int64_t k = weight.layer.k, m = x.numel() / k;
  if (m == 0 || weight.n == 0) return y;
  const Tensor input = ts::contiguous(x);
  if (m >= dense_rows()) {
    dense_gemm(weight, ts::view(input, {m, k}), dtype, ts::view(y, {m, weight.n}));
  } else {
    fused_gemm(weight, {input.const_data_ptr(), dtype, m, y.mutable_data_ptr(), weight.n, nullptr});
  }
  return y;
}

Tensor gemm(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& table,
            std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size,
            std::vector<int64_t> /*plan*/, std::optional<Tensor> /*next*/,
            int64_t /*next_bytes: these are for CUDA*/) {
  const Weight weight = check_weight("gemm", qweight, scales, table, part_sizes, bits, group_size);
  const Dtype dtype = check_input("gemm", x, qweight, weight);
  return product(x, weight, dtype);
}

Tensor gemm_gated(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& table,
                  std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size,
                  int64_t activation, std::vector<int64_t> /*plan*/, std::optional<Tensor> /*next*/,
                  int64_t /*next_bytes: these are for CUDA*/) {
  check_gated(part_sizes, activation);
  const Weight weight =
      check_weight("gemm_gated", qweight, scales, table, part_sizes, bits, group_size);
  const Dtype dtype = check_input("gemm_gated", x, qweight, weight);
  const Tensor both = product(x, weight, dtype);
  const int64_t half = weight.n / 2, values = both.numel() / 2;
  Tensor y = empty_output(x, half);
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  const char* in = static_cast<const char*>(both.const_data_ptr());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  // Cut anywhere, also within a row: one row is what most calls have.
  ts::parallel_for(0, values, rows_per_thread(kWorkOfActivation), [&](int64_t from, int64_t to) {
    while (from < to) {
      const int64_t m = from / half, column = from - m * half;
      const int64_t count = std::min(to - from, half - column);
      const char* gate = in + (2 * m * half + column) * size;
      cpu::multiply_gated(static_cast<cpu::Activation>(activation), dtype, gate, gate + half * size,
                          out + from * size, count);
      from += count;
    }
  });
  return y;
}

Tensor dequantize(const Tensor& qweight, const Tensor& scales, const Tensor& table,
                  std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size,
                  std::optional<ScalarType> dtype, int64_t /*in_features: internal layout only*/) {
  const Weight weight =
      check_weight("dequantize", qweight, scales, table, part_sizes, bits, group_size);
  const Dtype out_dtype = to_dtype("dequantize", "dtype", dtype.value_or(scales.scalar_type()));
  Tensor out = ts::new_empty(qweight, {weight.n, weight.layer.k}, to_scalar_type(out_dtype));
  if (weight.n > 0)
    dequantize_rows(weight, 0, weight.n, out_dtype, out_dtype, out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace flute

STABLE_TORCH_LIBRARY_IMPL(flute, CPU, m) {
  m.impl("gemm", TORCH_BOX(&flute::gemm));
  m.impl("gemm_gated", TORCH_BOX(&flute::gemm_gated));
  m.impl("dequantize", TORCH_BOX(&flute::dequantize));
}
