// Any processor: GCC and Clang vector extensions, four lanes (SSE2 and NEON registers).
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

struct Isa {
  static constexpr int kLanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  typedef std::uint32_t U __attribute__((vector_size(16)));
  static constexpr std::size_t kRows = 2, kColumns = 4;
  static constexpr int kSums = 8;  // kept in flight on few rows
  static constexpr bool kByteCodes = true;  // dot takes codes of all eight bits, whatever Bits says
  static constexpr int code_class(int) noexcept { return 8; }
  static constexpr std::size_t kMatrixRows = 0;  // without instructions that multiply matrices
  static F splat(float v) noexcept { return F{v, v, v, v}; }
  static F abs(F v) noexcept { return v < 0.0f ? -v : v; }
  static F min(F a, F b) noexcept { return a < b ? a : b; }
  static F max(F a, F b) noexcept { return a > b ? a : b; }
  static F fma(F a, F b, F c) noexcept { return a * b + c; }
  static F fnma(F a, F b, F c) noexcept { return c - a * b; }
  static F where_negative(F x, F yes, F no) noexcept { return x < 0.0f ? yes : no; }
  static F bytes_as_float(const std::uint8_t* p) noexcept {
    return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
  }
  static void store_low_bytes(std::int8_t* p, F v) noexcept {  // of each lane
    U bits;
    std::memcpy(&bits, &v, sizeof bits);
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(bits[i]);
  }
  static std::uint32_t sum(U v) noexcept { return v[0] + v[1] + v[2] + v[3]; }
  static U merge(U code, U plane, U mask) noexcept { return code | (plane & mask); }
  static U kept(U v) noexcept { return v; }
  static void opaque(I& v) noexcept { asm volatile("" : "+m"(v)); }  // a value the compiler cannot foresee
  // A product of an 8-bit code and an 8-bit activation fits 16 bits. Even and odd bytes go apart; each register of
  // products then holds two for every sum.
  template <int Bits>
  static I dot(I sum, U codes, I a) noexcept {
    typedef std::int16_t H __attribute__((vector_size(16)));
    const I even = reinterpret_cast<I>(reinterpret_cast<H>(codes & 0x00ff00ffu) * ((reinterpret_cast<H>(a) << 8) >> 8));
    const I odd = reinterpret_cast<I>(reinterpret_cast<H>((codes >> 8) & 0x00ff00ffu) * (reinterpret_cast<H>(a) >> 8));
    return sum + (reinterpret_cast<I>(reinterpret_cast<U>(even) << 16) >> 16) + (even >> 16) +
           (reinterpret_cast<I>(reinterpret_cast<U>(odd) << 16) >> 16) + (odd >> 16);
  }
  template <int Bits>
  using Short = Direct<Isa, Bits>;
};

#include "all.inl"

}  // namespace

const Kernels& portable_kernels() noexcept {
  static constexpr Kernels table = kernels_of("portable");
  return table;
}

}  // namespace tightrope
