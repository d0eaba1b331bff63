// AVX-512 with VNNI.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace tightrope {
namespace {

#include "direct.inl"
#include "avx512.inl"

using Isa = Avx512;

#include "clip.inl"
#include "codes.inl"
#include "linear.inl"

}  // namespace

const Kernels& avx512_kernels() noexcept {
  static constexpr Kernels table{"avx512", abs_max, clip_scale, encode, quantize, dequantize,
                                 quantize_row, linear_part, dot_peak};
  return table;
}

}  // namespace tightrope
