// AVX2 with FMA.
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

#include "avx2.inl"

using Isa = Avx2;

#include "clip.inl"
#include "codes.inl"
#include "linear.inl"

}  // namespace

const Kernels& avx2_kernels() noexcept {
  static constexpr Kernels table{"avx2", abs_max, clip_scale, encode, quantize, dequantize,
                                 quantize_row, linear_part, dot_peak};
  return table;
}

}  // namespace tightrope
