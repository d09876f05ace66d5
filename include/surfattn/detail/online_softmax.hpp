// surfattn layer 4: softmax over keys that arrive tile by tile

#pragma once

#include <algorithm>
#include <cmath>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/types.hpp>

namespace surfattn::detail {

/// The running softmax of some rows (Milakov and Gimelshein 2018, arXiv:1805.02867). Over the keys
/// met so far, for each row:
///
///     m = ⌈max_j S_j⌉,   l = Σ_j 2^(S_j − m),   o = Σ_j 2^(S_j − m)·v_j,
///
/// with S in units of ln 2, so that the output is o/l and the log-sum-exp ln2·(m + log₂ l). Before
/// the first key m = −∞, l = 0, o = 0. That m is an integer saves the subtraction (see Exp2Origin)
/// and makes every rescaling exact.
template <class Accumulator>
struct OnlineSoftmax {
  Accumulator* maximum = nullptr;
  Accumulator* sum = nullptr;

  void reset(Index rows) const {
    std::fill(maximum, maximum + rows, simd::minus_infinity<Accumulator>);
    std::fill(sum, sum + rows, Accumulator(0));
  }

  /// Raises m to the scores' maximum, and rescales l and `out` to it, which are 0 before the first
  /// key.
  void raise(Index row, Accumulator scores_maximum, Accumulator* out, Index padded_dim) const {
    const Accumulator before = maximum[row];
    const Accumulator now = std::max(before, std::ceil(scores_maximum));
    if (before == now) return;
    maximum[row] = now;
    if (before == simd::minus_infinity<Accumulator>) return;
    const Accumulator correction = std::exp2(before - now);
    simd::scale_row(out, padded_dim, correction);
    sum[row] *= correction;
  }

  /// Turns one row of scores, none above m, into weights 2^(S − m) and adds them to l. While every
  /// score so far is −∞, 0 stands for m, so that the weights are 0 and not NaN.
  void weigh(Index row, Accumulator* scores, Index padded_keys) const {
    const Accumulator m = maximum[row];
    const Accumulator origin = m == simd::minus_infinity<Accumulator> ? Accumulator(0) : m;
    sum[row] += simd::exp2_row(scores, padded_keys, origin);
  }

  /// Takes in the sums of the same row over other keys: both parts are brought to the larger
  /// maximum and added.
  void merge(Index row, const OnlineSoftmax& part, Accumulator* out, const Accumulator* part_out,
             Index padded_dim) const {
    const Accumulator largest = std::max(maximum[row], part.maximum[row]);
    const Accumulator shift =
        largest == simd::minus_infinity<Accumulator> ? Accumulator(0) : largest;
    const Accumulator own_factor = std::exp2(maximum[row] - shift),
                      part_factor = std::exp2(part.maximum[row] - shift);
    simd::scale_row(out, padded_dim, own_factor);
    simd::add_scaled_row(part_out, part_factor, out, padded_dim);
    sum[row] = sum[row] * own_factor + part.sum[row] * part_factor;
    maximum[row] = largest;
  }

  /// Takes in one score more, in units of ln 2, of a key whose value is 0.
  void include(Index row, Accumulator score, Accumulator* out, Index padded_dim) const {
    if (score == simd::minus_infinity<Accumulator>) return;
    raise(row, score, out, padded_dim);
    sum[row] += std::exp2(score - maximum[row]);
  }

  /// ln2·(m + log₂ l); −∞ where no key was seen.
  Accumulator log_sum_exp(Index row) const {
    return sum[row] == Accumulator(0)
               ? simd::minus_infinity<Accumulator>
               : (maximum[row] + std::log2(sum[row])) * simd::ln_2<Accumulator>;
  }

  /// 1/l, which turns o into the output; 0 where no key was seen.
  Accumulator normaliser(Index row) const {
    return sum[row] == Accumulator(0) ? Accumulator(0) : 1 / sum[row];
  }
};

}  // namespace surfattn::detail
