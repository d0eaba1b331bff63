#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"
#include "require.h"

namespace tightrope {
namespace {

struct Free {
  void operator()(void* p) const noexcept { std::free(p); }
};

// Memory that a thread keeps between calls, grown as needed. Aligned to 64 bytes.
std::uint8_t* workspace(std::size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096));
    if (memory == nullptr) throw std::bad_alloc();
    size = bytes;
  }
  return static_cast<std::uint8_t*>(memory.get());
}

std::size_t round_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

constexpr double kWorthAThread = 4e6;  // multiply-accumulates; below, starting a team costs more than it wins
constexpr std::size_t kTilesOfTask = 2;

bool is_scale(double value) { return value > 1e-30 && value < 1e30; }

}  // namespace

Layout checked_layout(std::int64_t n, std::int64_t k, std::int64_t bits, std::int64_t group, bool zeros) {
  constexpr std::int64_t most = std::int64_t{1} << 31;
  require(bits >= 2 && bits <= 8, [&] { return "bits must lie in [2, 8], got " + std::to_string(bits); });
  require(n >= 1 && k >= 1 && n < most && k < most, [&] {
    return "n and k must lie in [1, 2^31), got n = " + std::to_string(n) + ", k = " + std::to_string(k);
  });
  require(group >= 0 && group <= static_cast<std::int64_t>(kWholeRow) && group % static_cast<std::int64_t>(kChunk) == 0,
          [&] {
            return "group must be 0 (the whole row) or a multiple of 32 up to 256, got " + std::to_string(group);
          });
  return {static_cast<std::size_t>(n), static_cast<std::size_t>(k), static_cast<int>(bits),
          static_cast<std::size_t>(group), zeros};
}

Layout packed_layout(std::int64_t n, std::int64_t k, std::int64_t bits, std::int64_t group, std::size_t packed_size) {
  const Layout without = checked_layout(n, k, bits, group, false), with = checked_layout(n, k, bits, group, true);
  require(packed_size == without.bytes() || packed_size == with.bytes(), [&] {
    return "packed must hold exactly the " + std::to_string(without.bytes()) + " bytes of this weight, or " +
           std::to_string(with.bytes()) + " with zero points, got " + std::to_string(packed_size);
  });
  return packed_size == with.bytes() ? with : without;
}

void set_checked(Linear& call, std::int64_t activation, double x_scale, std::int64_t x_zero, bool x_is_codes,
                 double y_scale, std::int64_t y_zero, bool y_is_codes) {
  require(activation >= 0 && activation <= 2, [&] {
    return "activation must be 0 (none), 1 (relu) or 2 (gelu), got " + std::to_string(activation);
  });
  require(x_scale == 0.0 || is_scale(x_scale), [&] {
    return "x_scale must be 0 (each row its own) or in (1e-30, 1e30), got " + std::to_string(x_scale);
  });
  require(x_scale != 0.0 || !x_is_codes, "x_scale must be given where x is uint8");
  require(!y_is_codes || is_scale(y_scale), [&] {
    return "y_scale must be 0 (float32) or in (1e-30, 1e30), got " + std::to_string(y_scale);
  });
  require(x_zero >= 0 && x_zero <= 255 && y_zero >= 0 && y_zero <= 255, [&] {
    return "x_zero and y_zero must lie in [0, 255], got " + std::to_string(x_zero) + ", " + std::to_string(y_zero);
  });
  call.activation = static_cast<Activation>(activation);
  call.x_scale = static_cast<float>(x_scale);
  call.x_zero = static_cast<int>(x_zero);
  call.y_scale = static_cast<float>(y_scale);
  call.y_zero = static_cast<int>(y_zero);
}

void linear(const Kernels& isa, const Linear& call, int threads) {
  const Layout& w = call.w;
  // A line between rows, so that rows of 4096 bytes do not compete for the same lines of the first-level cache.
  const std::size_t stride = round_up(w.k, 64) + 64;
  const std::size_t sums = round_up(call.m * w.segments() * sizeof(float), 64);
  const std::size_t scales = round_up(call.m * sizeof(float), 64);
  // Rows behind the last one are multiplied, where matrices are, and thrown away.
  std::uint8_t* memory = workspace(2 * sums + scales + round_up(call.m, kMatrixBlock) * stride);
  const QuantizedRows rows{call.m,
                           reinterpret_cast<std::int8_t*>(memory + 2 * sums + scales),
                           stride,
                           reinterpret_cast<float*>(memory + 2 * sums),
                           reinterpret_cast<float*>(memory),
                           reinterpret_cast<std::int32_t*>(memory + sums)};

  const std::size_t bands = (call.m + kRowBlock - 1) / kRowBlock;
  const auto quantize = [&](std::size_t row) { isa.quantize_row(call, row, rows); };
  const auto part = [&](std::size_t band, std::size_t tile, std::size_t count) {
    const std::size_t row = band * kRowBlock;
    isa.linear_part(call, rows, row, std::min(row + kRowBlock, call.m), tile, std::min(tile + count, w.tiles()));
  };
  const double work = static_cast<double>(call.m) * static_cast<double>(w.n) * static_cast<double>(w.k);
#ifdef _OPENMP
  if (threads > 1 && work >= 2 * kWorthAThread) {
    const std::size_t strips = (w.tiles() + kTilesOfTask - 1) / kTilesOfTask;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (std::size_t row = 0; row < call.m; ++row) quantize(row);
#pragma omp for schedule(static)
      for (std::size_t i = 0; i < bands * strips; ++i) part(i / strips, i % strips * kTilesOfTask, kTilesOfTask);
    }
    return;
  }
#endif
  static_cast<void>(work);
  static_cast<void>(threads);
  for (std::size_t row = 0; row < call.m; ++row) quantize(row);
  for (std::size_t band = 0; band < bands; ++band) part(band, 0, w.tiles());
}

}  // namespace tightrope
