#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#define TIGHTROPE_X86 1
#else
#define TIGHTROPE_X86 0
#endif

namespace tightrope {
namespace {

// Linux gives a process the tile registers when it asks (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool may_use_tiles() noexcept {
#if defined(__linux__) && defined(__x86_64__)
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
#else
  return false;
#endif
}

}  // namespace

const Kernels* kernels_named(const char* name) noexcept {
  if (std::strcmp(name, "portable") == 0) return &portable_kernels();
#if TIGHTROPE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0 && avx2) return &avx2_kernels();
  if (std::strcmp(name, "avxvnni") == 0 && avx2 && __builtin_cpu_supports("avxvnni")) return &avxvnni_kernels();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(name, "avx512") == 0 && avx512) return &avx512_kernels();
  if (std::strcmp(name, "amx") == 0 && avx512 && __builtin_cpu_supports("amx-tile") &&
      __builtin_cpu_supports("amx-int8") && may_use_tiles())
    return &amx_kernels();
#endif
  return nullptr;
}

bool first_level_waits_for_many() noexcept {
#if TIGHTROPE_X86
  static const bool found = [] {  // AMD's from Zen 5, family 1Ah, on: measured there; Zen 4's does not
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) != 0 && (a >> 8 & 0xF) + (a >> 20 & 0xFF) >= 0x1A;
  }();
  return found;
#else
  return false;
#endif
}

namespace {

const Kernels& choose() {
  if (const char* asked = std::getenv("TIGHTROPE_ISA"); asked != nullptr && *asked != '\0') {
    if (const Kernels* found = kernels_named(asked)) return *found;
    for (const char* known : {"amx", "avx512", "avxvnni", "avx2"})
      if (std::strcmp(asked, known) == 0)
        throw std::runtime_error(std::string("TIGHTROPE_ISA=") + asked + ": this machine has no such instructions");
    throw std::runtime_error(std::string("TIGHTROPE_ISA must be portable, avx2, avxvnni, avx512 or amx, got '") + asked + "'");
  }
  for (const char* name : {"amx", "avx512", "avxvnni", "avx2"})
    if (const Kernels* found = kernels_named(name)) return *found;
  return portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace tightrope
