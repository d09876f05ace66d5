// surfattn layer 2: a vectorised hyperbolic tangent

#pragma once

#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <surfattn/detail/simd/exp2.hpp>

namespace surfattn::detail::simd {

/// tanh x = e/(e + 2) with e = exp(2x) − 1 = 2ⁿ·(2ʳ − 1) + (2ⁿ − 1), where 2x·log₂e = n + r with n
/// an integer and |r| ≤ ½. The polynomial of exp2 without its constant gives 2ʳ − 1 without
/// cancellation, so that small arguments keep their digits: the relative error is at most 8 ulp.
/// ±∞ gives ±1, NaN gives NaN. Where the target has no vectors, std::tanh.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> tanh(Packet<Scalar> x) {
  if constexpr (lanes<Scalar> == 1) {
    return std::tanh(x);
  } else {
    constexpr int digits = std::numeric_limits<Scalar>::digits;
    const auto magic = broadcast(Scalar(3) * Scalar(std::uint64_t(1) << (digits - 2)));
    const auto one = broadcast(Scalar(1));
    // tanh rounds to 1 long before 2x·log₂e = 60
    const auto y =
        minimum(maximum(multiply(x, broadcast(2 * log2_e<Scalar>)), broadcast(Scalar(-60))),
                broadcast(Scalar(60)));
    const auto biased = add(y, magic);
    const auto r = subtract(y, subtract(biased, magic));
    constexpr auto& coefficients = exp2_polynomial<Scalar>;
    constexpr int degree = int(std::size(coefficients));
    auto polynomial = broadcast(coefficients[degree - 1]);
    SURFATTN_UNROLL
    for (int k = degree - 2; k >= 0; --k)
      polynomial = multiply_add(polynomial, r, broadcast(coefficients[k]));
    const auto power = power_of_two<Scalar>(biased);
    const auto e = multiply_add(power, multiply(polynomial, r), subtract(power, one));
    return divide(e, add(e, broadcast(Scalar(2))));
  }
}

}  // namespace surfattn::detail::simd
