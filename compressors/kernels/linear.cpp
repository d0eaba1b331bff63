#include "linear.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

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
constexpr std::size_t kTilesOfTask = 4;

}  // namespace

void linear(const Kernels& isa, const Linear& call, int threads) {
  const Layout& w = call.w;
  // A line between rows, so that rows of 4096 bytes do not compete for the same lines of the first-level cache.
  const std::size_t stride = round_up(w.k, 64) + 64;
  const std::size_t sums = round_up(call.m * w.segments() * sizeof(float), 64);
  const std::size_t scales = round_up(call.m * sizeof(float), 64);
  std::uint8_t* memory = workspace(sums + scales + call.m * stride);
  const QuantizedRows rows{reinterpret_cast<std::int8_t*>(memory + sums + scales), stride,
                           reinterpret_cast<float*>(memory + sums), reinterpret_cast<float*>(memory)};

  const std::size_t bands = (call.m + kRowBlock - 1) / kRowBlock;
  const std::size_t strips = (w.tiles() + kTilesOfTask - 1) / kTilesOfTask;
  const auto quantize = [&](std::size_t row) { isa.quantize_row(call, row, rows); };
  const auto task = [&](std::size_t i) {
    const std::size_t row = i / strips * kRowBlock, tile = i % strips * kTilesOfTask;
    const std::size_t row_end = row + kRowBlock < call.m ? row + kRowBlock : call.m;
    const std::size_t tile_end = tile + kTilesOfTask < w.tiles() ? tile + kTilesOfTask : w.tiles();
    isa.linear_part(call, rows, row, row_end, tile, tile_end);
  };
  const double work = static_cast<double>(call.m) * static_cast<double>(w.n) * static_cast<double>(w.k);
#ifdef _OPENMP
  if (threads > 1 && work >= 2 * kWorthAThread) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (std::size_t row = 0; row < call.m; ++row) quantize(row);
#pragma omp for schedule(static)
      for (std::size_t i = 0; i < bands * strips; ++i) task(i);
    }
    return;
  }
#endif
  static_cast<void>(work);
  static_cast<void>(threads);
  for (std::size_t row = 0; row < call.m; ++row) quantize(row);
  for (std::size_t i = 0; i < bands * strips; ++i) task(i);
}

}  // namespace tightrope
