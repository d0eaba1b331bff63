#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>

#include "linear.h"

namespace tightrope {
namespace {

// Calls `use(byte, piece, low)` for each piece of the code of channel `n`, input `k`, which lies in that byte of its
// tile's record.
template <typename Use>
void each_piece(const Layout& w, std::size_t n, std::size_t k, Use use) {
  const std::size_t chunk = kSums + w.header() + k / w.segment() * w.segment_bytes() +
                            k % w.segment() / kChunk * w.chunk_bytes() + n % kTile * 4 + k % 4;
  for (int low = 0; low < w.bits;) {
    const Piece piece = piece_of(w.bits, static_cast<int>(k % kChunk / 4), low);
    use(chunk + kVector * static_cast<std::size_t>(piece.vector), piece, low);
    low += piece.count;
  }
}

// The scale, and after kScales bytes the zero point, of channel `n` in group `g` of its tile's record.
std::size_t scale_offset(const Layout& w, std::size_t n, std::size_t g) {
  return kSums + g * w.segment_bytes() + n % kTile * sizeof(float);
}
std::size_t zero_offset(const Layout& w, std::size_t n, std::size_t g) {
  return kSums + g * w.segment_bytes() + kScales + n % kTile;
}

// Asks for huge pages where these fit whole. A call of few rows reads all of a weight: fewer pages, less waiting.
void want_huge_pages(std::uint8_t* memory, std::size_t bytes) noexcept {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) static_cast<void>(madvise(memory + (begin - address), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

}  // namespace

void pack_tiles(const Layout& w, const std::uint8_t* codes, const float* scales, const std::uint8_t* zeros,
                std::uint8_t* packed) noexcept {
  want_huge_pages(packed, w.bytes());
  std::memset(packed, 0, w.bytes());
  const std::size_t groups = w.groups(), group = w.group == 0 ? w.k : w.group;
  for (std::size_t n = 0; n < w.n; ++n) {
    std::uint8_t* record = packed + n / kTile * w.tile_bytes();
    double total = 0.0;
    for (std::size_t g = 0; g < groups; ++g) {
      const float scale = scales[n * groups + g];
      const std::uint8_t zero = w.zeros ? zeros[n * groups + g] : static_cast<std::uint8_t>(w.middle());
      std::memcpy(record + scale_offset(w, n, g), &scale, sizeof scale);
      if (w.zeros) record[zero_offset(w, n, g)] = zero;
      std::int64_t sum = 0;
      for (std::size_t k = g * group; k < (g + 1) * group && k < w.k; ++k) {
        const unsigned code = codes[n * w.k + k];
        sum += static_cast<int>(code) - zero;
        each_piece(w, n, k, [&](std::size_t byte, const Piece& piece, int low) {
          record[byte] |= static_cast<std::uint8_t>((code >> low & ((1u << piece.count) - 1u)) << piece.bit);
        });
      }
      total += static_cast<double>(scale) * static_cast<double>(sum);
    }
    const float sums = static_cast<float>(total);
    std::memcpy(record + n % kTile * sizeof sums, &sums, sizeof sums);
  }
}

void unpack_tiles(const Layout& w, const std::uint8_t* packed, std::uint8_t* codes, float* scales,
                  std::uint8_t* zeros) noexcept {
  const std::size_t groups = w.groups();
  for (std::size_t n = 0; n < w.n; ++n) {
    const std::uint8_t* record = packed + n / kTile * w.tile_bytes();
    for (std::size_t g = 0; g < groups; ++g) {
      std::memcpy(scales + n * groups + g, record + scale_offset(w, n, g), sizeof(float));
      zeros[n * groups + g] = w.zeros ? record[zero_offset(w, n, g)] : static_cast<std::uint8_t>(w.middle());
    }
    for (std::size_t k = 0; k < w.k; ++k) {
      unsigned code = 0;
      each_piece(w, n, k, [&](std::size_t byte, const Piece& piece, int low) {
        code |= (static_cast<unsigned>(record[byte]) >> piece.bit & ((1u << piece.count) - 1u)) << low;
      });
      codes[n * w.k + k] = static_cast<std::uint8_t>(code);
    }
  }
}

}  // namespace tightrope
