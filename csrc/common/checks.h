// Argument checks of the compiled operators, in the package's one error form:
//   lowmem.<op>: <argument>: expected <what>, got <what>
// STD_TORCH_CHECK is not used for them: it puts a function, a file and a line before the message.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Got>
[[noreturn]] void bad(const char* op, const char* argument, const std::string& expected, const Got& got) {
  std::ostringstream text;
  text << "lowmem." << op << ": " << argument << ": expected " << expected << ", got " << got;
  throw std::runtime_error(text.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "shape (";
  const int64_t dims = t.dim();
  for (int64_t i = 0; i < dims; ++i) text << (i ? ", " : "") << t.size(i);
  text << (dims == 1 ? ",)" : ")");
  return text.str();
}

inline std::string dtype_text(ScalarType type) {
  std::ostringstream text;
  text << "torch." << torch::headeronly::toString(type);
  return text.str();
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// fp64 sums for fp64, fp32 sums for everything else.
inline ScalarType accumulate_dtype(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline void check_floating(const char* op, const char* argument, const Tensor& t) {
  if (!is_floating(t.scalar_type())) {
    bad(op, argument, "float32, float64, bfloat16 or float16", dtype_text(t.scalar_type()));
  }
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type) bad(op, argument, dtype_text(type), dtype_text(t.scalar_type()));
}

// A matrix; rows or cols of -1 may be anything.
inline void check_matrix(const char* op, const char* argument, const Tensor& t, int64_t rows, int64_t cols) {
  if (t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (cols < 0 || t.size(1) == cols)) return;
  std::ostringstream text;
  text << "shape [";
  rows < 0 ? text << "*" : text << rows;
  text << ", ";
  cols < 0 ? text << "*" : text << cols;
  text << "]";
  bad(op, argument, text.str(), shape_text(t));
}

}  // namespace lm
