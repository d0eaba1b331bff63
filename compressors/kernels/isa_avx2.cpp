// AVX2 with FMA.
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "kernels.h"

namespace tightrope {
namespace {

struct Isa {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;
  static F abs(F v) noexcept { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static F min(F a, F b) noexcept { return _mm256_min_ps(a, b); }
};

#include "clip.inl"

}  // namespace

const Kernels& avx2_kernels() noexcept {
  static constexpr Kernels table{"avx2", abs_max, clip_scale, encode};
  return table;
}

}  // namespace tightrope
