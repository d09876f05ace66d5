// Gradients of the fast path against central differences, to 1e-8.
#pragma once

#include <surfattn/gradcheck.hpp>

#include "support/catch.hpp"
#include "support/problem.hpp"

namespace surfattn::test {

/// `analytic` is the gradient of loss(point) at `at`, a matrix or a number.
template <class Point, class Analytic, class Loss>
void check_by_differences(const char* name, const Loss& loss, const Point& at,
                          const Analytic& analytic) {
  const auto check = check_gradient(loss, at, analytic, {.tolerance = 1e-8});
  INFO(name << ": " << check);
  CHECK(check.passed());
}

/// The gradients of a loss(options) by bandwidth and explicit prior, if the options have them; the prior is that of the problem,
/// or its first column.
template <class Loss>
void check_options_by_differences(const Loss& loss, const SurfaceOptions& options,
                                  const Problem<double>& p, double of_bandwidth,
                                  const Matrix<double>& of_prior) {
  const auto with = [&](const auto& change) {
    SurfaceOptions moved = options;
    change(moved);
    return loss(moved);
  };
  if (options.bandwidth) {
    check_by_differences(
        "bandwidth", [&](double x) { return with([&](auto& o) { o.bandwidth = x; }); },
        *options.bandwidth, of_bandwidth);
  }
  if (!options.prior.is_explicit()) return;
  const Matrix<double> prior =
      options.prior.cols() == 1 ? Matrix<double>(p.log_prior.leftCols(1)) : p.log_prior;
  check_by_differences(
      "log prior", [&](const Matrix<double>& x) { return with([&](auto& o) { o.prior = x; }); },
      prior, of_prior);
}

}  // namespace surfattn::test
