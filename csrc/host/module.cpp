// lowmem._host: what runs on the host and needs no torch. numpy in, numpy out; the GIL is free while it works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>

#include "pack.h"

namespace py = pybind11;
using lowmem::host::Int;
using lowmem::host::Ints;
using Array = py::array_t<Int, py::array::c_style | py::array::forcecast>;

namespace {

Ints vector_of(const Array& array) { return Ints(array.data(), array.data() + array.size()); }

// lowmem/sched/pack.py has checked the values and named what was wrong; this keeps a direct caller from reading past
// the end.
py::tuple pack(const Array& lengths, const Array& job_ends, const Array& batch_sizes, Int capacity, Int depth,
               Int multiple, Int node_limit) {
  const Ints ends = vector_of(job_ends), sizes = vector_of(batch_sizes);
  const Int samples = lengths.size();
  bool good = !ends.empty() && ends.size() == sizes.size() && capacity >= 1 && capacity <= INT32_MAX && depth >= 1 &&
              depth <= 1024 && multiple >= 1 && multiple <= capacity;
  Int previous = 0;
  for (Int end : ends) {
    good = good && end > previous;
    previous = end;
  }
  good = good && previous == samples;
  for (Int size : sizes) good = good && size >= 1 && size <= samples;
  const Int room = good ? capacity / multiple * multiple : 0;
  for (Int i = 0; good && i < samples; ++i) good = lengths.data()[i] >= 1 && lengths.data()[i] <= room;
  if (!good)
    throw std::invalid_argument("lowmem._host.pack: arguments break the rules of lowmem.sched.pack_microbatches");
  lowmem::host::Packing packing;
  {
    const Int* data = lengths.data();
    py::gil_scoped_release release;
    packing = lowmem::host::pack(data, samples, ends, sizes, capacity, depth, multiple, node_limit);
  }
  Array slot(samples);
  std::copy(packing.slot.begin(), packing.slot.end(), slot.mutable_data());
  return py::make_tuple(slot, packing.slots, packing.lower_bound, packing.max_lower_bound, packing.nodes);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of lowmem that need no torch.";
  m.def("pack", &pack, py::arg("lengths"), py::arg("job_ends"), py::arg("batch_sizes"), py::arg("capacity"),
        py::arg("depth"), py::arg("multiple"), py::arg("node_limit"),
        "(slot of each sample, slots, bound on the slots, bound on the fullest slot, nodes of the exact search)");
}
