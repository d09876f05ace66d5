// surfattn layer 4: softmax over keys that arrive tile by tile

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/types.hpp>
#include <surfattn/workspace.hpp>

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
  /// key. Returns the factor.
  Accumulator raise(Index row, Accumulator scores_maximum, Accumulator* out,
                    Index padded_dim) const {
    const Accumulator before = maximum[row];
    const Accumulator now = std::max(before, std::ceil(scores_maximum));
    if (before == now) return Accumulator(1);
    maximum[row] = now;
    if (before == simd::minus_infinity<Accumulator>) return Accumulator(1);
    const Accumulator correction = std::exp2(before - now);
    simd::scale_row(out, padded_dim, correction);
    sum[row] *= correction;
    return correction;
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

  /// ln2·(m + log₂ l); −∞ where no key was seen. The exponent of l goes to m, exactly, so that an m above
  /// the scores costs no digits.
  Accumulator log_sum_exp(Index row) const {
    if (sum[row] == Accumulator(0)) return simd::minus_infinity<Accumulator>;
    const auto [fraction, exponent] = simd::split_exponent(sum[row]);
    return (maximum[row] + exponent + std::log2(fraction)) * simd::ln_2<Accumulator>;
  }

  /// 1/l, which turns o into the output; 0 where no key was seen.
  Accumulator normaliser(Index row) const {
    return sum[row] == Accumulator(0) ? Accumulator(0) : 1 / sum[row];
  }
};

/// The running softmax of several rows that visit the same short runs of keys: all scores of a run lie
/// without a gap, and each of its places has l of its own beside the m of its row.
template <class Accumulator>
class ShortRunSoftmax {
 public:
  ShortRunSoftmax() = default;
  ShortRunSoftmax(Arena& arena, Index rows, Index longest_run)
      : rows_(rows),
        run_(longest_run),
        maximum_(arena.take<Accumulator>(places())),
        sum_(arena.take<Accumulator>(places())) {}
  /// For runs that are no longer.
  ShortRunSoftmax(const ShortRunSoftmax& longer, Index run) : ShortRunSoftmax(longer) {
    run_ = run;
  }

  /// How many scores a run has, with those that pad them to whole packets.
  Index places() const { return simd::rounded_up(rows_ * run_, simd::lanes<Accumulator>); }

  /// Before the first key the lowest number stands for m, so that scores of −∞ have weight 0 and not NaN.
  /// Nothing exceeds m where no key is.
  void reset() const {
    std::fill(maximum_, maximum_ + rows_ * run_, std::numeric_limits<Accumulator>::lowest());
    std::fill(maximum_ + rows_ * run_, maximum_ + places(), -simd::minus_infinity<Accumulator>);
    std::fill(sum_, sum_ + places(), Accumulator(0));
  }

  /// Scores of a run → weights. m, and what was summed with it, is that of the rows in `softmax`.
  void take_weights(Accumulator* scores, const OnlineSoftmax<Accumulator>& softmax,
                    Accumulator* out, Index out_stride) const {
    if (simd::exceeds_somewhere(scores, maximum_, places()))
      raise(scores, softmax, out, out_stride);
    simd::exp2_places(scores, maximum_, sum_, places());
  }

  /// l of all rows.
  void write_sums(Accumulator* to) const {
    for (Index row = 0; row < rows_; ++row) {
      const Accumulator* const sums = sum_ + row * run_;
      to[row] = std::accumulate(sums, sums + run_, Accumulator(0));
    }
  }

 private:
  SURFATTN_NEVER_INLINE void raise(const Accumulator* scores,
                                   const OnlineSoftmax<Accumulator>& softmax, Accumulator* out,
                                   Index out_stride) const {
    for (Index row = 0; row < rows_; ++row) {
      const Accumulator* const of_row = scores + row * run_;
      const Accumulator factor =
          softmax.raise(row, largest_of(of_row), out + row * out_stride, out_stride);
      Accumulator* const maxima = maximum_ + row * run_;
      Accumulator* const sums = sum_ + row * run_;
      for (Index j = 0; j < run_; ++j) sums[j] *= factor;
      if (softmax.maximum[row] != simd::minus_infinity<Accumulator>)
        std::fill(maxima, maxima + run_, softmax.maximum[row]);
    }
  }

  /// A NaN does not count.
  Accumulator largest_of(const Accumulator* scores) const {
    auto largest = simd::minus_infinity<Accumulator>;
    for (Index j = 0; j < run_; ++j) largest = scores[j] > largest ? scores[j] : largest;
    return largest;
  }

  Index rows_ = 0, run_ = 0;
  Accumulator *maximum_ = nullptr, *sum_ = nullptr;
};

}  // namespace surfattn::detail
