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

#include "all.inl"

}  // namespace

const Kernels& avx2_kernels() noexcept {
  static constexpr Kernels table = kernels_of("avx2");
  return table;
}

}  // namespace tightrope
