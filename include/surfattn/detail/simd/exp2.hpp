// surfattn layer 2: a vectorised 2ˣ for the weights of a softmax

#pragma once

#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <surfattn/detail/simd/packet.hpp>

namespace surfattn::detail::simd {

/// log₂ e: scores are held in units of ln 2, so that exp(S) = 2^(S·log₂ e) needs no reduction by ln
/// 2.
template <class Scalar>
inline constexpr Scalar log2_e = Scalar(1.44269504088896340735992468100189214L);

template <class Scalar>
inline constexpr Scalar ln_2 = Scalar(0.693147180559945309417232121458176568L);

/// The coefficients of r, r², … in the polynomial 1 + … of least relative error to 2ʳ for |r| ≤ ½
/// (found by Remez' algorithm): 2.6·10⁻⁹ for float and 1.8·10⁻¹⁷ for double.
template <class Scalar>
inline constexpr Scalar exp2_polynomial[] = {};
template <>
inline constexpr float exp2_polynomial<float>[] = {
    6.93147214967940850e-1f, 2.40226527828820341e-1f, 5.55031055117842162e-2f,
    9.61769297496295125e-3f, 1.34066438505444914e-3f, 1.55946774086013537e-4f};
template <>
inline constexpr double exp2_polynomial<double>[] = {
    6.93147180559945730316e-1, 2.40226506959100971628e-1, 5.55041086647903927909e-2,
    9.61812910760700273682e-3, 1.33335581534400134281e-3, 1.54035304415722594648e-4,
    1.52527273851524195690e-5, 1.32154426752670153164e-6, 1.01806476748837103971e-7,
    7.07257042305957473957e-9, 4.07806977803878487017e-10};

/// 2ˣ for x ≤ 127 (float) or x ≤ 1023 (double): a softmax takes it of differences to a maximum.
///
/// x = n + r with n an integer and |r| ≤ ½, exactly; a polynomial in r; n into the exponent. At
/// most 2 ulp from −126 (float) or −1022 (double) on; smaller arguments, −∞ among them, give
/// exactly 0, so that a masked weight is exactly 0. 2⁰ is exactly 1, and NaN gives NaN. Where the
/// target has no vectors, std::exp2.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> exp2(Packet<Scalar> x) {
  if constexpr (lanes<Scalar> == 1) {
    return std::exp2(x);
  } else {
    constexpr int digits = std::numeric_limits<Scalar>::digits;
    const auto magic = broadcast(
        Scalar(3) * Scalar(std::uint64_t(1) << (digits - 2)));  // adding it rounds to an integer
    const auto biased = add(x, magic);
    const auto r = subtract(x, subtract(biased, magic));
    constexpr auto& coefficients = exp2_polynomial<Scalar>;
    auto y = broadcast(coefficients[std::size(coefficients) - 1]);
    SURFATTN_UNROLL
    for (int k = int(std::size(coefficients)) - 2; k >= 0; --k)
      y = multiply_add(y, r, broadcast(coefficients[k]));
    y = multiply_add(y, r, broadcast(Scalar(1)));
    const auto smallest = broadcast(Scalar(std::numeric_limits<Scalar>::min_exponent - 1));
    return zero_where_less<Scalar>(x, smallest, multiply(y, power_of_two<Scalar>(biased)));
  }
}

}  // namespace surfattn::detail::simd
