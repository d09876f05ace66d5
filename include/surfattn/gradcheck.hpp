// surfattn layer 8: central differences with extrapolation, to check a gradient against its
// function.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <ostream>
#include <type_traits>

namespace surfattn {

namespace detail::gradcheck {

/// (f(x + h) - f(x - h)) / 2h, divided by the distance of the two points as they were rounded.
template <class Scalar, class Function>
Scalar symmetric_quotient(Function& function, Scalar x, Scalar step) {
  const Scalar above = x + step;
  const Scalar below = x - step;
  return (static_cast<Scalar>(function(above)) - static_cast<Scalar>(function(below))) /
         (above - below);
}

}  // namespace detail::gradcheck

/// The step that `central_difference` takes unless told otherwise: epsilon^(1/7), 0.0058 in double.
///
/// It balances the truncation error, of the order h^6, with the rounding error, of the order
/// epsilon / h, where f and its derivatives are of the order 1. What is then left is of the order
/// epsilon^(6/7): 4e-14 in double, 1e-6 in float. A function that varies over a length s much
/// shorter than max(1, |x|) wants s times this step; a long sum of large terms a longer one.
template <class Scalar>
Scalar default_difference_step() {
  static_assert(std::is_floating_point_v<Scalar>,
                "surfattn: a gradient check needs float, double or long double; check storage "
                "types of fewer bits through a function of one of these.");
  return std::pow(std::numeric_limits<Scalar>::epsilon(), Scalar(1) / Scalar(7));
}

/// Numerical derivative f'(x) of a scalar function of a scalar.
///
/// With D(h) = (f(x + h) - f(x - h)) / 2h = f' + c2 h^2 + c4 h^4 + c6 h^6 + ... , taken at h, h/2
/// and h/4, two rounds of extrapolation remove c2 and c4:
///   E(h) = (4 D(h/2) - D(h)) / 3,    f'(x) = (16 E(h/2) - E(h)) / 15 + O(h^6).
/// h = step * max(1, |x|). f must be smooth on [x - h, x + h]; it is called 6 times. A value that
/// is not finite gives a derivative that is not finite. Nothing is allocated. Source: L. F.
/// Richardson 1911, "The approximate arithmetical solution by finite differences"; C. J. F. Ridders
/// 1982, "Accurate computation of F'(x) and F'(x) F''(x)", who chooses the number of rounds
/// adaptively, where this function has a fixed one.
template <class Scalar, class Function>
requires std::is_floating_point_v<Scalar> Scalar
central_difference(Function&& function, Scalar x,
                   std::type_identity_t<Scalar> step = default_difference_step<Scalar>()) {
  const Scalar h = step * std::max(Scalar(1), std::abs(x));
  const Scalar whole = detail::gradcheck::symmetric_quotient(function, x, h);
  const Scalar half = detail::gradcheck::symmetric_quotient(function, x, h / 2);
  const Scalar quarter = detail::gradcheck::symmetric_quotient(function, x, h / 4);
  const Scalar coarse = (4 * half - whole) / 3;
  const Scalar fine = (4 * quarter - half) / 3;
  return (16 * fine - coarse) / 15;
}

/// Numerical gradient of a scalar function of a matrix, in the shape of x: the derivative by each
/// entry as above, with h = step * max(1, |x_ij|) for that entry.
///
/// x: any dense Eigen expression; the function receives its plain matrix type. Calls the function
/// 6 times for every entry; allocates one copy of x and the result. An empty x gives an empty
/// result.
template <class Derived, class Function>
typename Derived::PlainObject central_difference(
    Function&& function, const Eigen::MatrixBase<Derived>& x,
    typename Derived::Scalar step = default_difference_step<typename Derived::Scalar>()) {
  using Scalar = typename Derived::Scalar;
  using Plain = typename Derived::PlainObject;
  Plain point = x;
  Plain gradient = Plain::Zero(x.rows(), x.cols());
  for (Eigen::Index i = 0; i < x.rows(); ++i) {
    for (Eigen::Index j = 0; j < x.cols(); ++j) {
      const Scalar centre = point(i, j);
      const auto along_entry = [&](Scalar value) {
        point(i, j) = value;
        return static_cast<Scalar>(function(static_cast<const Plain&>(point)));
      };
      gradient(i, j) = central_difference(along_entry, centre, step);
      point(i, j) = centre;
    }
  }
  return gradient;
}

/// How a gradient is compared. Tolerances fit functions and gradients of the order 1.
template <class Scalar>
struct GradientCheckOptions {
  /// Largest error that passes: 1e-9 in double, 1e-4 in float.
  Scalar tolerance = std::pow(std::numeric_limits<Scalar>::epsilon(), Scalar(0.575));
  /// Step of the differences, see `default_difference_step`.
  Scalar step = default_difference_step<Scalar>();
  /// Added to the largest entry: gradients well below it are compared absolutely, so that the
  /// rounding errors of the differences do not fail a gradient that is 0.
  Scalar floor = Scalar(1e-3);
};

/// What a comparison of two gradients found. Converts to bool: did it pass?
template <class Scalar>
struct GradientCheck {
  Scalar error = 0;         ///< see `gradient_error`; infinity if a value is not finite
  Scalar tolerance = 0;     ///< largest error that passes
  Eigen::Index row = 0;     ///< where the two differ most (0, 0 if there are no entries)
  Eigen::Index column = 0;  ///< or the first entry that is not finite
  Scalar analytic = 0;      ///< the gradient under test there
  Scalar numeric = 0;       ///< the central difference there
  bool same_shape = true;   ///< gradients of different shapes have infinite error

  bool passed() const { return error <= tolerance; }
  explicit operator bool() const { return passed(); }
};

/// Compares two gradients of one shape: error = max |a - b| / (max(|a|, |b|) + floor), both maxima
/// over all entries. A value that is not finite in either makes it infinite, and so do different
/// shapes; two empty gradients have error 0. The options' step is not used here. O(entries),
/// allocates nothing.
template <class Analytic, class Numeric>
GradientCheck<typename Analytic::Scalar> compare_gradients(
    const Eigen::MatrixBase<Analytic>& analytic, const Eigen::MatrixBase<Numeric>& numeric,
    const GradientCheckOptions<typename Analytic::Scalar>& options = {}) {
  using Scalar = typename Analytic::Scalar;
  constexpr Scalar infinity = std::numeric_limits<Scalar>::infinity();
  GradientCheck<Scalar> check;
  check.tolerance = options.tolerance;
  check.same_shape = analytic.rows() == numeric.rows() && analytic.cols() == numeric.cols();
  if (!check.same_shape) check.error = infinity;
  if (!check.same_shape || analytic.size() == 0) return check;

  Scalar largest = 0;
  Scalar worst = -1;
  for (Eigen::Index i = 0; i < analytic.rows() && worst < infinity; ++i) {
    for (Eigen::Index j = 0; j < analytic.cols() && worst < infinity; ++j) {
      const Scalar a = analytic(i, j);
      const Scalar b = numeric(i, j);
      const Scalar difference = std::isfinite(a) && std::isfinite(b) ? std::abs(a - b) : infinity;
      largest = std::max({largest, std::abs(a), std::abs(b)});
      if (difference <= worst) continue;
      worst = difference;
      check.row = i, check.column = j;
      check.analytic = a, check.numeric = b;
    }
  }
  check.error = worst < infinity ? worst / (largest + options.floor) : infinity;
  return check;
}

/// The number alone: max |a - b| / (max(|a|, |b|) + floor), infinity if a value is not finite or
/// the shapes differ, 0 for empty gradients.
template <class Analytic, class Numeric>
typename Analytic::Scalar gradient_error(
    const Eigen::MatrixBase<Analytic>& analytic, const Eigen::MatrixBase<Numeric>& numeric,
    typename Analytic::Scalar floor = GradientCheckOptions<typename Analytic::Scalar>{}.floor) {
  GradientCheckOptions<typename Analytic::Scalar> options;
  options.floor = floor;
  return compare_gradients(analytic, numeric, options).error;
}

/// Checks an analytic gradient of a scalar function of a matrix at x by central differences:
///
///     const auto loss = [&](const Matrix<double>& q) { return grad_out.cwiseProduct(f(q)).sum(); };
///     const auto check = surfattn::check_gradient(loss, q, gradient);
///     if (!check) std::cerr << check << '\n';
///
/// analytic: the shape of x. See `central_difference` for cost and step, `compare_gradients` for
/// the error. Reports and never throws.
template <class Derived, class Analytic, class Function>
GradientCheck<typename Derived::Scalar> check_gradient(
    Function&& function, const Eigen::MatrixBase<Derived>& x,
    const Eigen::MatrixBase<Analytic>& analytic,
    const GradientCheckOptions<typename Derived::Scalar>& options = {}) {
  return compare_gradients(analytic, central_difference(function, x, options.step), options);
}

/// The same for a scalar function of a scalar.
template <class Scalar, class Function>
requires std::is_floating_point_v<Scalar> GradientCheck<Scalar> check_gradient(
    Function&& function, Scalar x, std::type_identity_t<Scalar> analytic,
    const GradientCheckOptions<std::type_identity_t<Scalar>>& options = {}) {
  using Entry = Eigen::Matrix<Scalar, 1, 1>;
  const Scalar numeric = central_difference(function, x, options.step);
  return compare_gradients(Entry::Constant(analytic), Entry::Constant(numeric), options);
}

/// One line: "gradient failed: error 1.2e-06 > 1e-09 at (0, 3): analytic 0.5, numeric 0.50000012".
template <class Scalar>
std::ostream& operator<<(std::ostream& stream, const GradientCheck<Scalar>& check) {
  if (!check.same_shape) return stream << "gradient failed: its shape is not that of the input";
  const std::streamsize precision = stream.precision(2);
  stream << "gradient " << (check ? "passed" : "failed") << ": error " << check.error
         << (check ? " <= " : " > ") << check.tolerance;
  stream.precision(std::numeric_limits<Scalar>::max_digits10);
  stream << " at (" << check.row << ", " << check.column << "): analytic " << check.analytic
         << ", numeric " << check.numeric;
  stream.precision(precision);
  return stream;
}

}  // namespace surfattn
