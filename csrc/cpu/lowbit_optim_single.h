// One element as a vector: the plain kernels, and the tails of the others. Included like lowbit_optim_kernels.h, before
// it.
struct Single : Scalar {
  static constexpr int kWidth = 1, kDraw = 8;
  static F load(const float* p) { return *p; }
  static void store(float* p, F v) { *p = v; }
  static I load_bytes(const uint8_t* p) { return *p; }
  static void store_bytes(uint8_t* p, I v) { *p = static_cast<uint8_t>(v); }
  static I load_words(const uint16_t* p) { return *p; }
  static void store_words(uint16_t* p, I v) { *p = static_cast<uint16_t>(v); }
  static I minu(I a, I b) { return static_cast<uint32_t>(a) < static_cast<uint32_t>(b) ? a : b; }
  static uint32_t top(I v) { return static_cast<uint32_t>(v); }
  static uint32_t bottom(I v) { return static_cast<uint32_t>(v); }
  static void draw(uint64_t seed, int64_t block, uint32_t step, uint16_t* to) {
    const uint64_t at = static_cast<uint64_t>(block);
    const Philox4 r = philox4x32_10(seed, static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), step, 0);
    for (int i = 0; i < 8; ++i) to[i] = static_cast<uint16_t>(r.w[i / 2] >> (16 * (i % 2)));
  }
};
