// The ops on CUDA tensors. Compiled only with FLUTE_BUILD=cuda; the library still loads under a
// torch without CUDA, because its one CUDA symbol is weak and nothing runs at load.
#include "bindings_cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>

#include "flute/cuda.h"
#include "flute/launch.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));

namespace flute {

namespace ts = torch::stable;

void* current_stream(int32_t device) {
  FLUTE_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "gemm", "x",
              ("this torch has no CUDA streams"), ("install a torch with CUDA"));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check_kernel(const char* op, int error, const char* argument) {
  FLUTE_CHECK(error == 0, op, argument, ("the kernel reports: ", flute_error_text(error)),
              ("rebuild with FLUTE_CUDA_ARCHS for this GPU, or check the earlier kernels"));
}

Tensor readable(const Tensor& tensor) {
  const Tensor dense = ts::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 ? ts::clone(dense) : dense;
}

int32_t dtype_number(ScalarType type) {
  return type == ScalarType::BFloat16 ? FLUTE_BFLOAT16
         : type == ScalarType::Half   ? FLUTE_FLOAT16
                                      : FLUTE_FLOAT32;
}

namespace {

// The guard of the right device must be held by the caller.
Tensor dense_weight(const char* op, const Weight& weight, const Tensor& qweight, Dtype round,
                    Dtype out_dtype) {
  Tensor out = ts::new_empty(qweight, {weight.n, weight.layer.k}, to_scalar_type(out_dtype));
  void* stream = current_stream(qweight.get_device_index());
  const int64_t row_bytes = weight.layer.k * (out_dtype == Dtype::kFloat32 ? 4 : 2);
  weight.for_each_part(0, weight.n, [&](const Layer& layer, int64_t begin, int64_t end) {
    const char* error =
        cuda::dequantize(layer, begin, end, round, out_dtype,
                         static_cast<char*>(out.mutable_data_ptr()) + begin * row_bytes, stream);
    FLUTE_CHECK(error == nullptr, op, "qweight", ("CUDA reports: ", error),
                ("rebuild with FLUTE_CUDA_ARCHS for this GPU, or check the earlier kernels"));
  });
  return out;
}

// --- the internal layout (cuda/layout.cuh): qweight is one run of records, made by `repack`
// -------

bool is_internal(const Tensor& qweight) {
  return qweight.dim() == 1;
}

FluteMatrix make_matrix(const char* op, const Tensor& scales, const Tensor& table,
                        const std::vector<int64_t>& part_sizes, int64_t bits, int64_t group_size,
                        int64_t k) {
  FluteMatrix matrix{};
  FLUTE_CHECK(
      scales.scalar_type() == ScalarType::BFloat16 || scales.scalar_type() == ScalarType::Half, op,
      "scales", ("dtype ", name_of(scales.scalar_type()), " in the internal layout"),
      ("pass scales of the dtype that flute::repack was given, fp16 or bf16"));
  FLUTE_CHECK(!part_sizes.empty() && part_sizes.size() <= FLUTE_MAX_PARTS, op, "part_sizes",
              (part_sizes.size(), " parts; the GPU layout has 1 to ", FLUTE_MAX_PARTS),
              ("keep the canonical tensors for this layer"));
  int64_t n = 0;
  for (const int64_t rows : part_sizes) {
    FLUTE_CHECK(rows > 0 && n + rows < (int64_t(1) << 31), op, "part_sizes",
                ("a part has ", rows, " rows"), ("pass the rows of each fused matrix"));
    matrix.part_rows[matrix.parts++] = int32_t(rows);
    n += rows;
  }
  matrix.n = int32_t(n);
  matrix.k = int32_t(k);
  matrix.bits = int32_t(bits);
  matrix.group_size = int32_t(group_size);
  matrix.dtype = scales.scalar_type() == ScalarType::BFloat16 ? FLUTE_BFLOAT16 : FLUTE_FLOAT16;
  matrix.pair_table = table.dim() == 3;
  return matrix;
}

FluteMatrix check_records(const char* op, const Tensor& qweight, const Tensor& scales,
                          const Tensor& table, const std::vector<int64_t>& part_sizes, int64_t bits,
                          int64_t group_size, int64_t k) {
  FLUTE_CHECK(
      qweight.is_cuda() && qweight.scalar_type() == ScalarType::Int && qweight.is_contiguous(), op,
      "qweight",
      (name_of(qweight.scalar_type()), " ", shape_of(qweight), " in the internal layout"),
      ("pass what flute::repack returned, on the GPU of x"));
  const FluteMatrix matrix = make_matrix(op, scales, table, part_sizes, bits, group_size, k);
  const int64_t words = flute_record_words(&matrix);
  FLUTE_CHECK(words == qweight.numel(), op, "qweight",
              ("the internal layout of ", matrix.n, " x ", k, " at ", bits, " bits has ", words,
               " words, this tensor ", qweight.numel()),
              ("pass what flute::repack returned for this layer"));
  FLUTE_CHECK(reinterpret_cast<uintptr_t>(qweight.data_ptr()) % 128 == 0, op, "qweight",
              ("it begins ", reinterpret_cast<uintptr_t>(qweight.data_ptr()) % 128,
               " bytes behind a multiple of 128"),
              ("pass what flute::repack returned, not a view of something larger"));
  const int64_t entries = int64_t(1) << (matrix.pair_table ? 2 * bits + 1 : bits);
  FLUTE_CHECK(table.numel() == entries * matrix.parts &&
                  table.scalar_type() == scales.scalar_type() && table.is_contiguous() &&
                  table.is_cuda() && table.get_device_index() == qweight.get_device_index(),
              op, "table", ("shape ", shape_of(table), " for ", matrix.parts, " parts"),
              ("stack one table for each part, in the dtype of scales"));
  FLUTE_CHECK(reinterpret_cast<uintptr_t>(table.data_ptr()) % 4 == 0, op, "table",
              ("it begins two bytes behind a multiple of four"), ("pass a clone of this view"));
  return matrix;
}

Tensor repack(const Tensor& qweight, const Tensor& scales, const Tensor& table,
              std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size) {
  const Weight weight =
      check_weight("repack", qweight, scales, table, part_sizes, bits, group_size);
  const FluteMatrix matrix =
      make_matrix("repack", scales, table, part_sizes, bits, group_size, weight.layer.k);
  const ts::accelerator::DeviceGuard guard(qweight.get_device_index());
  Tensor records = ts::new_empty(qweight, {flute_record_words(&matrix)});
  check_kernel("repack", flute_repack(&matrix, qweight.data_ptr(), scales.data_ptr(),
                                      records.mutable_data_ptr(),
                                      current_stream(qweight.get_device_index())));
  return records;
}

Tensor dense_records(const char* op, const FluteMatrix& matrix, const Tensor& qweight,
                     const Tensor& scales, const Tensor& table) {
  Tensor dense = ts::new_empty(scales, {matrix.n, matrix.k});
  check_kernel(
      op, flute_dequantize(&matrix, qweight.data_ptr(), table.data_ptr(), dense.mutable_data_ptr(),
                           current_stream(qweight.get_device_index())));
  return dense;
}

// What runs with up to `largest_m` rows of x (0: any), as flute_vllm/tuning/plan.py chose it.
enum Kernel : int64_t { kDense, kDecode, kSm90, kTile, kPlanes };
struct PlanEntry {
  static constexpr size_t kNumbers = 10;
  static constexpr int64_t kGates = 16;  // added to the kernel: its launch can apply an activation
  int64_t largest_m, kernel;
  bool gates;
  std::array<int32_t, 8> config;
};

PlanEntry plan_entry(const std::vector<int64_t>& plan, int64_t m) {
  FLUTE_CHECK(plan.size() % PlanEntry::kNumbers == 0, "gemm", "plan",
              (plan.size(), " numbers, no multiple of ", PlanEntry::kNumbers),
              ("pass what flute_vllm.tuning.plan returns for this layer"));
  for (size_t at = 0; at < plan.size(); at += PlanEntry::kNumbers) {
    if (plan[at] != 0 && m > plan[at]) continue;
    const int64_t kernel = plan[at + 1];
    PlanEntry entry{plan[at], kernel % PlanEntry::kGates, kernel >= PlanEntry::kGates, {}};
    for (size_t i = 0; i < entry.config.size(); ++i) entry.config[i] = int32_t(plan[at + 2 + i]);
    return entry;
  }
  return {0, kDense, false, {}};
}

// The records that the kernels ask for ahead: `next` is the qweight of the layer that runs next.
// None where it lies elsewhere than on `device`: a layer that vLLM offloads waits on the host for
// its turn, and what is only a hint must neither fail the call nor name memory out of reach.
FluteAhead ahead_of(const std::optional<Tensor>& next, int64_t next_bytes, int32_t device) {
  if (!next.has_value() || next_bytes <= 0) return {};
  if (!next->is_cuda() || next->get_device_index() != device) return {};
  FLUTE_CHECK(is_internal(*next) && next->is_contiguous() &&
                  reinterpret_cast<uintptr_t>(next->data_ptr()) % 16 == 0,
              "gemm", "next", ("shape ", shape_of(*next)),
              ("pass the repacked qweight of the next layer"));
  return {next->data_ptr(), next->numel() * 4, next_bytes};
}

// [..., N] to act(first half) * second half [..., N / 2].
Tensor activated(const Tensor& gate_up, int64_t activation) {
  const int64_t n = gate_up.size(gate_up.dim() - 1) / 2;
  Tensor y = empty_output(gate_up, n);
  if (y.numel() == 0) return y;
  const Tensor input = ts::contiguous(gate_up);
  const int32_t dtype = dtype_number(gate_up.scalar_type());
  const ts::accelerator::DeviceGuard guard(gate_up.get_device_index());
  check_kernel("gemm_gated",
               flute_activate(int32_t(activation), dtype, y.numel() / n, n, input.data_ptr(),
                              y.mutable_data_ptr(), current_stream(gate_up.get_device_index())));
  return y;
}

// `activation`: of a gated product, else FLUTE_NO_ACTIVATION.
Tensor gemm_records(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                    const Tensor& table, const std::vector<int64_t>& part_sizes, int64_t bits,
                    int64_t group_size, const std::vector<int64_t>& plan,
                    const std::optional<Tensor>& next, int64_t next_bytes, int64_t activation) {
  const int64_t k = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
  FLUTE_CHECK(x.scalar_type() == scales.scalar_type() && x.is_cuda() && k > 0, "gemm", "x",
              (name_of(x.scalar_type()), " ", shape_of(x), " with scales of ",
               name_of(scales.scalar_type()), " in the internal layout"),
              ("convert x, or repack with scales of its dtype"));
  FluteMatrix matrix =
      check_records("gemm", qweight, scales, table, part_sizes, bits, group_size, k);
  FLUTE_CHECK(x.get_device_index() == qweight.get_device_index(), "gemm", "x",
              ("it is on GPU ", x.get_device_index(), ", qweight on ", qweight.get_device_index()),
              ("move all tensors of the call to one device"));
  const int64_t m = x.numel() / k;
  FLUTE_CHECK(m < (int64_t(1) << 31), "gemm", "x", (m, " rows"), ("pass fewer rows"));
  if (m == 0) return empty_output(x, activation ? matrix.n / 2 : matrix.n);
  const ts::accelerator::DeviceGuard guard(qweight.get_device_index());
  const PlanEntry entry = plan_entry(plan, m);
  if (activation && (!entry.gates || entry.kernel == kDense))
    return activated(gemm_records(x, qweight, scales, table, part_sizes, bits, group_size, plan,
                                  next, next_bytes, FLUTE_NO_ACTIVATION),
                     activation);
  matrix.activation = int32_t(activation);
  if (entry.kernel == kDense)
    return ts::matmul(x,
                      ts::transpose(dense_records("gemm", matrix, qweight, scales, table), 0, 1));
  Tensor y = empty_output(x, activation ? matrix.n / 2 : matrix.n);
  const Tensor input = readable(x);
  const void *from = input.data_ptr(), *records = qweight.data_ptr(), *values = table.data_ptr();
  void *to = y.mutable_data_ptr(), *stream = current_stream(qweight.get_device_index());
  const auto& c = entry.config;
  const FluteAhead ahead = ahead_of(next, next_bytes, qweight.get_device_index());
  int error = 0;
  switch (entry.kernel) {
    case kDecode:
    case kPlanes: {
      const FluteDecodeConfig config = {c[0], c[1], c[2], c[3], c[4], c[5]};
      const auto decode = entry.kernel == kDecode ? flute_decode : flute_planes;
      error = decode(&matrix, &config, int32_t(m), from, records, values, to, &ahead, stream);
      break;
    }
    case kSm90: {
      const FluteSm90Config config = {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]};
      std::optional<Tensor> workspace;
      if (const int64_t bytes = flute_sm90_workspace(&config))
        workspace = ts::new_empty(qweight, {bytes / 4});
      error = flute_sm90_gemm(&matrix, &config, int32_t(m), from, records, values, to,
                              workspace ? workspace->mutable_data_ptr() : nullptr, &ahead, stream);
      break;
    }
    case kTile: {
      const FluteTileConfig config = {c[0], c[1], c[2], c[3]};
      const Tensor workspace =
          ts::new_empty(qweight, {flute_tile_workspace(&matrix, &config, int32_t(m)) / 4});
      error = flute_tile(&matrix, &config, int32_t(m), from, records, values, to,
                         workspace.mutable_data_ptr(), stream);
      break;
    }
    default:
      FLUTE_CHECK(false, "gemm", "plan", ("kernel ", entry.kernel, " is unknown"),
                  ("pass what flute_vllm.tuning.plan returns for this layer"));
  }
  check_kernel("gemm", error);
  return y;
}

// --- the ops
// --------------------------------------------------------------------------------------

Tensor gemm(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& table,
            std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size,
            std::vector<int64_t> plan, std::optional<Tensor> next, int64_t next_bytes) {
  if (is_internal(qweight))
    return gemm_records(x, qweight, scales, table, part_sizes, bits, group_size, plan, next,
                        next_bytes, FLUTE_NO_ACTIVATION);
  const Weight weight = check_weight("gemm", qweight, scales, table, part_sizes, bits, group_size);
  const Dtype dtype = check_input("gemm", x, qweight, weight);
  if (x.numel() == 0 || weight.n == 0) return empty_output(x, weight.n);
  const ts::accelerator::DeviceGuard guard(qweight.get_device_index());
  const Tensor dense = dense_weight("gemm", weight, qweight, weight.layer.dtype, dtype);
  return ts::matmul(x, ts::transpose(dense, 0, 1));
}

Tensor gemm_gated(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& table,
                  std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size,
                  int64_t activation, std::vector<int64_t> plan, std::optional<Tensor> next,
                  int64_t next_bytes) {
  check_gated(part_sizes, activation);
  if (is_internal(qweight))
    return gemm_records(x, qweight, scales, table, part_sizes, bits, group_size, plan, next,
                        next_bytes, activation);
  return activated(gemm(x, qweight, scales, table, part_sizes, bits, group_size, {}, {}, 0),
                   activation);
}

Tensor dequantize(const Tensor& qweight, const Tensor& scales, const Tensor& table,
                  std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size,
                  std::optional<ScalarType> dtype, int64_t in_features) {
  if (is_internal(qweight)) {
    const FluteMatrix matrix = check_records("dequantize", qweight, scales, table, part_sizes, bits,
                                             group_size, in_features);
    const ts::accelerator::DeviceGuard guard(qweight.get_device_index());
    const Tensor dense = dense_records("dequantize", matrix, qweight, scales, table);
    return ts::to(dense, dtype.value_or(scales.scalar_type()));
  }
  const Weight weight =
      check_weight("dequantize", qweight, scales, table, part_sizes, bits, group_size);
  const Dtype out_dtype = to_dtype("dequantize", "dtype", dtype.value_or(scales.scalar_type()));
  const ts::accelerator::DeviceGuard guard(qweight.get_device_index());
  return dense_weight("dequantize", weight, qweight, out_dtype, out_dtype);
}

}  // namespace
}  // namespace flute

STABLE_TORCH_LIBRARY_IMPL(flute, CUDA, m) {
  m.impl("gemm", TORCH_BOX(&flute::gemm));
  m.impl("gemm_gated", TORCH_BOX(&flute::gemm_gated));
  m.impl("dequantize", TORCH_BOX(&flute::dequantize));
  m.impl("repack", TORCH_BOX(&flute::repack));
}
