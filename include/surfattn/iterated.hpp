// surfattn layer 7: projection repeated until it settles on the surface

#pragma once

#include <surfattn/surface.hpp>
#include <vector>

/// The projection of a point is again a point, which can be projected:
///
///     q₀ = q,   q_{t+1} = q_t + η·(P(q_t) − q_t),   t = 0 … T − 1.
///
/// Under a uniform prior P(q) − q is σ² times the gradient of the log-density of the keys (see
/// project_forward), so this climbs the density, and with η = 1 it is the mean-shift iteration
/// (Fukunaga and Hostetler 1975; Cheng 1995); under KeyPrior::sdpa and η = 1 it is the update of a
/// modern Hopfield network (Ramsauer et al. 2020, arXiv:2008.02217). Few steps reach the ridge of
/// the density from farther away than one; many end in its modes.
namespace surfattn {

/// How often, and how far each time.
struct Iteration {
  Index steps = 1;       ///< T ≥ 0
  double step_size = 1;  ///< η > 0
};

/// The result of an iterated projection and what its backward needs.
template <class Scalar>
struct IteratedForward {
  Matrix<Scalar> out;                        ///< q_T, Tq × (Hq·d)
  std::vector<Matrix<Scalar>> points;        ///< q_0 … q_{T−1}
  std::vector<Forward<Scalar>> projections;  ///< P(q_t) and its log-sum-exp, t < T
  /// ‖q_T − q_{T−1}‖ for each query head, Tq × Hq; 0 where there is no step
  Matrix<Scalar> last_step;
  /// ρ = ‖q_T − q_{T−1}‖/‖q_{T−1} − q_{T−2}‖, Tq × Hq. Below 1 the steps shrink: were they to go on
  /// so, the limit would be about last_step·ρ/(1 − ρ) away. 0 with fewer than two steps, or where
  /// the step before was 0
  Matrix<Scalar> contraction;
};

/// Gradients of a loss with respect to the inputs of `project_iterated`.
template <class Scalar>
struct IteratedGradients {
  Matrix<Scalar> queries;    ///< Tq × (Hq·d)
  Matrix<Scalar> keys;       ///< Tk × (Hkv·d)
  Scalar bandwidth{};        ///< ∂loss/∂σ
  Matrix<Scalar> log_prior;  ///< Tk × Hkv, or Tk × 1 where one explicit prior serves all heads
  Scalar step_size{};        ///< ∂loss/∂η
};

namespace detail {

inline void check_iteration(const Iteration& iteration, const Require& require) {
  if (iteration.steps < 0)
    require.fail("steps must not be negative, but is " + std::to_string(iteration.steps));
  require.positive("step_size", iteration.step_size);
}

/// Whether a query of a head saw a key; where it did not, all its points are 0 from the first step
/// on, and no gradient passes.
template <class Scalar>
bool sees_a_key(MatrixView<const Scalar> log_sum_exp, Index query, Index head) {
  return log_sum_exp(query, head) != simd::minus_infinity<Scalar>;
}

/// point ← point + η·(projection − point), head by head.
template <class Scalar>
void take_step(MatrixView<const Scalar> projection, MatrixView<const Scalar> log_sum_exp,
               Scalar step_size, MatrixView<Scalar> point) {
  const Index width = log_sum_exp.cols > 0 ? point.cols / log_sum_exp.cols : 0;
  for (Index i = 0; i < point.rows; ++i) {
    for (Index c = 0; c < point.cols; ++c) {
      point(i, c) = sees_a_key(log_sum_exp, i, c / width)
                        ? point(i, c) + step_size * (projection(i, c) - point(i, c))
                        : Scalar(0);
    }
  }
}

/// ‖b − a‖ of each head's part of each row.
template <class Scalar>
Matrix<Scalar> step_lengths(const Matrix<Scalar>& a, const Matrix<Scalar>& b, Index heads) {
  Matrix<Scalar> lengths(a.rows(), heads);
  const Index width = a.cols() / heads;
  for (Index head = 0; head < heads; ++head) {
    lengths.col(head) = (b - a).middleCols(head * width, width).rowwise().norm();
  }
  return lengths;
}

/// last_step and contraction. A query that saw no key is at rest.
template <class Scalar>
void diagnose(IteratedForward<Scalar>& forward, Index heads) {
  const std::size_t steps = forward.points.size();
  const Index rows = forward.out.rows();
  forward.last_step = forward.contraction = Matrix<Scalar>::Zero(rows, heads);
  if (steps == 0) return;
  const Matrix<Scalar> last = step_lengths(forward.points[steps - 1], forward.out, heads);
  const Matrix<Scalar> before =
      steps < 2 ? Matrix<Scalar>(Matrix<Scalar>::Zero(rows, heads))
                : step_lengths(forward.points[steps - 2], forward.points[steps - 1], heads);
  const MatrixView<const Scalar> seen = view(forward.projections[steps - 1].log_sum_exp);
  for (Index i = 0; i < rows; ++i) {
    for (Index head = 0; head < heads; ++head) {
      if (!sees_a_key(seen, i, head)) continue;
      forward.last_step(i, head) = last(i, head);
      if (before(i, head) != Scalar(0))
        forward.contraction(i, head) = last(i, head) / before(i, head);
    }
  }
}

/// Bytes for P(q_t) and its log-sum-exp, before the workspace of the projection itself.
template <class Scalar>
std::size_t iterated_bytes(const Shape& shape) {
  Arena counter;
  counter.take<Scalar>(shape.queries * shape.query_heads * shape.head_dim);
  counter.take<Scalar>(shape.queries * shape.query_heads);
  return counter.used() + Arena::alignment;
}

}  // namespace detail

/// Bytes of workspace for `project_iterated_into`.
template <class Queries, class Keys>
std::size_t iterated_workspace_size(const Queries& queries, const Keys& keys,
                                    const SurfaceOptions& options = {}) {
  using Scalar = detail::scalar_t<Queries>;
  const auto shape = detail::Require("iterated_workspace_size")
                         .shapes(detail::extent(queries), detail::extent(keys),
                                 detail::extent(keys), options.heads, options.sequences);
  return detail::iterated_bytes<Scalar>(shape) +
         detail::forward_workspace_size<Scalar>(shape, options.executor);
}

/// q_T into `out`, Tq × (Hq·d), without allocating and without what the backward pass needs. Inputs
/// must be stored matrices; `out` may be `queries` itself and overlaps nothing else.
template <class Queries, class Keys, class Out, class... Terms>
void project_iterated_into(const Queries& queries, const Keys& keys, Out&& out,
                           const Workspace& workspace, const Iteration& iteration,
                           const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::check_outputs_at_compile_time<Scalar, Out>();
  constexpr detail::Require require("project_iterated");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  detail::check_iteration(iteration, require);
  auto operands = detail::surface_operands(q, k, options, require);
  const detail::Shape& shape = operands.shape;
  require.shape("out", detail::extent(out), shape.queries_extent(), "the shape of queries");
  const std::size_t own = detail::iterated_bytes<Scalar>(shape);
  detail::check_workspace(require, workspace,
                          own + detail::forward_workspace_size<Scalar>(shape, nullptr));
  detail::bind_terms(shape, require, terms...);
  detail::Arena arena(workspace);
  const Index cols = shape.query_heads * shape.head_dim;
  const detail::MatrixView<Scalar> projection{arena.take<Scalar>(shape.queries * cols),
                                              shape.queries, cols, cols, 1};
  const detail::MatrixView<Scalar> log_sum_exp{
      arena.take<Scalar>(shape.queries * shape.query_heads), shape.queries, shape.query_heads,
      shape.query_heads, 1};
  const detail::MatrixView<Scalar> points = detail::view(out);
  if (points.data != operands.queries.data) {
    for (Index i = 0; i < points.rows; ++i) {
      for (Index c = 0; c < points.cols; ++c) points(i, c) = operands.queries(i, c);
    }
  }
  operands.queries = points;
  const Workspace inner(workspace.data() + own, workspace.size() - own);
  for (Index step = 0; step < iteration.steps; ++step) {
    detail::run_forward<Scalar>(operands, {projection, log_sum_exp}, inner, options.executor,
                                require, terms...);
    detail::take_step<Scalar>(projection, log_sum_exp, static_cast<Scalar>(iteration.step_size),
                              points);
  }
}

/// Projects T times: q_{t+1} = q_t + η·(P(q_t) − q_t), and keeps what the backward pass needs, T
/// copies of the queries and of their projections, and says how fast the steps shrink.
///
/// queries, keys, options, terms and errors as for `project`; besides, a step size that is not
/// positive, a negative number of steps. T = 0 returns the queries. A query that sees no key gets 0.
/// Time and workspace T times those of `project`.
template <class Queries, class Keys, class... Terms>
auto project_iterated_forward(const Queries& queries, const Keys& keys, const Iteration& iteration,
                              const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("project_iterated_forward");
  detail::check_iteration(iteration, require);
  require.shapes(detail::extent(queries), detail::extent(keys), detail::extent(keys), options.heads,
                 options.sequences);
  IteratedForward<Scalar> forward;
  forward.out = queries;
  const auto& k = detail::stored(keys);
  for (Index step = 0; step < iteration.steps; ++step) {
    forward.points.push_back(forward.out);
    forward.projections.push_back(project_forward(forward.out, k, options, terms...));
    const Forward<Scalar>& projection = forward.projections.back();
    detail::take_step<Scalar>(detail::view(projection.out), detail::view(projection.log_sum_exp),
                              static_cast<Scalar>(iteration.step_size), detail::view(forward.out));
  }
  detail::diagnose(forward, options.heads.query);
  return forward;
}

/// `project_iterated_forward` without what the backward pass needs: q_T, Tq × (Hq·d). Allocates its
/// result, one projection and a workspace.
template <class Queries, class Keys, class... Terms>
auto project_iterated(const Queries& queries, const Keys& keys, const Iteration& iteration,
                      const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  Matrix<Scalar> out = queries;
  project_iterated_into(out, keys, out, Workspace(iterated_workspace_size(out, keys, options)),
                        iteration, options, terms...);
  return out;
}

/// Gradients of a loss with respect to queries, keys, bandwidth, log-prior and step size, given
/// grad_out = ∂loss/∂q_T and what project_iterated_forward returned for the same inputs. Backwards
/// from g_T = grad_out, with J the gradient that project_backward gives of η·g_{t+1}:
///
///     g_t = (1 − η)·g_{t+1} + J_queries,   dkeys += J_keys,  dσ and d log π likewise,
///     dη += g_{t+1}·(P(q_t) − q_t).
///
/// Time T times that of `project_backward`. Errors as for it; a forward result of another number of
/// steps.
template <class Queries, class Keys, class Scalar, class GradOut, class... Terms>
auto project_iterated_backward(const Queries& queries, const Keys& keys, const Iteration& iteration,
                               const IteratedForward<Scalar>& forward, const GradOut& grad_out,
                               const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Matrix<Scalar>, GradOut>();
  static_assert(!(detail::TrainableTermType<Terms> || ...),
                "surfattn: project_iterated_backward gives no gradients of terms with parameters");
  constexpr detail::Require require("project_iterated_backward");
  detail::check_iteration(iteration, require);
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  if (static_cast<Index>(forward.points.size()) != iteration.steps ||
      forward.projections.size() != forward.points.size()) {
    require.fail("forward has " + std::to_string(forward.points.size()) + " steps but must have " +
                 std::to_string(iteration.steps));
  }
  require.shape("grad_out", detail::extent(grad_out), shape.queries_extent(),
                "the shape of queries");
  const auto& k = detail::stored(keys);
  const bool shared_prior = options.prior.is_explicit() && options.prior.cols() == 1;
  const Scalar step_size = static_cast<Scalar>(iteration.step_size);
  IteratedGradients<Scalar> gradients{
      grad_out, Matrix<Scalar>::Zero(k.rows(), k.cols()), Scalar(0),
      Matrix<Scalar>::Zero(shape.keys, shared_prior ? 1 : shape.key_value_heads), Scalar(0)};
  Matrix<Scalar>& gradient = gradients.queries;
  for (Index step = iteration.steps - 1; step >= 0; --step) {
    const auto at = static_cast<std::size_t>(step);
    const Matrix<Scalar>& point = forward.points[at];
    const Forward<Scalar>& projection = forward.projections[at];
    const detail::MatrixView<const Scalar> seen = detail::view(projection.log_sum_exp);
    require.shape("forward.points", detail::extent(point), shape.queries_extent(),
                  "the shape of queries");
    const auto inner =
        project_backward(point, k, projection, step_size * gradient, options, terms...);
    for (Index i = 0; i < gradient.rows(); ++i) {
      for (Index c = 0; c < gradient.cols(); ++c) {
        const bool takes_part = detail::sees_a_key(seen, i, c / shape.head_dim);
        if (takes_part)
          gradients.step_size += gradient(i, c) * (projection.out(i, c) - point(i, c));
        gradient(i, c) =
            takes_part ? (1 - step_size) * gradient(i, c) + inner.queries(i, c) : Scalar(0);
      }
    }
    gradients.keys += inner.keys;
    gradients.bandwidth += inner.bandwidth;
    gradients.log_prior += inner.log_prior;
  }
  return gradients;
}

}  // namespace surfattn
