// The packed linear, written once over `Isa` and compiled once for each instruction set.
// Included inside an anonymous namespace, after clip.inl.

using U = Isa::U;                               // the same register as bytes: kLanes uint32
constexpr std::size_t kWidth = 4 * kLanes;      // bytes of a register
constexpr std::size_t kParts = kTile / kLanes;  // registers across a tile

template <typename T>
inline T read(const void* p) noexcept {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline U bytes(std::uint32_t value) noexcept { return U{} + value * 0x01010101u; }
inline I quad_of(const std::int8_t* a) noexcept { return I{} + read<std::int32_t>(a); }
inline F as_float(I v) noexcept { return __builtin_convertvector(v, F); }
inline bool any(I v) noexcept {
  std::int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= v[i];
  return found != 0;
}

// ---- activations ----

inline std::int8_t low_byte(float rounded) noexcept {  // of kRound + integer
  return static_cast<std::int8_t>(read<std::uint32_t>(&rounded));
}

// Codes of x[0, n) are what `rounded` makes of kLanes values at a time, kRound + code; returns their sum.
template <typename Rounded>
inline float quantize_floats(const float* x, std::size_t n, std::int8_t* codes, Rounded rounded) noexcept {
  F total{};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F code = rounded(load(x + i));
    Isa::store_low_bytes(codes + i, code);
    total += code - kRound;
  }
  if (i < n) {
    float code[kLanes];
    store(code, rounded(load_part(x + i, n - i)));
    for (std::size_t j = 0; i + j < n; ++j) {
      codes[i + j] = low_byte(code[j]);
      total[0] += code[j] - kRound;
    }
  }
  return sum(total);
}

void quantize_row(const Linear& call, std::size_t row, const QuantizedRows& out) noexcept {
  const std::size_t k = call.w.k, segment = call.w.segment(), segments = call.w.segments();
  std::int8_t* codes = out.codes + row * out.stride;
  float* sums = out.sums + row * segments;
  const auto each_segment = [&](auto sum_of) {
    for (std::size_t s = 0, i = 0; s < segments; ++s, i += segment) sums[s] = sum_of(i, std::min(segment, k - i));
  };
  float scale = call.x_scale;
  if (call.x_codes != nullptr) {
    const std::uint8_t* x = call.x_codes + row * k;
    each_segment([&](std::size_t i, std::size_t n) {
      std::int32_t total = 0;
      for (std::size_t j = i; j < i + n; ++j) {
        codes[j] = static_cast<std::int8_t>(x[j] ^ 0x80u);
        total += codes[j];
      }
      return static_cast<float>(total);
    });
  } else if (scale > 0.0f) {
    const float* x = call.x + row * k;
    const float zero = static_cast<float>(call.x_zero), shift = kRound + (zero - 128.0f);
    const F inverse = splat(1.0f / scale), low = splat(-zero), high = splat(255.0f - zero);
    I nan{};
    each_segment([&](std::size_t i, std::size_t n) {
      return quantize_floats(x + i, n, codes + i, [&](F v) {
        const F t = v * inverse;
        nan |= t != t;
        return ((Isa::min(Isa::max(t, low), high) + kRound) - kRound) + shift;  // a NaN goes to low
      });
    });
    if (any(nan)) scale = std::numeric_limits<float>::quiet_NaN();
  } else {
    const float* x = call.x + row * k;
    const float top = abs_max(x, k);
    const bool finite = !std::isinf(top), zero = top < kZeroChannel;
    scale = zero ? 0.0f : finite ? top / 127.0f : std::numeric_limits<float>::quiet_NaN();
    if (zero || !finite) {
      std::memset(codes, 0, k);
      std::memset(sums, 0, segments * sizeof(float));
    } else {
      const F inverse = splat(127.0f / top);
      each_segment([&](std::size_t i, std::size_t n) {
        return quantize_floats(x + i, n, codes + i, [&](F v) { return v * inverse + kRound; });
      });
    }
  }
  std::memset(codes + k, 0, out.stride - k);
  out.scales[row] = scale;
}

// ---- weights ----

// Shift left by `By` bits (right if negative). Bits that cross into a neighbouring byte are masked off by the caller.
template <int By>
inline U shifted(U v) noexcept {
  if constexpr (By > 0) return v << By;
  if constexpr (By < 0) return v >> -By;
  return v;
}

// Of the codes of quad J what its bits from `Low` on add to `code`; see linear.h for where they lie.
template <int Bits, int J, int Low>
inline U with_rest(const std::uint8_t* chunk, U code) noexcept {
  constexpr Piece piece = piece_of(Bits, J, Low);
  const U bits = shifted<Low - piece.bit>(read<U>(chunk + 64 * piece.vector));
  const U mask = bytes(((1u << piece.count) - 1u) << Low);
  if constexpr (Low == 0)
    code = bits & mask;
  else
    code = Isa::merge(code, bits, mask);
  if constexpr (Low + piece.count < Bits) return with_rest<Bits, J, Low + piece.count>(chunk, code);
  return code;
}

// Quad J of a chunk. With Raw, whole codes stay at the bit where they lie, which saves the shift: a sum of them is
// 2^raw_shift times what it stands for.
template <int Bits>
constexpr int raw_shift(int j) {
  return j < whole_quads(Bits) ? Bits * (j / Bits) : 0;
}
template <int Bits, bool Raw, int J>
inline U quad(const std::uint8_t* chunk) noexcept {
  constexpr int at = raw_shift<Bits>(J), kept = Raw ? at : 0;
  if constexpr (Bits == 8) return read<U>(chunk + 64 * J);
  if constexpr (J >= whole_quads(Bits)) return with_rest<Bits, J, 0>(chunk, U{});
  return shifted<kept - at>(read<U>(chunk + 64 * (J % Bits))) & bytes(((1u << Bits) - 1u) << kept);
}

// Calls use(std::integral_constant<int, j>) for quads 0..7.
template <typename Use, int... J>
inline void each_quad(Use use, std::integer_sequence<int, J...>) noexcept {
  (use(std::integral_constant<int, J>{}), ...);
}
template <typename Use>
inline void each_quad(Use use) noexcept {
  each_quad(use, std::make_integer_sequence<int, 8>{});
}

// A Layout's derived sizes, worked out once: the inner code cannot divide for them.
struct Sizes {
  std::size_t tile_bytes, zeros_offset, codes_offset, chunks, segments, step;  // step: chunks of a segment
  std::size_t grouped;                                                         // 0 where one group is the whole row
  explicit Sizes(const Layout& w) noexcept
      : tile_bytes(w.tile_bytes()),
        zeros_offset(w.zeros_offset()),
        codes_offset(w.codes_offset()),
        chunks(w.chunks()),
        segments(w.segments()),
        step(w.segment() / kChunk),
        grouped(w.group == 0 ? 0 : 1) {}

  // Scales and zero points of a tile in segment `s`.
  const float* scales(const std::uint8_t* record, std::size_t s) const noexcept {
    return reinterpret_cast<const float*>(record + 64 * (1 + s * grouped));
  }
  const std::uint8_t* zeros(const std::uint8_t* record, std::size_t s) const noexcept {
    return record + zeros_offset + kTile * s * grouped;
  }
};

// total + scale * (dots - zero * sum of activations). The dots and the product are integers below 2^24, so all but the
// last multiplication and addition is exact.
inline F rescaled(F total, I dots, F scale, F zero, float sum) noexcept {
  return Isa::fma(Isa::fnma(zero, splat(sum), as_float(dots)), scale, total);
}

// ---- the end of a row ----

// exp(v) for v in [-87, 0], to 2e-7 of its value: v = i ln 2 + r, and the Taylor polynomial of e^r.
inline F exp_negative(F v) noexcept {
  const F shift = v * 1.44269504f + kRound, i = shift - kRound;
  const F r = (v - i * 0.693359375f) + i * 2.12194440e-4f;
  F p = splat(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const U power = (read<U>(&shift) + (127u - 0x4b400000u)) << 23;
  return p * read<F>(&power);
}

// x Phi(x), by Abramowitz and Stegun 7.1.26: |error| <= 2e-7 |x| + 1e-7.
inline F gelu(F x) noexcept {
  const F z = Isa::min(splat(9.3f), Isa::abs(x) * 0.707106781f);
  const F t = 1.0f / (1.0f + 0.3275911f * z);
  F p = splat(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
  const F tail = 0.5f * p * t * exp_negative(-z * z);  // Phi(-|x|)
  return x * Isa::where_negative(x, tail, 1.0f - tail);
}

// Writes one register of channels, `left` of which exist, from their totals.
template <Activation Act>
inline void finish(const Linear& call, std::size_t at, std::size_t left, F v) noexcept {
  if constexpr (Act == Activation::relu) v = Isa::max(F{}, v);  // of the two, max gives a NaN in the second
  if constexpr (Act == Activation::gelu) v = gelu(v);
  if (call.y_codes == nullptr && left >= kLanes) return store(call.y + at, v);
  const std::size_t count = std::min<std::size_t>(left, kLanes);
  if (call.y_codes == nullptr) {
    std::memcpy(call.y + at, &v, count * sizeof(float));
    return;
  }
  const float zero = static_cast<float>(call.y_zero);
  v = Isa::min(Isa::max(v * (1.0f / call.y_scale), splat(-zero)), splat(255.0f - zero));  // a NaN becomes code 0
  std::int8_t codes[kLanes];
  Isa::store_low_bytes(codes, (v + kRound) + zero);
  std::memcpy(call.y_codes + at, codes, count);
}

// Writes rows [row, row_end) of `Tiles` tiles from their float totals, rows of 16 * Tiles.
template <Activation Act, std::size_t Tiles>
void finish_rows(const Linear& call, const Sizes& sizes, const QuantizedRows& rows, std::size_t row,
                 std::size_t row_end, std::size_t tile, const float* totals) noexcept {
  constexpr std::size_t columns = Tiles * kParts;
  const std::size_t n = call.w.n, channel = tile * kTile;
  const bool centred = call.x_codes == nullptr && !(call.x_scale > 0.0f);
  const float offset = centred ? 0.0f : static_cast<float>(call.x_zero - 128);
  float padded[kTile * Tiles] = {};
  if (call.bias != nullptr) std::memcpy(padded, call.bias + channel, std::min(n - channel, kTile * Tiles) * sizeof(float));
  F bias[columns], correction[columns];
  for (std::size_t c = 0; c < columns; ++c) {
    const std::uint8_t* record = call.packed + (tile + c / kParts) * sizes.tile_bytes;
    bias[c] = load(padded + c * kLanes);
    correction[c] = offset * load(reinterpret_cast<const float*>(record) + c % kParts * kLanes);
  }
  for (; row < row_end; ++row, totals += kTile * Tiles) {
    const F scale = splat(rows.scales[row]);
    for (std::size_t c = 0; c < columns && channel + c * kLanes < n; ++c) {
      const F total = Isa::fma(load(totals + c * kLanes) - correction[c], scale, bias[c]);
      finish<Act>(call, row * n + channel + c * kLanes, n - channel - c * kLanes, total);
    }
  }
}

template <std::size_t Tiles, typename... Args>
inline void finish_rows(const Linear& call, const Args&... args) noexcept {
  switch (call.activation) {
    case Activation::none:
      return finish_rows<Activation::none, Tiles>(call, args...);
    case Activation::relu:
      return finish_rows<Activation::relu, Tiles>(call, args...);
    case Activation::gelu:
      return finish_rows<Activation::gelu, Tiles>(call, args...);
  }
}

// ---- few rows: codes go from memory through registers, once ----

template <int Bits, std::size_t Rows, std::size_t Tiles>
void few_rows(const Linear& call, const Sizes& sizes, const QuantizedRows& rows, std::size_t row,
              std::size_t tile) noexcept {
  constexpr std::size_t columns = Tiles * kParts;
  // Codes left at different bits need sums of their own; where these are few, more hide the multiplication's latency.
  constexpr bool raw = Isa::kByteCodes && Bits < 5;
  constexpr int places = raw ? 8 / Bits : 1;
  constexpr int copies = std::max(1, (Rows * columns < 4 ? 4 : 2) / places);
  constexpr int chains = places * copies;
  const std::uint8_t* record = call.packed + tile * sizes.tile_bytes;
  const std::uint8_t* chunk = record + sizes.codes_offset;
  const std::int8_t* a = rows.codes + row * rows.stride;
  F totals[Rows][columns] = {};
  for (std::size_t s = 0, c = 0; c < sizes.chunks; ++s) {
    I dots[Rows][columns][chains];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (std::size_t t = 0; t < columns; ++t)
#pragma GCC unroll 8
        for (int i = 0; i < chains; ++i) dots[r][t][i] = I{};
    for (const std::size_t end = std::min(c + sizes.step, sizes.chunks); c < end; ++c, chunk += 64 * Bits, a += kChunk)
      each_quad([&](auto j) {
        constexpr int chain = raw_shift<Bits>(j) / Bits % places * copies + j % copies;
        I x[Rows];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < Rows; ++r) x[r] = quad_of(a + r * rows.stride + 4 * j);
#pragma GCC unroll 8
        for (std::size_t t = 0; t < columns; ++t) {
          const U codes = quad<Bits, raw, j>(chunk + t / kParts * sizes.tile_bytes + t % kParts * kWidth);
#pragma GCC unroll 8
          for (std::size_t r = 0; r < Rows; ++r)
            dots[r][t][chain] = Isa::template dot<Bits>(dots[r][t][chain], codes, x[r]);
        }
      });
#pragma GCC unroll 8
    for (std::size_t t = 0; t < columns; ++t) {
      const std::uint8_t* from = record + t / kParts * sizes.tile_bytes;
      const F scale = load(sizes.scales(from, s) + t % kParts * kLanes);
      const F zero = Isa::bytes_as_float(sizes.zeros(from, s) + t % kParts * kLanes);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r) {
        I sum{};
#pragma GCC unroll 8
        for (int i = 0; i < chains; ++i) sum += raw ? dots[r][t][i] >> (Bits * (i / copies)) : dots[r][t][i];
        totals[r][t] = rescaled(totals[r][t], sum, scale, zero, rows.sums[(row + r) * sizes.segments + s]);
      }
    }
  }
  finish_rows<Tiles>(call, sizes, rows, row, row + Rows, tile, reinterpret_cast<const float*>(totals));
}

// ---- many rows: codes are unpacked to a byte each, then used by every row of a block ----

constexpr std::size_t kDepth = 256;  // inputs unpacked at a time, at most: 16 KiB for 64 channels

template <int Bits>
void unpack_chunks(const std::uint8_t* chunk, std::size_t chunks, std::size_t tiles, std::uint8_t* out) noexcept {
  for (std::size_t c = 0; c < chunks; ++c, chunk += 64 * Bits, out += 8 * 64 * tiles)
    for (std::size_t p = 0; p < kParts; ++p)
      each_quad([&](auto j) {
        const U codes = quad<Bits, false, j>(chunk + p * kWidth);
        std::memcpy(out + j * 64 * tiles + p * kWidth, &codes, sizeof codes);
      });
}

// Adds inputs [32 * chunk, 32 * chunk_end) to Rows x Tiles outputs. `codes` are those inputs unpacked, each quad Tiles
// x 64 bytes; `totals` has rows of 16 * Tiles floats.
template <int Bits, std::size_t Rows, std::size_t Tiles>
void block(const Sizes sizes, const QuantizedRows& rows, std::size_t row, const std::uint8_t* record,
           const std::uint8_t* codes, std::size_t chunk, std::size_t chunk_end, float* totals) noexcept {
  constexpr std::size_t columns = Tiles * kParts;
  const std::size_t step = sizes.step, stride = rows.stride;
  const std::int8_t* a = rows.codes + row * stride + chunk * kChunk;
  const float* sums = rows.sums + row * sizes.segments + chunk / step;
  std::size_t s = chunk / step;
  for (; chunk < chunk_end; chunk += step, ++s, ++sums) {
    asm volatile("" ::: "memory");  // left alone, GCC keeps all totals in registers from here to the end, and spills
    I dots[Rows][columns];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (std::size_t c = 0; c < columns; ++c) dots[r][c] = I{};
    const std::size_t quads = 8 * (step < chunk_end - chunk ? step : chunk_end - chunk);
    for (const std::uint8_t* const end = codes + 64 * Tiles * quads; codes != end;) {
      typename Isa::template Short<Bits> shorts[Rows][columns];
#pragma GCC unroll 8
      for (int q = 0; q < Isa::template Short<Bits>::kQuads; ++q, codes += 64 * Tiles, a += 4) {
        U w[columns];
#pragma GCC unroll 8
        for (std::size_t c = 0; c < columns; ++c) w[c] = read<U>(codes + c * kWidth);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < Rows; ++r) {
          const I x = quad_of(a + r * stride);
#pragma GCC unroll 8
          for (std::size_t c = 0; c < columns; ++c) shorts[r][c].add(q, dots[r][c], w[c], x);
        }
      }
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (std::size_t c = 0; c < columns; ++c) shorts[r][c].flush(dots[r][c]);
    }
#pragma GCC unroll 8
    for (std::size_t c = 0; c < columns; ++c) {
      const std::uint8_t* tile = record + c / kParts * sizes.tile_bytes;
      const F scale = load(sizes.scales(tile, s) + c % kParts * kLanes);
      const F zero = Isa::bytes_as_float(sizes.zeros(tile, s) + c % kParts * kLanes);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r) {
        float* total = totals + r * kTile * Tiles + c * kLanes;
        store(total, rescaled(load(total), dots[r][c], scale, zero, sums[r * sizes.segments]));
      }
    }
  }
}

template <int Bits, std::size_t Tiles, typename... Args>
inline void block_of(std::size_t height, const Args&... args) noexcept {
  switch (height) {
    case 1:
      return block<Bits, 1, Tiles>(args...);
    case 2:
      return block<Bits, 2, Tiles>(args...);
    case 3:
      return block<Bits, 3, Tiles>(args...);
    case 4:
      return block<Bits, 4, Tiles>(args...);
    case 5:
      if constexpr (Isa::kRows >= 5)
        return block<Bits, 5, Tiles>(args...);
      else
        return;
    default:
      if constexpr (Isa::kRows >= 6)
        return block<Bits, 6, Tiles>(args...);
      else
        return;
  }
}

template <int Bits, std::size_t Tiles>
void many_rows(const Linear& call, const Sizes& sizes, const QuantizedRows& rows, std::size_t row0, std::size_t row1,
               std::size_t tile) noexcept {
  alignas(64) std::uint8_t codes[kDepth * kTile * Tiles];
  alignas(64) float totals[kRowBlock * kTile * Tiles];
  std::memset(totals, 0, (row1 - row0) * kTile * Tiles * sizeof(float));
  const std::size_t chunks = sizes.chunks, depth = kDepth / kChunk / sizes.step * sizes.step;
  const std::uint8_t* record = call.packed + tile * sizes.tile_bytes;
  for (std::size_t c = 0; c < chunks; c += depth) {
    const std::size_t end = c + depth < chunks ? c + depth : chunks;
    for (std::size_t t = 0; t < Tiles; ++t)
      unpack_chunks<Bits>(record + t * sizes.tile_bytes + sizes.codes_offset + c * 64 * Bits, end - c, Tiles,
                          codes + 64 * t);
    for (std::size_t r = row0; r < row1;) {
      const std::size_t left = row1 - r, pieces = (left + Isa::kRows - 1) / Isa::kRows,
                        height = (left + pieces - 1) / pieces;
      block_of<Isa::code_class(Bits), Tiles>(height, sizes, rows, r, record, codes, c, end,
                                             totals + (r - row0) * kTile * Tiles);
      r += height;
    }
  }
  finish_rows<Tiles>(call, sizes, rows, row0, row1, tile, totals);
}

template <int Bits, std::size_t Tiles, typename... Args>
inline void few_rows_of(std::size_t height, const Args&... args) noexcept {
  switch (height) {
    case 1:
      return few_rows<Bits, 1, Tiles>(args...);
    case 2:
      return few_rows<Bits, 2, Tiles>(args...);
    default:
      return few_rows<Bits, 3, Tiles>(args...);
  }
}

template <int Bits>
void linear_tiles(const Linear& call, const QuantizedRows& rows, std::size_t row0, std::size_t row1, std::size_t tile0,
                  std::size_t tile1) noexcept {
  const Sizes sizes(call.w);
  const std::size_t height = row1 - row0;
  for (std::size_t tile = tile0; tile < tile1;) {
    const std::size_t left = tile1 - tile;
    if (height < 4 && Isa::kFewTiles == 2 && left >= 2)
      few_rows_of<Bits, 2>(height, call, sizes, rows, row0, tile), tile += 2;
    else if (height < 4)
      few_rows_of<Bits, 1>(height, call, sizes, rows, row0, tile++);
    else if (Isa::kTiles >= 4 && left >= 4)
      many_rows<Bits, 4>(call, sizes, rows, row0, row1, tile), tile += 4;
    else if (Isa::kTiles >= 2 && left >= 2)
      many_rows<Bits, 2>(call, sizes, rows, row0, row1, tile), tile += 2;
    else
      many_rows<Bits, 1>(call, sizes, rows, row0, row1, tile++);
  }
}

void linear_part(const Linear& call, const QuantizedRows& rows, std::size_t row0, std::size_t row1, std::size_t tile0,
                 std::size_t tile1) noexcept {
  switch (call.w.bits) {
    case 2:
      return linear_tiles<2>(call, rows, row0, row1, tile0, tile1);
    case 3:
      return linear_tiles<3>(call, rows, row0, row1, tile0, tile1);
    case 4:
      return linear_tiles<4>(call, rows, row0, row1, tile0, tile1);
    case 5:
      return linear_tiles<5>(call, rows, row0, row1, tile0, tile1);
    case 6:
      return linear_tiles<6>(call, rows, row0, row1, tile0, tile1);
    case 7:
      return linear_tiles<7>(call, rows, row0, row1, tile0, tile1);
    default:
      return linear_tiles<8>(call, rows, row0, row1, tile0, tile1);
  }
}

// `rounds` times 64 multiply-accumulates of whole registers, on registers alone; returns the operations done (2 a
// multiply-accumulate). `sink` keeps the result alive.
double dot_peak(std::size_t rounds, std::int32_t* sink) noexcept {
  constexpr int chains = 16;  // more than latency times throughput
  I dots[chains];
  for (int d = 0; d < chains; ++d) dots[d] = I{} + d;
  const U codes = bytes(3);
  I a = I{} + 0x01020304;
  for (std::size_t i = 0; i < rounds; ++i)
    for (int j = 0; j < 64 / chains; ++j) {
      Isa::opaque(a);
      for (int d = 0; d < chains; ++d) dots[d] = Isa::template dot<4>(dots[d], codes, a);
    }
  I total = dots[0];
  for (int d = 1; d < chains; ++d) total ^= dots[d];
  *sink = total[0];
  return static_cast<double>(rounds) * 64 * 2 * static_cast<double>(kWidth);
}
