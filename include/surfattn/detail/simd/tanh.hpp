// surfattn layer 2: a vectorised hyperbolic tangent

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <surfattn/detail/simd/exp2.hpp>

namespace surfattn::detail::simd {

/// (eᵗ − 1)/t = 1 + t/2! + t²/3! + … for |t| ≤ ½ln 2, to less than half a unit in the last place.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> exp_minus_one_series(Packet<Scalar> t) {
  constexpr int terms = std::numeric_limits<Scalar>::digits <= 24 ? 7 : 13;
  auto sum = broadcast(Scalar(1));
  SURFATTN_UNROLL
  for (int k = terms; k >= 2; --k) {
    sum = multiply_add(multiply(sum, t), broadcast(1 / Scalar(k)), broadcast(Scalar(1)));
  }
  return sum;
}

/// tanh x = e/(e + 2) with e = exp(2x) − 1 = 2ⁿ·(eᵗ − 1) + (2ⁿ − 1), where 2x·log₂e = n + t·log₂e
/// with n an integer and |t| ≤ ½ln 2: without cancellation, so that small arguments keep their
/// digits. The relative error is at most 4 ulp. ±∞ gives ±1, NaN gives NaN. Where the target has no
/// vectors, std::tanh.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> tanh(Packet<Scalar> x) {
  if constexpr (lanes<Scalar> == 1) {
    return std::tanh(x);
  } else {
    constexpr int digits = std::numeric_limits<Scalar>::digits;
    constexpr Scalar bias = Scalar(std::numeric_limits<Scalar>::max_exponent - 1);
    const auto rounding = broadcast(Scalar(3) * Scalar(std::uint64_t(1) << (digits - 2)) + bias);
    const auto one = broadcast(Scalar(1)), limit = broadcast(Scalar(60));
    // tanh rounds to 1 long before 2x·log₂e = 60
    const auto y =
        minimum(maximum(multiply(x, broadcast(2 * log2_e<Scalar>)), broadcast(Scalar(-60))), limit);
    const auto biased = add(y, rounding);
    const auto t = multiply(subtract(y, subtract(biased, rounding)), broadcast(ln_2<Scalar>));
    const auto power = power_of_two<Scalar>(biased);
    const auto e =
        multiply_add(power, multiply(t, exp_minus_one_series<Scalar>(t)), subtract(power, one));
    return divide(e, add(e, broadcast(Scalar(2))));
  }
}

}  // namespace surfattn::detail::simd
