// The lora family's launchers and kernels, from csrc/cuda/lora.cuh as it is.
#include <optional>

#include "binding.h"
#include "cuda/lora.cuh"

namespace py = pybind11;

namespace {

using emu::Argument;

template <typename T>
void expand(Argument& out, Argument& ds, Argument& a, const uint32_t* mask, int64_t mask_stride, const int64_t* seed,
            uint32_t threshold, uint32_t child, float inv_keep, bool accumulate) {
  lm::ExpandArgs<T> p{out.view<T>(),
                      ds.view<const T>(),
                      a.any_view(),
                      mask,
                      mask_stride,
                      seed,
                      out.rows(),
                      static_cast<int>(out.cols()),
                      static_cast<int>(ds.cols()),
                      threshold,
                      child,
                      inv_keep,
                      accumulate};
  lm::masked_expand(p, nullptr);
}

py::array masked_expand(const py::tuple& out_from, const py::tuple& ds_from, const py::tuple& a_from,
                        const std::optional<py::tuple>& mask_from, const std::optional<py::tuple>& seed_from,
                        uint32_t threshold, uint32_t child, float inv_keep, bool accumulate) {
  Argument out("out", out_from, true), ds("ds", ds_from, false), a("a", a_from, false);
  std::optional<Argument> mask, seed;
  if (mask_from) mask.emplace("mask", *mask_from, false);
  if (seed_from) seed.emplace("seed", *seed_from, false);
  const auto* bits = mask ? static_cast<const uint32_t*>(mask->data()) : nullptr;
  const auto* key = seed ? static_cast<const int64_t*>(seed->data()) : nullptr;
  const int64_t stride = mask ? mask->row_stride() : 0;
  auto run = [&](auto zero) {
    expand<decltype(zero)>(out, ds, a, bits, stride, key, threshold, child, inv_keep, accumulate);
  };
  if (out.dtype() == "f32") {
    run(float{});
  } else if (out.dtype() == "f16") {
    run(__half{});
  } else {
    run(__nv_bfloat16{});
  }
  return out.result();
}

template <typename T>
void dy_pass(Argument& dy, Argument& b, Argument& s, float scale, Argument& ds, Argument& db) {
  const int64_t rows = dy.rows(), cols = dy.cols(), r = b.cols();
  const lm::DyPlan plan = lm::dy_plan<T>(rows, cols, r);
  const int64_t floats = plan.ds_floats + plan.db_floats;
  emu::Guarded workspace("workspace", 1, floats, floats, 1, sizeof(float), emu::Place::kEnd);
  lm::dy<T>(plan, dy.view<const T>(), s.view<const T>(), b.any_view(), rows, cols, r, scale, static_cast<T*>(ds.data()),
            static_cast<float*>(db.data()), static_cast<float*>(workspace.data()), nullptr);
}

py::tuple dy(const py::tuple& dy_from, const py::tuple& b_from, const py::tuple& s_from, float scale,
             const py::tuple& ds_from, const py::tuple& db_from) {
  Argument dy("dy", dy_from, false), b("b", b_from, false), s("s", s_from, false);
  Argument ds("ds", ds_from, true), db("db", db_from, true);
  if (dy.dtype() == "f32") {
    dy_pass<float>(dy, b, s, scale, ds, db);
  } else if (dy.dtype() == "f16") {
    dy_pass<__half>(dy, b, s, scale, ds, db);
  } else {
    dy_pass<__nv_bfloat16>(dy, b, s, scale, ds, db);
  }
  return py::make_tuple(ds.result(), db.result());
}

}  // namespace

LM_BIND(m) {
  m.def("masked_expand", &masked_expand);
  m.def("dy", &dy);
  m.def("dy_plan", [](const std::string& dtype, int64_t rows, int64_t cols, int64_t r) {
    const lm::DyPlan plan = dtype == "f32" ? lm::dy_plan<float>(rows, cols, r) : lm::dy_plan<__half>(rows, cols, r);
    return py::make_tuple(plan.width, plan.panels, plan.slabs, plan.slab_rows, plan.ds_floats, plan.db_floats);
  });
}
