// The module lowmem_emulator: settings, and the kernels that the tests run.
#include <vector>

#include "binding.h"
#include "emulator.h"

namespace py = pybind11;

static std::vector<void (*)(py::module_&)>& binders() {
  static std::vector<void (*)(py::module_&)> all;
  return all;
}

Binder::Binder(void (*bind)(py::module_&)) { binders().push_back(bind); }

PYBIND11_MODULE(lowmem_emulator, m) {
  py::register_exception<emu::Error>(m, "EmulationError", PyExc_RuntimeError);
  m.def(
      "configure",
      [](int order, int multiprocessors, double seconds) {
        emu::settings() = emu::Settings{order, multiprocessors, seconds};
      },
      py::arg("order"), py::arg("multiprocessors") = 2, py::arg("seconds") = 120.0);
  for (auto* bind : binders()) bind(m);
}
