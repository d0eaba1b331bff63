// The Python face of the kernels: checks sizes, releases the GIL, calls. tightrope.compressors.kernels explains.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace nb = nanobind;
using namespace tightrope;

namespace {

template <typename T, typename... Shape>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, Shape...>;
using Flat = nb::ndim<1>;
using Matrix = nb::ndim<2>;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void require_bits(int bits) { require(bits >= 2 && bits <= 8, "bits must lie in [2, 8]"); }

void pack(Array<const std::uint8_t, Flat> codes, int bits, Array<std::uint8_t, Flat> packed) {
  require_bits(bits);
  require(packed.size() == packed_bytes(codes.size(), bits), "packed must hold ceil(n * bits / 8) bytes");
  nb::gil_scoped_release release;
  pack_bits(codes.data(), codes.size(), bits, packed.data());
}

void unpack(Array<const std::uint8_t, Flat> packed, int bits, Array<std::uint8_t, Flat> codes) {
  require_bits(bits);
  require(packed.size() == packed_bytes(codes.size(), bits), "packed must hold ceil(n * bits / 8) bytes");
  nb::gil_scoped_release release;
  unpack_bits(packed.data(), codes.size(), bits, codes.data());
}

const Kernels& table(const std::string& isa) {
  if (isa.empty()) return kernels();
  const Kernels* found = kernels_named(isa.c_str());
  require(found != nullptr, "isa must be portable, avx2 or avx512, and one that this machine has");
  return *found;
}

// scales[b, c] for every width in `bits` and every channel; false if a weight is not finite.
bool clip_scales(Array<const float, Matrix> weight, Array<const std::int64_t, Flat> bits, int ratios,
                 Array<float, Matrix> scales, const std::string& isa) {
  const std::size_t channels = weight.shape(0), n = weight.shape(1), widths = bits.size();
  require(ratios >= 1 && ratios <= 10000, "ratios must lie in [1, 10000]");
  require(scales.shape(0) == widths && scales.shape(1) == channels, "scales must be [len(bits), channels]");
  for (std::size_t b = 0; b < widths; ++b) require_bits(static_cast<int>(bits.data()[b]));
  const Kernels& k = table(isa);
  nb::gil_scoped_release release;
  for (std::size_t c = 0; c < channels; ++c) {
    const float* row = weight.data() + c * n;
    const float top = k.abs_max(row, n);
    if (std::isinf(top)) return false;
    for (std::size_t b = 0; b < widths; ++b) {
      const int levels = (1 << (static_cast<int>(bits.data()[b]) - 1)) - 1;
      scales.data()[b * channels + c] = top < kZeroChannel ? 1.0f : k.clip_scale(row, n, top, levels, ratios);
    }
  }
  return true;
}

void encode(Array<const float, Matrix> weight, Array<const float, Flat> scales, int bits,
            Array<std::int8_t, Matrix> codes, const std::string& isa) {
  const std::size_t channels = weight.shape(0), n = weight.shape(1);
  require_bits(bits);
  require(scales.size() == channels, "scales must be [channels]");
  require(codes.shape(0) == channels && codes.shape(1) == n, "codes must be [channels, n]");
  const Kernels& k = table(isa);
  nb::gil_scoped_release release;
  for (std::size_t c = 0; c < channels; ++c)
    k.encode(weight.data() + c * n, n, scales.data()[c], (1 << (bits - 1)) - 1, codes.data() + c * n);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("has_isa", [](const std::string& name) { return kernels_named(name.c_str()) != nullptr; }, nb::arg("name"));
  m.def("pack_bits", pack, nb::arg("codes").noconvert(), nb::arg("bits"), nb::arg("packed").noconvert());
  m.def("unpack_bits", unpack, nb::arg("packed").noconvert(), nb::arg("bits"), nb::arg("codes").noconvert());
  m.def("clip_scales", clip_scales, nb::arg("weight").noconvert(), nb::arg("bits").noconvert(), nb::arg("ratios"),
        nb::arg("scales").noconvert(), nb::arg("isa") = "");
  m.def("encode", encode, nb::arg("weight").noconvert(), nb::arg("scales").noconvert(), nb::arg("bits"),
        nb::arg("codes").noconvert(), nb::arg("isa") = "");
}
