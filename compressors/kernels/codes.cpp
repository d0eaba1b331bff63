#include "kernels.h"

namespace tightrope {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 15;  // elements that are worth a thread

template <typename Part>
void in_pieces(std::size_t n, int threads, const Part& part) {
  const auto pieces = static_cast<std::int64_t>((n + kPiece - 1) / kPiece);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (pieces > 1 && threads > 1)
#else
  static_cast<void>(threads);
#endif
  for (std::int64_t p = 0; p < pieces; ++p) {
    const std::size_t first = static_cast<std::size_t>(p) * kPiece;
    part(first, n - first < kPiece ? n - first : kPiece);
  }
}

}  // namespace

void quantize(const Kernels& isa, const float* x, std::size_t n, float scale, int zero, std::uint8_t* codes,
              int threads) {
  const float inverse = 1.0f / scale;
  in_pieces(n, threads, [&](std::size_t first, std::size_t count) {
    isa.quantize(x + first, count, inverse, zero, codes + first);
  });
}

void dequantize(const Kernels& isa, const std::uint8_t* codes, std::size_t n, float scale, int zero, float* x,
                int threads) {
  in_pieces(n, threads, [&](std::size_t first, std::size_t count) {
    isa.dequantize(codes + first, count, scale, zero, x + first);
  });
}

}  // namespace tightrope
