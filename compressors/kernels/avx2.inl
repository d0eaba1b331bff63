// AVX2 with FMA. Included inside an anonymous namespace.

struct Avx2 {
  static constexpr int kLanes = 8;
  using F = __m256;
  typedef std::int32_t I __attribute__((vector_size(32)));
  typedef std::uint32_t U __attribute__((vector_size(32)));
  static constexpr std::size_t kRows = 4, kColumns = 2;  // 8 sums, 2 weights, the rest temporaries: 16 registers
  static constexpr int kSums = 8;  // kept in flight on few rows
  static constexpr bool kByteCodes = false;            // dot takes codes of all eight bits, whatever Bits says
  static constexpr int code_class(int bits) noexcept { return bits < 4 ? 4 : bits; }
  static constexpr std::size_t kMatrixRows = 0;  // without instructions that multiply matrices
  static F splat(float v) noexcept { return _mm256_set1_ps(v); }
  static F abs(F v) noexcept { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static F min(F a, F b) noexcept { return _mm256_min_ps(a, b); }
  static F max(F a, F b) noexcept { return _mm256_max_ps(a, b); }
  static F fma(F a, F b, F c) noexcept { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) noexcept { return _mm256_fnmadd_ps(a, b, c); }
  static F where_negative(F x, F yes, F no) noexcept { return _mm256_blendv_ps(no, yes, x); }
  static F bytes_as_float(const std::uint8_t* p) noexcept {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_low_bytes(std::int8_t* p, F v) noexcept {  // of each lane
    const __m256i low = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(255));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static std::uint32_t sum(U v) noexcept {
    const __m256i all = reinterpret_cast<__m256i>(v);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1))));
  }
  static U merge(U code, U plane, U mask) noexcept { return code | (plane & mask); }
  static U kept(U v) noexcept {  // in a register: GCC would read it from memory for each use
    asm("" : "+x"(v));
    return v;
  }
  static void opaque(I& v) noexcept { asm volatile("" : "+x"(v)); }  // a value the compiler cannot foresee
  // Pairs of products are summed in 16 bits, which codes of 7 bits cannot overflow: 2 * 127 * 128 < 2^15. The top bit
  // of an 8-bit code goes its own way and is worth 128 at the end.
  template <int Bits>
  static I dot(I sum, U codes, I a) noexcept {
    const __m256i x = reinterpret_cast<__m256i>(a), one = _mm256_set1_epi16(1);
    __m256i w = reinterpret_cast<__m256i>(codes), total = reinterpret_cast<__m256i>(sum);
    if constexpr (Bits == 8) {
      const __m256i top = _mm256_and_si256(_mm256_srli_epi16(w, 7), _mm256_set1_epi8(1));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), _mm256_set1_epi16(128)));
      w = _mm256_and_si256(w, _mm256_set1_epi8(0x7f));
    }
    return reinterpret_cast<I>(_mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one)));
  }
  // Narrow codes leave room in 16 bits for several quads: kQuads * 2 * (2^Bits - 1) * 128 < 2^15.
  template <int Bits>
  struct Short {
    static constexpr int kQuads = Bits <= 4 ? 8 : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;
    __m256i sum;
    void add(int quad, I& total, U codes, I a) noexcept {
      if constexpr (kQuads == 1) {
        total = dot<Bits>(total, codes, a);
      } else {
        const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(a));
        sum = quad == 0 ? pairs : _mm256_add_epi16(sum, pairs);
        asm volatile(""
                     : "+x"(sum));  // add now: left alone, GCC keeps all products for a tree of sums, and spills them
      }
    }
    void flush(I& total) noexcept {
      if constexpr (kQuads > 1)
        total = reinterpret_cast<I>(
            _mm256_add_epi32(reinterpret_cast<__m256i>(total), _mm256_madd_epi16(sum, _mm256_set1_epi16(1))));
    }
  };
};
