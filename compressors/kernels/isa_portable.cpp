// Any processor: GCC and Clang vector extensions, four lanes (SSE2 and NEON registers).
#include <cstring>
#include <limits>

#include "kernels.h"

namespace tightrope {
namespace {

struct Isa {
  static constexpr int kLanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  static F abs(F v) noexcept { return v < 0.0f ? -v : v; }
  static F min(F a, F b) noexcept { return a < b ? a : b; }
};

#include "clip.inl"

}  // namespace

const Kernels& portable_kernels() noexcept {
  static constexpr Kernels table{"portable", abs_max, clip_scale, encode};
  return table;
}

}  // namespace tightrope
