// Family `lowbit_optim` on CUDA devices: argument checks and the launch of lowbit_optim.cuh's kernel, one for every 288
// tensors. Registered as lowmem_c::lowbit_adamw_; the launcher under lowmem:: is in lowmem/ops/lowbit_optim.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../common/lowbit_optim.h"
#include "lowbit_optim.cuh"

namespace {

using lm::bad;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "lowbit_adamw_";
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of one launch

void check_device(const char* argument, const Tensor& t, const Tensor& like) {
  if (t.is_cuda() && t.get_device_index() == like.get_device_index()) return;
  const std::string got =
      t.is_cuda() ? "device cuda:" + std::to_string(t.get_device_index()) : "another kind of device";
  bad(kOp, argument, "device cuda:" + std::to_string(like.get_device_index()) + " (params')", got);
}

void lowbit_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> rests,
                   std::vector<Tensor> m_codes, std::vector<Tensor> m_scales, std::vector<Tensor> m_spans,
                   std::vector<Tensor> v_codes, std::vector<Tensor> v_scales, std::vector<Tensor> v_spans,
                   std::vector<Tensor> steps, std::vector<Tensor> seeds, std::vector<int64_t> offsets, Tensor lr,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, double beta1, double beta2,
                   double eps, double weight_decay, std::string m, std::string v, int64_t group, bool maximize) {
  const lm::AdamLists lists{params,  grads,    rests,   m_codes, m_scales, m_spans,
                            v_codes, v_scales, v_spans, steps,   seeds,    offsets};
  const lm::AdamCodecs codecs =
      lm::check_adamw(lists, lr, grad_scale, found_inf, beta1, beta2, eps, weight_decay, m, v, group);
  if (params.empty()) return;
  const Tensor& first = params[0];
  const struct {
    const char* name;
    const std::vector<Tensor>& list;
  } all[] = {{"params", params},     {"grads", grads},     {"remainders", rests}, {"m_codes", m_codes},
             {"m_scales", m_scales}, {"m_spans", m_spans}, {"v_codes", v_codes},  {"v_scales", v_scales},
             {"v_spans", v_spans},   {"steps", steps},     {"seeds", seeds}};
  for (const auto& one : all) {
    for (const Tensor& t : one.list) check_device(one.name, t, first);
  }
  check_device("lr", lr, first);
  if (grad_scale) check_device("grad_scale", *grad_scale, first);
  if (found_inf) check_device("found_inf", *found_inf, first);

  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
  const auto number = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  lm::AdamOptions options{};
  options.beta1 = beta1, options.beta2 = beta2;
  options.eps = static_cast<float>(eps), options.decay = static_cast<float>(weight_decay);
  options.sign = maximize ? -1.f : 1.f;
  options.lr = static_cast<const float*>(lr.const_data_ptr());
  options.grad_scale = number(grad_scale), options.found_inf = number(found_inf);
  options.group = static_cast<int>(group), options.m = codecs.m, options.v = codecs.v;
  lm::fill_trees(options);

  lm::AdamTable table{};
  int64_t blocks = 0;
  const auto flush = [&] {
    if (table.count > 0) STD_CUDA_CHECK(lm::lowbit_adamw(table, options, static_cast<cudaStream_t>(stream)));
    table.count = 0, blocks = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel(), mine = (n + lm::kStepBlock - 1) / lm::kStepBlock;
    if (n == 0) continue;
    if (mine > kMostBlocks) bad(kOp, "params", "fewer than 2**43 elements", n);
    if (table.count == lm::kStepTensors || blocks + mine > kMostBlocks) flush();
    blocks += mine;
    lm::AdamTensor& t = table.tensor[table.count++];
    t.p = params[i].mutable_data_ptr(), t.g = grads[i].const_data_ptr();
    t.rest = !rests.empty() && rests[i].numel() > 0 ? static_cast<int16_t*>(rests[i].mutable_data_ptr()) : nullptr;
    t.m = m_codes[i].mutable_data_ptr(), t.v = v_codes[i].mutable_data_ptr();
    t.m_scale = static_cast<float*>(m_scales[i].mutable_data_ptr());
    t.v_scale = static_cast<float*>(v_scales[i].mutable_data_ptr());
    t.m_span = static_cast<uint8_t*>(m_spans[i].mutable_data_ptr());
    t.v_span = static_cast<uint8_t*>(v_spans[i].mutable_data_ptr());
    t.step = static_cast<const float*>(steps[i].const_data_ptr());
    t.seed = static_cast<const int64_t*>(seeds[i].const_data_ptr());
    t.numel = n, t.offset = offsets[i];
    t.wide_p = params[i].scalar_type() == ScalarType::Float, t.wide_g = grads[i].scalar_type() == ScalarType::Float;
    t.plain_m = m_codes[i].scalar_type() == ScalarType::Float,
    t.plain_v = v_codes[i].scalar_type() == ScalarType::Float;
  }
  flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowmem_c, CUDA, m) { m.impl("lowbit_adamw_", TORCH_BOX(&lowbit_adamw_)); }
