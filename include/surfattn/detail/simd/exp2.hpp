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
/// x = n + r with n an integer and |r| ≤ ½, exactly; a polynomial in r; times 2ⁿ, whose bits are n
/// in the exponent. At most 2 ulp from −126 (float) or −1022 (double) on; where n is one less, or
/// would be, those bits spell 0, so that smaller arguments and −∞ give exactly 0: a masked weight
/// is exactly 0. 2⁰ is exactly 1, and NaN gives NaN. Where the target has no vectors, std::exp2.
///
/// Takes several packets at once, and each step for all of them before the next: the steps of one
/// packet wait for each other, those of different packets do not.
template <class Scalar, int Count>
SURFATTN_ALWAYS_INLINE void exp2(Packet<Scalar> (&x)[Count]) {
  if constexpr (lanes<Scalar> == 1) {
    for (auto& number : x) number = std::exp2(number);
  } else {
    constexpr int digits = std::numeric_limits<Scalar>::digits;
    const auto magic = broadcast(
        Scalar(3) * Scalar(std::uint64_t(1) << (digits - 2)));  // adding it rounds to an integer
    const auto smallest = broadcast(Scalar(std::numeric_limits<Scalar>::min_exponent - 2));
    Packet<Scalar> biased[Count], y[Count];
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) x[i] = maximum(x[i], smallest);
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) biased[i] = add(x[i], magic);
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) x[i] = subtract(x[i], subtract(biased[i], magic));
    constexpr auto& coefficients = exp2_polynomial<Scalar>;
    constexpr int degree = int(std::size(coefficients));
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) y[i] = broadcast(coefficients[degree - 1]);
    SURFATTN_UNROLL
    for (int k = degree - 2; k >= -1; --k) {
      const auto coefficient = broadcast(k < 0 ? Scalar(1) : coefficients[k < 0 ? 0 : k]);
      SURFATTN_UNROLL
      for (int i = 0; i < Count; ++i) y[i] = multiply_add(y[i], x[i], coefficient);
    }
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) x[i] = multiply(y[i], power_of_two<Scalar>(biased[i]));
  }
}

}  // namespace surfattn::detail::simd
