// Every kernel, compiled for `Isa`, and the table of them. Included inside an anonymous namespace.

#include "clip.inl"
#include "codes.inl"
#include "linear.inl"

constexpr Kernels kernels_of(const char* name) noexcept {
  return {name, abs_max, clip_scale, encode, quantize, dequantize, quantize_row, linear_part, dot_peak};
}
