#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#define TIGHTROPE_X86 1
#else
#define TIGHTROPE_X86 0
#endif

namespace tightrope {

const Kernels* kernels_named(const char* name) noexcept {
  if (std::strcmp(name, "portable") == 0) return &portable_kernels();
#if TIGHTROPE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0 && avx2) return &avx2_kernels();
  if (std::strcmp(name, "avx512") == 0 && avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return &avx512_kernels();
#endif
  return nullptr;
}

namespace {

const Kernels& choose() {
  if (const char* asked = std::getenv("TIGHTROPE_ISA"); asked != nullptr && *asked != '\0') {
    if (const Kernels* found = kernels_named(asked)) return *found;
    for (const char* known : {"avx512", "avx2"})
      if (std::strcmp(asked, known) == 0)
        throw std::runtime_error(std::string("TIGHTROPE_ISA=") + asked + ": this machine has no such instructions");
    throw std::runtime_error(std::string("TIGHTROPE_ISA must be portable, avx2 or avx512, got '") + asked + "'");
  }
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* found = kernels_named(name)) return *found;
  return portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace tightrope
