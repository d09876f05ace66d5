// surfattn layer 4: bounds of scores that need not be formed for them

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <surfattn/detail/simd/exp2.hpp>

namespace surfattn::detail {

/// At least ‖x‖, from ‖x‖² as it was summed over `dim` numbers, whose squares may have underflowed.
template <class Accumulator>
Accumulator bound_of_length(Accumulator squared_norm, Index dim) {
  return std::sqrt(squared_norm + Accumulator(dim) * std::numeric_limits<Accumulator>::min());
}

/// Between which numbers the scores S_ij = q_i·k_j + b_j of some keys lie, in units of ln 2: by the
/// inequality of Cauchy and Schwarz, |q·k| ≤ ‖q‖‖k‖.
template <class Accumulator>
class ScoreBounds {
 public:
  ScoreBounds() = default;
  /// `length`: ‖k‖ of the longest key. A bias of NaN leaves no bounds.
  ScoreBounds(Accumulator length, const Accumulator* bias, Index keys)
      : length_(length), lowest_bias_(bias[0]), highest_bias_(bias[0]) {
    for (Index j = 0; j < keys; ++j) {
      lowest_bias_ = bias[j] >= lowest_bias_ ? lowest_bias_ : bias[j];
      highest_bias_ = bias[j] <= highest_bias_ ? highest_bias_ : bias[j];
      if (std::isnan(bias[j])) length_ = bias[j];
    }
  }

  Accumulator highest(Accumulator query_length) const {
    return query_length * length_ + highest_bias_;
  }

  /// Whether the highest bound, or m where that is larger, can be the m of a softmax (see OnlineSoftmax) of
  /// these scores in place of the largest one. The bounds must be so close together that every weight
  /// that counts is far from the smallest normal number: since m is an integer, everything is then the
  /// same number but for a power of two. (What is summed with weights is as much smaller: outputs below
  /// 2⁻⁷⁸ in float may lose digits, or become 0 where subnormal numbers do.) And the scores must be so
  /// small that what rounding adds to them leaves exponents within the range of simd::exp2_in_range.
  bool give_maximum(Accumulator query_length, Accumulator m) const {
    constexpr Accumulator range = std::numeric_limits<Accumulator>::max_exponent;
    const Accumulator high = highest(query_length);
    const Accumulator low = lowest_bias_ - query_length * length_;
    return high - low <= range * 3 / 8 && m - low <= range - 4 &&
           std::max(m, std::abs(high)) <= 8 * range;
  }

 private:
  Accumulator length_{}, lowest_bias_{}, highest_bias_{};
};

}  // namespace surfattn::detail
