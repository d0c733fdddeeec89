// The loops of the activation family, over the numbers of activation_lanes.h. Included, like it, inside an unnamed
// namespace and an LM_TARGET region. Formulas: lowmem/ops/activation.py and lowmem/ops/activation_loss.py.

#include "cpu/activation_lanes.h"

// -------------------------------------------------------------------------------------------------------- FP8 groups

// One row's groups, from a row of the accumulation dtype.
template <class L>
inline void pack_row(const typename L::C* row, int64_t cols, uint8_t* codes, uint8_t* scales) {
  using V = typename L::V;
  const V limit = L::set(std::numeric_limits<float>::max());
  for (int64_t g0 = 0, g = 0; g0 < cols; g0 += kFp8Group, ++g) {
    const int64_t end = g0 + kFp8Group < cols ? g0 + kFp8Group : cols;
    V most = L::zero();
    for (int64_t k = g0; k < end; k += L::kWidth) {
      const V m = L::magnitude(L::load(row + k, end - k));
      most = L::larger(m <= limit ? m : L::zero(), most);  // NaN and infinities do not count
    }
    const uint32_t byte = fp8_scale_byte(static_cast<float>(L::largest(most)));
    scales[g] = static_cast<uint8_t>(byte);
    const auto inverse = static_cast<typename L::C>(fp8_inverse_scale(byte));
    for (int64_t k = g0; k < end; k += L::kWidth) {
      const V x = L::load(row + k, end - k);
      L::write_codes(codes + k,
                     L::magnitude(x) <= limit ? x * inverse : L::set(std::numeric_limits<float>::quiet_NaN()), end - k);
    }
  }
}

template <class L>
inline void unpack_row(const uint8_t* codes, const uint8_t* scales, int64_t cols, typename L::C* row) {
  for (int64_t k = 0; k < cols; k += L::kWidth) {
    const auto scale = static_cast<typename L::C>(fp8_scale(scales[k / kFp8Group]));
    L::store(row + k, L::read_codes(codes + k, cols - k) * scale, cols - k);
  }
}

inline int64_t groups_of(int64_t cols) { return (cols + kFp8Group - 1) / kFp8Group; }

// A row of this thread, with 16 elements to spare.
template <class C>
inline C* scratch(int64_t cols, int which) {
  return static_cast<C*>(activation_scratch((cols + 16) * static_cast<int64_t>(sizeof(C)), which));
}

// A row in the accumulation dtype: converted from `x`, or decoded from packed groups.
template <class L, class E>
inline const typename L::C* row_of(const E* x, const Packed& packed, int64_t row, int64_t cols, int which) {
  auto* to = scratch<typename L::C>(cols, which);
  if (x) {
    for (int64_t k = 0; k < cols; k += L::kWidth) L::store(to + k, L::load(x + k, cols - k), cols - k);
  } else {
    unpack_row<L>(packed.codes + row * cols, packed.scales + row * groups_of(cols), cols, to);
  }
  return to;
}

template <class L>
inline void pack_to(const typename L::C* row, const Packed& packed, int64_t at, int64_t cols) {
  pack_row<L>(row, cols, packed.codes + at * cols, packed.scales + at * groups_of(cols));
}

template <class L, class E>
void pack_rows(const PackArgs& a, int64_t row0, int64_t row1) {
  for (int64_t m = row0; m < row1; ++m) {
    pack_to<L>(row_of<L>(static_cast<const E*>(a.x) + m * a.ld, a.packed, m, a.cols, 0), a.packed, m, a.cols);
  }
}

template <class L, class E>
void unpack_rows(const PackArgs& a, int64_t row0, int64_t row1) {
  for (int64_t m = row0; m < row1; ++m) {
    const auto* row = row_of<L, E>(nullptr, a.packed, m, a.cols, 0);
    E* out = static_cast<E*>(a.out) + m * a.cols;
    for (int64_t k = 0; k < a.cols; k += L::kWidth) L::store(out + k, L::load(row + k, a.cols - k), a.cols - k);
  }
}

// ------------------------------------------------------------------------------------------------------ cross entropy

template <class L, class E>
inline typename L::V logit(const E* row, const typename L::C* bias, typename L::C cap, int64_t k, int64_t n) {
  typename L::V v = L::load(row + k, n);
  if (bias) v = v + L::load(bias + k, n);
  return cap > 0 ? cap * L::tanh(v / cap) : v;
}

template <class L, class E>
void loss_rows(const LossArgs& a, int64_t row0, int64_t row1) {
  using C = typename L::C;
  using V = typename L::V;
  constexpr int64_t kBlock = 512;  // sums of so many stay in one register, then go to fp64
  const C* bias = static_cast<const C*>(a.bias);
  const C cap = static_cast<C>(a.softcap), low = -std::numeric_limits<C>::infinity();
  const double smooth = a.smoothing;
  for (int64_t m = row0; m < row1; ++m) {
    E* row = static_cast<E*>(a.logits) + m * a.ld;
    C* loss = static_cast<C*>(a.loss) + m;
    const int64_t label = a.target[m * a.target_stride];
    if (label == a.ignore_index) {
      *loss = 0;
      if (a.factor) std::memset(row, 0, static_cast<size_t>(a.cols) * sizeof(E));
      continue;
    }
    V most = L::set(low);
    for (int64_t k = 0; k < a.cols; k += L::kWidth) {  // uncapped: the cap keeps the order
      V v = L::load(row + k, a.cols - k);
      if (bias) v = v + L::load(bias + k, a.cols - k);
      most = L::larger(L::first(v, L::set(low), a.cols - k), most);
    }
    C top = L::largest(most);
    if (cap > 0) top = cap * std::tanh(top / cap);
    double total = 0.0, plain = 0.0;
    for (int64_t b = 0; b < a.cols; b += kBlock) {
      const int64_t end = b + kBlock < a.cols ? b + kBlock : a.cols;
      V sum = L::zero(), sum_v = L::zero();
      for (int64_t k = b; k < end; k += L::kWidth) {
        const V v = logit<L>(row, bias, cap, k, end - k);
        sum = sum + L::first(L::exp(v - top), L::zero(), end - k);
        if (smooth > 0) sum_v = sum_v + L::first(v, L::zero(), end - k);
      }
      total += L::sum(sum);
      plain += L::sum(sum_v);
    }
    const double lse = static_cast<double>(top) + std::log(total);
    double own = static_cast<double>(static_cast<C>(row[label])) + (bias ? static_cast<double>(bias[label]) : 0.0);
    if (cap > 0) own = a.softcap * std::tanh(own / a.softcap);
    double value = lse - (1.0 - smooth) * own + a.z_loss * lse * lse;
    if (smooth > 0) value -= smooth * plain / static_cast<double>(a.cols);
    *loss = static_cast<C>(value);
    if (!a.factor) continue;
    const double f = static_cast<double>(static_cast<const C*>(a.factor)[m * a.factor_stride]);
    const C scale = static_cast<C>(f * (1.0 + 2.0 * a.z_loss * lse)), shift = static_cast<C>(lse);
    const C flat = static_cast<C>(f * smooth / static_cast<double>(a.cols)), inverse = cap > 0 ? 1 / cap : 0;
    const C target = static_cast<C>(f * (1.0 - smooth));
    const V before = L::load(row + label, 1);  // the label's logit, before its gradient is written over it
    for (int64_t k = 0; k < a.cols; k += L::kWidth) {
      const V v = logit<L>(row, bias, cap, k, a.cols - k);
      V grad = scale * L::exp(v - shift) - flat;
      if (cap > 0) grad = grad * (1 - (v * inverse) * (v * inverse));
      L::store(row + k, grad, a.cols - k);
    }
    V v = before;
    if (bias) v = v + L::load(bias + label, 1);
    if (cap > 0) v = cap * L::tanh(v / cap);
    V grad = scale * L::exp(v - shift) - flat - target;
    if (cap > 0) grad = grad * (1 - (v * inverse) * (v * inverse));
    L::store(row + label, grad, 1);
  }
}

// -------------------------------------------------------------------------------------------------------------- norms

template <class L, class E>
void norm_rows(const NormArgs& a, int64_t row0, int64_t row1) {
  using C = typename L::C;
  using V = typename L::V;
  const C *weight = static_cast<const C*>(a.weight), *bias = static_cast<const C*>(a.bias);
  const int64_t cols = a.cols;
  C* s = scratch<C>(cols, 0);
  for (int64_t m = row0; m < row1; ++m) {
    const E* x = static_cast<const E*>(a.x) + m * a.ld_x;
    if (a.residual) {  // the sum is rounded to the stream's dtype first: it is what the next layer reads
      const E* other = static_cast<const E*>(a.residual) + m * a.ld_residual;
      E* summed = static_cast<E*>(a.summed) + m * cols;
      for (int64_t k = 0; k < cols; k += L::kWidth) {
        L::store(summed + k, L::load(x + k, cols - k) + L::load(other + k, cols - k), cols - k);
      }
      x = summed;
    }
    V sum = L::zero(), squares = L::zero();
    for (int64_t k = 0; k < cols; k += L::kWidth) {
      const V v = L::load(x + k, cols - k);
      L::store(s + k, v, cols - k);
      sum = sum + v;
      squares = squares + v * v;
    }
    C mean = 0;
    double variance = L::sum(squares) / static_cast<double>(cols);
    if (a.center) {
      mean = static_cast<C>(L::sum(sum) / static_cast<double>(cols));
      squares = L::zero();
      for (int64_t k = 0; k < cols; k += L::kWidth) {
        const V v = L::first(L::load(s + k, cols - k) - mean, L::zero(), cols - k);
        squares = squares + v * v;
      }
      variance = L::sum(squares) / static_cast<double>(cols);
    }
    const C rstd = static_cast<C>(1.0 / std::sqrt(variance + a.eps));
    C* stats = static_cast<C*>(a.stats) + (a.center ? 2 * m : m);
    if (a.center) *stats++ = mean;
    *stats = rstd;
    E* y = static_cast<E*>(a.y) + m * cols;
    for (int64_t k = 0; k < cols; k += L::kWidth) {
      V v = (L::load(s + k, cols - k) - mean) * rstd;
      L::store(s + k, v, cols - k);
      if (weight) v = v * L::load(weight + k, cols - k);
      if (bias) v = v + L::load(bias + k, cols - k);
      L::store(y + k, v, cols - k);
    }
    if (a.packed.codes) pack_to<L>(s, a.packed, m, cols);
  }
}

template <class L, class E>
void norm_grad_rows(const NormGradArgs& a, int64_t row0, int64_t row1) {
  using C = typename L::C;
  using V = typename L::V;
  const C* weight = static_cast<const C*>(a.weight);
  const int64_t cols = a.cols;
  C *dw = static_cast<C*>(a.dw), *db = static_cast<C*>(a.db);
  C* normal = scratch<C>(cols, 1);
  for (int64_t m = row0; m < row1; ++m) {
    const E* dy = static_cast<const E*>(a.dy) + m * a.ld_dy;
    const C* stats = static_cast<const C*>(a.stats) + (a.center ? 2 * m : m);
    const C mean = a.center ? stats[0] : 0, rstd = a.center ? stats[1] : stats[0];
    const E* x = a.x ? static_cast<const E*>(a.x) + m * a.ld_x : nullptr;
    if (!x) unpack_row<L>(a.packed.codes + m * cols, a.packed.scales + m * groups_of(cols), cols, normal);
    V sum = L::zero(), product = L::zero();
    for (int64_t k = 0; k < cols; k += L::kWidth) {
      const V grad = L::load(dy + k, cols - k);
      if (x) L::store(normal + k, (L::load(x + k, cols - k) - mean) * rstd, cols - k);
      const V n = L::load(normal + k, cols - k);
      if (dw) L::store(dw + k, L::load(dw + k, cols - k) + grad * n, cols - k);
      if (db) L::store(db + k, L::load(db + k, cols - k) + grad, cols - k);
      const V dn = weight ? grad * L::load(weight + k, cols - k) : grad;
      sum = sum + dn;
      product = product + dn * n;
    }
    const C shift = a.center ? static_cast<C>(L::sum(sum) / static_cast<double>(cols)) : 0;
    const C slope = static_cast<C>(L::sum(product) / static_cast<double>(cols));
    E* dx = static_cast<E*>(a.dx) + m * cols;
    const E* dsum = a.dsum ? static_cast<const E*>(a.dsum) + m * a.ld_dsum : nullptr;
    for (int64_t k = 0; k < cols; k += L::kWidth) {
      V dn = L::load(dy + k, cols - k);
      if (weight) dn = dn * L::load(weight + k, cols - k);
      V out = rstd * (dn - shift - slope * L::load(normal + k, cols - k));
      if (dsum) out = out + L::load(dsum + k, cols - k);
      L::store(dx + k, out, cols - k);
    }
  }
}

// -------------------------------------------------------------------------------------------------------- activations

// y and f'(x). The derivative is taken at x clamped to +-100 (fp64: 1000), where it is 0 or 1: never inf * 0.
template <class L, int kind>
inline void evaluate(typename L::V x, typename L::V* y, typename L::V* slope) {
  using V = typename L::V;
  const typename L::C limit = sizeof(typename L::C) == 4 ? 100 : 1000;
  V c = x > limit ? L::set(limit) : x;
  c = c < -limit ? L::set(-limit) : c;
  if (kind == kSilu) {
    const V e = L::exp(-L::magnitude(c)), near = 1 / (1 + e), far = e * near;  // 1 - sigmoid without cancellation
    const V s = c < 0 ? far : near;
    *y = x * s;
    *slope = s + c * near * far;
  } else if (kind == kGelu) {
    const V p = L::normal_cdf(c);
    *y = x * p;
    *slope = p + c * static_cast<typename L::C>(0.3989422804014327) * L::exp(static_cast<typename L::C>(-0.5) * c * c);
  } else {
    const typename L::C two_root = static_cast<typename L::C>(1.5957691216057308);  // 2 sqrt(2 / pi)
    const typename L::C cubic = static_cast<typename L::C>(0.044715);
    const V e = L::exp(-two_root * L::magnitude(c + cubic * c * c * c)), near = 1 / (1 + e), far = e * near;
    const V s = c < 0 ? far : near;
    *y = x * s;
    *slope = s + c * near * far * two_root * (1 + 3 * cubic * c * c);
  }
}

constexpr double kSteps[kKinds] = {13, 11, 11};  // derivative levels (code - 1) / steps: 0 and 1 are exact
constexpr double kJumps[2][3] = {{-6.305046, -0.000868, 6.325816}, {-3.185881, -0.001179, 3.190833}};
constexpr double kLevels[2][4] = {{0, -0.040604, 1.040321, 0.999999}, {0, -0.049223, 1.04874, 0.999999}};

template <class C>
inline uint32_t code4(C slope, double steps) {
  const double at = slope == slope ? std::nearbyint(static_cast<double>(slope) * steps) + 1.0 : 1.0;
  return static_cast<uint32_t>(at < 0 ? 0 : at > 15 ? 15 : at);
}

template <class L, class E, int kind>
void act_rows(const ActArgs& a, int64_t row0, int64_t row1) {
  using C = typename L::C;
  using V = typename L::V;
  const int table = kind == kSilu ? 0 : 1;
  C *wide = scratch<C>(a.cols, 0), *slopes = scratch<C>(a.cols, 1);
  for (int64_t m = row0; m < row1; ++m) {
    const E* x = static_cast<const E*>(a.x) + m * a.ld_x;
    E* y = static_cast<E*>(a.out) + m * a.cols;
    for (int64_t k = 0; k < a.cols; k += L::kWidth) {
      const V v = L::load(x + k, a.cols - k);
      V value, slope;
      evaluate<L, kind>(v, &value, &slope);
      L::store(y + k, value, a.cols - k);
      L::store(wide + k, v, a.cols - k);
      if (a.form == kDeriv4) L::store(slopes + k, slope, a.cols - k);
    }
    uint8_t* saved = a.saved + m * a.bytes;
    if (a.form == kFp8) {
      pack_to<L>(wide, a.packed, m, a.cols);
    } else if (a.form == kDeriv4) {
      slopes[a.cols] = 0;  // the spare half of the last byte holds the derivative 0
      for (int64_t b = 0; b < a.bytes; ++b) {
        saved[b] =
            static_cast<uint8_t>(code4(slopes[2 * b], kSteps[kind]) | code4(slopes[2 * b + 1], kSteps[kind]) << 4);
      }
    } else if (a.form == kDeriv2) {
      for (int i = 0; i < 3; ++i) wide[a.cols + i] = -std::numeric_limits<C>::infinity();
      const C c0 = static_cast<C>(kJumps[table][0]), c1 = static_cast<C>(kJumps[table][1]),
              c2 = static_cast<C>(kJumps[table][2]);
      for (int64_t b = 0; b < a.bytes; ++b) {
        uint32_t byte = 0;
        for (int i = 0; i < 4; ++i) {
          const C v = wide[4 * b + i];
          byte |= static_cast<uint32_t>((v >= c0) + (v >= c1) + (v >= c2)) << (2 * i);
        }
        saved[b] = static_cast<uint8_t>(byte);
      }
    }
  }
}

template <class L, class E, int kind>
void act_grad_rows(const ActArgs& a, int64_t row0, int64_t row1) {
  using C = typename L::C;
  using V = typename L::V;
  C levels[16];
  for (int i = 0; i < 16; ++i) {
    levels[i] = a.form == kDeriv4 ? static_cast<C>((i - 1) / kSteps[kind])
                                  : static_cast<C>(kLevels[kind == kSilu ? 0 : 1][i & 3]);
  }
  C* slopes = scratch<C>(a.cols, 1);
  for (int64_t m = row0; m < row1; ++m) {
    const E* dy = static_cast<const E*>(a.dy) + m * a.ld_dy;
    E* dx = static_cast<E*>(a.out) + m * a.cols;
    if (a.form == kPlain || a.form == kFp8) {
      const E* source = a.form == kPlain ? static_cast<const E*>(a.x) + m * a.ld_x : nullptr;
      const C* x = row_of<L>(source, a.packed, m, a.cols, 0);
      for (int64_t k = 0; k < a.cols; k += L::kWidth) {
        V value, slope;
        evaluate<L, kind>(L::load(x + k, a.cols - k), &value, &slope);
        L::store(slopes + k, slope, a.cols - k);
      }
    } else {
      const uint8_t* saved = a.saved + m * a.bytes;
      const int bits = a.form == kDeriv4 ? 4 : 2, each = 8 / bits;
      for (int64_t k = 0; k < a.cols; ++k) {
        slopes[k] = levels[(saved[k / each] >> (bits * (k % each))) & ((1 << bits) - 1)];
      }
    }
    for (int64_t k = 0; k < a.cols; k += L::kWidth) {
      L::store(dx + k, L::load(dy + k, a.cols - k) * L::load(slopes + k, a.cols - k), a.cols - k);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- SwiGLU

template <class L, class E>
void glu_rows(const GluArgs& a, int64_t row0, int64_t row1) {
  using V = typename L::V;
  const int64_t cols = a.cols;
  const bool packed_in = a.g == nullptr;
  for (int64_t m = row0; m < row1; ++m) {
    const E* gate = packed_in ? nullptr : static_cast<const E*>(a.g) + m * a.ld_g;
    const E* up = packed_in ? nullptr : static_cast<const E*>(a.u) + m * a.ld_u;
    const auto* g = row_of<L>(gate, a.packed_g, m, cols, 0);
    const auto* u = row_of<L>(up, a.packed_u, m, cols, 1);
    E* h = static_cast<E*>(a.h) + m * cols;
    for (int64_t k = 0; k < cols; k += L::kWidth) {
      const V x = L::load(g + k, cols - k);
      L::store(h + k, x / (1 + L::exp(-x)) * L::load(u + k, cols - k), cols - k);
    }
    if (!packed_in && a.packed_g.codes) {
      pack_to<L>(g, a.packed_g, m, cols);
      pack_to<L>(u, a.packed_u, m, cols);
    }
  }
}

template <class L, class E>
void glu_grad_rows(const GluArgs& a, int64_t row0, int64_t row1) {
  using V = typename L::V;
  const int64_t cols = a.cols;
  for (int64_t m = row0; m < row1; ++m) {
    const auto* g = row_of<L>(a.g ? static_cast<const E*>(a.g) + m * a.ld_g : nullptr, a.packed_g, m, cols, 0);
    const auto* u = row_of<L>(a.u ? static_cast<const E*>(a.u) + m * a.ld_u : nullptr, a.packed_u, m, cols, 1);
    const E* dh = static_cast<const E*>(a.dh) + m * a.ld_dh;
    E *dg = static_cast<E*>(a.dg) + m * cols, *du = static_cast<E*>(a.du) + m * cols;
    for (int64_t k = 0; k < cols; k += L::kWidth) {
      const V grad = L::load(dh + k, cols - k);
      V value, slope;
      evaluate<L, kSilu>(L::load(g + k, cols - k), &value, &slope);
      L::store(dg + k, grad * L::load(u + k, cols - k) * slope, cols - k);
      L::store(du + k, grad * value, cols - k);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- table

template <class L, class E>
constexpr ActivationKernels activation_kernels() {
  return {loss_rows<L, E>,
          pack_rows<L, E>,
          unpack_rows<L, E>,
          norm_rows<L, E>,
          norm_grad_rows<L, E>,
          {act_rows<L, E, kSilu>, act_rows<L, E, kGelu>, act_rows<L, E, kGeluTanh>},
          {act_grad_rows<L, E, kSilu>, act_grad_rows<L, E, kGelu>, act_grad_rows<L, E, kGeluTanh>},
          glu_rows<L, E>,
          glu_grad_rows<L, E>};
}

constexpr ActivationIsa kActivations = {
    {activation_kernels<FloatLanes, float>(), activation_kernels<DoubleLanes, double>(),
     activation_kernels<FloatLanes, BFloat16>(), activation_kernels<FloatLanes, Half>()}};
