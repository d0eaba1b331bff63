// Included inside an anonymous namespace.

// Sums of kQuads quads before they join `total`, for instruction sets whose dot needs none kept apart.
template <class Isa, int Bits>
struct Direct {
  static constexpr int kQuads = 1;
  void add(int, typename Isa::I& total, typename Isa::U codes, typename Isa::I a) noexcept {
    total = Isa::template dot<Bits>(total, codes, a);
  }
  void flush(typename Isa::I&) noexcept {}
};
