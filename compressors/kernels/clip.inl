// Per-channel quantisation, written once over `Isa` and compiled once for each instruction set.
// Included inside an anonymous namespace, after struct Isa.

// Adding and taking away 1.5 * 2^23 rounds to nearest, ties to even, any float below 2^22 in magnitude.
constexpr float kRound = 12582912.0f;
constexpr int kLanes = Isa::kLanes;
using F = Isa::F;  // kLanes floats
using I = Isa::I;  // kLanes int32

inline F splat(float value) noexcept { return Isa::splat(value); }

inline F load(const float* p) noexcept {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline F load_part(const float* p, std::size_t n) noexcept {  // n < kLanes; the rest is zero
  F v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

inline void store(float* p, F v) noexcept { std::memcpy(p, &v, sizeof v); }
[[gnu::noinline]] void store_part(float* p, F v, std::size_t n) noexcept { std::memcpy(p, &v, n * sizeof(float)); }

inline float sum(F v) noexcept {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// The bit patterns of magnitudes order as the magnitudes do, with infinity and NaN on top.
float abs_max(const float* w, std::size_t n) noexcept {
  std::uint32_t top = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t pattern;
    std::memcpy(&pattern, w + i, sizeof pattern);
    pattern &= 0x7fffffffu;
    top = pattern > top ? pattern : top;
  }
  if (top >= 0x7f800000u) return std::numeric_limits<float>::infinity();
  float result;
  std::memcpy(&result, &top, sizeof result);
  return result;
}

inline F squared_error(F acc, F w, F inverse, F levels) noexcept {
  const F t = Isa::abs(w) * inverse;
  const F e = t - Isa::min((t + kRound) - kRound, levels);
  return acc + e * e;
}

// Errors are summed in units of the scale, so no weight, however large or small, over- or underflows. They only grow:
// a ratio is dropped as soon as its partial sum passes the best one.
float clip_scale(const float* w, std::size_t n, float top, int levels, int ratios) noexcept {
  constexpr std::size_t block = 32 * static_cast<std::size_t>(kLanes);
  const F limit = splat(static_cast<float>(levels));
  float best = std::numeric_limits<float>::infinity();
  int kept = ratios;
  for (int step = ratios; step >= 1; --step) {
    const float ratio = static_cast<float>(step) / static_cast<float>(ratios);
    const F inverse = splat(static_cast<float>(levels) / (ratio * top));
    const float unit = ratio * ratio;
    float error = 0.0f;
    std::size_t i = 0;
    for (; i + block <= n && error * unit < best; i += block) {
      F acc[4] = {};
      for (std::size_t j = i; j < i + block; j += 4 * static_cast<std::size_t>(kLanes))
        for (std::size_t a = 0; a < 4; ++a)
          acc[a] = squared_error(acc[a], load(w + j + a * static_cast<std::size_t>(kLanes)), inverse, limit);
      error += sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
    if (i + block <= n) continue;
    F acc{};
    for (; i + kLanes <= n; i += kLanes) acc = squared_error(acc, load(w + i), inverse, limit);
    if (i < n) acc = squared_error(acc, load_part(w + i, n - i), inverse, limit);
    error = (error + sum(acc)) * unit;
    if (error < best) {
      best = error;
      kept = step;
    }
  }
  return static_cast<float>(kept) / static_cast<float>(ratios) * top / static_cast<float>(levels);
}

void encode(const float* w, std::size_t n, float scale, int levels, std::int8_t* codes) noexcept {
  const float inverse = 1.0f / scale;
  const float limit = static_cast<float>(levels);
  for (std::size_t i = 0; i < n; ++i) {
    float t = w[i] * inverse;
    t = t > limit ? limit : t;
    t = t < -limit ? -limit : t;
    const float shifted = t + kRound;
    std::int32_t pattern;
    std::memcpy(&pattern, &shifted, sizeof pattern);
    codes[i] = static_cast<std::int8_t>(pattern - 0x4b400000);
  }
}
