// The mapping search of bitfusion.py, which says what it searches: power-of-two tiles and all orders of the five loops.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

namespace {

enum Operand { kWeights, kInputs, kOutputs, kOperands };
enum Loop { kBatch, kHigh, kWide, kIn, kOut, kLoops };
using Sizes = std::array<double, kOperands>;
using Trips = std::array<double, kLoops>;

// Whether an operand depends on a loop.
constexpr bool kNeeds[kOperands][kLoops] = {{false, false, false, true, true}, {true, true, true, true, false},
                                            {true, true, true, false, true}};

struct Chip {
  double rows, columns, interface_bits;
  Sizes halves;  // bits of half of each buffer, which is what a tile may fill
  double accumulator_bits, core_pj;
  Sizes read_pj, write_pj;
  double dram_pj;
};

struct Layer {
  double examples, high, wide, kernel_high, kernel_wide, stride_high, stride_wide, dilation_high, dilation_wide;
  bool unrolled;  // over the kernel (im2col)
};

struct Variant {
  double inputs, outputs, weight_bits, act_bits;
};

struct Tile {
  Sizes sizes;  // bits
  Trips trips;
  double compute, inside_pj;
  double least;  // cycles that it takes in any order: computing and one fill and drain, or moving everything once
};

struct Mapping {
  double cycles = std::numeric_limits<double>::infinity(), compute = 0, stall = 0, edge = 0, reads = 0, writes = 0, energy_pj = 0;
};

// Of numbers below 2^53, `by` above 0.
double ceil_div(double x, double by) {
  const double quotient = x / by, whole = static_cast<double>(static_cast<std::int64_t>(quotient));
  return whole < quotient ? whole + 1 : whole;
}

// How many operands of these bits share the place of an 8-bit one.
double speed(double bits) { return bits <= 2 ? 4 : bits <= 4 ? 2 : 1; }

// Calls `with` for `step`, 2 `step`, 4 `step`, ... and `most`.
template <typename With>
void powers(double most, double step, const With& with) {
  for (double size = step;; size *= 2) {
    with(std::min(size, most));
    if (size >= most) return;
  }
}

// All tiles that fit the buffers; none of a variant without channels.
void tiles_of(const Chip& chip, const Layer& layer, const Variant& v, std::vector<Tile>& tiles) {
  tiles.clear();
  if (v.inputs < 1 || v.outputs < 1) return;
  const double taps = layer.kernel_high * layer.kernel_wide;
  const double together = chip.rows * speed(v.weight_bits) * speed(v.act_bits);
  const double output_pj = chip.read_pj[kOutputs] + chip.write_pj[kOutputs];
  const double product_pj = chip.read_pj[kWeights] * v.weight_bits + chip.read_pj[kInputs] * v.act_bits;
  Trips trips;
  powers(v.inputs, 1, [&](double in) {
    trips[kIn] = ceil_div(v.inputs, in);
    const double rows = ceil_div(in * taps, together), steps = layer.unrolled ? rows : ceil_div(in, together) * taps;
    powers(v.outputs, chip.columns, [&](double out) {
      const double weights = rows * together * out * v.weight_bits, columns = ceil_div(out, chip.columns);
      if (weights > chip.halves[kWeights]) return;
      trips[kOut] = ceil_div(v.outputs, out);
      powers(std::max(layer.high, layer.wide), 1, [&](double side) {
        const double high = std::min(side, layer.high), wide = std::min(side, layer.wide);
        const double tall = (layer.kernel_high - 1) * layer.dilation_high + 1 + (high - 1) * layer.stride_high;
        const double broad = (layer.kernel_wide - 1) * layer.dilation_wide + 1 + (wide - 1) * layer.stride_wide;
        const double read = (layer.unrolled ? high * wide * taps : tall * broad) * in * v.act_bits;
        trips[kHigh] = ceil_div(layer.high, high), trips[kWide] = ceil_div(layer.wide, wide);
        const double made = high * wide * columns * chip.columns * chip.accumulator_bits;
        powers(layer.examples, 1, [&](double examples) {
          if (read * examples > chip.halves[kInputs] || made * examples > chip.halves[kOutputs]) return;
          trips[kBatch] = ceil_div(layer.examples, examples);
          Tile tile{{weights, read * examples, made * examples}, trips, 0, 0, 0};
          const double around = trips[kBatch] * trips[kHigh] * trips[kWide];
          const double sums = around * trips[kIn] * trips[kOut] * examples * high * wide;  // for one column
          tile.compute = sums * columns * steps;
          tile.inside_pj = chip.core_pj * tile.compute + sums * out * in * taps * product_pj +
                           sums * out * chip.accumulator_bits * output_pj;
          const double moved = tile.sizes[kWeights] * trips[kIn] * trips[kOut] + tile.sizes[kInputs] * around * trips[kIn] +
                               2 * tile.sizes[kOutputs] * around * trips[kOut];
          const double ends = tile.sizes[kWeights] + tile.sizes[kInputs] + 2 * tile.sizes[kOutputs];
          tile.least = std::max(moved, tile.compute * chip.interface_bits + ends) / chip.interface_bits;
          tiles.push_back(tile);
        });
      });
    });
  });
}

// A tile's cost once the order of its loops is known: the bits that each operand moves, and the most of it that is held.
void settle(const Chip& chip, const Tile& tile, const Sizes& traffic, const Sizes& largest, Mapping& best) {
  Mapping now;
  now.compute = tile.compute;
  now.reads = traffic[kWeights] + traffic[kInputs] + traffic[kOutputs];
  now.writes = traffic[kOutputs];
  const double fill = largest[kWeights] + largest[kInputs] + largest[kOutputs], drain = largest[kOutputs];
  const double behind = ceil_div(now.reads + now.writes - fill - drain, chip.interface_bits) - tile.compute;
  now.stall = std::max(0.0, behind);
  now.edge = ceil_div(fill, chip.interface_bits) + ceil_div(drain, chip.interface_bits);
  now.cycles = now.compute + now.stall + now.edge;
  if (now.cycles > best.cycles) return;
  now.energy_pj = tile.inside_pj + chip.write_pj[kWeights] * traffic[kWeights] + chip.write_pj[kInputs] * traffic[kInputs] +
                  (chip.read_pj[kOutputs] + chip.write_pj[kOutputs]) * now.writes + chip.dram_pj * (now.reads + now.writes);
  if (now.cycles < best.cycles || now.energy_pj < best.energy_pj) best = now;
}

// Tries all orders of the loops in the set `left`, from the inner one out. An operand moves again for each trip of a loop that it
// depends on, or of any loop once its footprint has outgrown half its buffer.
void order(const Chip& chip, const Tile& tile, unsigned left, const Sizes& traffic, const Sizes& largest, Mapping& best) {
  if (!left) return settle(chip, tile, traffic, largest, best);
  const bool alike = tile.trips[kHigh] == tile.trips[kWide];  // then only the one before the other is needed
  for (unsigned loop = 0; loop < kLoops; ++loop) {
    if (!(left >> loop & 1u) || (alike && loop == kWide && left >> kHigh & 1u)) continue;
    Sizes moved = traffic, held = largest;
    for (int operand = 0; operand < kOperands; ++operand) {
      if (kNeeds[operand][loop] || moved[operand] > chip.halves[operand]) moved[operand] *= tile.trips[loop];
      if (moved[operand] <= chip.halves[operand]) held[operand] = moved[operand];
    }
    order(chip, tile, left & ~(1u << loop), moved, held, best);
  }
}

Mapping best_of(const Chip& chip, const std::vector<Tile>& tiles) {
  Mapping best;
  const auto try_orders = [&](const Tile& tile) {
    unsigned left = 0;
    for (unsigned loop = 0; loop < kLoops; ++loop) left |= (tile.trips[loop] > 1 ? 1u : 0u) << loop;
    order(chip, tile, left, tile.sizes, tile.sizes, best);
  };
  // The most promising tile first: few others can still be better then.
  const auto first = std::min_element(tiles.begin(), tiles.end(), [](auto& a, auto& b) { return a.least < b.least; });
  try_orders(*first);
  for (auto tile = tiles.begin(); tile != tiles.end(); ++tile)
    if (tile != first && tile->least <= best.cycles) try_orders(*tile);
  return best;
}

using Variants = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Found = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::int64_t search(const std::array<double, 15>& c, const std::array<double, 10>& l, Variants variants, Found found) {
  const std::size_t n = variants.shape(0);
  if (variants.shape(1) != 4 || found.shape(0) != n || found.shape(1) != 7)
    throw std::invalid_argument("variants must be [n, 4] and found [n, 7]");
  const Chip chip{c[0], c[1], c[2], {4 * c[3], 4 * c[4], 4 * c[5]}, c[6], c[7], {c[8], c[10], c[12]}, {c[9], c[11], c[13]}, c[14]};
  const Layer layer{l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7], l[8], l[9] > 0};
  nb::gil_scoped_release release;
  std::vector<Tile> tiles;
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t* v = variants.data() + 4 * i;
    tiles_of(chip, layer, {double(v[0]), double(v[1]), double(v[2]), double(v[3])}, tiles);
    if (tiles.empty()) return static_cast<std::int64_t>(i);
    const Mapping best = best_of(chip, tiles);
    const double row[] = {best.cycles, best.compute, best.stall, best.edge, best.reads, best.writes, best.energy_pj};
    std::copy(std::begin(row), std::end(row), found.data() + 7 * i);
  }
  return -1;
}

}  // namespace

NB_MODULE(_bitfusion, m) {
  m.def("search", &search, nb::arg("chip"), nb::arg("layer"), nb::arg("variants"), nb::arg("found"));
}
