// surfattn layer 2: products of small tiles that become the weights of a softmax on their way

#pragma once

#include <algorithm>
#include <surfattn/detail/simd/exp2.hpp>
#include <surfattn/detail/simd/overlapped_work.hpp>
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

/// Makes weights of scores whose exponents are within the range of exp2_in_range, and asks for the bytes at
/// `ahead` meanwhile: `step` of them for each row of a panel.
template <class Scalar>
struct WeighRows {
  using Row = WeighedRow<Scalar>;

  const char* ahead;
  Index step;

  SURFATTN_ALWAYS_INLINE void operator()(Row& row, Scalar* panel, Index) {
    __builtin_prefetch(ahead);
    ahead += step;
    row.weigh_in_range(panel);
  }
};

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
  static_assert(overlaps_exponentials<Element>);
  constexpr Index width = panel_width<Element>;
  const Index panels = cols / width, whole = panels * width;
  const Index step = ahead_bytes / std::max<Index>(panels * count, 1);
  using Work = WeighRows<sum_t<Element>>;
  product<Store::set>(
      count, whole, depth, a, b, c,
      OverlappedFinish<Element, Work>(scores, rows, Work{static_cast<const char*>(ahead), step}));
  if (whole == cols) return;
  b.data += panels * b.panel_stride, c.data += whole, scores.bias += whole;
  product<Store::set>(count, cols - whole, depth, a, b, c, scores);
  weigh_part_of_panel(count, cols - whole, c, rows);
}

}  // namespace surfattn::detail::simd
