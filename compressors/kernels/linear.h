// Linear layers with weights of 2 to 8 bits and 8-bit activations.
//
// Weights are kept as *tiles* of 32 output channels, one record a tile, all of one size and read from front to back:
//
//   sums    32 float  the sum over k of the real weights (scale * (code - zero)) of each channel
//   for each group:
//     scales  32 float
//     zeros   32 uint8  zero points, in codes; padded to 64 bytes. Left out of a symmetric weight, where each is the
//                       middle code, 2^(bits - 1)
//     codes   a chunk of 128 * bits bytes for every 32 inputs of the group
//
// A chunk is eight *quads* of 4 inputs of every channel, a code each for byte 4 * channel + input of a vector of 128
// bytes. The eight quads share `bits` such vectors, so that a code takes exactly `bits` bits: as many as fit lie whole,
// quad j in vector j % bits at bit bits * (j / bits) of each byte, had by a shift and a mask. Where that leaves
// 8 % bits bits at the top of the bytes, these hold, vector by vector, the codes of the other quads as one stream of
// bits. Channels are padded to 32 and inputs to 32 with code 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tightrope {

constexpr std::size_t kTile = 32;
constexpr std::size_t kChunk = 32;
constexpr std::size_t kVector = 4 * kTile;              // bytes
constexpr std::size_t kSums = kTile * sizeof(float);    // bytes before the first group
constexpr std::size_t kScales = kTile * sizeof(float);  // bytes before the zeros of a group
constexpr std::size_t kZeros = 64;                      // bytes of these
constexpr std::size_t kWholeRow = 256;  // inputs between two float accumulations where a group is the whole row

enum class Activation { none, relu, gelu };

// What a packed weight is: `n` channels by `k` inputs in groups of `group` inputs (a multiple of 32 up to 256) that
// share scale and zero point; 0: one group a channel. `zeros`: whether zero points are kept.
struct Layout {
  std::size_t n, k;
  int bits;
  std::size_t group;
  bool zeros;

  constexpr int middle() const noexcept { return 1 << (bits - 1); }

  constexpr std::size_t tiles() const noexcept { return (n + kTile - 1) / kTile; }
  constexpr std::size_t chunks() const noexcept { return (k + kChunk - 1) / kChunk; }
  constexpr std::size_t groups() const noexcept { return group == 0 ? 1 : (k + group - 1) / group; }
  // Inputs are summed as integers over a segment: a group, or a piece of a whole row.
  constexpr std::size_t segment() const noexcept { return group == 0 ? kWholeRow : group; }
  constexpr std::size_t segments() const noexcept { return (k + segment() - 1) / segment(); }
  constexpr std::size_t chunk_bytes() const noexcept { return kVector * static_cast<std::size_t>(bits); }
  constexpr std::size_t header() const noexcept { return kScales + (zeros ? kZeros : 0); }  // bytes before the codes
  // The chunks of all segments but the last, and the scales and zeros that may come before them.
  constexpr std::size_t segment_bytes() const noexcept {
    return (group == 0 ? 0 : header()) + segment() / kChunk * chunk_bytes();
  }
  constexpr std::size_t tile_bytes() const noexcept { return kSums + groups() * header() + chunks() * chunk_bytes(); }
  constexpr std::size_t bytes() const noexcept { return tiles() * tile_bytes(); }
};

// Bits [low, low + count) of the codes of quad `quad` lie at bit `bit` of the bytes of vector `vector`.
struct Piece {
  int count, vector, bit;
};
constexpr int whole_quads(int bits) { return bits * (8 / bits); }
constexpr Piece piece_of(int bits, int quad, int low) {
  if (quad < whole_quads(bits)) return {bits, quad % bits, bits * (quad / bits)};
  const int spare = 8 % bits, at = (quad - whole_quads(bits)) * bits + low, left = spare - at % spare;
  return {left < bits - low ? left : bits - low, at / spare, 8 - left};
}

// Codes, scales and zero points (`n x k`, `n x groups`, `n x groups`, row-major) to tiles and back. Without `w.zeros`
// zero points are not read, and come back as the middle code.
void pack_tiles(const Layout& w, const std::uint8_t* codes, const float* scales, const std::uint8_t* zeros,
                std::uint8_t* packed) noexcept;
void unpack_tiles(const Layout& w, const std::uint8_t* packed, std::uint8_t* codes, float* scales,
                  std::uint8_t* zeros) noexcept;

// One call: y = activation(x W' + bias), `m` rows.
struct Linear {
  Layout w;
  const std::uint8_t* packed;
  const float* bias;  // n floats, or nullptr
  Activation activation;
  std::size_t m;
  // Input, `m x k` row-major: uint8 codes, value x_scale * (code - x_zero); or floats, quantised so where x_scale > 0,
  // and per row to int8 by the row's largest magnitude where x_scale is 0. A row with a NaN (per row: or an infinity)
  // gives a row of NaN.
  const float* x;
  const std::uint8_t* x_codes;
  float x_scale;
  int x_zero;
  // Output, `m x n` row-major: floats, or uint8 clamp(round(y / y_scale) + y_zero), NaN as 0.
  float* y;
  std::uint8_t* y_codes;
  float y_scale;
  int y_zero;
};

// Quantised input: signed codes, `count` rows of `stride` bytes padded with zeros, the value of a code in each row, and
// for every segment and row what zero points take away: the sum of the codes as a float (it is below 2^24, so exact);
// and that by the middle code, negative, where dot products start, or 0 where the weight has its own zero points. There is
// memory for codes of a multiple of kMatrixBlock rows.
struct QuantizedRows {
  std::size_t count;
  std::int8_t* codes;
  std::size_t stride;
  float* scales;
  float* sums;
  std::int32_t* starts;
};

struct Kernels;

// Arguments from outside; std::invalid_argument names the one that does not fit. The size of a packed weight tells
// whether it has zero points. The last sets what it checks in `call`.
Layout checked_layout(std::int64_t n, std::int64_t k, std::int64_t bits, std::int64_t group, bool zeros);
Layout packed_layout(std::int64_t n, std::int64_t k, std::int64_t bits, std::int64_t group, std::size_t packed_size);
void set_checked(Linear& call, std::int64_t activation, double x_scale, std::int64_t x_zero, bool x_is_codes,
                 double y_scale, std::int64_t y_zero, bool y_is_codes);

// Runs on up to `threads` threads; small calls stay on the caller's. Throws std::bad_alloc.
void linear(const Kernels& isa, const Linear& call, int threads);

}  // namespace tightrope
