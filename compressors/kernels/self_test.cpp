// Every kernel on every instruction set of this machine, on buffers of exactly the size that is promised: meant to be
// run under AddressSanitizer and UndefinedBehaviorSanitizer (self_test.sh). Exits with 1 at the first wrong result.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "histogram.h"
#include "kernels.h"

using namespace tightrope;

namespace {

std::mt19937 generator(1);

int below(int end) { return std::uniform_int_distribution<int>(0, end - 1)(generator); }
std::size_t size_below(std::size_t end) { return std::uniform_int_distribution<std::size_t>(1, end)(generator); }

void require(bool holds, const char* what, const char* isa) {
  if (holds) return;
  std::fprintf(stderr, "self-test failed on %s: %s\n", isa, what);
  std::exit(1);
}

std::vector<std::uint8_t> codes_of(std::size_t n, int bits) {
  std::vector<std::uint8_t> codes(n);
  for (auto& code : codes) code = static_cast<std::uint8_t>(below(1 << bits));
  return codes;
}

void test_bits() {
  for (int bits = 2; bits <= 8; ++bits)
    for (std::size_t n = 0; n < 40; ++n) {
      const auto codes = codes_of(n, bits);
      std::vector<std::uint8_t> packed(packed_bytes(n, bits)), back(n);
      pack_bits(codes.data(), n, bits, packed.data());
      unpack_bits(packed.data(), n, bits, back.data());
      require(back == codes, "codes do not come back from the bit stream", "any");
    }
}

void test_clipping(const Kernels& isa) {
  for (std::size_t n : {1u, 15u, 16u, 17u, 511u, 513u, 1025u}) {
    std::vector<float> w(n);
    for (auto& value : w) value = static_cast<float>(below(2001) - 1000) / 100.0f;
    w[n - 1] = -12.0f;
    const float top = isa.abs_max(w.data(), n);
    require(top == 12.0f, "largest magnitude", isa.name);
    const float scale = isa.clip_scale(w.data(), n, top, 7, 100);
    require(scale > 0.0f && scale <= 12.0f / 7.0f * 1.0001f, "scale within range", isa.name);
    std::vector<std::int8_t> codes(n);
    isa.encode(w.data(), n, scale, 7, codes.data());
    for (const auto code : codes) require(code >= -7 && code <= 7, "code within range", isa.name);
    w[0] = NAN;
    require(std::isinf(isa.abs_max(w.data(), n)), "NaN is seen", isa.name);
  }
}

void test_codes(const Kernels& isa) {
  for (std::size_t n : {1u, 15u, 16u, 17u, 100u}) {
    std::vector<float> x(n), back(n);
    for (auto& value : x) value = static_cast<float>(below(401) - 200) / 2.0f;
    std::vector<std::uint8_t> codes(n);
    isa.quantize(x.data(), n, 1.0f, 100, codes.data());
    isa.dequantize(codes.data(), n, 1.0f, 100, back.data());
    for (std::size_t i = 0; i < n; ++i)
      require(back[i] == std::nearbyint(x[i]), "a code is the nearest integer, halves to even", isa.name);
    x[n - 1] = NAN;
    isa.quantize(x.data(), n, 1.0f, 100, codes.data());
    require(codes[n - 1] == 0, "NaN becomes code 0", isa.name);
  }
}

// With scales of one and inputs of small integers the result is an integer, and must be exact.
void test_linear(const Kernels& isa) {
  constexpr std::size_t groups[] = {0, 32, 64, 128, 256};
  for (int round = 0; round < 300; ++round) {
    const int bits = 2 + below(7);
    const Layout w{size_below(70), size_below(200), bits, groups[below(5)], below(2) == 0};
    const std::size_t m = round % 10 == 0 ? 120 + size_below(20) : size_below(9);
    const std::size_t count = w.groups(), group = w.group == 0 ? w.k : w.group;
    const auto codes = codes_of(w.n * w.k, bits), x = codes_of(m * w.k, 8);
    const auto middles = std::vector<std::uint8_t>(w.n * count, static_cast<std::uint8_t>(w.middle()));
    const auto zeros = w.zeros ? codes_of(w.n * count, bits) : middles;
    const std::vector<float> scales(w.n * count, 1.0f), bias(w.n, 3.0f);
    const std::unique_ptr<std::uint8_t, void (*)(void*)> packed(
        static_cast<std::uint8_t*>(std::aligned_alloc(64, w.bytes())), std::free);
    pack_tiles(w, codes.data(), scales.data(), w.zeros ? zeros.data() : nullptr, packed.get());
    auto back = codes;
    auto scales_back = scales;
    auto zeros_back = zeros;
    unpack_tiles(w, packed.get(), back.data(), scales_back.data(), zeros_back.data());
    require(back == codes && scales_back == scales && zeros_back == zeros, "tiles do not come back", isa.name);

    const int zero = below(256);
    std::vector<float> y(m * w.n), real(m * w.k);
    for (std::size_t i = 0; i < real.size(); ++i) real[i] = static_cast<float>(x[i] - zero);
    std::vector<std::uint8_t> y_codes(m * w.n);
    Linear call{w,    packed.get(), bias.data(), Activation::none, m,    nullptr, x.data(),
                1.0f, zero,         y.data(),    nullptr,          0.0f, 0};
    linear(isa, call, 1);
    for (std::size_t r = 0; r < m; ++r)
      for (std::size_t n = 0; n < w.n; ++n) {
        std::int64_t sum = 3;
        for (std::size_t k = 0; k < w.k; ++k)
          sum += std::int64_t{x[r * w.k + k] - zero} * (codes[n * w.k + k] - zeros[n * count + k / group]);
        require(static_cast<std::int64_t>(y[r * w.n + n]) == sum, "integer result", isa.name);
      }
    const auto expected = y;
    call.x_codes = nullptr;
    call.x = real.data();
    linear(isa, call, 1);
    require(y == expected, "quantising the input gives what its codes give", isa.name);
    call.activation = below(2) == 0 ? Activation::relu : Activation::gelu;
    call.x_scale = 0.0f;
    real[0] = INFINITY;
    linear(isa, call, 1);
    require(std::isnan(y[0]), "an infinity gives NaN", isa.name);
    call.y = nullptr;
    call.y_codes = y_codes.data();
    call.y_scale = 50.0f;
    call.y_zero = 7;
    linear(isa, call, 1);
    require(y_codes[0] == 0, "NaN becomes code 0", isa.name);
  }
}

void test_histogram() {
  std::vector<float> values(1000);
  for (auto& value : values) value = static_cast<float>(below(2000) - 1000) / 300.0f;
  values[0] = INFINITY;
  values[1] = NAN;
  for (std::size_t bins : {1u, 7u, 300u}) {
    std::vector<std::int64_t> counts(bins);
    require(add_to_histogram(values.data(), values.size(), -2.0f, 3.0f, bins, counts.data()) == 1, "one NaN", "any");
    std::vector<double> scratch(2 * 256);
    for (const Loss loss : {Loss::squared_error, Loss::entropy})
      for (const int levels : {4, 256}) {
        const int step = best_ratio(counts.data(), bins, -2.0, 3.0, loss, levels, 50, scratch.data());
        require(step >= 1 && step <= 50, "step within range", "any");
      }
  }
}

}  // namespace

int main() {
  test_bits();
  test_histogram();
  for (const char* name : {"amx", "avx512", "avxvnni", "avx2", "portable"})
    if (const Kernels* isa = kernels_named(name)) {
      test_clipping(*isa);
      test_codes(*isa);
      test_linear(*isa);
      std::printf("%s: ok\n", name);
    }
}
