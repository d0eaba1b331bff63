// AVX-512 with VNNI, and AMX where there are many rows.
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

// The numbers of tiles are part of an instruction.
#define TIGHTROPE_DOT(sums, a, codes) \
  do {                                \
    if constexpr (Signed)             \
      _tile_dpbssd(sums, a, codes);   \
    else                              \
      _tile_dpbsud(sums, a, codes);   \
  } while (false)

struct Isa : Avx512 {
  static constexpr std::size_t kMatrixRows = 8;  // from so many rows on, matrices are faster
  static constexpr std::size_t kColumns = 2;     // of four, what is read and written leaves the first-level cache

  // The eight tile registers, while it lives: 0 to 3 hold sums, 16 rows x 16 channels; 4 and 5 activations, 16 rows x
  // Inputs; 6 and 7 codes, Inputs x 16 channels.
  template <std::size_t Inputs>
  class Matrix {
   public:
    static constexpr std::size_t kInputs = Inputs;

    Matrix() noexcept {
      struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {};
        std::uint8_t rows[16] = {};
      } config;
      for (std::size_t t = 0; t < 8; ++t) {
        config.row_bytes[t] = t == 4 || t == 5 ? Inputs : 64;
        config.rows[t] = t < 6 ? 16 : Inputs / 4;
      }
      written();
      _tile_loadconfig(&config);
    }
    ~Matrix() { _tile_release(); }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

    // Dot products of 16 * Rows rows of activations and Columns registers of channels over `steps` * Inputs inputs.
    // A quad of codes, Signed or not, takes `quad` bytes. `dots` gets Columns registers for each row. Each step fetches
    // `ahead` bytes from `next` on, some behind each product: all at once they would hold up the loads of tiles.
    template <std::size_t Rows, std::size_t Columns, bool Signed>
    static void multiply(const std::int8_t* a, std::size_t stride, const std::uint8_t* codes, std::size_t quad,
                         std::size_t steps, I* dots, const std::uint8_t* next, std::size_t ahead) noexcept {
      constexpr bool two_rows = Rows == 2, two_columns = Columns == 2;
      constexpr std::size_t row = Columns * sizeof(I);
      const std::size_t part = ahead / (Rows * Columns);
      const auto fetch_part = [&] {
        for (const std::uint8_t* const end = next + part; next < end; next += 64) __builtin_prefetch(next);
      };
      written();
      _tile_zero(0);
      if constexpr (two_columns) _tile_zero(1);
      if constexpr (two_rows) _tile_zero(2);
      if constexpr (two_rows && two_columns) _tile_zero(3);
      for (; steps > 0; --steps, a += Inputs, codes += Inputs / 4 * quad) {
        _tile_loadd(6, codes, quad);
        _tile_loadd(4, a, stride);
        TIGHTROPE_DOT(0, 4, 6);
        fetch_part();
        if constexpr (two_columns) {
          _tile_loadd(7, codes + sizeof(I), quad);
          TIGHTROPE_DOT(1, 4, 7);
          fetch_part();
        }
        if constexpr (two_rows) {
          _tile_loadd(5, a + 16 * stride, stride);
          TIGHTROPE_DOT(2, 5, 6);
          fetch_part();
        }
        if constexpr (two_rows && two_columns) {
          TIGHTROPE_DOT(3, 5, 7);
          fetch_part();
        }
      }
      _tile_stored(0, dots, row);
      if constexpr (two_columns) _tile_stored(1, dots + 1, row);
      if constexpr (two_rows) _tile_stored(2, dots + 16 * Columns, row);
      if constexpr (two_rows && two_columns) _tile_stored(3, dots + 16 * Columns + 1, row);
    }

   private:
    // GCC's intrinsics do not say that they read memory: what was written before must be there.
    static void written() noexcept { asm volatile("" ::: "memory"); }
  };
};

#include "all.inl"

}  // namespace

const Kernels& amx_kernels() noexcept {
  static constexpr Kernels table = kernels_of("amx");
  return table;
}

}  // namespace tightrope
