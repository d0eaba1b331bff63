// Kernels on packed low-bit codes: plain C++ over pointers and sizes. Nothing here knows Python or torch.
// Callers check sizes; kernels only state them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace tightrope {

// Packs `n` codes of `bits` bits (2..8) as one little-endian bit stream, low bits first: bit j of code i is bit
// (i * bits + j) of `packed`, which holds packed_bytes(n, bits). Codes are below 2^bits. No overlap.
void pack_bits(const std::uint8_t* codes, std::size_t n, int bits, std::uint8_t* packed) noexcept;
void unpack_bits(const std::uint8_t* packed, std::size_t n, int bits, std::uint8_t* codes) noexcept;
constexpr std::size_t packed_bytes(std::size_t n, int bits) noexcept {
  return n / 8 * static_cast<std::size_t>(bits) + (n % 8 * static_cast<std::size_t>(bits) + 7) / 8;
}

// Below this magnitude a channel counts as all zeros: no scale derived from it, nor a reciprocal, leaves normal range.
constexpr float kZeroChannel = 0x1p-100f;

constexpr std::size_t kRowBlock = 128;  // rows that share one unpacking of a linear's weights
constexpr std::size_t kMatrixBlock = 32;  // rows that instructions for matrices take at a time

// What is compiled once for each instruction set.
struct Kernels {
  const char* name;

  // Largest |w| of `n` floats; infinity if any of them is NaN or infinite.
  float (*abs_max)(const float* w, std::size_t n) noexcept;

  // Of the clip ratios 1/ratios, 2/ratios, ... 1 the one that quantises `w` (`n` floats, largest magnitude `top`, at
  // least kZeroChannel) to symmetric codes in [-levels, levels] with the least squared error; returns the scale.
  float (*clip_scale)(const float* w, std::size_t n, float top, int levels, int ratios) noexcept;

  // codes = clamp(round_half_even(w / scale), -levels, levels).
  void (*encode)(const float* w, std::size_t n, float scale, int levels, std::int8_t* codes) noexcept;

  // Activations to unsigned codes, clamp(round_half_even(x * inverse) + zero, 0, 255) and 0 for NaN, and back:
  // (code - zero) * scale. `zero` lies in [0, 255].
  void (*quantize)(const float* x, std::size_t n, float inverse, int zero, std::uint8_t* codes) noexcept;
  void (*dequantize)(const std::uint8_t* codes, std::size_t n, float scale, int zero, float* x) noexcept;

  // One row of a linear's input, and rows [row0, row1) x tiles [tile0, tile1) of its output; at most kRowBlock rows.
  void (*quantize_row)(const Linear& call, std::size_t row, const QuantizedRows& out) noexcept;
  void (*linear_part)(const Linear& call, const QuantizedRows& rows, std::size_t row0, std::size_t row1,
                      std::size_t tile0, std::size_t tile1) noexcept;

  // Multiply-accumulates on registers alone, to learn the peak: returns the operations done, 2 a multiply-accumulate.
  double (*dot_peak)(std::size_t rounds, std::int32_t* sink) noexcept;
};

const Kernels& portable_kernels() noexcept;
const Kernels& avx2_kernels() noexcept;
const Kernels& avx512_kernels() noexcept;
const Kernels& avxvnni_kernels() noexcept;
const Kernels& amx_kernels() noexcept;

// The same over many elements, on up to `threads` threads.
void quantize(const Kernels& isa, const float* x, std::size_t n, float scale, int zero, std::uint8_t* codes,
              int threads);
void dequantize(const Kernels& isa, const std::uint8_t* codes, std::size_t n, float scale, int zero, float* x,
                int threads);

// The fastest table this processor runs, or the one that TIGHTROPE_ISA names. Throws std::runtime_error if that name
// is unknown or the machine lacks the instructions. Decided once, at the first call.
const Kernels& kernels();

// The table called `name`, or nullptr where this processor cannot run it.
const Kernels* kernels_named(const char* name) noexcept;

// Whether the first-level cache of this processor waits for so many lines at a time that memory is never idle.
bool first_level_waits_for_many() noexcept;

}  // namespace tightrope
