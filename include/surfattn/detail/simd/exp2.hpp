// surfattn layer 2: a vectorised 2ˣ for the weights of a softmax

#pragma once

#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <surfattn/detail/simd/packet.hpp>
#include <type_traits>

namespace surfattn::detail::simd {

/// log₂ e: scores are held in units of ln 2, so that exp(S) = 2^(S·log₂ e) needs no reduction by ln
/// 2.
template <class Scalar>
inline constexpr Scalar log2_e = Scalar(1.44269504088896340735992468100189214L);

template <class Scalar>
inline constexpr Scalar ln_2 = Scalar(0.693147180559945309417232121458176568L);

template <class Scalar>
inline constexpr Scalar minus_infinity = -std::numeric_limits<Scalar>::infinity();

/// The coefficients of r, r², … in the polynomial 1 + … that is 2ʳ for |r| ≤ 1/(2·exp2_steps), by
/// Remez' algorithm: for double of least relative error, 1.8·10⁻¹⁷ without a table and 7.1·10⁻¹⁸ with
/// one; for float, where 2⁻²⁴ is 6·10⁻⁸, of least error when evaluated in float, 10⁻⁷ before rounding
/// without a table, 7·10⁻⁸ with one (a search among the floats nearby).
template <class Scalar, int steps = exp2_steps<Scalar>>
inline constexpr Scalar exp2_polynomial[] = {};
template <>
inline constexpr float exp2_polynomial<float, 1>[] = {
    6.931470037e-01f, 2.402226031e-01f, 5.550718680e-02f, 9.670581669e-03f, 1.326440135e-03f};
template <>
inline constexpr float exp2_polynomial<float, 32>[] = {6.931568980e-01f, 2.401967049e-01f};
template <>
inline constexpr double exp2_polynomial<double, 1>[] = {
    6.93147180559945730316e-1, 2.40226506959100971628e-1, 5.55041086647903927909e-2,
    9.61812910760700273682e-3, 1.33335581534400134281e-3, 1.54035304415722594648e-4,
    1.52527273851524195690e-5, 1.32154426752670153164e-6, 1.01806476748837103971e-7,
    7.07257042305957473957e-9, 4.07806977803878487017e-10};
template <>
inline constexpr double exp2_polynomial<double, 16>[] = {
    6.93147180559946888661e-1, 2.40226506959101670311e-1, 5.55041086519545801776e-2,
    9.61812910205344514350e-3, 1.33338202329091338943e-3, 1.54042117284551468903e-4};

/// 2ⁿ; a long double has digits for more than an integer holds.
template <class Scalar>
constexpr Scalar two_to_the(int n) {
  Scalar power(1);
  for (; n > 0; --n) power *= 2;
  return power;
}

/// What is added to x so that 2^(x − origin) stands in the bits, for an integer `origin` of at most
/// `exp2_origin_limit` in magnitude.
///
/// Adding 1.5·2^(digits − 1)/steps to a number rounds it to a multiple of 1/steps that stands in its
/// low bits. The origin and the bias of the exponent go into the same addend, so that taking the origin
/// away costs nothing.
template <class Scalar>
constexpr Scalar exp2_addend(Scalar origin) {
  using Limits = std::numeric_limits<Scalar>;
  constexpr Scalar bias = Scalar(Limits::max_exponent - 1);
  constexpr Scalar rounding = 3 * two_to_the<Scalar>(Limits::digits - 2) / exp2_steps<Scalar>;
  return lanes<Scalar> == 1 ? -origin : rounding + bias - origin;
}

/// The integer that `exp2` takes from the exponents.
template <class Scalar>
struct Exp2Origin {
  Packet<Scalar> addend;
  Packet<Scalar> smallest;  ///< arguments below, whose powers of two underflow, count as this one

  SURFATTN_ALWAYS_INLINE explicit Exp2Origin(Scalar origin)
      : addend(broadcast(exp2_addend(origin))),
        smallest(broadcast(origin - Scalar(std::numeric_limits<Scalar>::max_exponent - 1))) {}
};

/// Up to here the addend of an origin is exact.
template <class Scalar>
inline constexpr Scalar exp2_origin_limit =
    two_to_the<Scalar>(std::numeric_limits<Scalar>::digits - 3) / exp2_steps<Scalar>;

/// x = fraction·2^exponent, 1/2 ≤ fraction < 1, as std::frexp gives them.
template <class Scalar>
struct SplitExponent {
  Scalar fraction, exponent;
};

/// For x > 0. Of normal numbers by their bits, which takes less time than a call.
template <class Scalar>
SplitExponent<Scalar> split_exponent(Scalar x) {
  using Limits = std::numeric_limits<Scalar>;
  if constexpr (std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>) {
    if (Limits::min() <= x && x <= Limits::max()) {
      using Integer = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;
      constexpr int place = Limits::digits - 1;
      constexpr Integer of_one_half = Limits::max_exponent - 2;
      const auto bits = __builtin_bit_cast(Integer, x);
      const Integer fraction = bits % (Integer(1) << place) + (of_one_half << place);
      return {__builtin_bit_cast(Scalar, fraction),
              static_cast<Scalar>(bits >> place) - static_cast<Scalar>(of_one_half)};
    }
  }
  int exponent;
  const Scalar fraction = std::frexp(x, &exponent);
  return {fraction, static_cast<Scalar>(exponent)};
}

/// 2^(x − origin) for −126 ≤ x − origin ≤ 127 (float) or −1022 to 1023 (double), by the addend of the
/// origin.
///
/// x = n + r with n a multiple of 1/steps, exactly, and |r| ≤ 1/(2·steps); t = 2^(n − origin), by its
/// bits; then t·2ʳ, by a polynomial in r: as t + t·(2ʳ − 1) where t comes from a table and is rounded
/// itself. At most 2 ulp (2.5 in float where the target does not fuse products and sums). An origin more
/// or less only scales the result, exactly. 2⁰ is exactly 1, and NaN gives NaN. Where the target has no
/// vectors, std::exp2.
///
/// Takes several packets at once, and each step for all of them before the next: the steps of one
/// packet wait for each other, those of different packets do not.
template <class Scalar, int Count>
SURFATTN_ALWAYS_INLINE void exp2_in_range(Packet<Scalar> (&x)[Count], Packet<Scalar> addend) {
  if constexpr (lanes<Scalar> == 1) {
    for (auto& number : x) number = std::exp2(number + addend);
  } else {
    Packet<Scalar> biased[Count], y[Count];
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) biased[i] = add(x[i], addend);
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) x[i] = subtract(x[i], subtract(biased[i], addend));
    constexpr auto& coefficients = exp2_polynomial<Scalar>;
    constexpr int degree = int(std::size(coefficients));
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) y[i] = broadcast(coefficients[degree - 1]);
    SURFATTN_UNROLL
    for (int k = degree - 2; k >= 0; --k) {
      const auto coefficient = broadcast(coefficients[k]);
      SURFATTN_UNROLL
      for (int i = 0; i < Count; ++i) y[i] = multiply_add(y[i], x[i], coefficient);
    }
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) {
      const auto power = stepped_power_of_two<Scalar>(biased[i]);
      if constexpr (exp2_steps<Scalar> == 1) {
        x[i] = multiply(multiply_add(y[i], x[i], broadcast(Scalar(1))), power);
      } else {
        x[i] = multiply_add(multiply(y[i], x[i]), power, power);
      }
    }
  }
}

/// The same for any x − origin up to there: a softmax takes it of scores, less a number that none of them
/// passes. Where it would be subnormal, but not smaller than half of the smallest normal number, it is
/// smaller than that number, or 0, and below that exactly 0, for −∞ too: a masked weight is exactly 0.
template <class Scalar, int Count>
SURFATTN_ALWAYS_INLINE void exp2(Packet<Scalar> (&x)[Count], const Exp2Origin<Scalar>& origin) {
  if constexpr (lanes < Scalar >> 1) {
    SURFATTN_UNROLL
    for (int i = 0; i < Count; ++i) x[i] = maximum(x[i], origin.smallest);
  }
  exp2_in_range<Scalar>(x, origin.addend);
}

}  // namespace surfattn::detail::simd
