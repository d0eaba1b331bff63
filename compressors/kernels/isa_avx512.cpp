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

#include "all.inl"

}  // namespace

const Kernels& avx512_kernels() noexcept {
  static constexpr Kernels table = kernels_of("avx512");
  return table;
}

}  // namespace tightrope
