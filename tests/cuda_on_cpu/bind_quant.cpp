// The quant family's launchers and kernels, from csrc/cuda/quant.cuh as it is.
#include <optional>

#include "binding.h"
#include "cuda/quant.cuh"

namespace py = pybind11;

namespace {

using emu::Argument;

int dtype_of(const std::string& tag) {
  return tag == "f32" ? lm::kFloat32 : tag == "bf16" ? lm::kBFloat16 : tag == "f16" ? lm::kFloat16 : lm::kByte;
}

// (packed, scale, zero, scale_code, scale_absmax, scale_offset), each flat or None, spec, k.
class Weight {
 public:
  Weight(const py::tuple& tensors, int64_t spec, int64_t k) {
    static const char* const kNames[6] = {"packed", "scale", "zero", "scale_code", "scale_absmax", "scale_offset"};
    for (int i = 0; i < 6; ++i) {
      if (!tensors[i].is_none()) parts_[i].emplace(kNames[i], tensors[i].cast<py::tuple>(), false);
    }
    auto at = [&](int i) -> const void* { return parts_[i] ? parts_[i]->data() : nullptr; };
    view_.spec = lm::unpack_spec(spec);
    view_.packed = static_cast<const uint8_t*>(at(0));
    view_.scale = at(1), view_.zero = at(2);
    view_.scale_code = static_cast<const float*>(at(3));
    view_.scale_absmax = at(4), view_.scale_offset = at(5);
    view_.offset_step = parts_[5] && parts_[5]->cols() > 1 ? 1 : 0;
    view_.float_dtype = dtype_of(parts_[view_.spec.scale_bits > 0 ? 4 : 1]->dtype());
    view_.zero_dtype = parts_[2] ? dtype_of(parts_[2]->dtype()) : lm::kByte;
    view_.k = k;
  }
  const lm::QuantView& view() const { return view_; }

 private:
  std::optional<Argument> parts_[6];
  lm::QuantView view_{};
};

template <typename F>
void with_dtype(const std::string& tag, F f) {
  if (tag == "f32") {
    f(float{});
  } else if (tag == "f16") {
    f(__half{});
  } else {
    f(__nv_bfloat16{});
  }
}

py::array dequantize(const py::tuple& out_from, const py::tuple& weight, int64_t spec, int64_t k, int64_t row0,
                     int64_t col0) {
  Argument out("out", out_from, true);
  const Weight w(weight, spec, k);
  with_dtype(out.dtype(), [&](auto zero) {
    const auto view = out.view<decltype(zero)>();
    lm::dequantize(w.view(), view, out.rows(), out.cols(), row0, col0, nullptr);
  });
  return out.result();
}

// y [experts * m, n] of x [experts * m, k].
py::array gemv(const py::tuple& x_from, const py::tuple& weight, int64_t spec, int64_t row0,
               const std::optional<py::tuple>& bias_from, int experts, const py::tuple& y_from) {
  Argument x("x", x_from, false), y("y", y_from, true);
  std::optional<Argument> bias;
  if (bias_from) bias.emplace("bias", *bias_from, false);
  const Weight w(weight, spec, x.cols());
  lm::GemvArgs p{w.view(), x.any_view(), y.data(), bias ? bias->data() : nullptr, row0, x.cols()};
  p.n = static_cast<int>(y.cols()), p.m = static_cast<int>(y.rows() / experts);
  if (lm::gemv(p, experts, nullptr) != cudaSuccess) throw py::value_error("gemv does not serve this");
  return y.result();
}

py::array mma(const py::tuple& x_from, const py::tuple& weight, int64_t spec, int64_t row0,
              const std::optional<py::tuple>& bias_from, int experts, const py::tuple& y_from) {
  Argument x("x", x_from, false), y("y", y_from, true);
  std::optional<Argument> bias;
  if (bias_from) bias.emplace("bias", *bias_from, false);
  const Weight w(weight, spec, x.cols());
  const int64_t m = y.rows() / experts, n = y.cols(), k = x.cols();
  const lm::MmaPlan plan = lm::mma_plan(experts, m, n, k);
  emu::Guarded parts("parts", 1, plan.floats, plan.floats, 1, sizeof(float), emu::Place::kEnd);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    lm::MmaArgs<T> p{};
    p.w = w.view(), p.x = static_cast<const T*>(x.data()), p.y = static_cast<T*>(y.data());
    p.bias = bias ? static_cast<const T*>(bias->data()) : nullptr;
    p.parts = static_cast<float*>(parts.data());
    p.row0 = row0, p.k = k, p.n = static_cast<int>(n), p.m = static_cast<int>(m);
    if (lm::mma(p, experts, plan, nullptr) != cudaSuccess) throw py::value_error("mma does not serve this");
  };
  if (y.dtype() == "f16") {
    run(__half{});
  } else {
    run(__nv_bfloat16{});
  }
  return y.result();
}

}  // namespace

LM_BIND(m) {
  m.def("quant_dequantize", &dequantize);
  m.def("quant_gemv", &gemv);
  m.def("quant_mma", &mma);
  m.def("quant_mma_plan", [](int64_t experts, int64_t rows, int64_t n, int64_t k) {
    const lm::MmaPlan plan = lm::mma_plan(experts, rows, n, k);
    return py::make_tuple(plan.splits, plan.chunks_each, plan.floats);
  });
}
