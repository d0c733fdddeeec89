// CPU operators of the lowbit_optim family (schemas, formulas and references: lowmem/ops/lowbit_optim.py): checks and
// the partition of the work. The loops are in lowbit_optim_kernels.h.
//
// Work is divided in blocks of 1024 elements of one tensor. No block reads what another writes, so the bits of a result
// do not depend on the number of threads.
#include "common/lowbit_optim.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/lowbit_optim_impl.h"

namespace lm {
namespace {

constexpr int64_t kSerialBlocks = 64;  // less than this is not divided: a parallel region costs microseconds

const LowbitIsa& isa() {
  static const LowbitIsa* const chosen = [] {
    const LowbitIsa* const tables[kIsaLevels] = {lowbit_plain(), lowbit_avx2(), lowbit_avx512(), nullptr};
    return choose_isa(tables);
  }();
  return *chosen;
}

inline const char* bytes(const void* p) { return static_cast<const char*>(p); }

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Blocks of several tensors, numbered through.
class Blocks {
 public:
  void add(int64_t numel) { ends_.push_back(count() + (numel + kBlock - 1) / kBlock); }
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  // f(tensor, first element, elements are left behind it) for every block
  template <class F>
  void run(const F& f) const {
    const int64_t total = count();
    const auto part = [&](int64_t begin, int64_t end) {
      size_t tensor = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin());
      for (int64_t block = begin; block < end; ++block) {
        while (block >= ends_[tensor]) ++tensor;
        f(tensor, (block - (tensor ? ends_[tensor - 1] : 0)) * kBlock, block);
      }
    };
    if (total <= kSerialBlocks) {
      part(0, total);
    } else {
      torch::stable::parallel_for(0, total, kSerialBlocks / 4, part);
    }
  }

 private:
  std::vector<int64_t> ends_;
};

// ------------------------------------------------------------------------------------------------------------- codecs

std::tuple<Tensor, Tensor, Tensor> group_encode(const Tensor& x, std::string codec_name, int64_t group,
                                                bool is_signed) {
  const char* op = "group_encode";
  const Codec codec = check_codec(op, codec_name);
  check_group(op, group);
  check_dtype(op, "x", x, ScalarType::Float);
  if (!x.is_contiguous()) bad(op, "x", "a contiguous tensor", "strides");
  const int64_t n = x.numel(), groups = (n + group - 1) / group;
  const bool packed = codec == Codec::kInt4;
  Tensor codes = packed ? torch::stable::new_empty(x, {(n + 1) / 2}, ScalarType::Byte)
                        : torch::stable::new_empty(x, sizes_of(x), ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(x, {groups}, ScalarType::Float);
  Tensor span = torch::stable::new_empty(x, {with_span(codec) ? groups : 0}, ScalarType::Byte);
  const auto encode = isa().encode[static_cast<int>(codec)][is_signed];
  const float* from = data<const float>(x);
  auto* to = data<uint8_t>(codes);
  float* scales = data<float>(scale);
  auto* spans = data<uint8_t>(span);
  Blocks blocks;
  blocks.add(n);
  blocks.run([&](size_t, int64_t start, int64_t) {
    const int64_t count = std::min(kBlock, n - start), first = start / group;
    float padded[kBlock];
    const float* in = from + start;
    if (count % 16 != 0) {
      std::memcpy(padded, in, count * sizeof(float));
      std::memset(padded + count, 0, (16 - count % 16) * sizeof(float));
      in = padded;
    }
    encode(in, group, count, to + (packed ? start / 2 : start), scales + first,
           with_span(codec) ? spans + first : nullptr, reinterpret_cast<const char*>(from + start + kBlock));
  });
  return {codes, scale, span};
}

Tensor group_decode(const Tensor& codes, const Tensor& scale, const Tensor& span, int64_t numel, std::string codec_name,
                    int64_t group, bool is_signed) {
  const char* op = "group_decode";
  const Codec codec = check_codec(op, codec_name);
  check_group(op, group);
  check_state(op, "codes", "scale", "span", codec, group, numel, codes, scale, span);
  Tensor out = torch::stable::new_empty(scale, {numel}, ScalarType::Float);
  const auto decode = isa().decode[static_cast<int>(codec)][is_signed];
  const bool packed = codec == Codec::kInt4;
  const auto* from = data<const uint8_t>(codes);
  const float* scales = data<const float>(scale);
  const auto* spans = data<const uint8_t>(span);
  float* to = data<float>(out);
  Blocks blocks;
  blocks.add(numel);
  blocks.run([&](size_t, int64_t start, int64_t) {
    const int64_t count = std::min(kBlock, numel - start), first = start / group;
    float padded[kBlock];
    float* target = count % 16 == 0 ? to + start : padded;
    decode(from + (packed ? start / 2 : start), scales + first, with_span(codec) ? spans + first : nullptr, group,
           count, target, reinterpret_cast<const char*>(from + start + kBlock));
    if (target == padded) std::memcpy(to + start, padded, count * sizeof(float));
  });
  return out;
}

// --------------------------------------------------------------------------------------------------------------- norm

Tensor lowbit_grad_norm(std::vector<Tensor> grads) {
  const char* op = "lowbit_grad_norm";
  if (grads.empty()) bad(op, "grads", "at least one tensor", "none");
  Blocks blocks;
  for (const Tensor& g : grads) {
    check_weight_dtype(op, "grads", g);
    if (!g.is_contiguous()) bad(op, "grads", "contiguous tensors", "strides");
    blocks.add(g.numel());
  }
  Tensor out = torch::stable::new_empty(grads[0], {2}, ScalarType::Double);
  std::vector<double> sums(static_cast<size_t>(blocks.count()));
  std::vector<uint8_t> broken(static_cast<size_t>(blocks.count()));
  blocks.run([&](size_t tensor, int64_t start, int64_t block) {
    const Tensor& g = grads[tensor];
    const int64_t count = std::min(kBlock, g.numel() - start);
    float wide[kBlock];
    const float* from = nullptr;
    if (g.scalar_type() == ScalarType::Float) {
      from = data<const float>(g) + start;
    } else {
      isa().widen(data<const uint16_t>(g) + start, wide, count);
      from = wide;
    }
    bool finite = true;
    sums[static_cast<size_t>(block)] = isa().squares(from, count, &finite);
    broken[static_cast<size_t>(block)] = !finite;
  });
  double total = 0.0, bad_blocks = 0.0;
  for (size_t i = 0; i < sums.size(); ++i) {
    total += sums[i];
    bad_blocks += broken[i];
  }
  auto* result = data<double>(out);
  result[0] = total;
  result[1] = bad_blocks > 0.0 ? 1.0 : 0.0;
  return out;
}

// --------------------------------------------------------------------------------------------------------------- step

// A moment of one tensor: codes with their scales, or fp32.
struct Moment {
  Codec codec;
  uint8_t* codes;
  float *scale, *plain;
  uint8_t* span;

  Moment(Codec kept, const Tensor& codes_, const Tensor& scale_, const Tensor& span_)
      : codec(kept), codes(nullptr), scale(nullptr), plain(nullptr), span(nullptr) {
    if (codec == Codec::kFp32) {
      plain = data<float>(codes_);
    } else {
      codes = data<uint8_t>(codes_);
      scale = data<float>(scale_);
      span = data<uint8_t>(span_);
    }
  }

  // The values of a block, in place or decoded into `buffer`.
  float* read(int64_t start, int64_t count, int64_t group, bool is_signed, float* buffer, const char* ahead) const {
    if (plain) return plain + start;
    isa().decode[static_cast<int>(codec)][is_signed](at(start), scale + start / group, spans(start, group), group,
                                                     count, buffer, ahead);
    return buffer;
  }
  void write(int64_t start, int64_t count, int64_t group, bool is_signed, float* buffer) const {
    if (plain) return;
    for (int64_t k = count; k % 16 != 0; ++k) buffer[k] = 0.f;
    isa().encode[static_cast<int>(codec)][is_signed](buffer, group, count, at(start), scale + start / group,
                                                     spans(start, group), bytes(at(start + kBlock)));
  }

 private:
  uint8_t* at(int64_t start) const { return codes + (codec == Codec::kInt4 ? start / 2 : start); }
  uint8_t* spans(int64_t start, int64_t group) const { return with_span(codec) ? span + start / group : nullptr; }
};

void lowbit_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> rests,
                   std::vector<Tensor> m_codes, std::vector<Tensor> m_scales, std::vector<Tensor> m_spans,
                   std::vector<Tensor> v_codes, std::vector<Tensor> v_scales, std::vector<Tensor> v_spans,
                   std::vector<Tensor> steps, std::vector<Tensor> seeds, std::vector<int64_t> offsets, Tensor lr,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, double beta1, double beta2,
                   double eps, double weight_decay, std::string m, std::string v, int64_t group, bool maximize) {
  const AdamLists lists{params,  grads,    rests,   m_codes, m_scales, m_spans,
                        v_codes, v_scales, v_spans, steps,   seeds,    offsets};
  const AdamCodecs codecs = check_adamw(lists, lr, grad_scale, found_inf, beta1, beta2, eps, weight_decay, m, v, group);
  if (found_inf && *data<const float>(*found_inf) != 0.f) return;
  const float sign = maximize ? -1.f : 1.f;
  std::vector<AdamBy> by(params.size());
  std::vector<Moment> means, squares;
  Blocks blocks;
  for (size_t i = 0; i < params.size(); ++i) {
    blocks.add(params[i].numel());
    means.emplace_back(state_codec(m_codes[i], codecs.m), m_codes[i], m_scales[i], m_spans[i]);
    squares.emplace_back(state_codec(v_codes[i], codecs.v), v_codes[i], v_scales[i], v_spans[i]);
    const auto step = static_cast<uint32_t>(*data<const float>(steps[i]));
    const Unbias unbias = unbias_of(beta1, beta2, step);
    by[i] = AdamBy{*data<const float>(lr),
                   static_cast<float>(beta1),
                   static_cast<float>(1.0 - beta1),
                   static_cast<float>(beta2),
                   static_cast<float>(1.0 - beta2),
                   static_cast<float>(eps),
                   static_cast<float>(weight_decay),
                   unbias.first,
                   unbias.second,
                   grad_scale ? sign * *data<const float>(*grad_scale) : sign};
  }
  blocks.run([&](size_t i, int64_t start, int64_t) {
    alignas(64) float weights[kBlock], gradients[kBlock], mean_buffer[kBlock], square_buffer[kBlock];
    const Tensor &p = params[i], &g = grads[i];
    const int64_t count = std::min(kBlock, p.numel() - start);
    const bool wide = p.scalar_type() == ScalarType::Float, rest = !rests.empty() && rests[i].numel() > 0;
    const char* weight_at = static_cast<const char*>(p.data_ptr()) + start * p.element_size();
    const char* gradient_at = static_cast<const char*>(g.data_ptr()) + start * g.element_size();
    auto* narrow = wide ? nullptr : data<uint16_t>(p) + start;
    float* weight = wide ? data<float>(p) + start : weights;
    if (!wide && rest) isa().join(narrow, data<const int16_t>(rests[i]) + start, weight, count);
    if (!wide && !rest) isa().widen(narrow, weight, count);
    const float* gradient = gradients;
    if (g.scalar_type() == ScalarType::Float) {
      gradient = data<const float>(g) + start;
    } else {
      isa().widen(data<const uint16_t>(g) + start, gradients, count);
    }
    // a block of fp32 weights is a page, and the processor's own prefetching starts anew on every page
    float* mean = means[i].read(start, count, group, true, mean_buffer, bytes(gradient_at + kBlock * g.element_size()));
    float* square =
        squares[i].read(start, count, group, false, square_buffer, bytes(weight_at + kBlock * p.element_size()));
    isa().adam(weight, gradient, mean, square, count, by[i]);
    means[i].write(start, count, group, true, mean_buffer);
    squares[i].write(start, count, group, false, square_buffer);
    if (!wide && rest) isa().split(weight, narrow, data<int16_t>(rests[i]) + start, count);
    if (!wide && !rest) {
      isa().dither(weight, narrow, count, static_cast<uint64_t>(*data<const int64_t>(seeds[i])), offsets[i] + start,
                   static_cast<uint32_t>(*data<const float>(steps[i])));
    }
  });
}

}  // namespace
}  // namespace lm

STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) {
  m.impl("group_encode", TORCH_BOX(&lm::group_encode));
  m.impl("group_decode", TORCH_BOX(&lm::group_decode));
  m.impl("lowbit_grad_norm", TORCH_BOX(&lm::lowbit_grad_norm));
  m.impl("lowbit_adamw_", TORCH_BOX(&lm::lowbit_adamw_));
}
