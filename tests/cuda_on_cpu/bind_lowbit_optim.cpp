// The lowbit_optim family's launcher and kernel, from csrc/cuda/lowbit_optim.cuh as it is.
#include <memory>
#include <string>
#include <vector>

#include "binding.h"
#include "cuda/lowbit_optim.cuh"

namespace py = pybind11;

namespace {

// A flat array in guarded memory.
class Flat {
 public:
  Flat(const char* name, const py::array& values, bool writable, emu::Place place)
      : values_(values), writable_(writable) {
    const auto n = static_cast<int64_t>(values.size());
    if (n == 0) return;
    memory_ = std::make_unique<emu::Guarded>(name, 1, n, n, 1, static_cast<size_t>(values.itemsize()), place);
    memory_->copy_in(values.data(), !writable);
  }
  template <class T>
  T* data() const {
    return memory_ ? static_cast<T*>(memory_->data()) : nullptr;
  }
  py::array result() const {
    if (!writable_) return values_;
    py::array out(values_.dtype(), std::vector<py::ssize_t>{values_.size()});
    if (memory_) memory_->copy_out(out.mutable_data());
    return out;
  }

 private:
  py::array values_;
  bool writable_;
  std::unique_ptr<emu::Guarded> memory_;
};

constexpr const char* kNames[] = {"params",  "grads",    "remainders", "m_codes", "m_scales", "m_spans",
                                  "v_codes", "v_scales", "v_spans",    "steps",   "seeds"};
constexpr int kLists = 11;

// `lists`: for each name a list of flat arrays; returns the lists as they are afterwards.
std::vector<std::vector<py::array>> adamw(const std::vector<std::vector<py::array>>& lists,
                                          const std::vector<int64_t>& offsets, float lr, py::object grad_scale,
                                          py::object found_inf, double beta1, double beta2, float eps, float decay,
                                          int m, int v, int group, bool maximize, const std::string& where) {
  const emu::Place place = where == "end" ? emu::Place::kEnd : emu::Place::kStart;
  std::vector<std::vector<Flat>> memory(kLists);
  for (int k = 0; k < kLists; ++k) {
    const bool writable = k != 1 && k < 9;
    for (const auto& values : lists[static_cast<size_t>(k)]) memory[k].emplace_back(kNames[k], values, writable, place);
  }
  const float scale = grad_scale.is_none() ? 0.f : grad_scale.cast<float>();
  const float found = found_inf.is_none() ? 0.f : found_inf.cast<float>();
  auto table = std::make_unique<lm::AdamTable>();
  table->count = static_cast<int>(offsets.size());
  for (int i = 0; i < table->count; ++i) {
    const auto& p = lists[0][i];
    lm::AdamTensor& t = table->tensor[i];
    t.p = memory[0][i].data<void>(), t.g = memory[1][i].data<void>(), t.rest = memory[2][i].data<int16_t>();
    t.m = memory[3][i].data<void>(), t.m_scale = memory[4][i].data<float>(), t.m_span = memory[5][i].data<uint8_t>();
    t.v = memory[6][i].data<void>(), t.v_scale = memory[7][i].data<float>(), t.v_span = memory[8][i].data<uint8_t>();
    t.step = memory[9][i].data<float>(), t.seed = memory[10][i].data<int64_t>();
    t.numel = static_cast<int64_t>(p.size()), t.offset = offsets[i];
    t.wide_p = p.itemsize() == 4, t.wide_g = lists[1][i].itemsize() == 4;
    t.plain_m = lists[3][i].itemsize() == 4, t.plain_v = lists[6][i].itemsize() == 4;
  }
  lm::AdamOptions options{};
  options.beta1 = beta1, options.beta2 = beta2, options.eps = eps, options.decay = decay;
  options.sign = maximize ? -1.f : 1.f;
  options.lr = &lr, options.grad_scale = grad_scale.is_none() ? nullptr : &scale;
  options.found_inf = found_inf.is_none() ? nullptr : &found;
  options.group = group, options.m = static_cast<lm::Codec>(m), options.v = static_cast<lm::Codec>(v);
  lm::fill_trees(options);
  lm::lowbit_adamw(*table, options, nullptr);
  std::vector<std::vector<py::array>> after(kLists);
  for (int k = 0; k < kLists; ++k) {
    for (const auto& one : memory[k]) after[k].push_back(one.result());
  }
  return after;
}

}  // namespace

LM_BIND(m) { m.def("lowbit_adamw", &adamw); }
