// The packed linear, written once over `Isa` and compiled once for each instruction set.
// Included inside an anonymous namespace, after clip.inl.

// Before loops over registers: their counts are known, and small. Sanitised, the unrolled code takes minutes to
// compile.
#ifdef __SANITIZE_ADDRESS__
#define TIGHTROPE_UNROLL
#else
#define TIGHTROPE_UNROLL _Pragma("GCC unroll 8")
#endif

using U = Isa::U;                               // the same register as bytes: kLanes uint32
constexpr std::size_t kWidth = 4 * kLanes;      // bytes of a register
constexpr std::size_t kParts = kTile / kLanes;  // registers across a tile

template <typename T>
inline T read(const void* p) noexcept {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Fetches `size` bytes into the cache of a level, to read or (Write) to write them.
template <int Level = 1, bool Write = false>
inline void fetch(const void* p, std::size_t size) noexcept {
  TIGHTROPE_UNROLL
  for (std::size_t i = 0; i < size; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, Write, 4 - Level);
}

inline U bytes(std::uint32_t value) noexcept { return U{} + value * 0x01010101u; }
inline U less_bytes(U a, U b) noexcept {
  typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));
  return reinterpret_cast<U>(reinterpret_cast<Bytes>(a) - reinterpret_cast<Bytes>(b));
}
inline I quad_of(const std::int8_t* a) noexcept { return I{} + read<std::int32_t>(a); }
inline F as_float(I v) noexcept { return __builtin_convertvector(v, F); }
inline bool any(I v) noexcept {
  std::int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= v[i];
  return found != 0;
}

// ---- activations ----

constexpr std::uint32_t kRoundBits = 0x4b400000u;  // of kRound

inline std::int8_t low_byte(float rounded) noexcept {  // of kRound + integer
  return static_cast<std::int8_t>(read<std::uint32_t>(&rounded));
}

// Codes of x[0, n) are what `rounded` makes of kLanes values at a time, kRound + code; returns their sum. It is taken
// of the bits of kRound + code, which count up by one as the code does.
template <typename Rounded>
inline std::int32_t quantize_floats(const float* x, std::size_t n, std::int8_t* codes, Rounded rounded) noexcept {
  U total{};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F code = rounded(load(x + i));
    Isa::store_low_bytes(codes + i, code);
    total += read<U>(&code);
  }
  std::uint32_t sum = Isa::sum(total);
  if (i < n) {
    float code[kLanes];
    store(code, rounded(load_part(x + i, n - i)));
    for (std::size_t j = 0; i + j < n; ++j) {
      codes[i + j] = low_byte(code[j]);
      sum += read<std::uint32_t>(code + j);
    }
  }
  return static_cast<std::int32_t>(sum - static_cast<std::uint32_t>(n) * kRoundBits);
}

void quantize_row(const Linear& call, std::size_t row, const QuantizedRows& out) noexcept {
  const std::size_t k = call.w.k, segment = call.w.segment(), segments = call.w.segments();
  std::int8_t* codes = out.codes + row * out.stride;
  const int start = call.w.zeros ? 0 : -call.w.middle();
  const auto each_segment = [&](auto sum_of) {
    for (std::size_t s = 0, i = 0; s < segments; ++s, i += segment) {
      const std::int32_t sum = sum_of(i, std::min(segment, k - i));
      out.sums[s * out.count + row] = static_cast<float>(sum);
      out.starts[s * out.count + row] = start * sum;
    }
  };
  if (call.x != nullptr && row + 1 < call.m) fetch(call.x + (row + 1) * k, k * sizeof(float));
  float scale = call.x_scale;
  if (call.x_codes != nullptr) {
    const std::uint8_t* x = call.x_codes + row * k;
    each_segment([&](std::size_t i, std::size_t n) {
      std::int32_t total = 0;
      for (std::size_t j = i; j < i + n; ++j) {
        codes[j] = static_cast<std::int8_t>(x[j] ^ 0x80u);
        total += codes[j];
      }
      return total;
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
      each_segment([](std::size_t, std::size_t) { return 0; });
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
  const U bits = shifted<Low - piece.bit>(read<U>(chunk + kVector * piece.vector));
  const U mask = bytes(((1u << piece.count) - 1u) << Low);
  if constexpr (Low == 0)
    code = bits & mask;
  else
    code = Isa::merge(code, bits, mask);
  if constexpr (Low + piece.count < Bits) return with_rest<Bits, J, Low + piece.count>(chunk, code);
  return code;
}

// Calls use(j, codes) for quads j = 0..7 of a chunk, in the order in which they lie: each vector is read once; j
// is an integral_constant and codes an array of `Columns` registers. With Raw, whole codes stay at the bit where they
// lie, which saves the shift: a sum of them is 2^(Bits * place) times what it stands for, place = place_of<Bits>(j).
template <int Bits>
constexpr int place_of(int j) {
  return j < whole_quads(Bits) ? j / Bits : 0;
}
template <int Bits, bool Raw, std::size_t Columns, int Vector, int Place, typename Use>
inline void quads_of(const U (&vectors)[Columns], const Use& use) noexcept {
  constexpr int at = Bits * Place, kept = Raw ? at : 0;
  U codes[Columns];
  TIGHTROPE_UNROLL
  for (std::size_t t = 0; t < Columns; ++t) {
    codes[t] = vectors[t];
    if constexpr (Bits < 8) codes[t] = shifted<kept - at>(codes[t]) & bytes(((1u << Bits) - 1u) << kept);
  }
  use(std::integral_constant<int, Vector + at>{}, codes);
  if constexpr (Place + 1 < 8 / Bits) quads_of<Bits, Raw, Columns, Vector, Place + 1>(vectors, use);
}
template <int Bits, bool Raw, std::size_t Columns, int J = 0, typename Use>
inline void each_quad(const std::uint8_t* chunk, const Use& use) noexcept {
  U read_[Columns];
  if constexpr (J < Bits) {
    TIGHTROPE_UNROLL
    for (std::size_t t = 0; t < Columns; ++t) read_[t] = Isa::kept(read<U>(chunk + J * kVector + t * kWidth));
    quads_of<Bits, Raw, Columns, J, 0>(read_, use);
    each_quad<Bits, Raw, Columns, J + 1>(chunk, use);
  } else if constexpr (whole_quads(Bits) + J - Bits < 8) {
    constexpr int quad = whole_quads(Bits) + J - Bits;
    TIGHTROPE_UNROLL
    for (std::size_t t = 0; t < Columns; ++t) read_[t] = with_rest<Bits, quad, 0>(chunk + t * kWidth, U{});
    use(std::integral_constant<int, quad>{}, read_);
    each_quad<Bits, Raw, Columns, J + 1>(chunk, use);
  }
}

// Where the parts of a packed weight lie, by *columns*: registers of channels, kParts a tile. Sizes are worked out
// once, since the inner code cannot divide for them.
struct Weight {
  const std::uint8_t* packed;
  std::size_t bytes, tile_bytes, segment_bytes, chunks, segments, step;  // step: chunks of a segment
  std::size_t header, next_header;                                // next_header: 0 where one group is the whole row
  bool has_zeros;
  explicit Weight(const Linear& call) noexcept
      : packed(call.packed),
        bytes(call.w.bytes()),
        tile_bytes(call.w.tile_bytes()),
        segment_bytes(call.w.segment_bytes()),
        chunks(call.w.chunks()),
        segments(call.w.segments()),
        step(call.w.segment() / kChunk),
        header(call.w.header()),
        next_header(call.w.group == 0 ? 0 : segment_bytes),
        has_zeros(call.w.zeros) {}

  // How many bytes, at most `ahead`, behind `p` there are `size` more: fetching from where no memory is mapped takes
  // longer than waiting.
  std::size_t reach(const std::uint8_t* p, std::size_t ahead, std::size_t size) const noexcept {
    const std::size_t left = bytes - static_cast<std::size_t>(p - packed);
    return std::min(ahead, left - std::min(left, size));
  }
  const std::uint8_t* record(std::size_t column) const noexcept { return packed + column / kParts * tile_bytes; }
  F sums(std::size_t column) const noexcept {
    return load(reinterpret_cast<const float*>(record(column)) + column % kParts * kLanes);
  }
  const std::uint8_t* scales(std::size_t column, std::size_t segment) const noexcept {
    return record(column) + kSums + segment * next_header + column % kParts * kWidth;
  }
  const std::uint8_t* zeros(std::size_t column, std::size_t segment) const noexcept {
    return record(column) + kSums + segment * next_header + kScales + column % kParts * kLanes;
  }
  const std::uint8_t* codes(std::size_t column, std::size_t segment) const noexcept {
    return record(column) + kSums + header + segment * segment_bytes + column % kParts * kWidth;
  }
};

// total + scale * (dots - zero * sum of activations). The dots and the product are integers below 2^24, so all but the
// last multiplication and addition is exact. Without zeros the dots started at what is to be taken away.
inline F rescaled(F total, I dots, F scale) noexcept { return Isa::fma(as_float(dots), scale, total); }
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
  const U power = (read<U>(&shift) + (127u - kRoundBits)) << 23;
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
  if (call.y_codes == nullptr) return store_part(call.y + at, v, count);
  const float zero = static_cast<float>(call.y_zero);
  v = Isa::min(Isa::max(v * (1.0f / call.y_scale), splat(-zero)), splat(255.0f - zero));  // a NaN becomes code 0
  std::int8_t codes[kLanes];
  Isa::store_low_bytes(codes, (v + kRound) + zero);
  std::memcpy(call.y_codes + at, codes, count);
}

// Writes rows [row, row_end) of columns [column, column + Columns) from their totals, rows of as many registers.
template <Activation Act, std::size_t Columns>
void finish_rows(const Linear& call, const Weight& weight, const QuantizedRows& rows, std::size_t row,
                 std::size_t row_end, std::size_t column, const F* totals) noexcept {
  const std::size_t n = call.w.n, channel = column * kLanes;
  const bool centred = call.x_codes == nullptr && !(call.x_scale > 0.0f);
  const F offset = splat(centred ? 0.0f : static_cast<float>(call.x_zero - 128));
  F bias[Columns], correction[Columns];
  TIGHTROPE_UNROLL
  for (std::size_t c = 0; c < Columns; ++c) {
    const std::size_t at = std::min(n, channel + c * kLanes), left = n - at;
    bias[c] = call.bias == nullptr ? F{} : left >= kLanes ? load(call.bias + at) : load_part(call.bias + at, left);
    correction[c] = offset * weight.sums(column + c);
  }
  for (; row < row_end; ++row, totals += Columns) {
    const F scale = splat(rows.scales[row]);
    TIGHTROPE_UNROLL
    for (std::size_t c = 0; c < Columns; ++c)
      if (const std::size_t at = channel + c * kLanes; at < n)
        finish<Act>(call, row * n + at, n - at, Isa::fma(totals[c] - correction[c], scale, bias[c]));
  }
}

template <std::size_t Columns, typename... Args>
inline void finish_rows(const Linear& call, const Args&... args) noexcept {
  switch (call.activation) {
    case Activation::none:
      return finish_rows<Activation::none, Columns>(call, args...);
    case Activation::relu:
      return finish_rows<Activation::relu, Columns>(call, args...);
    case Activation::gelu:
      return finish_rows<Activation::gelu, Columns>(call, args...);
  }
}

// ---- few rows: codes go from memory through registers, once ----

constexpr std::size_t kAhead = 8192;  // bytes between what is fetched and what is used

// A weight of more bytes, which no second-level cache holds, is fetched into that: what comes from behind it takes so
// long that the first level, which waits for few lines at a time on most processors, would keep memory idle. Smaller
// ones, which it holds at least in part, the first level is to have in time.
constexpr std::size_t kSecondLevel = std::size_t{4} << 20;

template <int Bits, std::size_t Rows, int Level, std::size_t Columns>  // columns of one tile
void few_rows(const Linear& call, const Weight& weight, const QuantizedRows& rows, std::size_t row,
              std::size_t column) noexcept {
  // Codes left at different bits need sums of their own; where these are few, more hide the multiplication's latency.
  constexpr bool raw = Isa::kByteCodes && Bits < 5;
  constexpr int places = raw ? 8 / Bits : 1;
  constexpr int copies = std::max(1, Isa::kSums / (static_cast<int>(Rows * Columns) * places));
  const std::int8_t* a = rows.codes + row * rows.stride;
  const std::int8_t* const a_end = a + weight.chunks * kChunk;
  const std::size_t step = weight.step * kChunk, stride = rows.stride;
  const float* sums = rows.sums + row;
  const std::int32_t* starts = rows.starts + row;
  const std::uint8_t *scales = weight.scales(column, 0), *zeros = weight.zeros(column, 0);
  const std::uint8_t* codes = weight.codes(column, 0);
  const std::size_t ahead = weight.reach(weight.record(column), kAhead, weight.tile_bytes);
  F totals[Rows][Columns] = {};
  while (a != a_end) {
    I dots[Rows][Columns][places][copies];
    TIGHTROPE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r)
      TIGHTROPE_UNROLL
      for (std::size_t t = 0; t < Columns; ++t)
        TIGHTROPE_UNROLL
        for (int i = 0; i < places * copies; ++i) dots[r][t][i / copies][i % copies] = I{} + (i == 0 ? starts[r] : 0);
    if (Level > 1) fetch<Level>(scales + ahead, Columns * kWidth);
    const std::uint8_t* chunk = codes;
    for (const std::int8_t* const end = a + std::min<std::size_t>(step, a_end - a); a != end;
         a += kChunk, chunk += kVector * Bits) {
      fetch<Level>(chunk + ahead, Bits * Columns * kWidth);
      each_quad<Bits, raw, Columns>(chunk, [&](auto j, const U(&quad)[Columns]) {
        TIGHTROPE_UNROLL
        for (std::size_t r = 0; r < Rows; ++r) {
          const I x = quad_of(a + r * stride + 4 * j);
          TIGHTROPE_UNROLL
          for (std::size_t t = 0; t < Columns; ++t) {
            I& sum = dots[r][t][raw ? place_of<Bits>(j) : 0][j % copies];
            sum = Isa::template dot<Bits>(sum, quad[t], x);
          }
        }
      });
    }
    TIGHTROPE_UNROLL
    for (std::size_t t = 0; t < Columns; ++t) {
      const F scale = read<F>(scales + t * kWidth);
      TIGHTROPE_UNROLL
      for (std::size_t r = 0; r < Rows; ++r) {
        I sum{};
        TIGHTROPE_UNROLL
        for (int p = 0; p < places; ++p) {
          I place{};
          TIGHTROPE_UNROLL
          for (int i = 0; i < copies; ++i) place += dots[r][t][p][i];
          sum += place >> (Bits * p);
        }
        if (weight.has_zeros)
          totals[r][t] = rescaled(totals[r][t], sum, scale, Isa::bytes_as_float(zeros + t * kLanes), sums[r]);
        else
          totals[r][t] = rescaled(totals[r][t], sum, scale);
      }
    }
    sums += rows.count, starts += rows.count;
    scales += weight.next_header, zeros += weight.next_header, codes += weight.segment_bytes;
  }
  finish_rows<Columns>(call, weight, rows, row, row + Rows, column, totals[0]);
}

// ---- many rows: codes are unpacked to a byte each, then used by every row of a block ----

constexpr std::size_t kDepth = 256;  // inputs unpacked at a time, at most: 16 KiB for 64 channels

// Unpacks chunks [c, end) of `Columns` columns, from the start of segment `s` on; a quad is then as many registers.
// FromMiddle: less the middle code, as signed bytes. Fetch: what lies `ahead` bytes on, to be unpacked next, meanwhile.
template <int Bits, std::size_t Columns, bool FromMiddle, bool Fetch>
void unpack_chunks(const Weight& weight, std::size_t column, std::size_t s, std::size_t c, std::size_t end,
                   std::size_t ahead, std::uint8_t* out) noexcept {
  for (; c < end; ++s) {
    const std::size_t count = std::min(weight.step, end - c);
    for (std::size_t t = 0; t < Columns; ++t) {
      const std::uint8_t* chunk = weight.codes(column + t, s);
      std::uint8_t* to = out + t * kWidth;
      const std::size_t fetched = weight.reach(chunk, ahead, count * kVector * Bits);
      for (std::size_t i = 0; i < count; ++i, chunk += kVector * Bits, to += 8 * Columns * kWidth) {
        each_quad<Bits, false, 1>(chunk, [&](auto j, const U(&codes)[1]) {
          const U code = FromMiddle ? less_bytes(codes[0], bytes(1u << (Bits - 1))) : codes[0];
          std::memcpy(to + j * Columns * kWidth, &code, sizeof code);
        });
        if (Fetch && t % kParts == 0) fetch(chunk + fetched, kVector * Bits);
      }
    }
    c += count;
    out += count * 8 * Columns * kWidth;
  }
}

// Adds inputs [32 * chunk, 32 * chunk_end), which start with segment `s`, to Rows x Columns outputs: to those `before`,
// giving `totals`, which may be the same; rows of Columns registers. `codes` are those inputs unpacked.
template <int Bits, std::size_t Rows, std::size_t Columns>
void block(const Weight& weight, const QuantizedRows& rows, std::size_t row, std::size_t column,
           const std::uint8_t* codes, std::size_t s, std::size_t chunk, std::size_t chunk_end, const F* before,
           F* totals) noexcept {
  const std::size_t step = weight.step, stride = rows.stride, next_sums = rows.count, next_header = weight.next_header;
  const bool has_zeros = weight.has_zeros;
  const std::int8_t* a = rows.codes + row * stride + chunk * kChunk;
  const float* sums = rows.sums + s * next_sums + row;
  const std::int32_t* starts = rows.starts + s * next_sums + row;
  const std::uint8_t *scales[Columns], *zeros[Columns];  // not read from `weight` anew whenever a total is written
  for (std::size_t c = 0; c < Columns; ++c) {
    scales[c] = weight.scales(column + c, s);
    zeros[c] = weight.zeros(column + c, s);
  }
  for (; chunk < chunk_end; chunk += step, sums += next_sums, starts += next_sums) {
    asm volatile("" ::: "memory");  // left alone, GCC keeps all totals in registers from here to the end, and spills
    I dots[Rows][Columns];
    TIGHTROPE_UNROLL
    for (std::size_t r = 0; r < Rows; ++r)
      TIGHTROPE_UNROLL
      for (std::size_t c = 0; c < Columns; ++c) dots[r][c] = I{} + starts[r];
    const std::size_t quads = 8 * std::min(step, chunk_end - chunk);
    for (const std::uint8_t* const end = codes + kWidth * Columns * quads; codes != end;) {
      typename Isa::template Short<Bits> shorts[Rows][Columns];
      TIGHTROPE_UNROLL
      for (int q = 0; q < Isa::template Short<Bits>::kQuads; ++q, codes += kWidth * Columns, a += 4) {
        U w[Columns];
        TIGHTROPE_UNROLL
        for (std::size_t c = 0; c < Columns; ++c) w[c] = read<U>(codes + c * kWidth);
        TIGHTROPE_UNROLL
        for (std::size_t r = 0; r < Rows; ++r) {
          const I x = quad_of(a + r * stride);
          TIGHTROPE_UNROLL
          for (std::size_t c = 0; c < Columns; ++c) shorts[r][c].add(q, dots[r][c], w[c], x);
        }
      }
      TIGHTROPE_UNROLL
      for (std::size_t r = 0; r < Rows; ++r)
        TIGHTROPE_UNROLL
        for (std::size_t c = 0; c < Columns; ++c) shorts[r][c].flush(dots[r][c]);
    }
    if (has_zeros) {
      TIGHTROPE_UNROLL
      for (std::size_t c = 0; c < Columns; ++c) {
        asm volatile("" ::: "memory");  // left alone, GCC reads all totals before it branches, and spills them
        const F scale = read<F>(scales[c]), zero = Isa::bytes_as_float(zeros[c]);
        TIGHTROPE_UNROLL
        for (std::size_t r = 0; r < Rows; ++r)
          totals[r * Columns + c] = rescaled(before[r * Columns + c], dots[r][c], scale, zero, sums[r]);
      }
    } else {
      TIGHTROPE_UNROLL
      for (std::size_t c = 0; c < Columns; ++c) {
        const F scale = read<F>(scales[c]);
        TIGHTROPE_UNROLL
        for (std::size_t r = 0; r < Rows; ++r)
          totals[r * Columns + c] = rescaled(before[r * Columns + c], dots[r][c], scale);
      }
    }
    for (std::size_t c = 0; c < Columns; ++c) scales[c] += next_header, zeros[c] += next_header;
    before = totals;
  }
}

template <int Bits, std::size_t Columns, typename... Args>
inline void block_of(std::size_t height, const Args&... args) noexcept {
  switch (height) {
    case 1:
      return block<Bits, 1, Columns>(args...);
    case 2:
      return block<Bits, 2, Columns>(args...);
    case 3:
      return block<Bits, 3, Columns>(args...);
    case 4:
      return block<Bits, 4, Columns>(args...);
    case 5:
      if constexpr (Isa::kRows >= 5)
        return block<Bits, 5, Columns>(args...);
      else
        return;
    default:
      if constexpr (Isa::kRows >= 6)
        return block<Bits, 6, Columns>(args...);
      else
        return;
  }
}

// Instructions that multiply matrices, where a machine has them.
template <typename Machine, std::size_t Inputs>
using Matrix = typename Machine::template Matrix<Inputs>;

// As block, for `height` rows, at most kMatrixBlock. Without zeros codes are signed: the middle code is 0. Where `next`
// is not null, codes from there on, as many as these, are fetched meanwhile: `chunk_bytes` a chunk.
template <typename Matrix, bool Zeros, std::size_t Columns>
void matrix_block(std::size_t height, const Weight& weight, const QuantizedRows& rows, std::size_t row,
                  std::size_t column, const std::uint8_t* codes, std::size_t s, std::size_t chunk,
                  std::size_t chunk_end, const F* before, F* totals, const std::uint8_t* next,
                  std::size_t chunk_bytes) noexcept {
  static_assert(Columns <= 2, "codes are fetched once for each pair of columns");
  constexpr std::size_t most = 4;  // segments scaled at a time
  alignas(64) I dots[most][kMatrixBlock * Columns];
  const std::int8_t* a = rows.codes + row * rows.stride;
  const std::size_t step = weight.step;
  while (chunk < chunk_end) {
    F scales[most][Columns], zeros[most][Columns];
    const float* sums = rows.sums + s * rows.count + row;
    std::size_t count = 0;
    for (; count < most && chunk < chunk_end; ++count, ++s, chunk += step) {
      const std::size_t inputs = kChunk * std::min(step, chunk_end - chunk);
      const std::size_t steps = (inputs + Matrix::kInputs - 1) / Matrix::kInputs;  // behind the last inputs, a is 0
      const auto multiply = height > kMatrixBlock / 2 ? Matrix::template multiply<2, Columns, !Zeros>
                                                      : Matrix::template multiply<1, Columns, !Zeros>;
      multiply(a + chunk * kChunk, rows.stride, codes, Columns * kWidth, steps, dots[count], next,
               next == nullptr ? 0 : Matrix::kInputs / kChunk * chunk_bytes);
      codes += inputs / 4 * Columns * kWidth;
      if (next != nullptr) next += weight.segment_bytes;
      for (std::size_t i = 0; i < Columns; ++i) {
        scales[count][i] = read<F>(weight.scales(column + i, s));
        zeros[count][i] = Zeros ? Isa::bytes_as_float(weight.zeros(column + i, s)) : F{};
      }
    }
    const auto scale = [&](auto segments) {
      constexpr std::size_t end = decltype(segments)::value;
      for (std::size_t r = 0; r < height; ++r)
        TIGHTROPE_UNROLL
        for (std::size_t i = 0; i < Columns; ++i) {
          F total = before[r * Columns + i];
          TIGHTROPE_UNROLL
          for (std::size_t g = 0; g < end; ++g) {
            const I dot = dots[g][r * Columns + i];
            total = Zeros ? rescaled(total, dot, scales[g][i], zeros[g][i], sums[g * rows.count + r])
                          : rescaled(total, dot, scales[g][i]);
          }
          totals[r * Columns + i] = total;
        }
    };
    switch (count) {
      case 1:
        scale(std::integral_constant<std::size_t, 1>{});
        break;
      case 2:
        scale(std::integral_constant<std::size_t, 2>{});
        break;
      case 3:
        scale(std::integral_constant<std::size_t, 3>{});
        break;
      default:
        scale(std::integral_constant<std::size_t, most>{});
    }
    before = totals;
  }
}

template <int Bits, std::size_t Columns>
void many_rows(const Linear& call, const Weight& weight, const QuantizedRows& rows, std::size_t row0, std::size_t row1,
               std::size_t column) noexcept {
  alignas(64) std::uint8_t codes[kDepth * kLanes * Columns];
  alignas(64) F totals[kRowBlock * Columns];
  static constexpr F nought[std::max(Isa::kRows, Isa::kMatrixRows > 0 ? kMatrixBlock : 0) * Columns] = {};
  const std::size_t chunks = weight.chunks, deep = kDepth / kChunk / weight.step, depth = deep * weight.step;
  constexpr std::size_t strip = std::max<std::size_t>(1, Columns / kParts);  // tiles
  const auto blocks = [&](auto from_middle, auto matrices, const auto& height_of, const auto& block) {
    for (std::size_t c = 0, s = 0; c < chunks; c += depth, s += deep) {
      const std::size_t end = std::min(c + depth, chunks);
      const std::size_t ahead =
          end < chunks ? deep * weight.segment_bytes : strip * weight.tile_bytes - s * weight.segment_bytes;
      unpack_chunks<Bits, Columns, from_middle, !matrices>(weight, column, s, c, end, ahead, codes);
      for (std::size_t r = row0; r < row1;) {
        const std::size_t height = height_of(row1 - r);
        if (end == chunks && call.y != nullptr)
          for (std::size_t i = r; i < r + height; ++i)
            fetch<1, true>(call.y + i * call.w.n + column * kLanes, Columns * kWidth);
        F* const at = totals + (r - row0) * Columns;
        const F* const before = c == 0 ? nought : at;
        if constexpr (matrices) {
          const std::uint8_t* here = weight.codes(column, s);
          const std::uint8_t* next = here + weight.reach(here, ahead, deep * weight.segment_bytes);
          if (r != row0) next = nullptr;  // the first rows have fetched it
          block(height, weight, rows, r, column, codes, s, c, end, before, at, next, kVector * Bits);
        } else {
          block(height, weight, rows, r, column, codes, s, c, end, before, at);
        }
        if (end == chunks) finish_rows<Columns>(call, weight, rows, r, r + height, column, at);
        r += height;
      }
    }
  };
  if constexpr (Isa::kMatrixRows > 0)
    if (row1 - row0 >= Isa::kMatrixRows * (1 + weight.step % 2)) {  // odd steps fill half a tile
      using Machine = std::conditional_t<Bits != 0, Isa, void>;  // depends on Bits: looked into where it is used
      const auto by = [&](const auto& matrix, auto zeros) {
        blocks(std::bool_constant<!zeros>{}, std::true_type{},
               [](std::size_t left) { return std::min(left, kMatrixBlock); },
               [&](const auto&... args) { matrix_block<std::decay_t<decltype(matrix)>, zeros, Columns>(args...); });
      };
      const auto with = [&](auto zeros) {
        weight.step % 2 == 0 ? by(Matrix<Machine, 64>(), zeros) : by(Matrix<Machine, 32>(), zeros);
      };
      return weight.has_zeros ? with(std::true_type{}) : with(std::false_type{});
    }
  const auto even = [](std::size_t left) {  // heights
    const std::size_t pieces = (left + Isa::kRows - 1) / Isa::kRows;
    return (left + pieces - 1) / pieces;
  };
  blocks(std::false_type{}, std::false_type{}, even,
         [&](const auto&... args) { block_of<Isa::code_class(Bits), Columns>(args...); });
}

template <int Bits, std::size_t Rows, std::size_t Columns>
void few_rows(const Linear& call, const Weight& weight, const QuantizedRows& rows, std::size_t row,
              std::size_t column) noexcept {
  if (weight.bytes > kSecondLevel && !first_level_waits_for_many())
    few_rows<Bits, Rows, 2, Columns>(call, weight, rows, row, column);
  else
    few_rows<Bits, Rows, 1, Columns>(call, weight, rows, row, column);
}

template <int Bits, std::size_t Columns>
void linear_columns(const Linear& call, const Weight& weight, const QuantizedRows& rows, std::size_t row0,
                    std::size_t row1, std::size_t column) noexcept {
  if constexpr (Columns <= 2) {
    switch (row1 - row0) {
      case 1:
        return few_rows<Bits, 1, Columns>(call, weight, rows, row0, column);
      case 2:
        return few_rows<Bits, 2, Columns>(call, weight, rows, row0, column);
      case 3:
        return few_rows<Bits, 3, Columns>(call, weight, rows, row0, column);
      default:
        break;
    }
  }
  return many_rows<Bits, Columns>(call, weight, rows, row0, row1, column);
}

template <int Bits>
void linear_tiles(const Linear& call, const QuantizedRows& rows, std::size_t row0, std::size_t row1, std::size_t tile0,
                  std::size_t tile1) noexcept {
  const Weight weight(call);
  const std::size_t end = std::min(tile1 * kParts, (call.w.n + kLanes - 1) / kLanes);
  constexpr std::size_t most = Isa::kColumns;
  for (std::size_t column = tile0 * kParts; column < end;) {
    const std::size_t left = end - column;
    if (left >= most && row1 - row0 > 3)
      linear_columns<Bits, most>(call, weight, rows, row0, row1, column), column += most;
    else if (left >= 2)
      linear_columns<Bits, 2>(call, weight, rows, row0, row1, column), column += 2;
    else
      linear_columns<Bits, 1>(call, weight, rows, row0, row1, column++);
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
