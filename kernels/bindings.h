// Arguments of the ops after all checks. With bindings*.cpp, the only code that sees torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flute/format.h"

namespace flute {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Every message says what failed, where, why (with numbers) and what to do: errors.py, in C++.
#define FLUTE_CHECK(condition, op, argument, why, fix)                                       \
  do {                                                                                       \
    if (!(condition)) ::flute::fail((op), (argument), ::flute::text why, ::flute::text fix); \
  } while (0)

[[noreturn]] void fail(const char* op, const char* argument, const std::string& why,
                       const std::string& fix);

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string shape_of(const Tensor& tensor);
const char* name_of(ScalarType type);

// The weight of one op call: a layer, cut into parts with a table each.
struct Weight {
  Layer layer;  // table: of part 0
  int64_t n;
  std::vector<int64_t> ends;  // last row + 1 of each part
  int64_t table_entries;      // distance of two tables, in values

  // Calls f(layer with the table of the part, begin, end) for each part in rows [begin, end).
  template <class F>
  void for_each_part(int64_t begin, int64_t end, const F& f) const {
    int64_t start = 0;
    for (size_t part = 0; part < ends.size(); ++part) {
      const int64_t from = begin > start ? begin : start;
      const int64_t to = end < ends[part] ? end : ends[part];
      if (from < to) {
        Layer rows = layer;
        rows.table += int64_t(part) * table_entries;
        f(rows, from, to);
      }
      start = ends[part];
    }
  }
};

Weight check_weight(const char* op, const Tensor& qweight, const Tensor& scales,
                    const Tensor& table, const std::vector<int64_t>& part_sizes, int64_t bits,
                    int64_t group_size);

// Checks x against the weight; the Dtype of x.
Dtype check_input(const char* op, const Tensor& x, const Tensor& qweight, const Weight& weight);

// What gemm_gated takes beside the arguments of gemm.
void check_gated(const std::vector<int64_t>& part_sizes, int64_t activation);

Dtype to_dtype(const char* op, const char* argument, ScalarType type);
ScalarType to_scalar_type(Dtype dtype);

// [..., N] in the dtype of x.
Tensor empty_output(const Tensor& x, int64_t n);

}  // namespace flute
