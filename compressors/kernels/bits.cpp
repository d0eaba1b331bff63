#include "kernels.h"

namespace tightrope {
namespace {

// Eight codes of `Bits` bits fill exactly `Bits` bytes, so the stream is cut there.
template <int Bits>
void pack(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) noexcept {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8, packed += Bits) {
    std::uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= std::uint64_t{codes[i + static_cast<std::size_t>(j)]} << (Bits * j);
    for (int j = 0; j < Bits; ++j) packed[j] = static_cast<std::uint8_t>(word >> (8 * j));
  }
  std::uint64_t word = 0;
  for (std::size_t j = i; j < n; ++j) word |= std::uint64_t{codes[j]} << (Bits * static_cast<int>(j - i));
  for (std::size_t j = 0; j < packed_bytes(n - i, Bits); ++j) packed[j] = static_cast<std::uint8_t>(word >> (8 * j));
}

template <int Bits>
void unpack(const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) noexcept {
  constexpr std::uint64_t mask = (1u << Bits) - 1;
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8, packed += Bits) {
    std::uint64_t word = 0;
    for (int j = 0; j < Bits; ++j) word |= std::uint64_t{packed[j]} << (8 * j);
    for (int j = 0; j < 8; ++j)
      codes[i + static_cast<std::size_t>(j)] = static_cast<std::uint8_t>(word >> (Bits * j) & mask);
  }
  std::uint64_t word = 0;
  for (std::size_t j = 0; j < packed_bytes(n - i, Bits); ++j) word |= std::uint64_t{packed[j]} << (8 * j);
  for (std::size_t j = i; j < n; ++j)
    codes[j] = static_cast<std::uint8_t>(word >> (Bits * static_cast<int>(j - i)) & mask);
}

}  // namespace

void pack_bits(const std::uint8_t* codes, std::size_t n, int bits, std::uint8_t* packed) noexcept {
  switch (bits) {
    case 2:
      return pack<2>(codes, n, packed);
    case 3:
      return pack<3>(codes, n, packed);
    case 4:
      return pack<4>(codes, n, packed);
    case 5:
      return pack<5>(codes, n, packed);
    case 6:
      return pack<6>(codes, n, packed);
    case 7:
      return pack<7>(codes, n, packed);
    default:
      return pack<8>(codes, n, packed);
  }
}

void unpack_bits(const std::uint8_t* packed, std::size_t n, int bits, std::uint8_t* codes) noexcept {
  switch (bits) {
    case 2:
      return unpack<2>(packed, n, codes);
    case 3:
      return unpack<3>(packed, n, codes);
    case 4:
      return unpack<4>(packed, n, codes);
    case 5:
      return unpack<5>(packed, n, codes);
    case 6:
      return unpack<6>(packed, n, codes);
    case 7:
      return unpack<7>(packed, n, codes);
    default:
      return unpack<8>(packed, n, codes);
  }
}

}  // namespace tightrope
