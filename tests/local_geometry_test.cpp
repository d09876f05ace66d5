// Local-linear projection on noisy surfaces with edges, beside the local constant; tangents, dimension and distance.
#include <surfattn/local_geometry.hpp>
#include <surfattn/surfattn.hpp>

#include "support/problem.hpp"
#include "support/surfaces.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

struct MeanErrors {
  double distance = 0;  // to the surface
  double to_foot = 0;   // to the point of the surface from which noise moved the query
};

MeanErrors mean_errors(const TestSurface& surface, const NoisyPoints& noisy,
                       const Matrix<double>& projected) {
  MeanErrors errors;
  for (Index i = 0; i < projected.rows(); ++i) {
    errors.distance += surface.distance(projected.row(i)) / double(projected.rows());
    errors.to_foot += (projected.row(i) - noisy.feet.row(i)).norm() / double(projected.rows());
  }
  return errors;
}

}  // namespace

TEST_CASE(
    "local-linear projection: at edges a third of the error of the local constant, never farther "
    "off") {
  std::mt19937_64 random = seeded_random();
  for (const TestSurface& surface : {arc(), sphere(), swiss_roll(), torus()}) {
    const NoisyPoints keys = noisy_points(surface, surface.samples, false, random);
    const SurfaceOptions options{.bandwidth = surface.bandwidth};
    for (const bool only_edges : {false, true}) {
      const NoisyPoints queries = noisy_points(surface, 300, only_edges, random);
      const auto constant =
          mean_errors(surface, queries, project(queries.points, keys.points, options));
      const auto linear = mean_errors(
          surface, queries, local_linear(queries.points, keys.points, surface.ridge, options));
      INFO(surface.name << (only_edges ? ", edges" : "") << ": constant " << constant.distance
                        << " from the surface, " << constant.to_foot << " from the foot; linear "
                        << linear.distance << ", " << linear.to_foot);
      // At an edge the local constant is drawn inward along the surface, which the distance to the surface does not show.
      if (only_edges) {
        CHECK(3 * linear.to_foot <= constant.to_foot);
      } else {
        CHECK(linear.distance <= constant.distance);
        CHECK(linear.to_foot <= constant.to_foot);
      }
    }
  }
}

TEST_CASE("local_geometry: projection, tangents, dimension and distance of a sphere") {
  std::mt19937_64 random = seeded_random();
  const TestSurface surface = sphere();
  const NoisyPoints keys = noisy_points(surface, surface.samples, false, random);
  NoisyPoints queries = noisy_points(surface, 40, false, random);
  queries.points = queries.feet * 1.3;  // off the sphere, along its normal
  const SurfaceOptions options{.bandwidth = surface.bandwidth};
  const auto geometry = local_geometry(queries.points, keys.points, surface.ridge, options);
  CHECK((geometry.out - local_linear(queries.points, keys.points, surface.ridge, options))
            .cwiseAbs()
            .maxCoeff() <= 1e-12);
  CHECK((geometry.projection.out - project(queries.points, keys.points, options))
            .cwiseAbs()
            .maxCoeff() == 0);
  for (Index i = 0; i < 40; ++i) {
    const Eigen::Map<const Matrix<double>> basis(geometry.basis.row(i).data(), 3, 3);
    CHECK((basis * basis.transpose() - Matrix<double>::Identity(3, 3)).norm() <= 1e-12);
    CHECK(geometry.variances(i, 0) >= geometry.variances(i, 1));
    CHECK(geometry.variances(i, 1) >= geometry.variances(i, 2));
    // the third direction is the normal, up to the tilt that an edge gives
    CHECK(std::abs(basis.row(2).dot(queries.feet.row(i))) > 0.93);
    CHECK(geometry.dimension(i, 0) == Approx(2).margin(0.35));
    CHECK(geometry.distance(i, 0) == Approx((queries.points.row(i) - geometry.out.row(i)).norm()));
    // λ/(s + λ) of the way to the sphere, with a variance s along the normal that is of the order of λ
    CHECK(geometry.distance(i, 0) > 0.15);
    CHECK(geometry.distance(i, 0) < 0.33);
  }
}

TEST_CASE("local_geometry: the moments of a few keys, by hand, for heads, masks and empty rows") {
  // two heads; keys at ±1 along x for head 0, along y for head 1
  Matrix<double> k(2, 4), q(3, 4);
  k << 1, 0, 0, 1, -1, 0, 0, -1;
  q << 0, 3, 2, 0, 0, 3, 2, 0, 0, 3, 2, 0;
  reference::Mask mask = reference::Mask::Constant(3, 2, true);
  mask.row(1).setConstant(false);
  mask(2, 0) = false;
  const auto g = local_geometry(q, k, 0.25, {.heads = {2}}, BoolMask{mask});
  CHECK(g.variances.row(0).isApprox(row({1, 0, 1, 0})));
  CHECK(g.basis.row(0).isApprox(row({1, 0, 0, 1, 0, 1, 1, 0})));
  CHECK(g.dimension(0, 0) == Approx(0.8));
  CHECK(g.distance(0, 0) == Approx(3));
  CHECK(g.out.row(0).isZero(1e-15));
  CHECK(g.variances.row(1).isZero(0));
  CHECK(g.basis.row(1).isZero(0));
  CHECK(g.distance(1, 0) == 0);
  CHECK(g.dimension.row(2).isZero(1e-15));  // one key: a point
  CHECK(g.out.row(2).isApprox(row({-1, 0, 0, -1})));
}
