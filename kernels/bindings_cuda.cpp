// The ops on CUDA tensors. Compiled only with FLUTE_BUILD=cuda; the library still loads under a
// torch without CUDA, because its one CUDA symbol is weak and nothing runs at load.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "flute/cuda.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));

namespace flute {
namespace {

namespace ts = torch::stable;

void* current_stream(int32_t device) {
  FLUTE_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "gemm", "x",
              ("this torch has no CUDA streams"), ("install a torch with CUDA"));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

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

Tensor gemm(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& table,
            std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size) {
  const Weight weight = check_weight("gemm", qweight, scales, table, part_sizes, bits, group_size);
  const Dtype dtype = check_input("gemm", x, qweight, weight);
  if (x.numel() == 0 || weight.n == 0) return empty_output(x, weight.n);
  const ts::accelerator::DeviceGuard guard(qweight.get_device_index());
  const Tensor dense = dense_weight("gemm", weight, qweight, weight.layer.dtype, dtype);
  return ts::matmul(x, ts::transpose(dense, 0, 1));
}

Tensor dequantize(const Tensor& qweight, const Tensor& scales, const Tensor& table,
                  std::vector<int64_t> part_sizes, int64_t bits, int64_t group_size,
                  std::optional<ScalarType> dtype) {
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
  m.impl("dequantize", TORCH_BOX(&flute::dequantize));
}
