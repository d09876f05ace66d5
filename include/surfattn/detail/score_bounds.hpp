// surfattn layer 4: bounds of scores that need not be formed for them

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <surfattn/detail/simd/exp2.hpp>

namespace surfattn::detail {

/// Between which numbers the scores S_ij = q_i·k_j + b_j of some keys lie, in units of ln 2: by the
/// inequality of Cauchy and Schwarz, |q·k| ≤ ‖q‖‖k‖.
template <class Accumulator>
class ScoreBounds {
 public:
  ScoreBounds() = default;
  /// `length`: ‖k‖ of the longest key.
  ScoreBounds(Accumulator length, const Accumulator* bias, Index keys) : length_(length) {
    const auto [lowest, highest] = std::minmax_element(bias, bias + keys);
    lowest_bias_ = *lowest, highest_bias_ = *highest;
  }

  Accumulator highest(Accumulator query_length) const {
    return query_length * length_ + highest_bias_;
  }

  /// Whether the highest bound, or m where that is larger, can be the m of a softmax (see OnlineSoftmax) of
  /// these scores in place of the largest one. The bounds must be so close together that every weight
  /// that counts, and what is summed with it, is far from the smallest normal number: since m is an
  /// integer, everything is then the same number but for a power of two.
  bool give_maximum(Accumulator query_length, Accumulator m) const {
    using Limits = std::numeric_limits<Accumulator>;
    constexpr Accumulator most_apart = Limits::max_exponent * 3 / 8;
    constexpr Accumulator most_below = Limits::max_exponent - 4;  // for simd::exp2_in_range
    const Accumulator high = highest(query_length);
    const Accumulator low = lowest_bias_ - query_length * length_;
    return high - low <= most_apart && m - low <= most_below &&
           std::max(m, std::abs(high)) < simd::exp2_origin_limit<Accumulator>;
  }

 private:
  Accumulator length_{}, lowest_bias_{}, highest_bias_{};
};

}  // namespace surfattn::detail
