#pragma once
// The same attention, standard and as a surface projection: one function, one set of gradients,
// computed in either form so that results and times can be compared.

#include <cmath>
#include <cstdio>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <surfattn/surfattn.hpp>
#include <utility>
#include <vector>

#include "stopwatch.hpp"

namespace examples {

/// F(Q, K) = P(Q)·readout under a causal mask, its last query being shown all keys.
template <class S>
class TwoForms {
 public:
  using Matrix = surfattn::Matrix<S>;
  struct Result {
    Matrix out, grad_queries, grad_keys;
  };

  /// Weights by distance exp(−‖q − k‖²/(2σ²))·π, or, without log π, exp(q·k/σ²).
  ///
  /// A distance is a dot product with one column more: S = β q·k + b, b = log π − β‖k‖²/2, β =
  /// 1/σ², where the queries hold 1 and the keys b/β.
  TwoForms(Matrix queries, Matrix keys, Matrix readout, double bandwidth,
           std::optional<Matrix> log_prior = {})
      : queries_(std::move(queries)),
        keys_(std::move(keys)),
        readout_(std::move(readout)),
        log_prior_(std::move(log_prior)),
        bandwidth_(bandwidth),
        standard_queries_(queries_),
        standard_keys_(keys_) {
    draw_upstream_gradient();
    if (!log_prior_) return;
    const Eigen::Index width = keys_.cols();
    standard_queries_.conservativeResize(Eigen::NoChange, width + 1);
    standard_queries_.col(width).setOnes();
    standard_keys_.conservativeResize(Eigen::NoChange, width + 1);
    standard_keys_.col(width) =
        *log_prior_ * static_cast<S>(bandwidth * bandwidth) - keys_.rowwise().squaredNorm() / S(2);
  }

  Result surface(bool backward) const {
    const surfattn::KeyPrior prior =
        log_prior_ ? surfattn::KeyPrior(*log_prior_) : surfattn::KeyPrior::sdpa;
    const surfattn::SurfaceOptions options{.bandwidth = bandwidth_, .prior = prior};
    const auto forward = surfattn::project_forward(queries_, keys_, options, mask);
    Result result{forward.out * readout_, {}, {}};
    if (!backward) return result;
    const Matrix grad_points = grad_out_ * readout_.transpose();
    auto grad = surfattn::project_backward(queries_, keys_, forward, grad_points, options, mask);
    result.grad_queries = std::move(grad.queries);
    result.grad_keys = std::move(grad.keys);
    return result;
  }

  Result standard(bool backward) const {
    const surfattn::Options options{.scale = 1 / (bandwidth_ * bandwidth_)};
    const Matrix values = keys_ * readout_;
    auto forward =
        surfattn::attention_forward(standard_queries_, standard_keys_, values, options, mask);
    Result result;
    if (backward) {
      const Eigen::Index width = keys_.cols();
      const auto grad = surfattn::attention_backward(standard_queries_, standard_keys_, values,
                                                     forward, grad_out_, options, mask);
      result.grad_queries = grad.queries.leftCols(width);
      // The keys made the values too, and, by b/β = (log π)/β − ‖k‖²/2, the column more.
      result.grad_keys = grad.keys.leftCols(width) + grad.values * readout_.transpose();
      if (log_prior_) result.grad_keys -= grad.keys.col(width).asDiagonal() * keys_;
    }
    result.out = std::move(forward.out);
    return result;
  }

  Eigen::Index rows() const { return keys_.rows(); }

 private:
  void draw_upstream_gradient() {
    std::mt19937 generator(1);
    std::normal_distribution<double> normal;
    grad_out_.resize(queries_.rows(), readout_.cols());
    for (S& entry : grad_out_.reshaped()) entry = static_cast<S>(normal(generator));
  }

  static constexpr surfattn::Causal mask{surfattn::Align::bottom_right};
  Matrix queries_, keys_, readout_, grad_out_;
  std::optional<Matrix> log_prior_;
  double bandwidth_;
  Matrix standard_queries_, standard_keys_;
};

/// One line: the largest differences of the two forms, and beside each the largest magnitude.
template <class S>
void print_differences(const std::string& name, const TwoForms<S>& forms) {
  using Matrix = surfattn::Matrix<S>;
  const auto surface = forms.surface(true), standard = forms.standard(true);
  const auto largest = [](const Matrix& m) { return static_cast<double>(m.cwiseAbs().maxCoeff()); };
  std::printf("  %-38s", name.c_str());
  for (const auto part : {&TwoForms<S>::Result::out, &TwoForms<S>::Result::grad_queries,
                          &TwoForms<S>::Result::grad_keys}) {
    std::printf("  %7.1e of %5.3g", largest(surface.*part - standard.*part),
                largest(standard.*part));
  }
  std::printf("\n");
}

/// One line: the median microseconds of standard and surface form, forward and with backward.
template <class S>
void print_times(const std::string& name, const TwoForms<S>& forms) {
  volatile S sink = 0;  // keeps the calls from being optimised away
  std::vector<std::function<void()>> runs;
  for (const bool backward : {false, true}) {
    runs.emplace_back([&, backward] { sink = forms.standard(backward).out(0, 0); });
    runs.emplace_back([&, backward] { sink = forms.surface(backward).out(0, 0); });
  }
  const std::vector<double> times = median_times(runs);
  std::printf("  %-38s %10.1f %10.1f %14.1f %10.1f\n", name.c_str(), times[0], times[1], times[2],
              times[3]);
}

}  // namespace examples
