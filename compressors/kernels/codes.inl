// Activations to codes and back, written once and compiled once for each instruction set.
// Included inside an anonymous namespace, after clip.inl.

// codes = clamp(round_half_even(x / scale) + zero, 0, 255); a NaN gives 0. `inverse` is 1 / scale.
void quantize(const float* x, std::size_t n, float inverse, int zero, std::uint8_t* codes) noexcept {
  const float low = static_cast<float>(-zero), high = static_cast<float>(255 - zero);
  for (std::size_t i = 0; i < n; ++i) {
    float t = x[i] * inverse;
    t = t > low ? t : low;  // NaN too
    t = (t < high ? t : high) + kRound;
    std::uint32_t pattern;
    std::memcpy(&pattern, &t, sizeof pattern);
    codes[i] = static_cast<std::uint8_t>(pattern + static_cast<std::uint32_t>(zero));
  }
}

void dequantize(const std::uint8_t* codes, std::size_t n, float scale, int zero, float* x) noexcept {
  for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<float>(codes[i] - zero) * scale;
}
