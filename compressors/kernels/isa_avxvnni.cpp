// AVX2 with VNNI: what processors without AVX-512 have had since 2021.
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
#include "avx2.inl"

struct Isa : Avx2 {
  static constexpr std::size_t kRows = 6;    // 12 sums, 2 weights: 14 of 16 registers
  static constexpr bool kByteCodes = true;  // dot takes codes of all eight bits, whatever Bits says
  static constexpr int code_class(int) noexcept { return 8; }
  template <int Bits>
  static I dot(I sum, U codes, I a) noexcept {
    return reinterpret_cast<I>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(codes),
                                                       reinterpret_cast<__m256i>(a)));
  }
  template <int Bits>
  using Short = Direct<Isa, Bits>;
};

#include "all.inl"

}  // namespace

const Kernels& avxvnni_kernels() noexcept {
  static constexpr Kernels table = kernels_of("avxvnni");
  return table;
}

}  // namespace tightrope
