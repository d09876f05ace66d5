// The filters that example 7 compares with, and its simulated electrocardiogram.

#include <Eigen/LU>
#include <cmath>
#include <random>

#include "../examples/support/ecg_simulator.hpp"
#include "../examples/support/streams.hpp"
#include "support/catch.hpp"

namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;
using examples::Index;

VectorXd white_noise(Index size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  VectorXd values(size);
  for (double& value : values) value = normal(generator);
  return values;
}

/// x_t = 1.6·x_{t−1} − 0.8·x_{t−2} + white noise
VectorXd autoregression(Index size) {
  VectorXd values = white_noise(size, 3);
  for (Index t = 2; t < size; ++t) values[t] += 1.6 * values[t - 1] - 0.8 * values[t - 2];
  return values;
}

}  // namespace

TEST_CASE("the inverse correlation is the inverse of the weighted sum", "[streams]") {
  constexpr Index order = 5;
  constexpr double forgetting = 0.9, first_power = 2;
  examples::InverseCorrelation inverse(order, forgetting, first_power);
  MatrixXd sum = first_power * MatrixXd::Identity(order, order);
  for (unsigned t = 0; t < 40; ++t) {
    const VectorXd u = white_noise(order, t);
    const VectorXd gain = inverse.update(u);
    sum = forgetting * sum + u * u.transpose();
    const MatrixXd expected = sum.inverse();
    CHECK((gain - expected * u).norm() <= 1e-11);
    for (Index row = 0; row < order; ++row)
      CHECK(std::abs(inverse.solved(row, u) - expected.row(row).dot(u)) <= 1e-11);
  }
}

TEST_CASE("the linear predictor leaves the innovation of an autoregression", "[streams]") {
  const VectorXd signal = autoregression(4000);
  examples::LinearPredictor predictor(2, 1, 0.1);
  const VectorXd error = examples::run_stream(predictor, signal).values - signal;
  const VectorXd innovation = white_noise(4000, 3);
  CHECK((error + innovation).tail(2000).norm() <= 0.1 * innovation.tail(2000).norm());
}

TEST_CASE("the adaptive Wiener filter comes near the Wiener filter", "[streams]") {
  constexpr Index size = 20000, order = 9, delay = 4;
  const VectorXd clean = autoregression(size);
  constexpr double noise = 2;
  const VectorXd noisy = clean + noise * white_noise(size, 5);
  examples::AdaptiveWiener filter(order, 1, delay, noise);
  const VectorXd adapted = examples::run_stream(filter, noisy).values;

  MatrixXd correlation = MatrixXd::Zero(order, order);  // of the clean signal, in hindsight
  for (Index t = order - 1; t < size; ++t) {
    const VectorXd u = clean.segment(t - order + 1, order);
    correlation += u * u.transpose() / static_cast<double>(size - order + 1);
  }
  const VectorXd weights =
      (correlation + noise * noise * MatrixXd::Identity(order, order)).inverse() *
      correlation.col(order - 1 - delay);
  VectorXd best = noisy;
  for (Index t = order - 1; t < size; ++t)
    best[t - delay] = weights.dot(noisy.segment(t - order + 1, order));

  const Index scored = size / 2;
  const double of_adapted = examples::decibels(clean.tail(scored), adapted.tail(scored)),
               of_best = examples::decibels(clean.tail(scored), best.tail(scored)),
               of_noisy = examples::decibels(clean.tail(scored), noisy.tail(scored));
  CHECK(of_best >= of_noisy + 2);
  CHECK(of_adapted >= of_best - 0.1);
}

TEST_CASE("a stream's estimates stand at its delay", "[streams]") {
  const VectorXd ramp = VectorXd::LinSpaced(20, 0, 19);
  examples::MovingAverage middle(5, 2), next(1, -1);
  CHECK((examples::run_stream(middle, ramp).values - ramp).segment(2, 16).norm() <= 1e-12);
  const VectorXd predicted = examples::run_stream(next, ramp).values;
  CHECK((predicted - ramp).tail(19).isApproxToConstant(-1));
  CHECK(predicted[0] == ramp[0]);
}

TEST_CASE("the best candidate is the one with the least error", "[streams]") {
  const VectorXd clean = VectorXd::LinSpaced(400, 0, 1), noisy = clean + white_noise(400, 7);
  std::vector<examples::Candidate> candidates;
  for (const Index length : {1, 41, 7})
    candidates.push_back(
        {"", [=] { return std::make_unique<examples::MovingAverage>(length, length / 2); }});
  CHECK(examples::best_candidate(candidates, noisy, clean, 50, 350, "") == 1);
}

TEST_CASE("the simulated heart beats at its rate, between -0.4 and 1.2 mV", "[streams]") {
  constexpr double seconds = 60, rate = 250;
  const VectorXd signal = examples::EcgSimulator(1).simulate(seconds, rate);
  CHECK(signal.minCoeff() == Approx(-0.4));
  CHECK(signal.maxCoeff() == Approx(1.2));
  int beats = 0;
  for (Index i = 1; i < signal.size(); ++i) beats += signal[i - 1] < 0.7 && signal[i] >= 0.7;
  CHECK(std::abs(beats - seconds / 0.85) <= 3);
}
