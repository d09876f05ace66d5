#pragma once
// Causal filters of a noisy signal that see one sample after the other: the linear ones that the
// examples compare with, and what runs and scores any of them.

#include <Eigen/Core>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "progress.hpp"

namespace examples {

using Eigen::Index;
using Eigen::VectorXd;

/// Receives sample after sample and estimates the clean signal at a fixed place beside the newest.
class Stream {
 public:
  virtual ~Stream() = default;
  /// How many samples before the newest the estimate is for; −1 for the one that is to come.
  virtual Index delay() const = 0;
  /// Receives the newest sample and returns the estimate.
  virtual double push(double sample) = 0;
};

/// The newest samples, oldest first; before the first sample the signal counts as constant.
class History {
 public:
  explicit History(Index size) : samples_(size) {}

  void push(double sample) {
    if (is_empty_) samples_.setConstant(sample);
    is_empty_ = false;
    for (Index i = 0; i + 1 < samples_.size(); ++i) samples_[i] = samples_[i + 1];
    samples_[samples_.size() - 1] = sample;
  }
  const VectorXd& samples() const { return samples_; }

 private:
  VectorXd samples_;
  bool is_empty_ = true;
};

/// The mean of the newest samples, as an estimate of the middle one or of the next.
class MovingAverage : public Stream {
 public:
  MovingAverage(Index length, Index delay) : history_(length), delay_(delay) {}
  Index delay() const override { return delay_; }
  double push(double sample) override {
    history_.push(sample);
    return history_.samples().mean();
  }

 private:
  History history_;
  Index delay_;
};

/// What recursive least squares updates: R⁻¹, R = Σ_i λ^(t−i) u_i u_iᵀ, by the matrix inversion
/// lemma. One triangle is stored, so that R⁻¹ stays symmetric however long it runs.
class InverseCorrelation {
 public:
  InverseCorrelation(Index order, double forgetting, double first_power)
      : inverse_(Eigen::MatrixXd::Identity(order, order) / first_power),
        gain_(order),
        forgetting_(forgetting) {}

  /// Takes in u and returns the gain R⁻¹u.
  const VectorXd& update(const VectorXd& u) {
    gain_.noalias() = inverse_.selfadjointView<Eigen::Lower>() * u;
    const double power = forgetting_ + u.dot(gain_);
    inverse_.selfadjointView<Eigen::Lower>().rankUpdate(gain_, -1 / power);
    inverse_.triangularView<Eigen::Lower>() *= 1 / forgetting_;
    gain_ /= power;
    return gain_;
  }

  /// (R⁻¹u)_row, with the R⁻¹ of the last update.
  double solved(Index row, const VectorXd& u) const {
    return inverse_.row(row).head(row + 1).dot(u.head(row + 1)) +
           inverse_.col(row).tail(u.size() - row - 1).dot(u.tail(u.size() - row - 1));
  }

 private:
  Eigen::MatrixXd inverse_;
  VectorXd gain_;
  double forgetting_;
};

/// The newest samples about their exponentially weighted mean, and the sum of the weights.
class CentredHistory {
 public:
  CentredHistory(Index size, double forgetting)
      : history_(size), centred_(size), forgetting_(forgetting) {}

  const VectorXd& push(double sample) {
    history_.push(sample);
    weight_ = forgetting_ * weight_ + 1;
    mean_ += (sample - mean_) / weight_;
    centred_ = history_.samples().array() - mean_;
    return centred_;
  }
  double weight() const { return weight_; }
  double mean() const { return mean_; }

 private:
  History history_;
  VectorXd centred_;
  double forgetting_, weight_ = 0, mean_ = 0;
};

/// The adaptive Wiener filter: with R/n the recursive estimate of the noisy samples' correlation and
/// s² the known variance of white noise, the best linear estimate of the clean u is
/// u − s²·(R/n)⁻¹u, of which one entry is kept. It does better than recursive least squares without
/// s², which may not use the noisy sample that it estimates.
class AdaptiveWiener : public Stream {
 public:
  AdaptiveWiener(Index order, double forgetting, Index delay, double noise)
      : history_(order, forgetting),
        inverse_(order, forgetting, 10 * noise * noise),
        delay_(delay),
        row_(order - 1 - delay),
        variance_(noise * noise) {}
  Index delay() const override { return delay_; }

  double push(double sample) override {
    const VectorXd& u = history_.push(sample);
    inverse_.update(u);
    return history_.mean() + u[row_] - variance_ * history_.weight() * inverse_.solved(row_, u);
  }

 private:
  CentredHistory history_;
  InverseCorrelation inverse_;
  Index delay_, row_;
  double variance_;
};

/// Recursive least squares: the next sample as a linear function of the newest.
class LinearPredictor : public Stream {
 public:
  LinearPredictor(Index order, double forgetting, double noise)
      : history_(order, forgetting),
        inverse_(order, forgetting, 10 * noise * noise),
        coefficients_(VectorXd::Zero(order)),
        last_(VectorXd::Zero(order)) {}
  Index delay() const override { return -1; }

  double push(double sample) override {
    const double error = sample - prediction_;
    coefficients_ += error * inverse_.update(last_);
    last_ = history_.push(sample);
    prediction_ = history_.mean() + coefficients_.dot(last_);
    return prediction_;
  }

 private:
  CentredHistory history_;
  InverseCorrelation inverse_;
  VectorXd coefficients_, last_;
  double prediction_ = 0;
};

struct Estimate {
  VectorXd values;  // for each sample of the signal; the signal itself where there is no estimate
  double microseconds = 0;  // a sample, in the mean
};

/// Runs a stream over a signal.
inline Estimate run_stream(Stream& stream, const VectorXd& noisy) {
  using Clock = std::chrono::steady_clock;
  Estimate estimate{noisy};
  const Clock::time_point start = Clock::now();
  for (Index t = 0; t < noisy.size(); ++t) {
    const double value = stream.push(noisy[t]);
    const Index at = t - stream.delay();
    if (at >= 0 && at < noisy.size()) estimate.values[at] = value;
  }
  const std::chrono::duration<double, std::micro> time = Clock::now() - start;
  estimate.microseconds = time.count() / static_cast<double>(noisy.size());
  return estimate;
}

/// Signal-to-noise ratio in decibels: the variance of `clean` over the mean squared error.
inline double decibels(const VectorXd& clean, const VectorXd& estimate) {
  return 10 * std::log10((clean.array() - clean.mean()).square().sum() /
                         (estimate - clean).squaredNorm());
}

/// A filter with its parameters, in words.
struct Candidate {
  std::string parameters;
  std::function<std::unique_ptr<Stream>()> make;
};

/// Which candidate has the best signal-to-noise ratio over [begin, end) of the signal.
inline std::size_t best_candidate(const std::vector<Candidate>& candidates, const VectorXd& noisy,
                                  const VectorXd& clean, Index begin, Index end,
                                  const std::string& task) {
  Progress progress(task, static_cast<double>(candidates.size()));
  std::vector<double> ratios;
  for (const Candidate& candidate : candidates) {
    const Estimate estimate = run_stream(*candidate.make(), noisy.head(end));
    ratios.push_back(
        decibels(clean.segment(begin, end - begin), estimate.values.segment(begin, end - begin)));
    progress.add(1);
  }
  return static_cast<std::size_t>(std::max_element(ratios.begin(), ratios.end()) - ratios.begin());
}

}  // namespace examples
