// AVX-512 with VNNI. Included inside an anonymous namespace.

struct Avx512 {
  static constexpr int kLanes = 16;
  using F = __m512;
  typedef std::int32_t I __attribute__((vector_size(64)));
  typedef std::uint32_t U __attribute__((vector_size(64)));
  static constexpr std::size_t kRows = 6, kColumns = 4;  // 24 sums, 4 weights: 28 of 32 registers
  static constexpr int kSums = 8;  // kept in flight on few rows
  static constexpr bool kByteCodes = true;             // dot takes codes of all eight bits, whatever Bits says
  static constexpr int code_class(int) noexcept { return 8; }
  static constexpr std::size_t kMatrixRows = 0;  // without instructions that multiply matrices
  static F splat(float v) noexcept { return _mm512_set1_ps(v); }
  static F abs(F v) noexcept { return _mm512_abs_ps(v); }
  static F min(F a, F b) noexcept { return _mm512_min_ps(a, b); }
  static F max(F a, F b) noexcept { return _mm512_max_ps(a, b); }
  static F fma(F a, F b, F c) noexcept { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) noexcept { return _mm512_fnmadd_ps(a, b, c); }
  static F where_negative(F x, F yes, F no) noexcept {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), no, yes);
  }
  static F bytes_as_float(const std::uint8_t* p) noexcept {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_low_bytes(std::int8_t* p, F v) noexcept {  // of each lane
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
  }
  static std::uint32_t sum(U v) noexcept {
    const __m512i all = reinterpret_cast<__m512i>(v);  // not by _mm512_reduce_add_epi32, whose sums are signed
    const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1))));
  }
  static U merge(U code, U plane, U mask) noexcept {  // code | (plane & mask)
    return reinterpret_cast<U>(_mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(code),
                                                         reinterpret_cast<__m512i>(plane),
                                                         reinterpret_cast<__m512i>(mask), 0xf8));
  }
  static U kept(U v) noexcept {  // in a register: GCC would read it from memory for each use
    asm("" : "+v"(v));
    return v;
  }
  static void opaque(I& v) noexcept { asm volatile("" : "+v"(v)); }  // a value the compiler cannot foresee
  template <int Bits>
  static I dot(I sum, U codes, I a) noexcept {
    return reinterpret_cast<I>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(codes),
                                                   reinterpret_cast<__m512i>(a)));
  }
  template <int Bits>
  using Short = Direct<Avx512, Bits>;
};
