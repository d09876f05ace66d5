// surfattn layer 7: what the surface looks like around each query: tangents, dimension, distance

#pragma once

#include <Eigen/Eigenvalues>
#include <surfattn/local_linear.hpp>

namespace surfattn {

/// The surface around each query, for each query head. Nothing is known where a query sees no key:
/// all numbers are 0 there.
template <class Scalar>
struct LocalGeometry {
  Matrix<Scalar> out;          ///< f, Tq × (Hq·d), as of local_linear
  Forward<Scalar> projection;  ///< μ and log_sum_exp
  /// s₁ ≥ s₂ ≥ …, the variances of the keys about μ along the directions of `basis`; Tq × (Hq·d)
  Matrix<Scalar> variances;
  /// unit vectors, one after the other in the order of `variances`, each with its largest component
  /// positive; the first ones span the tangent of the surface. Tq × (Hq·d·d)
  Matrix<Scalar> basis;
  /// Σ s/(s + λ) = d − λ·tr C⁻¹: how many directions the projection keeps; Tq × Hq
  Matrix<Scalar> dimension;
  /// ‖q − f(q)‖, how far the query lies from the surface; Tq × Hq
  Matrix<Scalar> distance;
};

namespace detail {

/// Everything about one query from the eigenvectors of M = Σ w δ·δᵀ: f = q − λ·Σ_n u_n (u_n·(q −
/// μ))/(s_n + λ).
template <class Scalar, class Accumulator, class Solver>
void local_geometry_row(const LocalProblem<Scalar>& problem, Index head, Index query, Index row,
                        const Moments<Accumulator>& moments, Solver& solver,
                        LocalGeometry<Scalar>& geometry) {
  using Dense = Matrix<Accumulator>;
  const Index d = moments.dim;
  const Eigen::Map<const Dense, 0, Eigen::OuterStride<>> second(
      moments.second, d, d, Eigen::OuterStride<>(moments.stride));
  const Eigen::Map<const RowVector<Accumulator>> centre(moments.centre, d);
  solver.compute(second);  // reads the lower triangle
  const auto queries = problem.operands.query_head(head);
  RowVector<Accumulator> point(d);
  for (Index c = 0; c < d; ++c) point[c] = static_cast<Accumulator>(queries(query, c));
  const RowVector<Accumulator> offset = point - centre;
  RowVector<Accumulator> removed = RowVector<Accumulator>::Zero(d);
  Accumulator dimension(0);
  for (Index n = 0; n < d; ++n) {
    const Accumulator variance = std::max(solver.eigenvalues()[d - 1 - n], Accumulator(0));
    RowVector<Accumulator> direction = solver.eigenvectors().col(d - 1 - n).transpose();
    Index largest = 0;
    direction.cwiseAbs().maxCoeff(&largest);
    if (direction[largest] < 0) direction = -direction;
    removed += problem.ridge / (variance + problem.ridge) * direction.dot(offset) * direction;
    dimension += variance / (variance + problem.ridge);
    geometry.variances(row, head * d + n) = static_cast<Scalar>(variance);
    geometry.basis.row(row).segment((head * d + n) * d, d) = direction.template cast<Scalar>();
  }
  geometry.out.row(row).segment(head * d, d) = (point - removed).template cast<Scalar>();
  geometry.dimension(row, head) = static_cast<Scalar>(dimension);
  geometry.distance(row, head) = static_cast<Scalar>(removed.norm());
}

}  // namespace detail

/// The local-linear projection of each query and the geometry of the surface that the keys sample:
/// tangent basis and variances (local principal components), dimension and distance; see
/// LocalGeometry for formulas and shapes.
///
/// Arguments, terms and errors as for `local_linear`. The eigenvectors that belong to equal
/// variances are any basis of their space. Allocates its result, d² numbers for each query, and
/// what the eigenvalue solver needs for each. Runs on the calling thread but for the projection.
/// Time O(Hq·Tq·(Tk·2d² + 10·d³)).
template <class Queries, class Keys, class... Terms>
auto local_geometry(const Queries& queries, const Keys& keys, double ridge,
                    const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  using Accumulator = accumulator_t<Scalar>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("local_geometry");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const decltype(&k) none = nullptr;
  const auto operands = detail::local_operands(q, k, none, options, require);
  const auto usable_ridge = detail::checked_ridge<Scalar>(ridge, require);
  const detail::Shape& shape = operands.shape;
  const auto zeros = [&](Index cols) {
    return Matrix<Scalar>(Matrix<Scalar>::Zero(shape.queries, cols));
  };
  const Index width = shape.query_heads * shape.head_dim;
  LocalGeometry<Scalar> geometry{zeros(width),
                                 {zeros(width), zeros(shape.query_heads)},
                                 zeros(width),
                                 zeros(width * shape.head_dim),
                                 zeros(shape.query_heads),
                                 zeros(shape.query_heads)};
  const auto bind = detail::term_binder(shape, require, terms...);
  const Workspace workspace(detail::local_linear_bytes(Pass::forward, operands, options.executor));
  detail::run_forward<Scalar>(
      operands,
      {detail::view(geometry.projection.out), detail::view(geometry.projection.log_sum_exp)},
      workspace, options.executor, require, terms...);
  const detail::LocalProblem<Scalar> problem{operands, detail::view(geometry.projection.out),
                                             detail::view(geometry.projection.log_sum_exp),
                                             usable_ridge};
  Eigen::SelfAdjointEigenSolver<Matrix<Accumulator>> solver(shape.head_dim);
  const detail::MomentPlan<Scalar> plan(shape, true, nullptr);
  detail::for_each_sequence(problem, bind, [&](const auto& one, const auto& bound) {
    detail::for_each_moments(one, bound, plan, workspace, nullptr,
                             [&](Index head, Index query, bool sees_a_key, const auto& moments) {
                               if (sees_a_key) {
                                 detail::local_geometry_row(one, head, query,
                                                            one.operands.shape.first_query + query,
                                                            moments, solver, geometry);
                               }
                             });
  });
  return geometry;
}

}  // namespace surfattn
