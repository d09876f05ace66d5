// Example 8. Points with noise, moved back onto the curve that they were drawn from.
//
// The points are the surface's only description: they are the keys, and the queries too. Three ways
// to move a point q, with weights w_j ∝ exp(−‖q − k_j‖²/(2σ²)) on the points k_j nearby:
//
//     local constant   P(q) = Σ w_j k_j, the mean of the neighbours. Where the curve bends, the mean
//                      lies inside the bend; where it ends, the mean lies before the end.
//     iterated         q ← P(q), three times. With a small σ the points come nearest to the curve, to
//                      the ridge of their density, but they also slide along it and gather.
//     local linear     q is moved onto the line that fits the neighbours, by all but the share
//                      s²/(s² + λ) of its way across the line, s the noise: no pull at an end.
//
// Two mean distances are printed, for points near an end (of the twentieth part of the curve before
// each) and for the others: from the curve to the moved point, and from the foot, the point of the
// curve that is nearest to q before it moves, so that sliding along the curve counts.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/arguments.hpp"
#include "support/svg_plot.hpp"

namespace {

using surfattn::Index;
using Points = surfattn::Matrix<double>;

constexpr double pi = 3.14159265358979323846, noise = 0.07;

// ------------------------------------------------------------------------------- curves, points

struct Curve {
  std::string name;
  Points polyline;  // so fine that its vertices stand for the curve, equally far apart
  Index points;

  Index last() const { return polyline.rows() - 1; }
};

/// Walks along a curve, parametrised by t in [0, 1], in steps of equal length.
Curve curve(const std::string& name, const std::function<Points(double)>& at, Index points) {
  constexpr Index fine = 20000, vertices = 2001;
  std::vector<double> length{0};
  for (Index i = 1; i <= fine; ++i)
    length.push_back(length.back() + (at(double(i) / fine) - at(double(i - 1) / fine)).norm());
  Points polyline(vertices, 2);
  for (Index i = 0; i < vertices; ++i) {
    const double target = length.back() * double(i) / (vertices - 1);
    const auto step = std::lower_bound(length.begin(), length.end(), target) - length.begin();
    polyline.row(i) = at(double(step) / fine);
  }
  return {name, polyline, points};
}

Points polar(double radius, double angle) {
  return Eigen::RowVector2d(radius * std::cos(angle), radius * std::sin(angle));
}

std::array<Curve, 2> curves() {
  return {curve(
              "Spiral", [](double t) { return polar(0.4 + 1.3 * t, 3 * pi * t); }, 500),
          curve(
              "Arc", [](double t) { return polar(1, pi * t); }, 200)};
}

Points noisy_points(const Curve& curve) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<Index> vertex(0, curve.last());
  std::normal_distribution<double> normal(0, noise);
  Points points(curve.points, 2);
  for (Index i = 0; i < points.rows(); ++i) {
    points.row(i) = curve.polyline.row(vertex(generator));
    for (Index c = 0; c < 2; ++c) points(i, c) += normal(generator);
  }
  return points;
}

// ------------------------------------------------------------------------------ the three ways

struct Way {
  std::string name;
  std::function<Points(const Points&, double)> move;  // points, bandwidth
};

const std::array<Way, 3> ways{{
    {"local constant",
     [](const Points& points, double bandwidth) {
       return surfattn::project(points, points, {.bandwidth = bandwidth});
     }},
    {"iterated",
     [](const Points& points, double bandwidth) {
       return surfattn::project_iterated(points, points, {.steps = 3}, {.bandwidth = bandwidth});
     }},
    {"local linear",
     [](const Points& points, double bandwidth) {
       constexpr double ridge = 4 * noise * noise;  // between s², across the line, and σ², along it
       return surfattn::local_linear(points, points, ridge, {.bandwidth = bandwidth});
     }},
}};
constexpr std::array bandwidths{0.1, 0.2, 0.3};
constexpr double shown_bandwidth = 0.2;

// ------------------------------------------------------------------------------------- errors

struct Nearest {
  Index vertex;
  double distance;
};

Nearest nearest(const Curve& curve, const Points& points, Index i) {
  Index vertex = 0;
  const double squared =
      (curve.polyline.rowwise() - points.row(i)).rowwise().squaredNorm().minCoeff(&vertex);
  return {vertex, std::sqrt(squared)};
}

/// Mean distances, over the points near an end and over the others.
struct Errors {
  double from_curve[2] = {0, 0}, from_foot[2] = {0, 0};
};

Errors errors(const Curve& curve, const Points& points, const Points& moved) {
  Errors sums;
  Index counts[2] = {0, 0};
  for (Index i = 0; i < points.rows(); ++i) {
    const Index foot = nearest(curve, points, i).vertex;
    const bool at_end = std::min(foot, curve.last() - foot) < curve.last() / 20;
    ++counts[at_end];
    sums.from_curve[at_end] += nearest(curve, moved, i).distance;
    sums.from_foot[at_end] += (moved.row(i) - curve.polyline.row(foot)).norm();
  }
  for (const int part : {0, 1}) {
    sums.from_curve[part] /= static_cast<double>(counts[part]);
    sums.from_foot[part] /= static_cast<double>(counts[part]);
  }
  return sums;
}

// -------------------------------------------------------------------------------------- report

std::vector<double> column(const Points& points, Index c) {
  return {points.col(c).begin(), points.col(c).end()};
}

examples::Panel panel(const Curve& curve, const std::string& title, const Points& points,
                      const Points& moved) {
  namespace colour = examples::colour;
  const Eigen::RowVector2d low = curve.polyline.colwise().minCoeff().array() - 0.25,
                           high = curve.polyline.colwise().maxCoeff().array() + 0.25;
  examples::Panel panel;
  panel.title = title;
  panel.x = {"", low[0], high[0]};
  panel.y = {"", low[1], high[1]};
  panel.height = examples::panel_width(ways.size()) * (high[1] - low[1]) / (high[0] - low[0]);
  panel.clouds = {{"", "#b8c2cc", column(points, 0), column(points, 1), 1.4},
                  {"", colour::vermilion, column(moved, 0), column(moved, 1), 1.6}};
  const Points drawn = curve.polyline(Eigen::seq(0, curve.last(), 10), Eigen::all);
  panel.curves = {{"", colour::ink, column(drawn, 0), column(drawn, 1), 1, "", false}};
  return panel;
}

void print(const std::string& name, const Errors& e) {
  std::printf("  %-30s %10.4f %10.4f %13.4f %10.4f\n", name.c_str(), e.from_curve[0],
              e.from_foot[0], e.from_curve[1], e.from_foot[1]);
}

void run(const examples::Arguments& arguments) {
  std::vector<examples::Panel> panels;
  std::printf("mean distance                         inner points            near an end\n");
  std::printf("%-32s %10s %10s %13s %10s\n", "", "from curve", "from foot", "from curve",
              "from foot");
  for (const Curve& curve : curves()) {
    const Points points = noisy_points(curve);
    std::printf("%s, %d points, noise %.2f\n", curve.name.c_str(), static_cast<int>(points.rows()),
                noise);
    print("not moved", errors(curve, points, points));
    for (const double bandwidth : bandwidths) {
      for (const Way& way : ways) {
        const Points moved = way.move(points, bandwidth);
        char name[64];
        std::snprintf(name, sizeof name, "%s, bandwidth %.1f", way.name.c_str(), bandwidth);
        print(name, errors(curve, points, moved));
        if (bandwidth == shown_bandwidth)
          panels.push_back(panel(curve, curve.name + ", " + way.name, points, moved));
      }
    }
  }
  char subtitle[128];
  std::snprintf(
      subtitle, sizeof subtitle,
      "Points with noise %.2f (grey) about a curve (black), and where they are moved with "
      "bandwidth %.1f (red).",
      noise, shown_bandwidth);
  examples::write_svg(arguments.svg, "Back onto the surface", subtitle, panels, ways.size());
  std::printf("Plot: %s\n", arguments.svg.c_str());
}

}  // namespace

int main(int count, char** words) {
  return examples::run_example(
      {"08_manifold", "Moves points with noise back onto the curve they come from.", "",
       "manifold.svg"},
      count, words, run);
}
