#pragma once
// An electrocardiogram without a patient: the dynamical model of P. E. McSharry, G. D. Clifford,
// L. Tarassenko and L. A. Smith, "A dynamical model for generating synthetic electrocardiogram
// signals", IEEE Trans. Biomed. Eng. 50:289 (2003).
//
//     x' = αx − ωy,   y' = αy + ωx,   α = 1 − √(x² + y²),   ω = 2π/R(t),
//     z' = −Σ_i a_i·Δθ_i·exp(−Δθ_i²/(2b_i²)) − (z − z₀(t)),   Δθ_i = θ − θ_i in (−π, π],
//
// with θ the angle of (x, y), one turn a heartbeat. R(t), the length of a beat, varies with blood
// pressure (0.1 Hz) and breath (0.25 Hz); z₀ = 0.005·sin(2π·0.25 Hz·t): breath moves the baseline.

#include <Eigen/Core>
#include <array>
#include <cmath>
#include <random>
#include <vector>

namespace examples {

class EcgSimulator {
 public:
  explicit EcgSimulator(unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<double> phase(0, 2 * pi);
    // Two peaks of a spectrum, each a Gaussian of deviation 0.01 Hz, cut into sines.
    for (const double centre : {0.1, 0.25}) {
      for (int k = -4; k <= 4; ++k) {
        const double amplitude = 0.02 * std::exp(-0.125 * k * k / 2);
        waves_.push_back({amplitude, centre + 0.005 * k, phase(generator)});
      }
    }
  }

  /// So many seconds at so many samples a second, in millivolts from −0.4 to 1.2.
  Eigen::VectorXd simulate(double seconds, double rate) const {
    Eigen::VectorXd signal(static_cast<Eigen::Index>(seconds * rate));
    State state{-1, 0, 0};
    constexpr int steps = 2;  // of the integration, in a sample
    const double h = 1 / (rate * steps);
    for (Eigen::Index i = 0; i < signal.size(); ++i) {
      for (int s = 0; s < steps; ++s)
        state = stepped(state, (static_cast<double>(i) * steps + s) * h, h);
      signal[i] = state[2];
    }
    const double low = signal.minCoeff(), high = signal.maxCoeff();
    return (signal.array() - low) * (1.6 / (high - low)) - 0.4;
  }

 private:
  using State = Eigen::Array3d;
  struct Event {
    double angle, height, width;  // θ_i, a_i, b_i
  };
  struct Wave {
    double amplitude, frequency, phase;
  };
  static constexpr double pi = 3.14159265358979323846;
  // P, Q, R, S and T: Table I of the paper
  static constexpr std::array<Event, 5> events{{{-pi / 3, 1.2, 0.25},
                                                {-pi / 12, -5, 0.1},
                                                {0, 30, 0.1},
                                                {pi / 12, -7.5, 0.1},
                                                {pi / 2, 0.75, 0.4}}};

  double beat_length(double t) const {
    double length = 0.85;
    for (const Wave& wave : waves_)
      length += wave.amplitude * std::sin(2 * pi * wave.frequency * t + wave.phase);
    return length;
  }

  State derivative(const State& s, double t) const {
    const double alpha = 1 - std::hypot(s[0], s[1]), omega = 2 * pi / beat_length(t);
    const double theta = std::atan2(s[1], s[0]);
    double slope = 0.005 * std::sin(2 * pi * 0.25 * t) - s[2];
    for (const Event& e : events) {
      const double apart = std::remainder(theta - e.angle, 2 * pi);
      slope -= e.height * apart * std::exp(-apart * apart / (2 * e.width * e.width));
    }
    return {alpha * s[0] - omega * s[1], alpha * s[1] + omega * s[0], slope};
  }

  /// One step of the classical Runge–Kutta method.
  State stepped(const State& s, double t, double h) const {
    const State k1 = derivative(s, t), k2 = derivative(s + h / 2 * k1, t + h / 2),
                k3 = derivative(s + h / 2 * k2, t + h / 2), k4 = derivative(s + h * k3, t + h);
    return s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4);
  }

  std::vector<Wave> waves_;
};

}  // namespace examples
