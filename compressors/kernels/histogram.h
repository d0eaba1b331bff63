// Calibration of activation ranges from a histogram of values in [low, high], cut into `bins` equal bins.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tightrope {

// Adds `n` values to `counts`; what lies outside the range goes to the end bins. Returns how many were NaN: not
// counted.
std::size_t add_to_histogram(const float* values, std::size_t n, float low, float high, std::size_t bins,
                             std::int64_t* counts) noexcept;

enum class Loss { squared_error, entropy };

// Of the ranges [r low, r high], r = 1/ratios .. 1, the one whose uniform quantisation to `levels` loses least; of
// equals the widest. Returns r * ratios. `scratch` holds 2 * levels doubles.
//   squared_error: of the bins' centres, weighted by their counts.
//   entropy: the Kullback-Leibler divergence of the quantised from the clipped distribution (Migacz, "8-bit inference
//   with TensorRT", GTC 2017); ranges of fewer than `levels` bins are not tried, unless all are.
int best_ratio(const std::int64_t* counts, std::size_t bins, double low, double high, Loss loss, int levels, int ratios,
               double* scratch) noexcept;

}  // namespace tightrope
