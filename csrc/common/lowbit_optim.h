// Argument checks of the lowbit_optim operators, the same on every device. Needs torch.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "codecs.h"
#include "unbias.h"

namespace lm {

inline Codec check_codec(const char* op, const std::string& name, const char* argument = "codec") {
  for (int i = 1; i < kCodecs; ++i) {
    if (name == kCodecNames[i]) return static_cast<Codec>(i);
  }
  bad(op, argument, "one of e4m3, e4m3+exp, e5m2, de8, de8+exp, log8, int8, int4", "'" + name + "'");
}

inline void check_group(const char* op, int64_t group) {
  if (group < 16 || group > 512 || (group & (group - 1)) != 0) {
    bad(op, "group_size", "16, 32, 64, 128, 256 or 512", group);
  }
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

inline void check_count(const char* op, const char* argument, const Tensor& t, ScalarType type, int64_t count) {
  check_dtype(op, argument, t, type);
  if (!t.is_contiguous()) bad(op, argument, "a contiguous tensor", "strides");
  if (t.numel() != count) bad(op, argument, std::to_string(count) + " elements", t.numel());
}

// Codes, scale and span of `numel` elements.
inline void check_state(const char* op, const char* codes_name, const char* scale_name, const char* span_name,
                        Codec codec, int64_t group, int64_t numel, const Tensor& codes, const Tensor& scale,
                        const Tensor& span) {
  if (numel < 0) bad(op, "numel", "a number >= 0", numel);
  const int64_t groups = (numel + group - 1) / group;
  check_count(op, codes_name, codes, ScalarType::Byte, codec == Codec::kInt4 ? (numel + 1) / 2 : numel);
  check_count(op, scale_name, scale, ScalarType::Float, groups);
  check_count(op, span_name, span, ScalarType::Byte, with_span(codec) ? groups : 0);
}

inline void check_weight_dtype(const char* op, const char* argument, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float && t.scalar_type() != ScalarType::BFloat16) {
    bad(op, argument, "float32 or bfloat16", dtype_text(t.scalar_type()));
  }
}

// Small tensors keep fp32 moments where their codes would be.
inline Codec state_codec(const Tensor& codes, Codec codec) {
  return codes.scalar_type() == ScalarType::Float ? Codec::kFp32 : codec;
}

struct AdamLists {
  const std::vector<Tensor>&params, &grads, &rests, &m_codes, &m_scales, &m_spans, &v_codes, &v_scales, &v_spans,
      &steps, &seeds;
  const std::vector<int64_t>& offsets;
};

struct AdamCodecs {
  Codec m, v;
};

inline AdamCodecs check_adamw(const AdamLists& t, const Tensor& lr, const std::optional<Tensor>& grad_scale,
                              const std::optional<Tensor>& found_inf, double beta1, double beta2, double eps,
                              double weight_decay, const std::string& m, const std::string& v, int64_t group) {
  const char* op = "lowbit_adamw_";
  const AdamCodecs codecs{check_codec(op, m, "m"), check_codec(op, v, "v")};
  check_group(op, group);
  if (!(beta1 >= 0.0 && beta1 < 1.0)) bad(op, "beta1", "a number in [0, 1)", beta1);
  if (!(beta2 >= 0.0 && beta2 < 1.0)) bad(op, "beta2", "a number in [0, 1)", beta2);
  if (!(eps >= 0.0) || std::isinf(eps)) bad(op, "eps", "a finite number >= 0", eps);
  if (!(weight_decay >= 0.0) || std::isinf(weight_decay)) {
    bad(op, "weight_decay", "a finite number >= 0", weight_decay);
  }
  check_count(op, "lr", lr, ScalarType::Float, 1);
  if (grad_scale) check_count(op, "grad_scale", *grad_scale, ScalarType::Float, 1);
  if (found_inf) check_count(op, "found_inf", *found_inf, ScalarType::Float, 1);
  const size_t count = t.params.size();
  const struct {
    const char* name;
    size_t size;
  } sizes[] = {{"grads", t.grads.size()},
               {"m_codes", t.m_codes.size()},
               {"m_scales", t.m_scales.size()},
               {"m_spans", t.m_spans.size()},
               {"v_codes", t.v_codes.size()},
               {"v_scales", t.v_scales.size()},
               {"v_spans", t.v_spans.size()},
               {"steps", t.steps.size()},
               {"seeds", t.seeds.size()},
               {"offsets", t.offsets.size()},
               {"remainders", t.rests.empty() ? count : t.rests.size()}};
  for (const auto& list : sizes) {
    if (list.size != count) bad(op, list.name, std::to_string(count) + " entries, as params has", list.size);
  }
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = t.params[i];
    const int64_t n = p.numel();
    check_weight_dtype(op, "params", p);
    if (!p.is_contiguous()) bad(op, "params", "contiguous tensors", "strides");
    check_weight_dtype(op, "grads", t.grads[i]);
    check_count(op, "grads", t.grads[i], t.grads[i].scalar_type(), n);
    const bool bf16 = p.scalar_type() == ScalarType::BFloat16;
    if (!t.rests.empty() && t.rests[i].numel() > 0) {
      if (!bf16) bad(op, "remainders", "an empty tensor beside float32 weights", "elements");
      check_count(op, "remainders", t.rests[i], ScalarType::Short, n);
    }
    const Codec kinds[2] = {state_codec(t.m_codes[i], codecs.m), state_codec(t.v_codes[i], codecs.v)};
    if (kinds[0] == Codec::kFp32) {
      check_count(op, "m_codes", t.m_codes[i], ScalarType::Float, n);
    } else {
      check_state(op, "m_codes", "m_scales", "m_spans", kinds[0], group, n, t.m_codes[i], t.m_scales[i], t.m_spans[i]);
    }
    if (kinds[1] == Codec::kFp32) {
      check_count(op, "v_codes", t.v_codes[i], ScalarType::Float, n);
    } else {
      check_state(op, "v_codes", "v_scales", "v_spans", kinds[1], group, n, t.v_codes[i], t.v_scales[i], t.v_spans[i]);
    }
    check_count(op, "steps", t.steps[i], ScalarType::Float, 1);
    check_count(op, "seeds", t.seeds[i], ScalarType::Long, 1);
    if (t.offsets[i] < 0) bad(op, "offsets", "numbers >= 0", t.offsets[i]);
  }
  return codecs;
}

}  // namespace lm
