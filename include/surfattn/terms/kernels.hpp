// surfattn layer 3: kernels of the distance other than the Gaussian, for the surface form

#pragma once

#include <cmath>
#include <limits>
#include <surfattn/terms/modifiers.hpp>

/// In the surface form under the uniform prior a score is S = −‖q − k‖²/(2σ²), so that another kernel
/// of the distance is a function of S; anywhere else these terms are an error. (Log-weights of keys
/// come behind the kernel, as an AdditiveBias with one row.) Gradients of queries, keys and bandwidth
/// go through it. Temperature, listed before, gives each head a bandwidth of its own, σ/√τ_h.
namespace surfattn {
namespace detail {

/// f(S) = −a·log(1 − 2S/ν),   f'(S) = (2a/ν)/(1 − 2S/ν).
struct StudentTKernel {
  double degrees_of_freedom, exponent;

  template <class Scalar>
  ValueAndDerivative<Scalar> operator()(Scalar score, const Position&) const {
    const Scalar freedom = static_cast<Scalar>(degrees_of_freedom),
                 power = static_cast<Scalar>(exponent);
    const Scalar base = -2 * score / freedom;
    return {-power * std::log1p(base), 2 * power / (freedom * (1 + base))};
  }
};

/// f(S) = log(1 + 2S),   f'(S) = 2/(1 + 2S); out of reach −∞ and 0.
struct EpanechnikovKernel {
  template <class Scalar>
  ValueAndDerivative<Scalar> operator()(Scalar score, const Position&) const {
    const Scalar weight = 1 + 2 * score;
    if (weight <= Scalar(0)) return {-std::numeric_limits<Scalar>::infinity(), Scalar(0)};
    return {std::log(weight), 2 / weight};
  }
};

}  // namespace detail

/// Student's t in the place of the Gaussian, with ν > 0 degrees of freedom:
///
///     w ∝ (1 + ‖q − k‖²/(ν·σ²))^(−(ν + d)/2),
///
/// d the head's width. Its tails are heavy: far keys keep some weight, the more the smaller ν;
/// ν → ∞ is the Gaussian. (The kernel of t-SNE, van der Maaten and Hinton 2008, is ν = 1, d = 1.)
/// List it as a term of `project`. Errors: ν that is not positive and finite; scores that are no
/// distances (`attention`, or a prior that is not uniform).
struct StudentT {
  static constexpr bool is_distance_kernel = true;

  double degrees_of_freedom;

  constexpr explicit StudentT(double nu) : degrees_of_freedom(nu) {}

  auto bind(const detail::Shape& shape, const detail::Require& require) const {
    require.positive("the degrees of freedom of StudentT", degrees_of_freedom);
    const double exponent = (degrees_of_freedom + static_cast<double>(shape.head_dim)) / 2;
    return detail::BoundModifier<detail::StudentTKernel>{{degrees_of_freedom, exponent}};
  }
};

/// Epanechnikov's kernel (1969) in the place of the Gaussian, of compact support: σ is its radius,
///
///     w ∝ max(0, 1 − ‖q − k‖²/σ²).
///
/// A query that has no key within σ gives 0, with log-sum-exp −∞ and no gradient. List it as a term of
/// `project`. The gradient is exact but where a key lies at distance σ, where the
/// weight has a corner. Errors: scores that are no distances, as for StudentT.
struct Epanechnikov {
  static constexpr bool is_distance_kernel = true;

  detail::BoundModifier<detail::EpanechnikovKernel> bind(const detail::Shape&,
                                                         const detail::Require&) const {
    return {};
  }
};

}  // namespace surfattn
