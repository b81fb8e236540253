// Schemas of the ops and the checks that every device shares.
#include "bindings.h"

#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

namespace flute {

void fail(const char* op, const char* argument, const std::string& why, const std::string& fix) {
  throw std::runtime_error(text("flute: cannot run flute::", op, "\n  where: argument ", argument,
                                "\n  why: ", why, "\n  fix: ", fix));
}

std::string shape_of(const Tensor& tensor) {
  std::string out = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    out += (i ? ", " : "") + std::to_string(tensor.size(i));
  return out + "]";
}

const char* name_of(ScalarType type) {
  return torch::headeronly::toString(type);
}

Dtype to_dtype(const char* op, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      fail(op, argument, text("dtype ", name_of(type), " is not float32, float16 or bfloat16"),
           "convert it to one of them");
  }
}

ScalarType to_scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return ScalarType::Float;
    case Dtype::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::BFloat16;
  }
}

namespace {

void check_place(const char* op, const char* argument, const Tensor& tensor,
                 const Tensor& qweight) {
  const bool same_kind =
      tensor.is_cuda() == qweight.is_cuda() && tensor.is_cpu() == qweight.is_cpu();
  FLUTE_CHECK(same_kind && tensor.get_device_index() == qweight.get_device_index(), op, argument,
              ("it is on another device than qweight"),
              ("move all tensors of the call to one device"));
}

void check_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  FLUTE_CHECK(tensor.is_contiguous(), op, argument,
              (shape_of(tensor), " is not contiguous: its codes and scales are read as one block"),
              ("call .contiguous() once when loading"));
}

int64_t check_table(const char* op, const Tensor& table, const Tensor& scales, int64_t bits,
                    int64_t parts) {
  const bool pair = table.dim() == 3;
  const int64_t entries = pair ? int64_t(1) << (2 * bits) : int64_t(1) << bits;
  const bool fits = (table.dim() == 2 || (pair && table.size(2) == 2)) && table.size(0) == parts &&
                    table.size(1) == entries;
  FLUTE_CHECK(
      fits, op, "table",
      ("shape ", shape_of(table), " is neither [", parts, ", ", int64_t(1) << bits, "] nor [",
       parts, ", ", int64_t(1) << (2 * bits), ", 2] (", parts, " parts, ", bits, " bits)"),
      ("stack one table for each entry of part_sizes"));
  FLUTE_CHECK(table.scalar_type() == scales.scalar_type(), op, "table",
              ("dtype ", name_of(table.scalar_type()), " differs from the dtype of scales, ",
               name_of(scales.scalar_type())),
              ("convert the table when loading"));
  return pair ? 2 * entries : entries;
}

}  // namespace

Weight check_weight(const char* op, const Tensor& qweight, const Tensor& scales,
                    const Tensor& table, const std::vector<int64_t>& part_sizes, int64_t bits,
                    int64_t group_size) {
  FLUTE_CHECK(bits >= kMinBits && bits <= kMaxBits, op, "bits",
              (bits, " is not in ", kMinBits, "..", kMaxBits),
              ("pass the bits of the checkpoint's quantization_config"));
  bool known_group = group_size == kPerRow;
  for (const int size : kGroupSizes) known_group |= group_size == size;
  FLUTE_CHECK(known_group, op, "group_size",
              (group_size, " is not one of 32, 64, 128, 256 and -1 (one scale for each row)"),
              ("pass the group_size of the checkpoint's quantization_config"));
  FLUTE_CHECK(qweight.dim() == 2 && qweight.scalar_type() == ScalarType::Int, op, "qweight",
              ("expected int32 [N, K / 32 * ", bits, "], got ", name_of(qweight.scalar_type()), " ",
               shape_of(qweight)),
              ("pass the tensor as the checkpoint stores it"));
  const int64_t n = qweight.size(0), words = qweight.size(1), k = words / bits * kUnit;
  FLUTE_CHECK(words > 0 && words % bits == 0, op, "qweight",
              (words, " words in a row are not a positive multiple of ", bits, " bits"),
              ("check that bits belongs to this tensor"));
  const int64_t group = group_size == kPerRow ? k : group_size;
  FLUTE_CHECK(k % group == 0, op, "group_size",
              (k, " input features are not a multiple of group_size ", group_size),
              ("check that group_size belongs to this tensor"));
  FLUTE_CHECK(
      scales.scalar_type() == ScalarType::Half || scales.scalar_type() == ScalarType::BFloat16, op,
      "scales", ("dtype ", name_of(scales.scalar_type()), " is not fp16 or bf16"),
      ("pass the tensor as the checkpoint stores it"));
  FLUTE_CHECK(scales.dim() == 2 && scales.size(0) == n && scales.size(1) == k / group, op, "scales",
              ("shape ", shape_of(scales), " is not [", n, ", ", k / group, "] (", k,
               " input features, group_size ", group_size, ")"),
              ("check that group_size belongs to this tensor"));
  const int64_t entries =
      check_table(op, table, scales, bits, static_cast<int64_t>(part_sizes.size()));

  std::vector<int64_t> ends;
  int64_t rows = 0;
  for (const int64_t size : part_sizes) {
    FLUTE_CHECK(size >= 0 && size <= n, op, "part_sizes",
                ("part ", ends.size(), " has ", size, " rows of ", n),
                ("pass the rows of each fused matrix"));
    ends.push_back(rows += size);
  }
  FLUTE_CHECK(rows == n, op, "part_sizes",
              ("the parts have ", rows, " rows in all, but qweight has ", n),
              ("pass the rows of each fused matrix"));
  check_place(op, "scales", scales, qweight);
  check_place(op, "table", table, qweight);
  check_contiguous(op, "qweight", qweight);
  check_contiguous(op, "scales", scales);
  check_contiguous(op, "table", table);

  Layer layer{};
  layer.codes = static_cast<const uint32_t*>(qweight.const_data_ptr());
  layer.scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  layer.table = static_cast<const uint16_t*>(table.const_data_ptr());
  layer.dtype = to_dtype(op, "scales", scales.scalar_type());
  layer.bits = int(bits);
  layer.pair = table.dim() == 3;
  layer.k = k;
  layer.group = group;
  layer.words_per_row = words;
  layer.groups = k / group;
  return {layer, n, std::move(ends), entries};
}

Dtype check_input(const char* op, const Tensor& x, const Tensor& qweight, const Weight& weight) {
  const Dtype dtype = to_dtype(op, "x", x.scalar_type());
  FLUTE_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.layer.k, op, "x",
              ("shape ", shape_of(x), " does not end in the ", weight.layer.k,
               " input features of qweight ", shape_of(qweight)),
              ("check that this activation belongs to this layer"));
  check_place(op, "x", x, qweight);
  return dtype;
}

void check_gated(const std::vector<int64_t>& part_sizes, int64_t activation) {
  FLUTE_CHECK(activation >= 1 && activation <= 3, "gemm_gated", "activation",
              (activation, " is not 1 (silu), 2 (gelu with tanh) or 3 (gelu)"),
              ("pass one of flute_vllm.ops.Activation"));
  FLUTE_CHECK(part_sizes.size() == 2 && part_sizes[0] == part_sizes[1], "gemm_gated", "part_sizes",
              ("a gated layer has two parts of as many rows, gate and up; got ", part_sizes.size(),
               part_sizes.size() == 2 ? text(" of ", part_sizes[0], " and ", part_sizes[1], " rows")
                                      : std::string(" parts")),
              ("pass the rows of gate and of up, or call flute::gemm"));
}

Tensor empty_output(const Tensor& x, int64_t n) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(n);
  return torch::stable::new_empty(x, shape);
}

namespace {

// Requests: -1 the level in use, -2 the best one of this machine, else the level to use from now.
int64_t cpu_isa(int64_t request) {
  if (request == -2) return cpu::best_isa();
  if (request != -1) cpu::request_isa(request < 0 || request > 99 ? 99 : int(request));
  return cpu::current_isa();
}

}  // namespace
}  // namespace flute

STABLE_TORCH_LIBRARY(flute, m) {
  m.def(
      "gemm(Tensor x, Tensor qweight, Tensor scales, Tensor table, int[] part_sizes, int bits, "
      "int group_size, int[] plan=[], Tensor? next=None, int next_bytes=0) -> Tensor");
  m.def(
      "gemm_gated(Tensor x, Tensor qweight, Tensor scales, Tensor table, int[] part_sizes, "
      "int bits, int group_size, int activation, int[] plan=[], Tensor? next=None, "
      "int next_bytes=0) -> Tensor");
  m.def(
      "dequantize(Tensor qweight, Tensor scales, Tensor table, int[] part_sizes, int bits, "
      "int group_size, ScalarType? dtype=None, int in_features=0) -> Tensor");
  m.def(
      "repack(Tensor qweight, Tensor scales, Tensor table, int[] part_sizes, int bits, "
      "int group_size) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon, float weight_offset=0.) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon, "
      "float weight_offset=0.) -> (Tensor, Tensor)");
  m.def("cpu_isa(int request=-1) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flute, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&flute::cpu_isa));
}
