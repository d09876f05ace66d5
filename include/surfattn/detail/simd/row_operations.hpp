// surfattn layer 2: operations on the rows of score tiles

#pragma once

#include <cmath>
#include <limits>
#include <surfattn/detail/simd/exp2.hpp>
#include <surfattn/detail/simd/tile_products.hpp>

namespace surfattn::detail::simd {

/// The largest of `count` numbers; those that pad them to whole packets become −∞. Where there is a
/// NaN, any of them or NaN.
template <class Scalar>
Scalar pad_and_find_maximum(Scalar* row, Index count) {
  Packet<Scalar> largest[panel_packets];
  for (auto& packet : largest) packet = broadcast(minus_infinity<Scalar>);
  Index j = 0;
  for (; j + panel_width<Scalar> <= count; j += panel_width<Scalar>) {
    SURFATTN_UNROLL
    for (int p = 0; p < panel_packets; ++p)
      largest[p] = maximum(largest[p], load(row + j + p * lanes<Scalar>));
  }
  for (; j < count; j += lanes<Scalar>) {
    const auto scores = first_lanes<Scalar>(load(row + j), count - j, minus_infinity<Scalar>);
    store(row + j, scores);
    largest[0] = maximum(largest[0], scores);
  }
  return maximum_of(maximum(largest[0], largest[1]));
}

/// Calls step.operator()<Count>(first) for every `Count` packets, from number `first` on, of a row
/// `count` numbers long, a whole number of packets: several at a time while so many are left.
template <class Scalar, class Step>
SURFATTN_ALWAYS_INLINE void for_packets(Index count, const Step& step) {
  Index j = 0;
  for (constexpr Index two = 2 * panel_width<Scalar>; j + two <= count; j += two) {
    step.template operator()<2 * panel_packets>(j);
  }
  if (j + panel_width<Scalar> <= count) {
    step.template operator()<panel_packets>(j);
    j += panel_width<Scalar>;
  }
  if (j < count) step.template operator()<1>(j);
}

/// row ← 2^(row − origin) over a whole number of packets, `origin` an integer or not finite; returns
/// the sum.
template <class Scalar>
Scalar exp2_row(Scalar* row, Index count, Scalar origin) {
  if (!(std::abs(origin) <= exp2_origin_limit<Scalar>)) {
    for (Index j = 0; j < count; ++j) row[j] -= origin;
    origin = Scalar(0);
  }
  const Exp2Origin<Scalar> exp2_origin(origin);
  Packet<Scalar> sums[panel_packets];
  for (auto& packet : sums) packet = broadcast(Scalar(0));
  for_packets<Scalar>(count, [&]<int Count>(Index first) {
    Packet<Scalar> weights[Count];
    SURFATTN_UNROLL
    for (int p = 0; p < Count; ++p) weights[p] = load(row + first + p * lanes<Scalar>);
    exp2<Scalar>(weights, exp2_origin);
    SURFATTN_UNROLL
    for (int p = 0; p < Count; ++p) {
      store(row + first + p * lanes<Scalar>, weights[p]);
      sums[p % panel_packets] = add(sums[p % panel_packets], weights[p]);
    }
  });
  return sum(add(sums[0], sums[1]));
}

/// Whether some number of a row is larger than the limit at its place, over a whole number of packets.
template <class Scalar>
bool exceeds_somewhere(const Scalar* row, const Scalar* limits, Index count) {
  bool any = false;
  for_packets<Scalar>(count, [&]<int Count>(Index first) {
    SURFATTN_UNROLL
    for (int p = 0; p < Count; ++p) {
      const Index j = first + p * lanes<Scalar>;
      any |= exceeds(load(row + j), load(limits + j));
    }
  });
  return any;
}

/// row ← 2^(row − origins), place by place, and sums ← sums + row, over a whole number of packets.
template <class Scalar>
void exp2_places(Scalar* row, const Scalar* origins, Scalar* sums, Index count) {
  const Exp2Origin<Scalar> zero(Scalar(0));
  for_packets<Scalar>(count, [&]<int Count>(Index first) {
    Packet<Scalar> weights[Count];
    SURFATTN_UNROLL
    for (int p = 0; p < Count; ++p) {
      const Index j = first + p * lanes<Scalar>;
      weights[p] = subtract(load(row + j), load(origins + j));
    }
    exp2<Scalar>(weights, zero);
    SURFATTN_UNROLL
    for (int p = 0; p < Count; ++p) {
      const Index j = first + p * lanes<Scalar>;
      store(row + j, weights[p]);
      store(sums + j, add(load(sums + j), weights[p]));
    }
  });
}

/// row ← factor·row over a whole number of packets.
template <class Scalar>
void scale_row(Scalar* row, Index count, Scalar factor) {
  const auto multiplier = broadcast(factor);
  for (Index c = 0; c < count; c += lanes<Scalar>)
    store(row + c, multiply(load(row + c), multiplier));
}

/// difference ← a − b over a whole number of panels.
template <class Scalar>
void subtract_rows(const Scalar* a, const Scalar* b, Index count, Scalar* difference) {
  for (Index c = 0; c < count; c += lanes<Scalar>)
    store(difference + c, subtract(load(a + c), load(b + c)));
}

/// The same, and scaled ← factor·difference.
template <class Scalar>
void subtract_and_scale_rows(const Scalar* a, const Scalar* b, Scalar factor, Index count,
                             Scalar* difference, Scalar* scaled) {
  const auto multiplier = broadcast(factor);
  for (Index c = 0; c < count; c += lanes<Scalar>) {
    const auto packet = subtract(load(a + c), load(b + c));
    store(difference + c, packet);
    store(scaled + c, multiply(packet, multiplier));
  }
}

/// totals ← totals + factor·row over a whole number of panels.
template <class Scalar>
void add_scaled_row(const Scalar* row, Scalar factor, Scalar* totals, Index count) {
  const auto multiplier = broadcast(factor);
  for (Index c = 0; c < count; c += lanes<Scalar>) {
    store(totals + c, multiply_add(load(row + c), multiplier, load(totals + c)));
  }
}

/// row ← factor·row + addends over whole packets that hold `count` numbers.
template <class Scalar>
void scale_and_add_row(const Scalar* addends, Scalar factor, Scalar* row, Index count) {
  const auto multiplier = broadcast(factor);
  for (Index j = 0; j < count; j += lanes<Scalar>) {
    store(row + j, multiply_add(load(row + j), multiplier, load(addends + j)));
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
