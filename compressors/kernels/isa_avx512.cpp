// AVX-512 with VNNI.
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "kernels.h"

namespace tightrope {
namespace {

struct Isa {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;
  static F abs(F v) noexcept { return _mm512_abs_ps(v); }
  static F min(F a, F b) noexcept { return _mm512_min_ps(a, b); }
};

#include "clip.inl"

}  // namespace

const Kernels& avx512_kernels() noexcept {
  static constexpr Kernels table{"avx512", abs_max, clip_scale, encode};
  return table;
}

}  // namespace tightrope
