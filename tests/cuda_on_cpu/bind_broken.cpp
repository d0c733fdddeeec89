// broken.cuh's kernels by name.
#include "binding.h"
#include "broken.cuh"

namespace py = pybind11;

namespace {

using emu::Argument;

template <bool kSound>
void run(const std::string& name, Argument& in, Argument& out) {
  using namespace broken;
  const auto* from = static_cast<const float*>(in.data());
  auto* to = static_cast<float*>(out.data());
  const int count = static_cast<int>(out.cols());
  auto launch = [&](auto kernel, unsigned blocks, size_t shared, const auto&... args) {
    lm::launch(kernel, dim3(blocks), dim3(kThreads), shared, nullptr, args...);
  };
  if (name == "missing_barrier") return launch(missing_barrier<kSound>, 1, 0, from, to);
  if (name == "early_return") return launch(early_return<kSound>, 1, 0, from, to, count);
  if (name == "divergent_barrier") return launch(divergent_barrier<kSound>, 1, 0, from, to);
  if (name == "off_by_one_write") return launch(off_by_one<kSound, false>, 1, 0, from, to, count);
  if (name == "off_by_one_read") return launch(off_by_one<kSound, true>, 1, 0, from, to, count);
  if (name == "narrow_offset") {
    return launch(narrow_offset<kSound>, 1, 0, to, static_cast<int>(out.rows()), count, out.row_stride());
  }
  if (name == "missing_wait") return launch(missing_wait<kSound>, 1, 0, from, to);
  if (name == "overwritten_stage") {
    return launch(overwritten_stage<kSound>, 1, 0, from, to, static_cast<int>(in.cols() / (4 * kThreads)));
  }
  if (name == "stale_shared") return launch(stale_shared<kSound>, static_cast<unsigned>(count / kThreads), 0, from, to);
  if (name == "racing_sum") {
    const auto blocks = static_cast<unsigned>((in.cols() + kThreads - 1) / kThreads);
    return launch(racing_sum<kSound>, blocks, 0, from, to, static_cast<int>(in.cols()));
  }
  if (name == "misaligned") return launch(misaligned<kSound>, 1, 0, from, to);
  if (name == "absent_lanes") return launch(absent_lanes<kSound>, 1, 0, from, to);
  if (name == "shared_overrun") return launch(shared_overrun<kSound>, 1, kThreads * sizeof(float), from, to);
  if (name == "static_overrun") return launch(static_overrun<kSound>, 1, 0, from, to);
  if (name == "spinning") return launch(spinning<kSound>, 1, 0, from, to);
  throw py::key_error(name);
}

}  // namespace

LM_BIND(m) {
  m.def("broken", [](const std::string& name, bool sound, const py::tuple& in_from, const py::tuple& out_from) {
    Argument in("in", in_from, false), out("out", out_from, true);
    sound ? run<true>(name, in, out) : run<false>(name, in, out);
    return out.result();
  });
  m.def("writes_input", [](const py::tuple& in_from, const py::tuple& out_from) {
    Argument in("in", in_from, false), out("out", out_from, true);
    lm::launch(broken::missing_barrier<true>, dim3(1), dim3(broken::kThreads), 0, nullptr,
               static_cast<const float*>(out.data()), static_cast<float*>(in.data()));
    return out.result();
  });
}
