// surfattn layer 2: operations on the rows of score tiles

#pragma once

#include <limits>
#include <surfattn/detail/simd/exp2.hpp>
#include <surfattn/detail/simd/tile_products.hpp>

namespace surfattn::detail::simd {

template <class Scalar>
inline constexpr Scalar minus_infinity = -std::numeric_limits<Scalar>::infinity();

/// The largest of `count` numbers, a whole number of panels. Where there is a NaN, any of them or
/// NaN.
template <class Scalar>
Scalar row_maximum(const Scalar* row, Index count) {
  Packet<Scalar> largest[panel_packets];
  for (auto& packet : largest) packet = broadcast(minus_infinity<Scalar>);
  for (Index j = 0; j < count; j += panel_width<Scalar>) {
    SURFATTN_UNROLL
    for (int p = 0; p < panel_packets; ++p)
      largest[p] = maximum(largest[p], load(row + j + p * lanes<Scalar>));
  }
  return maximum_of(maximum(largest[0], largest[1]));
}

/// The part of a row that `Count` packets hold: row ← 2^(row − subtrahend), added to `sums`.
template <int Count, class Scalar>
SURFATTN_ALWAYS_INLINE void exp2_packets(Scalar* row, Packet<Scalar> subtrahend,
                                         Packet<Scalar> (&sums)[panel_packets]) {
  Packet<Scalar> weights[Count];
  SURFATTN_UNROLL
  for (int p = 0; p < Count; ++p) weights[p] = subtract(load(row + p * lanes<Scalar>), subtrahend);
  exp2<Scalar>(weights);
  SURFATTN_UNROLL
  for (int p = 0; p < Count; ++p) {
    store(row + p * lanes<Scalar>, weights[p]);
    sums[p % panel_packets] = add(sums[p % panel_packets], weights[p]);
  }
}

/// row ← 2^(row − shift) over a whole number of panels; returns the sum.
template <class Scalar>
Scalar exp2_row(Scalar* row, Index count, Scalar shift) {
  const auto subtrahend = broadcast(shift);
  Packet<Scalar> sums[panel_packets];
  for (auto& packet : sums) packet = broadcast(Scalar(0));
  Index j = 0;
  for (constexpr Index two = 2 * panel_width<Scalar>; j + two <= count; j += two) {
    exp2_packets<2 * panel_packets>(row + j, subtrahend, sums);
  }
  if (j < count) exp2_packets<panel_packets>(row + j, subtrahend, sums);
  return sum(add(sums[0], sums[1]));
}

/// row ← factor·row over a whole number of panels.
template <class Scalar>
void scale_row(Scalar* row, Index count, Scalar factor) {
  const auto multiplier = broadcast(factor);
  for (Index c = 0; c < count; c += lanes<Scalar>)
    store(row + c, multiply(load(row + c), multiplier));
}

/// totals ← totals + factor·row over a whole number of panels.
template <class Scalar>
void add_scaled_row(const Scalar* row, Scalar factor, Scalar* totals, Index count) {
  const auto multiplier = broadcast(factor);
  for (Index c = 0; c < count; c += lanes<Scalar>) {
    store(totals + c, multiply_add(load(row + c), multiplier, load(totals + c)));
  }
}

/// gradients ← weights ∘ (gradients − mean) over a whole number of panels: the backward of a
/// softmax along a row.
template <class Scalar>
void softmax_gradient_row(const Scalar* weights, Scalar* gradients, Index count, Scalar mean) {
  const auto subtrahend = broadcast(mean);
  for (Index j = 0; j < count; j += lanes<Scalar>) {
    store(gradients + j, multiply(load(weights + j), subtract(load(gradients + j), subtrahend)));
  }
}

/// totals ← totals + row over `count` numbers, and none beside them.
template <class Scalar>
void add_row(const Scalar* row, Scalar* totals, Index count) {
  Index j = 0;
  for (; j + lanes<Scalar> <= count; j += lanes<Scalar>) {
    store(totals + j, add(load(totals + j), load(row + j)));
  }
  for (; j < count; ++j) totals[j] += row[j];
}

}  // namespace surfattn::detail::simd
