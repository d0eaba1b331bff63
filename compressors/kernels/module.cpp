// The Python face of the kernels: checks sizes, releases the GIL, calls. tightrope.compressors.kernels explains.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "histogram.h"
#include "kernels.h"
#include "require.h"
#include "torch_op.h"

namespace nb = nanobind;
using namespace tightrope;

namespace {

template <typename T, typename... Shape>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, Shape...>;
using Flat = nb::ndim<1>;
using Matrix = nb::ndim<2>;

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
  require(found != nullptr, "isa must be portable, avx2, avxvnni, avx512 or amx, and one that this machine has");
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

std::size_t histogram(Array<const float, Flat> values, float low, float high, Array<std::int64_t, Flat> counts) {
  require(std::isfinite(low) && std::isfinite(high) && low < high, "low and high must be finite, low below high");
  require(counts.size() >= 1, "counts must hold at least one bin");
  nb::gil_scoped_release release;
  return add_to_histogram(values.data(), values.size(), low, high, counts.size(), counts.data());
}

int histogram_ratio(Array<const std::int64_t, Flat> counts, double low, double high, bool entropy, int bits,
                    int ratios) {
  require_bits(bits);
  require(low <= 0.0 && high >= 0.0 && low < high && std::isfinite(high - low),
          "low <= 0 <= high must hold, and low < high");
  require(ratios >= 1 && ratios <= 10000, "ratios must lie in [1, 10000]");
  std::vector<double> scratch(static_cast<std::size_t>(2) << bits);
  nb::gil_scoped_release release;
  return best_ratio(counts.data(), counts.size(), low, high, entropy ? Loss::entropy : Loss::squared_error, 1 << bits,
                    ratios, scratch.data());
}

void pack_linear(Array<const std::uint8_t, Matrix> codes, Array<const float, Matrix> scales,
                 std::optional<Array<const std::uint8_t, Matrix>> zeros, int bits, std::int64_t group,
                 Array<std::uint8_t, Flat> packed) {
  const Layout w = checked_layout(static_cast<std::int64_t>(codes.shape(0)), static_cast<std::int64_t>(codes.shape(1)),
                                  bits, group, zeros.has_value());
  require(scales.shape(0) == w.n && scales.shape(1) == w.groups(), "scales must be [n, groups]");
  require(!zeros || (zeros->shape(0) == w.n && zeros->shape(1) == w.groups()), "zeros must be [n, groups]");
  require(packed.size() == w.bytes(), "packed must hold linear_bytes(n, k, bits, group, zeros) bytes");
  nb::gil_scoped_release release;
  pack_tiles(w, codes.data(), scales.data(), zeros ? zeros->data() : nullptr, packed.data());
}

void unpack_linear(Array<const std::uint8_t, Flat> packed, int bits, std::int64_t group,
                   Array<std::uint8_t, Matrix> codes, Array<float, Matrix> scales, Array<std::uint8_t, Matrix> zeros) {
  const Layout w = packed_layout(static_cast<std::int64_t>(codes.shape(0)), static_cast<std::int64_t>(codes.shape(1)),
                                 bits, group, packed.size());
  require(scales.shape(0) == w.n && scales.shape(1) == w.groups(), "scales must be [n, groups]");
  require(zeros.shape(0) == w.n && zeros.shape(1) == w.groups(), "zeros must be [n, groups]");
  nb::gil_scoped_release release;
  unpack_tiles(w, packed.data(), codes.data(), scales.data(), zeros.data());
}

// On addresses, for tests and benchmarks of one instruction set; who calls vouches for them. torch_op.cpp has the rest.
void run_linear(std::uintptr_t x, bool x_is_codes, double x_scale, std::int64_t x_zero, std::uintptr_t packed,
                std::size_t packed_size, std::uintptr_t bias, std::int64_t activation, std::uintptr_t y,
                bool y_is_codes, double y_scale, std::int64_t y_zero, std::size_t m, std::int64_t n, std::int64_t k,
                std::int64_t bits, std::int64_t group, int threads, const std::string& isa) {
  Linear call{};
  call.w = packed_layout(n, k, bits, group, packed_size);
  call.packed = reinterpret_cast<const std::uint8_t*>(packed);
  call.bias = reinterpret_cast<const float*>(bias);
  call.m = m;
  if (x_is_codes)
    call.x_codes = reinterpret_cast<const std::uint8_t*>(x);
  else
    call.x = reinterpret_cast<const float*>(x);
  if (y_is_codes)
    call.y_codes = reinterpret_cast<std::uint8_t*>(y);
  else
    call.y = reinterpret_cast<float*>(y);
  set_checked(call, activation, x_scale, x_zero, x_is_codes, y_scale, y_zero, y_is_codes);
  const Kernels& k_ = table(isa);
  nb::gil_scoped_release release;
  linear(k_, call, threads);
}

double dot_peak(std::size_t rounds, const std::string& isa) {
  const Kernels& k = table(isa);
  std::int32_t sink = 0;
  nb::gil_scoped_release release;
  const double operations = k.dot_peak(rounds, &sink);
  return sink == 1 ? operations : operations + 0 * sink;
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
  m.def("histogram", histogram, nb::arg("values").noconvert(), nb::arg("low"), nb::arg("high"),
        nb::arg("counts").noconvert());
  m.def("histogram_ratio", histogram_ratio, nb::arg("counts").noconvert(), nb::arg("low"), nb::arg("high"),
        nb::arg("entropy"), nb::arg("bits"), nb::arg("ratios"));
  m.def(
      "linear_bytes",
      [](std::int64_t n, std::int64_t k, std::int64_t bits, std::int64_t group, bool zeros) {
        return checked_layout(n, k, bits, group, zeros).bytes();
      },
      nb::arg("n"), nb::arg("k"), nb::arg("bits"), nb::arg("group"), nb::arg("zeros"));
  m.def("pack_linear", pack_linear, nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
        nb::arg("zeros").noconvert().none(), nb::arg("bits"), nb::arg("group"), nb::arg("packed").noconvert());
  m.def("unpack_linear", unpack_linear, nb::arg("packed").noconvert(), nb::arg("bits"), nb::arg("group"),
        nb::arg("codes").noconvert(), nb::arg("scales").noconvert(), nb::arg("zeros").noconvert());
  m.def("linear", run_linear);
  m.def(
      "register_torch_op", [](const std::string& library) { register_torch_op(library.c_str()); }, nb::arg("library"));
  m.def("dot_peak", dot_peak, nb::arg("rounds"), nb::arg("isa") = "");
}
