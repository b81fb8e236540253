// RMS norms on CUDA tensors, see cuda/norm.cu. Compiled only with FLUTE_BUILD=cuda.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings_cuda.h"
#include "flute/launch.h"

namespace flute {
namespace {

namespace ts = torch::stable;

void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& x) {
  FLUTE_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() &&
                  tensor.scalar_type() == x.scalar_type(),
              op, argument,
              (name_of(tensor.scalar_type()), " ", shape_of(tensor), " beside x of ",
               name_of(x.scalar_type())),
              ("convert it to the dtype and device of x"));
}

// y, and x + residual where there is one.
std::tuple<Tensor, Tensor> norm(const char* op, const Tensor& x, const Tensor* residual,
                                const Tensor& weight, double epsilon, double weight_offset) {
  const int64_t n = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
  const bool known = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  FLUTE_CHECK(x.is_cuda() && known && n > 0 && n % 8 == 0 && n <= FLUTE_MAX_NORM, op, "x",
              (name_of(x.scalar_type()), " ", shape_of(x),
               ", not 16 bits [..., a multiple of 8 up to ", FLUTE_MAX_NORM, "]"),
              ("use torch's norm for it"));
  FLUTE_CHECK(weight.numel() == n, op, "weight", (shape_of(weight), " for x of ", shape_of(x)),
              ("pass a weight for each of the last dimension"));
  check_like(op, "weight", weight, x);
  const int64_t m = x.numel() / n;
  FLUTE_CHECK(m < (int64_t(1) << 31), op, "x", (m, " rows"), ("pass fewer rows"));
  const Tensor input = readable(x), factor = readable(weight);
  Tensor y = ts::new_empty(input, input.sizes()), sums = y, other = input;
  if (residual != nullptr) {
    check_like(op, "residual", *residual, x);
    FLUTE_CHECK(residual->numel() == x.numel(), op, "residual",
                (shape_of(*residual), " for x of ", shape_of(x)), ("pass tensors of one shape"));
    other = readable(*residual);
    sums = ts::new_empty(input, input.sizes());
  }
  if (m == 0) return {y, sums};
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  const bool adds = residual != nullptr;
  check_kernel(op,
               flute_rms_norm(dtype_number(x.scalar_type()), int32_t(m), int32_t(n), float(epsilon),
                              float(weight_offset), input.data_ptr(),
                              adds ? other.data_ptr() : nullptr, factor.data_ptr(),
                              y.mutable_data_ptr(), adds ? sums.mutable_data_ptr() : nullptr,
                              current_stream(x.get_device_index())),
               "x");
  return {y, sums};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon, double weight_offset) {
  return std::get<0>(norm("rms_norm", x, nullptr, weight, epsilon, weight_offset));
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double epsilon,
                                        double weight_offset) {
  return norm("add_rms_norm", x, &residual, weight, epsilon, weight_offset);
}

}  // namespace
}  // namespace flute

STABLE_TORCH_LIBRARY_IMPL(flute, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&flute::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&flute::add_rms_norm));
}
