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

// ---- activations ----

inline std::int8_t low_byte(float rounded) noexcept {  // of kRound + integer
  return static_cast<std::int8_t>(read<std::uint32_t>(&rounded));
}

void quantize_row(const Linear& call, std::size_t row, const QuantizedRows& out) noexcept {
  const std::size_t k = call.w.k, segment = call.w.segment();
  std::int8_t* codes = out.codes + row * out.stride;
  float scale = call.x_scale;
  if (call.x_codes != nullptr) {
    const std::uint8_t* x = call.x_codes + row * k;
    for (std::size_t i = 0; i < k; ++i) codes[i] = static_cast<std::int8_t>(x[i] ^ 0x80u);
  } else if (scale > 0.0f) {
    const float* x = call.x + row * k;
    const float inverse = 1.0f / scale, zero = static_cast<float>(call.x_zero);
    const float low = -zero, high = 255.0f - zero, shift = kRound + (zero - 128.0f);
    std::uint32_t nan = 0;
    for (std::size_t i = 0; i < k; ++i) {
      float t = x[i] * inverse;
      nan |= t != t;
      t = t > low ? t : low;
      t = t < high ? t : high;
      codes[i] = low_byte(((t + kRound) - kRound) + shift);
    }
    if (nan != 0) scale = std::numeric_limits<float>::quiet_NaN();
  } else {
    const float* x = call.x + row * k;
    const float top = abs_max(x, k);
    scale = std::isinf(top) ? std::numeric_limits<float>::quiet_NaN() : top / 127.0f;
    if (top < kZeroChannel || std::isinf(top)) {
      if (top < kZeroChannel) scale = 0.0f;
      std::memset(codes, 0, k);
    } else {
      const float inverse = 127.0f / top;
      for (std::size_t i = 0; i < k; ++i) codes[i] = low_byte(x[i] * inverse + kRound);
    }
  }
  std::memset(codes + k, 0, out.stride - k);
  out.scales[row] = scale;
  for (std::size_t s = 0; s < call.w.segments(); ++s) {
    std::int32_t total = 0;
    const std::size_t end = (s + 1) * segment < k ? (s + 1) * segment : k;
    for (std::size_t i = s * segment; i < end; ++i) total += codes[i];
    out.sums[row * call.w.segments() + s] = static_cast<float>(total);
  }
}

// ---- weights ----

// Shift left by `By` bits (right if negative). Bits that cross into a neighbouring byte are masked off by the caller.
template <int By>
inline U shifted(U v) noexcept {
  if constexpr (By > 0) return v << By;
  if constexpr (By < 0) return v >> -By;
  return v;
}

// Adds plane `Plane` (of the planes of `Bits`) of quad `J` to `code`. `chunk` points at this part of a chunk.
template <int Bits, int Plane, int J>
inline U with_plane(const std::uint8_t* chunk, U code) noexcept {
  if constexpr ((Bits & Plane) == 0) return code;
  constexpr int low = Bits & ~(2 * Plane - 1);  // wider planes come first: in the code as in the chunk
  constexpr int from = Plane * (J / Plane);
  const U vector = read<U>(chunk + 64 * (low + J % Plane));
  if constexpr (Plane == 8) return vector;
  return Isa::merge(code, shifted<low - from>(vector), bytes(((1u << Plane) - 1u) << low));
}

// Quad J of a chunk. With Raw, codes of a single plane stay at the bit where they lie, which saves the shift: a sum of
// them is 2^raw_shift<Bits>(J) times what it stands for.
template <int Bits>
constexpr int raw_shift(int j) {
  return Bits * (j / Bits);
}
template <int Bits, bool Raw, int J>
inline U quad(const std::uint8_t* chunk) noexcept {
  if constexpr (Raw) {
    return read<U>(chunk + 64 * (J % Bits)) & bytes(((1u << Bits) - 1u) << raw_shift<Bits>(J));
  } else {
    const U wide = with_plane<Bits, 4, J>(chunk, with_plane<Bits, 8, J>(chunk, U{}));
    return with_plane<Bits, 1, J>(chunk, with_plane<Bits, 2, J>(chunk, wide));
  }
}

// Hands quads 0..7 of a chunk to `use(j, codes)`.
template <int Bits, bool Raw, typename Use, int... J>
inline void each_quad(const std::uint8_t* chunk, Use use, std::integer_sequence<int, J...>) noexcept {
  (use(J, quad<Bits, Raw, J>(chunk)), ...);
}
template <int Bits, bool Raw, typename Use>
inline void each_quad(const std::uint8_t* chunk, Use use) noexcept {
  each_quad<Bits, Raw>(chunk, use, std::make_integer_sequence<int, 8>{});
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

// Writes channels [channel, channel + 16 * tiles) of one row from its float totals.
template <Activation Act>
void finish(const Linear& call, const QuantizedRows& rows, std::size_t row, std::size_t channel, std::size_t tiles,
            const float* totals) noexcept {
  const F scale = splat(rows.scales[row]);
  const bool centred = call.x_codes == nullptr && !(call.x_scale > 0.0f);
  const F offset = splat(centred ? 0.0f : static_cast<float>(call.x_zero - 128));
  const std::uint8_t* record = call.packed + channel / kTile * call.w.tile_bytes();
  for (std::size_t t = 0; t < tiles; ++t, channel += kTile, totals += kTile, record += call.w.tile_bytes()) {
    const std::size_t count = call.w.n - channel < kTile ? call.w.n - channel : kTile;
    const float* bias = call.bias == nullptr ? nullptr : call.bias + channel;
    float* out = call.y + row * call.w.n + channel;
    alignas(64) float some[2][kTile] = {};  // where fewer than a tile's channels are left, or bytes are asked for
    if (count < kTile && bias != nullptr)
      bias = static_cast<const float*>(std::memcpy(some[0], bias, count * sizeof(float)));
    if (count < kTile || call.y_codes != nullptr) out = some[1];
#pragma GCC unroll 4
    for (std::size_t p = 0; p < kTile; p += kLanes) {
      const F sums = load(reinterpret_cast<const float*>(record) + p);
      F v = Isa::fma(Isa::fnma(offset, sums, load(totals + p)), scale, bias == nullptr ? F{} : load(bias + p));
      if constexpr (Act == Activation::relu) v = Isa::max(F{}, v);  // of the two, max gives a NaN in the second
      if constexpr (Act == Activation::gelu) v = gelu(v);
      store(out + p, v);
    }
    if (call.y_codes != nullptr) {
      const float inverse = 1.0f / call.y_scale, zero = static_cast<float>(call.y_zero);
      for (std::size_t i = 0; i < count; ++i) {
        float v = out[i] * inverse;
        v = v > -zero ? v : -zero;
        v = v < 255.0f - zero ? v : 255.0f - zero;
        call.y_codes[row * call.w.n + channel + i] = static_cast<std::uint8_t>(low_byte(v + kRound) + call.y_zero);
      }
    } else if (count < kTile) {
      std::memcpy(call.y + row * call.w.n + channel, out, count * sizeof(float));
    }
  }
}

inline void finish_row(const Linear& call, const QuantizedRows& rows, std::size_t row, std::size_t channel,
                       std::size_t tiles, const float* totals) noexcept {
  switch (call.activation) {
    case Activation::none:
      return finish<Activation::none>(call, rows, row, channel, tiles, totals);
    case Activation::relu:
      return finish<Activation::relu>(call, rows, row, channel, tiles, totals);
    case Activation::gelu:
      return finish<Activation::gelu>(call, rows, row, channel, tiles, totals);
  }
}

// ---- few rows: codes go from memory through registers, once ----

constexpr std::size_t kAhead = 4096;  // bytes fetched ahead: caches beyond the second level want asking early

template <int Bits, std::size_t Rows>
void few_rows(const Linear& call, const Sizes& sizes, const QuantizedRows& rows, std::size_t row,
              std::size_t tile) noexcept {
  constexpr bool raw = Isa::kByteCodes && (Bits == 2 || Bits == 4);
  // Quads that share a sum. Several sums hide the latency of the multiplication; codes left at different bits need
  // them.
  constexpr int shared = Rows * kParts == 1 ? 1 : Rows * kParts == 2 || Bits == 2 ? 2 : 4;
  constexpr int chains = 8 / shared;
  const std::uint8_t* record = call.packed + tile * sizes.tile_bytes;
  const std::uint8_t* chunk = record + sizes.codes_offset;
  const std::int8_t* a = rows.codes + row * rows.stride;
  F totals[Rows][kParts] = {};
  for (std::size_t s = 0, c = 0; c < sizes.chunks; ++s) {
    I dots[kParts][Rows][chains];
#pragma GCC unroll 8
    for (std::size_t p = 0; p < kParts; ++p)
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < chains; ++i) dots[p][r][i] = I{};
    for (const std::size_t end = std::min(c + sizes.step, sizes.chunks); c < end;
         ++c, chunk += 64 * Bits, a += kChunk) {
#pragma GCC unroll 8
      for (std::size_t line = 0; line < Bits; ++line) Isa::prefetch(chunk + kAhead + 64 * line);
#pragma GCC unroll 8
      for (std::size_t p = 0; p < kParts; ++p)
        each_quad<Bits, raw>(chunk + p * kWidth, [&](int j, U codes) {
#pragma GCC unroll 8
          for (std::size_t r = 0; r < Rows; ++r) {
            I& chain = dots[p][r][j / shared];
            chain = Isa::template dot<Bits>(chain, codes, quad_of(a + r * rows.stride + 4 * j));
          }
        });
    }
    const float* scales = sizes.scales(record, s);
    const std::uint8_t* zeros = sizes.zeros(record, s);
#pragma GCC unroll 8
    for (std::size_t p = 0; p < kParts; ++p)
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r) {
        I sum{};
#pragma GCC unroll 8
        for (int i = 0; i < chains; ++i) sum += raw ? dots[p][r][i] >> raw_shift<Bits>(i * shared) : dots[p][r][i];
        totals[r][p] = rescaled(totals[r][p], sum, load(scales + p * kLanes), Isa::bytes_as_float(zeros + p * kLanes),
                                rows.sums[(row + r) * sizes.segments + s]);
      }
  }
#pragma GCC unroll 8
  for (std::size_t r = 0; r < Rows; ++r)
    finish_row(call, rows, row + r, tile * kTile, 1, reinterpret_cast<const float*>(totals[r]));
}

// ---- many rows: codes are unpacked to a byte each, then used by every row of a block ----

constexpr std::size_t kDepth = 512;  // inputs unpacked at a time, at most: 32 KiB for 64 channels

template <int Bits>
void unpack_chunks(const std::uint8_t* chunk, std::size_t chunks, std::size_t tiles, std::uint8_t* out) noexcept {
  for (std::size_t c = 0; c < chunks; ++c, chunk += 64 * Bits, out += 8 * 64 * tiles)
    for (std::size_t p = 0; p < kParts; ++p)
      each_quad<Bits, false>(chunk + p * kWidth, [&](int j, U codes) {
        std::memcpy(out + static_cast<std::size_t>(j) * 64 * tiles + p * kWidth, &codes, sizeof codes);
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
  for (std::size_t r = row0; r < row1; ++r)
    finish_row(call, rows, r, tile * kTile, Tiles, totals + (r - row0) * kTile * Tiles);
}

template <int Bits>
void linear_tiles(const Linear& call, const QuantizedRows& rows, std::size_t row0, std::size_t row1, std::size_t tile0,
                  std::size_t tile1) noexcept {
  const Sizes sizes(call.w);
  for (std::size_t tile = tile0; tile < tile1;) {
    const std::size_t left = tile1 - tile;
    if (row1 - row0 == 1)
      few_rows<Bits, 1>(call, sizes, rows, row0, tile++);
    else if (row1 - row0 == 2)
      few_rows<Bits, 2>(call, sizes, rows, row0, tile++);
    else if (row1 - row0 == 3)
      few_rows<Bits, 3>(call, sizes, rows, row0, tile++);
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
