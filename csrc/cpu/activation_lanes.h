// Sixteen fp32 numbers (or one fp64 number) as a value, in the compiler's own vector types: the same source becomes
// AVX-512, AVX2 or the architecture's baseline, by the LM_TARGET region that it is included in. Inside an unnamed
// namespace, after every header.

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t S16 __attribute__((vector_size(32)));
typedef uint8_t B16 __attribute__((vector_size(16)));

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bytes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct FloatLanes {
  using C = float;
  using V = F16;
  static constexpr int kWidth = 16;

  static V set(float x) { return x - V{}; }
  static V zero() { return V{}; }

  static V read(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static V read(const BFloat16* p) {
    S16 s;
    std::memcpy(&s, p, sizeof(s));
    return as<V>(__builtin_convertvector(s, U16) << 16);
  }
  static V read(const Half* p) {
    V v;
#if defined(LM_LANES_F16C)
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1));
    std::memcpy(&v, &low, 32);
    std::memcpy(reinterpret_cast<char*>(&v) + 32, &high, 32);
#else
    for (int i = 0; i < 16; ++i) v[i] = static_cast<float>(p[i]);
#endif
    return v;
  }

  static void write(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static void write(BFloat16* p, V v) {  // to nearest even; NaN stays NaN
    const U16 u = as<U16>(v);
    const U16 rounded = (v == v) ? u + 0x7FFFu + ((u >> 16) & 1u) : (u | 0x400000u);
    const S16 s = __builtin_convertvector(rounded >> 16, S16);
    std::memcpy(p, &s, sizeof(s));
  }
  static void write(Half* p, V v) {
#if defined(LM_LANES_F16C)
    __m256 low, high;
    std::memcpy(&low, &v, 32);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 16; ++i) p[i] = static_cast<Half>(static_cast<float>(v[i]));
#endif
  }

  // n in [1, 16] of them; the others read as zero and are not written
  template <class E>
  static V load(const E* p, int64_t n) {
    if (n >= kWidth) return read(p);
    alignas(64) unsigned char some[16 * sizeof(E)] = {};
    std::memcpy(some, p, static_cast<size_t>(n) * sizeof(E));
    return read(reinterpret_cast<const E*>(some));
  }
  template <class E>
  static void store(E* p, V v, int64_t n) {
    if (n >= kWidth) return write(p, v);
    alignas(64) unsigned char some[16 * sizeof(E)];
    write(reinterpret_cast<E*>(some), v);
    std::memcpy(p, some, static_cast<size_t>(n) * sizeof(E));
  }

  // `x` where less than n lanes have passed, else `other`
  static V first(V x, V other, int64_t n) {
    const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < static_cast<int32_t>(n < 16 ? n : 16) ? x : other;
  }

  static double sum(V v) {
    double total = 0.0;
    for (int i = 0; i < 16; ++i) total += static_cast<double>(v[i]);
    return total;
  }
  static float largest(V v) {
    float most = v[0];
    for (int i = 1; i < 16; ++i) most = v[i] > most ? v[i] : most;
    return most;
  }
  static V larger(V a, V b) { return a > b ? a : b; }
  static V magnitude(V v) { return as<V>(as<U16>(v) & 0x7FFFFFFFu); }

  // within 2 units in the last place; 0 below -104, infinity above 89, NaN for NaN
  static V exp(V x) {
    x = x < -104.0f ? set(-104.0f) : x;
    x = x > 89.5f ? set(89.5f) : x;
    const V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = set(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    const I16 k = __builtin_convertvector(x == x ? n : zero(), I16), half = k >> 1;  // by halves: 2^k may not be normal
    return p * as<V>((half + 127) << 23) * as<V>((k - half + 127) << 23);
  }
  static V tanh(V x) {
    const V z = x * x;
    V odd = set(-0.00886323553f);  // the series: its error at 0.35 is below a unit in the last place
    odd = odd * z + 0.0218694885f;
    odd = odd * z - 0.0539682540f;
    odd = odd * z + 0.133333333f;
    odd = odd * z - 0.333333333f;
    return magnitude(x) < 0.35f ? x + x * z * odd : 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  }
  // (1 + erf(x / sqrt 2)) / 2, the tails to relative accuracy
  static V normal_cdf(V x) {
    const V a = magnitude(x) * 0.707106781f, z = a * a;
    V near = set(7.882497112e-05f);
    near = near * z - 8.018854993e-04f;
    near = near * z + 5.189311943e-03f;
    near = near * z - 2.685432880e-02f;
    near = near * z + 1.128359746e-01f;
    near = near * z - 3.761262690e-01f;
    near = near * z + 1.128379166e+00f;
    const V t = 1.0f / (1.0f + 0.5f * a);
    V tail = set(-7.059330283e-02f);
    tail = tail * t + 3.381117509e-01f;
    tail = tail * t - 5.916359413e-01f;
    tail = tail * t + 3.904670445e-01f;
    tail = tail * t - 1.001113924e-01f;
    tail = tail * t + 2.328919877e-01f;
    tail = tail * t + 2.353177283e-01f;
    tail = tail * t + 2.835860904e-01f;
    tail = tail * t + 2.819835445e-01f;
    tail = tail * t + 3.634000955e-06f;
    tail = 0.5f * tail * exp(-z);
    const V erf_half = 0.5f * a * near;
    const V upper = a < 1.0f ? 0.5f + erf_half : 1.0f - tail, lower = a < 1.0f ? 0.5f - erf_half : tail;
    return x < 0.0f ? lower : upper;
  }

  // FP8 as in common/fp8.h; `p` is scaled
  static void write_codes(uint8_t* codes, V v, int64_t n) {
    const U16 u = as<U16>(v), m = u & 0x7FFFFFFFu;
    const U16 small = as<U16>(as<V>(m) + 16384.0f) - 0x46800000u;
    const U16 normal = ((m + 0x7FFFFu + ((m >> 20) & 1u)) >> 20) - (120u << 3);
    U16 code = (m < 0x3C800000u ? small : normal) | ((u >> 24) & 0x80u);
    code = m > 0x7F800000u ? U16{} + kFp8Nan : code;
    const B16 bytes = __builtin_convertvector(code, B16);
    std::memcpy(codes, &bytes, static_cast<size_t>(n < 16 ? n : 16));
  }
  static V read_codes(const uint8_t* codes, int64_t n) {
    B16 bytes = {};
    std::memcpy(&bytes, codes, static_cast<size_t>(n < 16 ? n : 16));
    const U16 code = __builtin_convertvector(bytes, U16), m = code & 0x7Fu;
    const V small = __builtin_convertvector(m, V) * 0.001953125f, normal = as<V>((m + (120u << 3)) << 20);
    V value = m < 8u ? small : normal;
    value = m == kFp8Nan ? as<V>(U16{} + 0x7FC00000u) : value;
    return as<V>(as<U16>(value) | ((code & 0x80u) << 24));
  }
};

struct DoubleLanes {
  using C = double;
  using V = double;
  static constexpr int kWidth = 1;

  static V set(double x) { return x; }
  static V zero() { return 0.0; }
  static V load(const double* p, int64_t) { return *p; }
  static V load(const float* p, int64_t) { return static_cast<double>(*p); }
  static void store(double* p, V v, int64_t) { *p = v; }
  static void store(float* p, V v, int64_t) { *p = static_cast<float>(v); }
  static V first(V x, V, int64_t) { return x; }
  static double sum(V v) { return v; }
  static double largest(V v) { return v; }
  static V larger(V a, V b) { return a > b ? a : b; }
  static V magnitude(V v) { return std::fabs(v); }
  static V exp(V x) { return std::exp(x); }
  static V tanh(V x) { return std::tanh(x); }
  static V normal_cdf(V x) { return 0.5 * std::erfc(-0.70710678118654752440 * x); }
  static void write_codes(uint8_t* codes, V v, int64_t) {
    *codes = static_cast<uint8_t>(e4m3_from_float(static_cast<float>(v)));
  }
  static V read_codes(const uint8_t* codes, int64_t) { return static_cast<double>(e4m3_to_float(*codes)); }
};
