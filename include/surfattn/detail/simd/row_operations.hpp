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

/// row ← 2^(row − shift) over a whole number of panels; returns the sum.
template <class Scalar>
Scalar exp2_row(Scalar* row, Index count, Scalar shift) {
  const auto subtrahend = broadcast(shift);
  Packet<Scalar> sums[panel_packets];
  for (auto& packet : sums) packet = broadcast(Scalar(0));
  for (Index j = 0; j < count; j += panel_width<Scalar>) {
    SURFATTN_UNROLL
    for (int p = 0; p < panel_packets; ++p) {
      Scalar* at = row + j + p * lanes<Scalar>;
      const auto weights = exp2<Scalar>(subtract(load(at), subtrahend));
      store(at, weights);
      sums[p] = add(sums[p], weights);
    }
  }
  return sum(add(sums[0], sums[1]));
}

/// row ← factor·row over a whole number of panels.
template <class Scalar>
void scale_row(Scalar* row, Index count, Scalar factor) {
  const auto multiplier = broadcast(factor);
  for (Index c = 0; c < count; c += lanes<Scalar>)
    store(row + c, multiply(load(row + c), multiplier));
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

/// totals ← totals + row over a whole number of panels.
template <class Scalar>
void add_row(const Scalar* row, Scalar* totals, Index count) {
  for (Index j = 0; j < count; j += lanes<Scalar>)
    store(totals + j, add(load(totals + j), load(row + j)));
}

}  // namespace surfattn::detail::simd
