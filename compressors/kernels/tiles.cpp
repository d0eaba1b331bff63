#include <cstring>

#include "linear.h"

namespace tightrope {
namespace {

// Calls `use(byte, piece, low)` for each piece of the code of channel `n`, input `k`; `byte` counts from the first of
// the tile's codes.
template <typename Use>
void each_piece(const Layout& w, std::size_t n, std::size_t k, Use use) {
  const std::size_t chunk = k / kChunk * w.chunk_bytes() + n % kTile * 4 + k % 4;
  for (int low = 0; low < w.bits;) {
    const Piece piece = piece_of(w.bits, static_cast<int>(k % kChunk / 4), low);
    use(chunk + 64 * static_cast<std::size_t>(piece.vector), piece, low);
    low += piece.count;
  }
}

}  // namespace

void pack_tiles(const Layout& w, const std::uint8_t* codes, const float* scales, const std::uint8_t* zeros,
                std::uint8_t* packed) noexcept {
  std::memset(packed, 0, w.bytes());
  const std::size_t groups = w.groups(), group = w.group == 0 ? w.k : w.group;
  for (std::size_t n = 0; n < w.n; ++n) {
    std::uint8_t* tile = packed + n / kTile * w.tile_bytes();
    std::uint8_t* packed_codes = tile + w.codes_offset();
    float* floats = reinterpret_cast<float*>(tile) + n % kTile;
    double total = 0.0;
    for (std::size_t g = 0; g < groups; ++g) {
      const float scale = scales[n * groups + g];
      const std::uint8_t zero = zeros[n * groups + g];
      floats[kTile * (1 + g)] = scale;
      tile[w.zeros_offset() + kTile * g + n % kTile] = zero;
      std::int64_t sum = 0;
      for (std::size_t k = g * group; k < (g + 1) * group && k < w.k; ++k) {
        const unsigned code = codes[n * w.k + k];
        sum += static_cast<int>(code) - zero;
        each_piece(w, n, k, [&](std::size_t byte, const Piece& piece, int low) {
          packed_codes[byte] |=
              static_cast<std::uint8_t>((code >> low & ((1u << piece.count) - 1u)) << piece.bit);
        });
      }
      total += static_cast<double>(scale) * static_cast<double>(sum);
    }
    floats[0] = static_cast<float>(total);
  }
}

void unpack_tiles(const Layout& w, const std::uint8_t* packed, std::uint8_t* codes, float* scales,
                  std::uint8_t* zeros) noexcept {
  const std::size_t groups = w.groups();
  for (std::size_t n = 0; n < w.n; ++n) {
    const std::uint8_t* tile = packed + n / kTile * w.tile_bytes();
    const std::uint8_t* packed_codes = tile + w.codes_offset();
    for (std::size_t g = 0; g < groups; ++g) {
      scales[n * groups + g] = reinterpret_cast<const float*>(tile)[kTile * (1 + g) + n % kTile];
      zeros[n * groups + g] = tile[w.zeros_offset() + kTile * g + n % kTile];
    }
    for (std::size_t k = 0; k < w.k; ++k) {
      unsigned code = 0;
      each_piece(w, n, k, [&](std::size_t byte, const Piece& piece, int low) {
        code |= (static_cast<unsigned>(packed_codes[byte]) >> piece.bit & ((1u << piece.count) - 1u)) << low;
      });
      codes[n * w.k + k] = static_cast<std::uint8_t>(code);
    }
  }
}

}  // namespace tightrope
