#include "histogram.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tightrope {
namespace {

double squared_error(const std::int64_t* counts, std::size_t bins, double low, double width, double ratio,
                     int levels) noexcept {
  const double first = ratio * low, scale = ratio * width * static_cast<double>(bins) / (levels - 1);
  double total = 0.0;
  for (std::size_t i = 0; i < bins; ++i) {
    if (counts[i] == 0) continue;
    const double centre = low + (static_cast<double>(i) + 0.5) * width;
    const double code = std::clamp(std::nearbyint((centre - first) / scale), 0.0, static_cast<double>(levels - 1));
    const double error = centre - (first + code * scale);
    total += static_cast<double>(counts[i]) * error * error;
  }
  return total;
}

double divergence(const std::int64_t* counts, std::size_t bins, std::size_t begin, std::size_t end, int levels,
                  double* sums, double* kept) noexcept {
  const auto level = [&](std::size_t i) { return (i - begin) * static_cast<std::size_t>(levels) / (end - begin); };
  std::fill_n(sums, levels, 0.0);
  std::fill_n(kept, levels, 0.0);
  double below = 0.0, above = 0.0, inside = 0.0;
  for (std::size_t i = 0; i < bins; ++i) {
    const double count = static_cast<double>(counts[i]);
    if (i < begin)
      below += count;
    else if (i >= end)
      above += count;
    else if (count > 0.0) {
      inside += count;
      sums[level(i)] += count;
      kept[level(i)] += 1.0;
    }
  }
  if (inside == 0.0) return std::numeric_limits<double>::infinity();
  const double all = inside + below + above;
  double total = 0.0;
  for (std::size_t i = begin; i < end; ++i) {
    double p = static_cast<double>(counts[i]);
    const double q = p > 0.0 ? sums[level(i)] / kept[level(i)] / inside : 1e-9;  // smoothed where only outliers went
    if (i == begin) p += below;
    if (i + 1 == end) p += above;
    if (p > 0.0) total += p / all * std::log(p / all / q);
  }
  return total;
}

}  // namespace

std::size_t add_to_histogram(const float* values, std::size_t n, float low, float high, std::size_t bins,
                             std::int64_t* counts) noexcept {
  const double scale = static_cast<double>(bins) / (static_cast<double>(high) - static_cast<double>(low));
  const double last = static_cast<double>(bins - 1);
  std::size_t skipped = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (std::isnan(values[i])) {
      ++skipped;
      continue;
    }
    const double at = (static_cast<double>(values[i]) - static_cast<double>(low)) * scale;
    ++counts[static_cast<std::size_t>(std::clamp(at, 0.0, last))];
  }
  return skipped;
}

int best_ratio(const std::int64_t* counts, std::size_t bins, double low, double high, Loss loss, int levels, int ratios,
               double* scratch) noexcept {
  const double width = (high - low) / static_cast<double>(bins);
  double best = std::numeric_limits<double>::infinity();
  int kept = ratios;
  for (int step = ratios; step >= 1; --step) {
    const double ratio = static_cast<double>(step) / ratios;
    double found = 0.0;
    if (loss == Loss::squared_error) {
      found = squared_error(counts, bins, low, width, ratio, levels);
    } else {
      const double most = static_cast<double>(bins);
      const auto begin = static_cast<std::size_t>(std::clamp(std::nearbyint((ratio * low - low) / width), 0.0, most));
      const auto end = static_cast<std::size_t>(std::clamp(std::nearbyint((ratio * high - low) / width), 0.0, most));
      if (end - begin < static_cast<std::size_t>(levels) && step < ratios) break;
      found = divergence(counts, bins, begin, end, levels, scratch, scratch + levels);
    }
    if (found < best) {
      best = found;
      kept = step;
    }
  }
  return kept;
}

}  // namespace tightrope
