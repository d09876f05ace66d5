// Surfaces with an edge, sampled with noise: where a projection ought to land is known.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <numbers>
#include <random>
#include <surfattn/types.hpp>

namespace surfattn::test {

/// A surface p(a, b) for a and b from 0 to 1, with its normal. Only at a = 0 and a = 1 does it have an edge that is measured.
struct TestSurface {
  const char* name;
  double bandwidth, ridge, noise;
  Index samples;
  double edge_width;  // in units of a
  std::function<RowVector<double>(double a, double b)> point, normal;
  std::function<double(const RowVector<double>&)> distance;  // to the surface
};

inline RowVector<double> row(std::initializer_list<double> numbers) {
  RowVector<double> result(static_cast<Index>(numbers.size()));
  std::copy(numbers.begin(), numbers.end(), result.data());
  return result;
}

/// Three quarters of a circle of radius 1.
inline TestSurface arc() {
  constexpr double length = 1.5 * std::numbers::pi;
  const auto point = [](double a, double) {
    return row({std::cos(length * a), std::sin(length * a)});
  };
  const auto distance = [point](const RowVector<double>& x) {
    double angle = std::atan2(x[1], x[0]);
    if (angle < 0) angle += 2 * std::numbers::pi;
    if (angle <= length) return std::abs(x.norm() - 1);
    return std::min((x - point(0, 0)).norm(), (x - point(1, 0)).norm());
  };
  return {"arc", 0.2, 0.002, 0.02, 600, 0.2 / length, point, point, distance};
}

/// A sphere of radius 1 without what lies within 0.6 rad of its poles.
inline TestSurface sphere() {
  constexpr double low = 0.6, high = std::numbers::pi - 0.6;
  const auto point = [](double a, double b) {
    const double polar = low + (high - low) * a, turn = 2 * std::numbers::pi * b;
    return row(
        {std::sin(polar) * std::cos(turn), std::sin(polar) * std::sin(turn), std::cos(polar)});
  };
  const auto distance = [point](const RowVector<double>& x) {
    const double polar = std::acos(x[2] / x.norm());
    if (low <= polar && polar <= high) return std::abs(x.norm() - 1);
    const double turn = std::atan2(x[1], x[0]) / (2 * std::numbers::pi);
    return (x - point(polar < low ? 0 : 1, turn)).norm();
  };
  return {"sphere", 0.2, 0.002, 0.02, 3000, 0.2 / (high - low), point, point, distance};
}

/// The Swiss roll (t cos t, h, t sin t), t from 1.5π to 4.5π, in tenths; its edges along t.
inline TestSurface swiss_roll() {
  const auto turn = [](double a) { return 1.5 * std::numbers::pi + 3 * std::numbers::pi * a; };
  const auto point = [turn](double a, double b) {
    const double t = turn(a);
    return row({0.1 * t * std::cos(t), 2 * b, 0.1 * t * std::sin(t)});
  };
  const auto normal = [turn](double a, double) {
    const double t = turn(a);
    RowVector<double> n = row({std::sin(t) + t * std::cos(t), 0, -(std::cos(t) - t * std::sin(t))});
    return RowVector<double>(n / n.norm());
  };
  const auto distance = [point](const RowVector<double>& x) {
    double least = 1e9;
    const double b = std::clamp(x[1] / 2, 0.0, 1.0);
    for (int i = 0; i <= 20000; ++i) least = std::min(least, (x - point(i / 20000.0, b)).norm());
    return least;
  };
  return {"Swiss roll", 0.2, 0.002, 0.02, 4000, 0.2 / 9.4, point, normal, distance};
}

/// Half of a torus of radii 1 and 0.4, cut across the tube.
inline TestSurface torus() {
  const auto frame = [](double a, double b, double radius, double centre) {
    const double along = std::numbers::pi * a, around = 2 * std::numbers::pi * b;
    const double r = centre + radius * std::cos(around);
    return row({r * std::cos(along), r * std::sin(along), radius * std::sin(around)});
  };
  const auto point = [frame](double a, double b) { return frame(a, b, 0.4, 1); };
  const auto normal = [frame](double a, double b) { return frame(a, b, 1, 0); };
  const auto distance = [](const RowVector<double>& x) {
    RowVector<double> y = x;
    double beyond = 0;
    if (y[1] < 0) {
      beyond = y[1];
      y[1] = 0;
    }
    const double across = std::hypot(std::hypot(y[0], y[1]) - 1, y[2]) - 0.4;
    return std::hypot(across, beyond);
  };
  return {"torus", 0.2, 0.002, 0.015, 5000, 0.2 / std::numbers::pi, point, normal, distance};
}

/// Points of a surface moved along its normal by noise, and where they come from.
struct NoisyPoints {
  Matrix<double> points, feet;
  std::vector<double> place;  // a of each
};

inline NoisyPoints noisy_points(const TestSurface& surface, Index count, bool only_edges,
                                std::mt19937_64& random) {
  std::uniform_real_distribution<double> uniform(0, 1);
  std::normal_distribution<double> normal(0, surface.noise);
  const Index width = surface.point(0, 0).size();
  NoisyPoints noisy{Matrix<double>(count, width), Matrix<double>(count, width), {}};
  for (Index i = 0; i < count; ++i) {
    double a = uniform(random);
    if (only_edges) a = a < 0.5 ? 2 * a * surface.edge_width : 1 - 2 * (1 - a) * surface.edge_width;
    const double b = uniform(random);
    noisy.place.push_back(a);
    noisy.feet.row(i) = surface.point(a, b);
    noisy.points.row(i) = noisy.feet.row(i) + normal(random) * surface.normal(a, b);
  }
  return noisy;
}

}  // namespace surfattn::test
