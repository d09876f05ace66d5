// surfattn layer 2: products of small tiles that become the weights of a softmax on their way

#pragma once

#include <algorithm>
#include <surfattn/detail/simd/exp2.hpp>
#include <surfattn/detail/simd/tile_products.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail::simd {

/// A row of scores S that become weights 2^(S − origin) and are summed.
template <class Scalar>
struct WeighedRow {
  alignas(Arena::alignment) Scalar sums[panel_width<Scalar>];
  Scalar origin;  ///< an integer, see exp2
  Scalar addend;

  void start(Scalar at) {
    std::fill(sums, sums + panel_width<Scalar>, Scalar(0));
    origin = at, addend = exp2_addend(at);
  }

  /// Scores of one panel → weights, by `exp2`.
  template <class Exponential>
  SURFATTN_ALWAYS_INLINE void weigh(Scalar* panel, const Exponential& exp2) {
    Packet<Scalar> weights[panel_packets];
    SURFATTN_UNROLL
    for (int p = 0; p < panel_packets; ++p) weights[p] = load(panel + p * lanes<Scalar>);
    exp2(weights);
    SURFATTN_UNROLL
    for (int p = 0; p < panel_packets; ++p) {
      store(panel + p * lanes<Scalar>, weights[p]);
      store(sums + p * lanes<Scalar>, add(load(sums + p * lanes<Scalar>), weights[p]));
    }
  }
  SURFATTN_ALWAYS_INLINE void weigh_in_range(Scalar* panel) {
    weigh(panel, [&](auto& scores) { exp2_in_range<Scalar>(scores, broadcast(addend)); });
  }

  Scalar sum() const { return simd::sum(add(load(sums), load(sums + lanes<Scalar>))); }
};

/// Scores that become weights, whose exponents must be within the range of exp2_in_range. While a kernel
/// multiplies and adds, the scores of the one before, which are in the first-level cache, become weights:
/// most of that are operations that other parts of a core do meanwhile. Where another thread shares the
/// core every instruction counts: what is done for a row is counted by one pointer.
template <class Element>
class WeightFinish {
  using Sum = sum_t<Element>;

 public:
  static constexpr bool whole_kernels = true;

  /// Asks for `ahead` meanwhile: `step` bytes of it for each row of a panel.
  WeightFinish(const Finish<Element>& scores, WeighedRow<Sum>* rows, const void* ahead, Index step)
      : scores_(scores), rows_(rows), ahead_(static_cast<const char*>(ahead)), step_(step) {}

  SURFATTN_ALWAYS_INLINE const Sum* start() const { return scores_.start(); }

  template <int Rows, int Packets>
  SURFATTN_ALWAYS_INLINE void take(Index row, Accumulators<Rows, Packets, Element>& product,
                                   const Tile<Sum>& c) {
    complete();
    scores_.take(row, product, c);
    left_ = c, next_ = rows_ + row, end_ = next_ + Rows;
  }

  SURFATTN_ALWAYS_INLINE void work() {
    if (next_ == end_) return;
    __builtin_prefetch(ahead_);
    ahead_ += step_;
    next_->weigh_in_range(left_.data);
    left_.data += left_.row_stride, ++next_;
  }

  SURFATTN_ALWAYS_INLINE void complete() {
    if (next_ == end_) return;
    weigh_rest(left_, next_, end_);
    next_ = end_;
  }

  SURFATTN_ALWAYS_INLINE void to_next_panel() { scores_.to_next_panel(); }

 private:
  SURFATTN_NEVER_INLINE static void weigh_rest(Tile<Sum> scores, WeighedRow<Sum>* row,
                                               WeighedRow<Sum>* end) {
    for (; row != end; ++row, scores.data += scores.row_stride) row->weigh_in_range(scores.data);
  }

  Finish<Element> scores_;
  WeighedRow<Sum>* rows_;
  const char* ahead_;
  Index step_;
  Tile<Sum> left_{};  ///< the scores that are left to do, in one panel
  WeighedRow<Sum>*next_ = nullptr, *end_ = nullptr;
};

/// Whether products may become weights: not where they are summed in parts, on targets whose exponentials
/// take longer than what they wait for, nor without vectors, where an origin does not only scale them.
template <class Element>
inline constexpr bool makes_weights =
    !broadcasts_by_shuffling<Element> && lanes<sum_t<Element>> > 1;

/// The rows of one panel, of which `cols` columns are scores and the others become 0.
template <class Scalar>
void weigh_part_of_panel(Index count, Index cols, Tile<Scalar> scores, WeighedRow<Scalar>* rows) {
  for (Index i = 0; i < count; ++i) {
    const Exp2Origin<Scalar> origin(rows[i].origin);
    rows[i].weigh(scores.from(i).data, [&](auto& row) {
      for (int p = 0; p < panel_packets; ++p)
        row[p] = first_lanes<Scalar>(row[p], cols - p * lanes<Scalar>, minus_infinity<Scalar>);
      exp2<Scalar>(row, origin);
    });
  }
}

/// C = 2^(bias + A·B − origin) for `cols` columns, and sums ← sums + C, for `count` rows, whole kernels. The
/// exponents must be within the range of exp2_in_range. What pads the columns to whole panels becomes 0. Of
/// pairs, 2^(factor·A·B + bias − origin). Asks for the `ahead_bytes` bytes at `ahead` meanwhile.
template <class Element, class Left>
void set_weights(Index count, Index cols, Index depth, const Left& a, Panels<Element> b,
                 Tile<sum_t<Element>> c, Finish<Element> scores, WeighedRow<sum_t<Element>>* rows,
                 const void* ahead, Index ahead_bytes) {
  static_assert(makes_weights<Element>);
  constexpr Index width = panel_width<Element>;
  const Index panels = cols / width, whole = panels * width;
  const Index step = ahead_bytes / std::max<Index>(panels * count, 1);
  product<Store::set>(count, whole, depth, a, b, c,
                      WeightFinish<Element>(scores, rows, ahead, step));
  if (whole == cols) return;
  b.data += panels * b.panel_stride, c.data += whole, scores.bias += whole;
  product<Store::set>(count, cols - whole, depth, a, b, c, scores);
  weigh_part_of_panel(count, cols - whole, c, rows);
}

}  // namespace surfattn::detail::simd
