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
  if (iteration.steps < 0) require.fail("steps must not be negative, but is ", iteration.steps);
  require.positive("step_size", iteration.step_size);
}

/// Whether a query of a head saw a key; where it did not, all its points are 0 from that step on, and
/// no gradient passes.
template <class Scalar>
bool sees_a_key(MatrixView<const Scalar> log_sum_exp, Index query, Index head) {
  return log_sum_exp(query, head) != simd::minus_infinity<Scalar>;
}

/// A query that saw no key in the step before sees none in this one, though the 0 that it has become may
/// lie within the reach of a kernel: P = 0, log-sum-exp −∞.
template <class Scalar>
void keep_unseen(MatrixView<const Scalar> log_sum_exp_before, MatrixView<Scalar> projection,
                 MatrixView<Scalar> log_sum_exp) {
  const Index width = log_sum_exp.cols > 0 ? projection.cols / log_sum_exp.cols : 0;
  for (Index i = 0; i < projection.rows; ++i) {
    for (Index head = 0; head < log_sum_exp.cols; ++head) {
      if (sees_a_key(log_sum_exp_before, i, head)) continue;
      log_sum_exp(i, head) = simd::minus_infinity<Scalar>;
      for (Index c = head * width; c < (head + 1) * width; ++c) projection(i, c) = Scalar(0);
    }
  }
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

/// What is kept of T steps: a block of rows for each.
template <class Points, class Projections, class LogSumExp>
void require_steps(const Require& require, const Points& points, const Projections& projections,
                   const LogSumExp& log_sum_exp, const Shape& shape, const Iteration& iteration) {
  const Extent all{iteration.steps * shape.queries, shape.query_heads * shape.head_dim};
  require.shape("points", extent(points), all, "the shape of queries, steps times");
  require.shape("projections", extent(projections), all, "the shape of queries, steps times");
  require.shape("log_sum_exp", extent(log_sum_exp), {all.rows, shape.query_heads},
                "steps · queries × query heads");
}

/// What the backward pass keeps of one step, before the workspace of the projection's.
template <class Scalar>
struct IteratedBackwardBuffers {
  using Map = Eigen::Map<Matrix<Scalar>>;
  Map upstream, queries, keys, log_prior;

  IteratedBackwardBuffers(Arena& arena, const Shape& shape)
      : upstream(take(arena, shape.queries_extent())),
        queries(take(arena, shape.queries_extent())),
        keys(take(arena, shape.keys_extent())),
        log_prior(take(arena, {shape.keys, shape.key_value_heads})) {}

  static Map take(Arena& arena, Extent extent) {
    return {arena.take<Scalar>(extent.rows * extent.cols), extent.rows, extent.cols};
  }
  static std::size_t bytes(const Shape& shape) {
    Arena counter;
    IteratedBackwardBuffers(counter, shape);
    return counter.used() + Arena::alignment;
  }
};

/// Where the gradients go.
template <class Scalar>
struct IteratedOutputs {
  MatrixView<Scalar> queries, keys, log_prior;
  Scalar* bandwidth;
  Scalar* step_size;
};

/// One step back: dη, g_t from g_{t+1} = outputs.queries, and what the step adds to the rest. A query
/// that saw no key gets and gives none.
template <class Scalar, class Point, class Projection, class LogSumExp>
void step_back(const Point& point, const Projection& projection, const LogSumExp& log_sum_exp,
               Scalar step_size, Index width, const IteratedBackwardBuffers<Scalar>& inner,
               Scalar grad_bandwidth, const IteratedOutputs<Scalar>& outputs) {
  const MatrixView<Scalar> gradient = outputs.queries;
  for (Index i = 0; i < gradient.rows; ++i) {
    for (Index c = 0; c < gradient.cols; ++c) {
      const bool takes_part = log_sum_exp(i, c / width) != simd::minus_infinity<Scalar>;
      Scalar& entry = gradient(i, c);
      if (takes_part) *outputs.step_size += entry * (projection(i, c) - point(i, c));
      entry = takes_part ? (1 - step_size) * entry + inner.queries(i, c) : Scalar(0);
    }
  }
  const auto add = [](const auto& from, MatrixView<Scalar> to) {
    for (Index i = 0; i < to.rows; ++i) {
      for (Index c = 0; c < to.cols; ++c) to(i, c) += from(i, c);
    }
  };
  add(inner.keys, outputs.keys);
  add(inner.log_prior, outputs.log_prior);
  *outputs.bandwidth += grad_bandwidth;
}

/// The whole way back; step_at(t, use) calls use(q_t, P(q_t), its log-sum-exp).
template <class Keys, class GradOut, class StepAt, class... Terms>
void iterated_backward(const Keys& keys, const Iteration& iteration, const Shape& shape,
                       const GradOut& grad_out, const StepAt& step_at,
                       const IteratedOutputs<scalar_t<Keys>>& outputs, const Workspace& workspace,
                       const SurfaceOptions& options, const Terms&... terms) {
  using Scalar = scalar_t<Keys>;
  static_assert(!(TrainableTermType<Terms> || ...),
                "surfattn: project_iterated_backward gives no gradients of terms with parameters");
  const std::size_t own = IteratedBackwardBuffers<Scalar>::bytes(shape);
  Arena arena(workspace);
  IteratedBackwardBuffers<Scalar> inner(arena, shape);
  const Workspace rest(workspace.data() + own, workspace.size() - own);
  const auto set = [](MatrixView<Scalar> to, const auto& value) {
    for (Index i = 0; i < to.rows; ++i) {
      for (Index c = 0; c < to.cols; ++c) to(i, c) = value(i, c);
    }
  };
  const auto zero = [](Index, Index) { return Scalar(0); };
  set(outputs.queries, grad_out);
  set(outputs.keys, zero);
  set(outputs.log_prior, zero);
  *outputs.bandwidth = *outputs.step_size = Scalar(0);
  const Scalar step_size = static_cast<Scalar>(iteration.step_size);
  for (Index step = iteration.steps - 1; step >= 0; --step) {
    step_at(step, [&](const auto& point, const auto& projection, const auto& log_sum_exp) {
      Scalar grad_bandwidth(0);
      for (Index i = 0; i < inner.upstream.rows(); ++i) {
        for (Index c = 0; c < inner.upstream.cols(); ++c)
          inner.upstream(i, c) = step_size * outputs.queries(i, c);
      }
      project_backward_into(point, keys, projection, log_sum_exp, inner.upstream, inner.queries,
                            inner.keys, grad_bandwidth, inner.log_prior, rest, options, terms...);
      step_back(point, projection, log_sum_exp, step_size, shape.head_dim, inner, grad_bandwidth,
                outputs);
    });
  }
}

/// Bytes for P(q_t), its log-sum-exp and that of the step before, ahead of the projection's own workspace.
template <class Scalar>
std::size_t iterated_bytes(const Shape& shape) {
  Arena counter;
  counter.take<Scalar>(shape.queries * shape.query_heads * shape.head_dim);
  for (int step = 0; step < 2; ++step) counter.take<Scalar>(shape.queries * shape.query_heads);
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

/// The same for `project_iterated_forward_into` (Pass::forward) or `project_iterated_backward_into`
/// (Pass::backward).
template <class Queries, class Keys, class... Terms>
std::size_t iterated_workspace_size(Pass pass, const Queries& queries, const Keys& keys,
                                    const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  const auto shape = detail::Require("iterated_workspace_size")
                         .shapes(detail::extent(queries), detail::extent(keys),
                                 detail::extent(keys), options.heads, options.sequences);
  const std::size_t own = pass == Pass::backward
                              ? detail::IteratedBackwardBuffers<Scalar>::bytes(shape)
                              : std::size_t(0);
  return own + workspace_size(pass, queries, keys, options, terms...);
}

/// q_T into `out`, Tq × (Hq·d), without allocating and without what the backward pass needs. Inputs
/// must be stored matrices; `out` may be `queries` itself and overlaps nothing else.
template <class Queries, class Keys, class Out, class... Terms>
void project_iterated_into(const Queries& queries, const Keys& keys, Out&& out,
                           const Workspace& workspace, const Iteration& iteration,
                           const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
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
  detail::term_binder(operands, require, terms...);
  detail::Arena arena(workspace);
  const Index cols = shape.query_heads * shape.head_dim;
  const detail::MatrixView<Scalar> projection{arena.take<Scalar>(shape.queries * cols),
                                              shape.queries, cols, cols, 1};
  const auto take_sums = [&] {
    return detail::MatrixView<Scalar>{arena.take<Scalar>(shape.queries * shape.query_heads),
                                      shape.queries, shape.query_heads, shape.query_heads, 1};
  };
  const detail::MatrixView<Scalar> sums_of_steps[] = {take_sums(), take_sums()};
  const detail::MatrixView<Scalar> points = detail::view(out);
  if (points.data != operands.queries.data) {
    for (Index i = 0; i < points.rows; ++i) {
      for (Index c = 0; c < points.cols; ++c) points(i, c) = operands.queries(i, c);
    }
  }
  operands.queries = points;
  const Workspace inner(workspace.data() + own, workspace.size() - own);
  for (Index step = 0; step < iteration.steps; ++step) {
    const auto& log_sum_exp = sums_of_steps[step % 2];
    detail::run_forward<Scalar>(operands, {projection, log_sum_exp}, inner, options.executor,
                                require, terms...);
    if (step > 0)
      detail::keep_unseen<Scalar>(sums_of_steps[(step - 1) % 2], projection, log_sum_exp);
    detail::take_step<Scalar>(projection, log_sum_exp, static_cast<Scalar>(iteration.step_size),
                              points);
  }
}

/// Projects T times: q_{t+1} = q_t + η·(P(q_t) − q_t), and keeps what the backward pass needs, T
/// copies of the queries and of their projections, and says how fast the steps shrink.
///
/// queries, keys, options, terms and errors as for `project`, but no numbers of 16 bits; besides, a
/// step size that is not positive, a negative number of steps. T = 0 returns the queries. A query that
/// sees no key gets 0. Time and workspace T times those of `project`.
template <class Queries, class Keys, class... Terms>
auto project_iterated_forward(const Queries& queries, const Keys& keys, const Iteration& iteration,
                              const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
  constexpr detail::Require require("project_iterated_forward");
  detail::check_iteration(iteration, require);
  IteratedForward<Scalar> forward;
  forward.out = queries;
  const auto& k = detail::stored(keys);
  detail::term_binder(detail::surface_operands(forward.out, k, options, require), require,
                      terms...);
  for (Index step = 0; step < iteration.steps; ++step) {
    forward.points.push_back(forward.out);
    forward.projections.push_back(project_forward(forward.out, k, options, terms...));
    Forward<Scalar>& projection = forward.projections.back();
    if (step > 0) {
      const Forward<Scalar>& before = forward.projections[static_cast<std::size_t>(step - 1)];
      detail::keep_unseen<Scalar>(detail::view(before.log_sum_exp), detail::view(projection.out),
                                  detail::view(projection.log_sum_exp));
    }
    detail::take_step<Scalar>(detail::view(projection.out), detail::view(projection.log_sum_exp),
                              static_cast<Scalar>(iteration.step_size), detail::view(forward.out));
  }
  detail::diagnose(forward, options.heads.query);
  return forward;
}

/// `project_iterated_forward` into matrices of any storage, without allocating: q_T into `out`, and
/// for the backward pass q_t, P(q_t) and its log-sum-exp, t < T, into the rows of `points`,
/// `projections`, T·Tq × (Hq·d), and `log_sum_exp`, T·Tq × Hq, from row t·Tq on. `workspace` needs
/// iterated_workspace_size(Pass::forward, queries, keys, options) bytes.
template <class Queries, class Keys, class Out, class Points, class Projections, class LogSumExp,
          class... Terms>
void project_iterated_forward_into(const Queries& queries, const Keys& keys, Out&& out,
                                   Points&& points, Projections&& projections,
                                   LogSumExp&& log_sum_exp, const Workspace& workspace,
                                   const Iteration& iteration, const SurfaceOptions& options = {},
                                   const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
  detail::check_outputs_at_compile_time<Scalar, Out, Points, Projections, LogSumExp>();
  constexpr detail::Require require("project_iterated_forward");
  detail::check_iteration(iteration, require);
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto operands = detail::surface_operands(q, k, options, require);
  const detail::Shape& shape = operands.shape;
  require.shape("out", detail::extent(out), shape.queries_extent(), "the shape of queries");
  detail::require_steps(require, points, projections, log_sum_exp, shape, iteration);
  detail::check_workspace(require, workspace,
                          detail::forward_workspace_size<Scalar>(shape, nullptr));
  detail::term_binder(operands, require, terms...);
  out = q;
  for (Index step = 0; step < iteration.steps; ++step) {
    const auto rows = [&](auto& all, Index at) {
      return all.middleRows(at * shape.queries, shape.queries);
    };
    auto point = rows(points, step);
    auto projection = rows(projections, step);
    auto sums = rows(log_sum_exp, step);
    point = out;
    project_forward_into(point, k, projection, sums, workspace, options, terms...);
    if (step > 0) {
      const auto before = rows(log_sum_exp, step - 1);
      detail::keep_unseen<Scalar>(detail::view(before), detail::view(projection),
                                  detail::view(sums));
    }
    detail::take_step<Scalar>(detail::view(projection), detail::view(sums),
                              static_cast<Scalar>(iteration.step_size), detail::view(out));
  }
}

/// `project_iterated_forward` without what the backward pass needs: q_T, Tq × (Hq·d). Allocates its
/// result, one projection and a workspace.
template <class Queries, class Keys, class... Terms>
auto project_iterated(const Queries& queries, const Keys& keys, const Iteration& iteration,
                      const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
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
  constexpr detail::Require require("project_iterated_backward");
  detail::check_iteration(iteration, require);
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  if (static_cast<Index>(forward.points.size()) != iteration.steps ||
      forward.projections.size() != forward.points.size()) {
    require.fail("forward has ", forward.points.size(), " steps but must have ", iteration.steps);
  }
  require.shape("grad_out", detail::extent(grad_out), shape.queries_extent(),
                "the shape of queries");
  for (const Matrix<Scalar>& point : forward.points)
    require.shape("forward.points", detail::extent(point), shape.queries_extent(),
                  "the shape of queries");
  const auto& k = detail::stored(keys);
  const auto& g = detail::stored(grad_out);
  IteratedGradients<Scalar> gradients{
      detail::matrix<Scalar>(shape.queries_extent()), detail::matrix<Scalar>(shape.keys_extent()),
      Scalar(0), detail::matrix<Scalar>({shape.keys, shape.key_value_heads}), Scalar(0)};
  detail::iterated_backward(
      k, iteration, shape, g,
      [&](Index step, const auto& use) {
        const auto at = static_cast<std::size_t>(step);
        use(forward.points[at], forward.projections[at].out, forward.projections[at].log_sum_exp);
      },
      {detail::view(gradients.queries), detail::view(gradients.keys),
       detail::view(gradients.log_prior), &gradients.bandwidth, &gradients.step_size},
      Workspace(iterated_workspace_size(Pass::backward, queries, k, options, terms...)), options,
      terms...);
  if (options.prior.is_explicit() && options.prior.cols() == 1)
    gradients.log_prior = gradients.log_prior.rowwise().sum().eval();
  return gradients;
}

/// `project_iterated_backward` into matrices of any storage, without allocating, from what
/// `project_iterated_forward_into` kept in `points`, `projections` and `log_sum_exp`. Outputs as for
/// `project_backward_into`, and ∂loss/∂η. `workspace` needs iterated_workspace_size(Pass::backward,
/// queries, keys, options, terms...) bytes.
template <class Keys, class Points, class Projections, class LogSumExp, class GradOut,
          class GradQueries, class GradKeys, class GradLogPrior, class... Terms>
void project_iterated_backward_into(const Keys& keys, const Points& points,
                                    const Projections& projections, const LogSumExp& log_sum_exp,
                                    const GradOut& grad_out, GradQueries&& grad_queries,
                                    GradKeys&& grad_keys, detail::scalar_t<Keys>& grad_bandwidth,
                                    GradLogPrior&& grad_log_prior,
                                    detail::scalar_t<Keys>& grad_step_size,
                                    const Workspace& workspace, const Iteration& iteration,
                                    const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Keys>;
  detail::check_inputs_at_compile_time<Keys, Points, Projections, LogSumExp, GradOut>();
  detail::check_outputs_at_compile_time<Scalar, GradQueries, GradKeys, GradLogPrior>();
  constexpr detail::Require require("project_iterated_backward");
  detail::check_iteration(iteration, require);
  const auto& k = detail::stored(keys);
  const auto& g = detail::stored(grad_out);
  const auto shape = require.shapes(detail::extent(g), detail::extent(k), detail::extent(k),
                                    options.heads, options.sequences);
  detail::require_steps(require, points, projections, log_sum_exp, shape, iteration);
  require.shape("grad_queries", detail::extent(grad_queries), shape.queries_extent(),
                "the shape of queries");
  require.shape("grad_keys", detail::extent(grad_keys), shape.keys_extent(), "the shape of keys");
  require.shape("grad_log_prior", detail::extent(grad_log_prior),
                {shape.keys, shape.key_value_heads}, "keys × key/value heads");
  SurfaceOptions serial = options;
  serial.executor = nullptr;
  detail::check_workspace(require, workspace,
                          iterated_workspace_size(Pass::backward, g, k, serial, terms...));
  detail::term_binder(detail::surface_operands(g, k, options, require), require, terms...);
  detail::iterated_backward(
      k, iteration, shape, g,
      [&](Index step, const auto& use) {
        const auto rows = [&](const auto& all) {
          return all.middleRows(step * shape.queries, shape.queries);
        };
        use(rows(points), rows(projections), rows(log_sum_exp));
      },
      {detail::view(grad_queries), detail::view(grad_keys), detail::view(grad_log_prior),
       &grad_bandwidth, &grad_step_size},
      workspace, options, terms...);
}

}  // namespace surfattn
