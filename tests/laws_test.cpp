// Laws that hold for attention and projection without any reference: symmetries, limits, equivalent
// ways to pose one problem. Every tolerance follows from the rounding errors that the sizes allow.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <surfattn/surfattn.hpp>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using surfattn::Forward;
using surfattn::Heads;
using surfattn::Index;
using surfattn::Matrix;
using surfattn::Options;
using surfattn::SurfaceOptions;
using surfattn::Workspace;
using surfattn::test::random_matrix;
using surfattn::test::seed;
using surfattn::test::seeded_random;
namespace detail = surfattn::detail;

using Random = std::mt19937_64;
using Real = long double;
using Wide = Matrix<Real>;

// ---- Problems ----------------------------------------------------------------------------------

enum class Form { standard, surface };

struct Sizes {
  Index queries, keys, head_dim, value_dim;
  Index query_heads = 1, key_value_heads = 1;
};

/// Everything that forward and backward pass say about one problem; what the form lacks stays
/// empty.
struct Result {
  Wide out, log_sum_exp, grad_queries, grad_keys, grad_values, grad_log_prior;
  Real grad_bandwidth = 0;
};

struct Evaluator;

/// One problem of either form. In the surface form `values` is the keys once more.
struct Problem {
  const Evaluator* evaluator;
  Form form;
  Heads heads;
  double scale;
  Wide queries, keys, values, grad_out;
  std::optional<double> bandwidth = {};  // of the surface form, in place of the scale: 1/√scale
  Wide log_prior = {};                   // of the surface form; size 0: uniform

  Index query_heads() const { return heads.query; }
  Index key_heads() const { return heads.key_value.value_or(heads.query); }
  Index group() const { return query_heads() / key_heads(); }
  Index head_dim() const { return queries.cols() / query_heads(); }
  Index value_dim() const { return grad_out.cols() / query_heads(); }
  double epsilon() const;

  void set_keys(const Wide& rows) {
    keys = rows;
    if (form == Form::surface) values = rows;
  }
};

/// How one scalar type runs a problem. The laws themselves compute in long double, whatever that
/// type is, and so compile once.
struct Evaluator {
  double epsilon;
  Wide (*random)(Index rows, Index cols, Random& random);
  Forward<Real> (*forward)(const Problem& p);
  Result (*both)(const Problem& p);
  Result (*masked)(const Problem& p, const Matrix<bool>& mask);
  Result (*tiled)(const Problem& p, const detail::Tiling* forward, const detail::Tiling* backward);
};

double Problem::epsilon() const { return evaluator->epsilon; }
Forward<Real> evaluate_forward(const Problem& p) { return p.evaluator->forward(p); }
Result evaluate(const Problem& p) { return p.evaluator->both(p); }

// ---- Problems in one scalar type ---------------------------------------------------------------

template <class S>
Wide wide(const Matrix<S>& matrix) {
  return matrix.template cast<Real>();
}

/// A problem's matrices in the scalar type S.
template <class S>
struct Narrow {
  Matrix<S> queries, keys, values, grad_out, log_prior;
  Options standard;
  SurfaceOptions surface;

  explicit Narrow(const Problem& p)
      : queries(p.queries.cast<S>()),
        keys(p.keys.cast<S>()),
        values(p.values.cast<S>()),
        grad_out(p.grad_out.cast<S>()),
        log_prior(p.log_prior.cast<S>()),
        standard{.scale = p.scale, .heads = p.heads},
        surface{.scale = p.scale, .heads = p.heads} {
    if (log_prior.size() > 0) surface.prior = log_prior;
    if (p.bandwidth) surface.bandwidth = p.bandwidth, surface.scale.reset();
  }
};

template <class S>
Wide random_in(Index rows, Index cols, Random& random) {
  return wide(random_matrix<S>(rows, cols, random));
}

template <class S, class... Terms>
Forward<S> run_forward(const Problem& p, const Narrow<S>& n, const Terms&... terms) {
  return p.form == Form::standard
             ? surfattn::attention_forward(n.queries, n.keys, n.values, n.standard, terms...)
             : surfattn::project_forward(n.queries, n.keys, n.surface, terms...);
}

template <class S>
Forward<Real> forward_in(const Problem& p) {
  const Forward<S> forward = run_forward(p, Narrow<S>(p));
  return {wide(forward.out), wide(forward.log_sum_exp)};
}

template <class S, class... Terms>
Result run_both(const Problem& p, const Terms&... terms) {
  const Narrow<S> n(p);
  const Forward<S> f = run_forward(p, n, terms...);
  if (p.form == Form::standard) {
    const auto g = surfattn::attention_backward(n.queries, n.keys, n.values, f, n.grad_out,
                                                n.standard, terms...);
    return {wide(f.out), wide(f.log_sum_exp), wide(g.queries), wide(g.keys), wide(g.values), {}};
  }
  const auto g = surfattn::project_backward(n.queries, n.keys, f, n.grad_out, n.surface, terms...);
  return {wide(f.out), wide(f.log_sum_exp), wide(g.queries), wide(g.keys),
          {},          wide(g.log_prior),   g.bandwidth};
}

template <class S>
Result both_in(const Problem& p) {
  return run_both<S>(p);
}

template <class S>
Result masked_in(const Problem& p, const Matrix<bool>& mask) {
  return run_both<S>(p, surfattn::BoolMask{mask});
}

/// Both passes by the engines themselves, under a causal mask, with tiles as the caller cuts them;
/// a null pointer stands for the library's own tiles.
template <class S>
Result tiled_in(const Problem& p, const detail::Tiling* forward, const detail::Tiling* backward) {
  const Narrow<S> n(p);
  const detail::Require require("laws_test");
  const bool surface = p.form == Form::surface;
  const auto operands =
      surface ? detail::surface_operands(n.queries, n.keys, n.surface, require)
              : detail::attention_operands(n.queries, n.keys, n.values, n.standard, require);
  const detail::Shape& shape = operands.shape;
  const auto bind = [&](const detail::Shape& sequence) {
    return detail::bind_terms(sequence, require, surfattn::Causal{surfattn::Align::bottom_right});
  };
  const auto forward_tiling = forward ? *forward : detail::forward_tiling<S>(shape, 1);
  const auto backward_tiling = backward ? *backward : detail::backward_tiling<S>(shape, 1);

  Forward<S> f{detail::matrix<S>(shape.out_extent()),
               detail::matrix<S>(shape.log_sum_exp_extent())};
  const auto plan_forward = [&](const detail::Shape& sequence, const auto& use) {
    use(detail::ForwardPlan<S>(sequence, forward_tiling));
  };
  const auto forward_plan = detail::work_plan(shape, plan_forward, nullptr);
  detail::forward(operands, bind, plan_forward, forward_plan,
                  {detail::view(f.out), detail::view(f.log_sum_exp)},
                  Workspace(forward_plan.workspace_size()), nullptr);
  Matrix<S> grad_queries(n.queries.rows(), n.queries.cols()),
      grad_keys = n.keys, grad_values = n.values, grad_log_prior(shape.keys, shape.key_value_heads);
  detail::GradientOutputs<S> gradients{detail::view(grad_queries),
                                       detail::view(grad_keys),
                                       {},
                                       detail::view(grad_log_prior),
                                       detail::view(grad_queries)};
  if (!surface) gradients.values = detail::view(grad_values);
  const Forward<S>& read = f;
  const auto plan_backward = [&](const detail::Shape& sequence, const auto& use) {
    use(detail::BackwardPlan<S>(sequence, backward_tiling, surface));
  };
  const auto backward_plan = detail::work_plan(shape, plan_backward, nullptr);
  detail::backward(
      operands, bind, plan_backward, backward_plan,
      {detail::view(read.out), detail::view(read.log_sum_exp), detail::view(n.grad_out)}, gradients,
      Workspace(backward_plan.workspace_size()), nullptr);
  return {wide(f.out),     wide(f.log_sum_exp), wide(grad_queries),
          wide(grad_keys), wide(grad_values),   wide(grad_log_prior)};
}

template <class S>
const Evaluator evaluator_of{static_cast<double>(std::numeric_limits<S>::epsilon()),
                             random_in<S>,
                             forward_in<S>,
                             both_in<S>,
                             masked_in<S>,
                             tiled_in<S>};

Problem random_problem(const Evaluator& evaluator, Form form, const Sizes& s, Random& random) {
  const Index value_dim = form == Form::surface ? s.head_dim : s.value_dim;
  Problem p{&evaluator,
            form,
            {s.query_heads, s.key_value_heads},
            0.8 / std::sqrt(static_cast<double>(s.head_dim)),
            evaluator.random(s.queries, s.query_heads * s.head_dim, random),
            evaluator.random(s.keys, s.key_value_heads * s.head_dim, random),
            evaluator.random(s.keys, s.key_value_heads * value_dim, random),
            evaluator.random(s.queries, s.query_heads * value_dim, random)};
  p.set_keys(p.keys);
  return p;
}

// ---- Rounding errors ---------------------------------------------------------------------------

double largest(const Wide& matrix) {
  return matrix.size() == 0 ? 0 : static_cast<double>(matrix.cwiseAbs().maxCoeff());
}

double sum_of_magnitudes(const Wide& matrix) {
  return static_cast<double>(matrix.cwiseAbs().sum());
}

double largest_row_norm(const Wide& matrix) {
  return matrix.size() == 0 ? 0 : static_cast<double>(matrix.rowwise().norm().maxCoeff());
}

double count(Index n) { return static_cast<double>(n); }

/// Bounds, to first order, on the rounding errors of one evaluation; n operations in a row lose at
/// most n ulp of the largest magnitude they meet. With e = one ulp of 1, β the scale, and n, m the
/// numbers of keys and of query rows that share a key:
///
///     |S| ≤ A = β‖q‖‖k‖ [+ β‖q‖²/2 + β‖k‖²/2 + |log π|]
///     S          (d + 6)·e·A, and 2·e·A for inputs that a law has computed and that were rounded
///     W          relative: both S and L are off, S − m loses e·2A, exp 2 ulp, a sum n ulp
///     O = W·V    W's error and n ulp, times |v|
///     dS         |dP|, |D| ≤ G = Σ|dO|·|v|; summed over one row's keys, where Σ W = 1
///     dQ, dK, dV, c   sums of those over n keys or m queries
///
/// Laws compare two evaluations and allow twice as much.
struct Tolerance {
  double mean, out, log_sum_exp, grad_queries, grad_keys, grad_values, grad_log_prior;

  explicit Tolerance(const Problem& p) {
    const double e = p.epsilon(), n = count(p.keys.rows()), m = count(p.queries.rows() * p.group());
    const double q = largest_row_norm(p.queries), k = largest_row_norm(p.keys);
    const double v = largest(p.values);
    const double A = magnitude(p, q, k);
    const double score = (count(p.head_dim()) + 8) * e * A;
    const double weight = 2 * score + 2 * A * e + (n + 16) * e;
    const double G = v * static_cast<double>(p.grad_out.cwiseAbs().rowwise().sum().maxCoeff());
    const double row = G * (3 * weight + n * e + 2 * (count(p.value_dim()) + 4) * e);
    // the weights of O = Σ wv / Σ w are the same above and below: only the sums round
    mean = 2 * (n + 4) * e;
    out = (weight + n * e) * v;
    log_sum_exp = score + (n + 16 + 2 * (A + std::log(n + 1))) * e;
    grad_queries = p.scale * k * (row + 2 * G * (n + 4) * e);
    grad_log_prior = m * (row + 2 * G * m * e);
    grad_values = largest(p.grad_out) * m * (weight + m * e);
    grad_keys = p.scale * q * grad_log_prior;
    if (p.form == Form::surface) grad_keys += grad_values + p.scale * k * grad_log_prior;
  }

 private:
  static double magnitude(const Problem& p, double q, double k) {
    const double dot = p.scale * q * k;
    if (p.form == Form::standard) return dot;
    return dot + p.scale * (q * q + k * k) / 2 + largest(p.log_prior);
  }
};

/// Largest |a − b|; infinite where the shapes differ or a NaN stands on either side.
double difference(const Wide& a, const Wide& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (Index i = 0; i < a.size(); ++i) {
    const auto error = static_cast<double>(std::abs(a.data()[i] - b.data()[i]));
    if (std::isnan(error)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, error);
  }
  return worst;
}

bool identical(const Wide& a, const Wide& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() && a == b;
}

void check_close(const Result& a, const Result& b, const Tolerance& t) {
  CHECK(difference(a.out, b.out) <= 2 * t.out);
  CHECK(difference(a.log_sum_exp, b.log_sum_exp) <= 2 * t.log_sum_exp);
  CHECK(difference(a.grad_queries, b.grad_queries) <= 2 * t.grad_queries);
  CHECK(difference(a.grad_keys, b.grad_keys) <= 2 * t.grad_keys);
  CHECK(difference(a.grad_values, b.grad_values) <= 2 * t.grad_values);
  CHECK(difference(a.grad_log_prior, b.grad_log_prior) <= 2 * t.grad_log_prior);
}

// ---- Running a law over forms and sizes --------------------------------------------------------

using Law = void (*)(const Problem&, Random&);

void check_law(const Evaluator& evaluator, Form form, Law law) {
  static constexpr Sizes all_sizes[] = {{1, 1, 1, 1},     {2, 7, 3, 8},    {9, 17, 8, 1},
                                        {33, 65, 17, 3},  {7, 2, 1, 3},    {65, 33, 64, 8},
                                        {17, 257, 8, 17}, {257, 9, 3, 64}, {129, 129, 3, 1}};
  Random random = seeded_random();
  for (const Sizes& s : all_sizes) {
    INFO((form == Form::standard ? "standard form" : "surface form")
         << ", queries " << s.queries << ", keys " << s.keys << ", widths " << s.head_dim << " and "
         << s.value_dim << ", seed " << seed());
    law(random_problem(evaluator, form, s, random), random);
  }
}

template <class Real>
void check_law(Form form, Law law) {
  check_law(evaluator_of<Real>, form, law);
}

template <class Real>
void check_law(Law law) {
  check_law<Real>(Form::standard, law);
  check_law<Real>(Form::surface, law);
}

std::vector<Index> random_permutation(Index size, Random& random) {
  std::vector<Index> order(static_cast<std::size_t>(size));
  std::iota(order.begin(), order.end(), Index{0});
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

/// Row i of the result is row order[i]; a matrix that is empty stays so.
Wide rows_in_order(const Wide& matrix, const std::vector<Index>& order) {
  if (matrix.size() == 0) return matrix;
  Wide result(static_cast<Index>(order.size()), matrix.cols());
  for (Index i = 0; i < result.rows(); ++i)
    result.row(i) = matrix.row(order[static_cast<std::size_t>(i)]);
  return result;
}

Wide with_column(const Wide& matrix, const Wide& column) {
  Wide result(matrix.rows(), matrix.cols() + 1);
  result << matrix, column;
  return result;
}

Wide stacked(const Wide& above, const Wide& below) {
  Wide result(above.rows() + below.rows(), above.cols());
  result << above, below;
  return result;
}

// ---- Permutations ------------------------------------------------------------------------------

void permuting_keys(const Problem& p, Random& random) {
  const auto order = random_permutation(p.keys.rows(), random);
  Problem permuted = p;
  permuted.keys = rows_in_order(p.keys, order);
  permuted.values = rows_in_order(p.values, order);
  Result expected = evaluate(p);
  expected.grad_keys = rows_in_order(expected.grad_keys, order);
  expected.grad_values = rows_in_order(expected.grad_values, order);
  expected.grad_log_prior = rows_in_order(expected.grad_log_prior, order);
  check_close(evaluate(permuted), expected, Tolerance(p));
}

void permuting_queries(const Problem& p, Random& random) {
  const auto order = random_permutation(p.queries.rows(), random);
  Problem permuted = p;
  permuted.queries = rows_in_order(p.queries, order);
  permuted.grad_out = rows_in_order(p.grad_out, order);
  Result expected = evaluate(p);
  expected.out = rows_in_order(expected.out, order);
  expected.log_sum_exp = rows_in_order(expected.log_sum_exp, order);
  expected.grad_queries = rows_in_order(expected.grad_queries, order);
  check_close(evaluate(permuted), expected, Tolerance(p));
}

void replacing_other_queries(const Problem& p, Random& random) {
  const Index kept = p.queries.rows() / 2;
  Problem replaced = p;
  replaced.queries = p.evaluator->random(p.queries.rows(), p.queries.cols(), random);
  replaced.grad_out = p.evaluator->random(p.grad_out.rows(), p.grad_out.cols(), random);
  replaced.queries.row(kept) = p.queries.row(kept);
  replaced.grad_out.row(kept) = p.grad_out.row(kept);
  const Result a = evaluate(p), b = evaluate(replaced);
  CHECK(identical(b.out.row(kept), a.out.row(kept)));
  CHECK(identical(b.log_sum_exp.row(kept), a.log_sum_exp.row(kept)));
  CHECK(identical(b.grad_queries.row(kept), a.grad_queries.row(kept)));
}

TEMPLATE_TEST_CASE("Permuting the keys permutes their gradients and nothing else", "[laws]", float,
                   double, long double) {
  check_law<TestType>(permuting_keys);
}

TEMPLATE_TEST_CASE("Permuting the queries permutes their rows and nothing else", "[laws]", float,
                   double, long double) {
  check_law<TestType>(permuting_queries);
}

TEMPLATE_TEST_CASE("The other queries change no bit of a query's results", "[laws]", float,
                   double) {
  check_law<TestType>(replacing_other_queries);
}

// ---- Shifts of the scores ----------------------------------------------------------------------

/// One column more, c_i at query i and 1 at every key, adds β·c_i to the scores of row i; in the
/// surface form −β(c_i − 1)²/2.
void shifting_scores(const Problem& p, Random& random) {
  const Wide c = p.evaluator->random(p.queries.rows(), 1, random);
  Problem shifted = p;
  shifted.queries = with_column(p.queries, c);
  shifted.set_keys(with_column(p.keys, Wide::Ones(p.keys.rows(), 1)));
  if (p.form == Form::standard) shifted.values = p.values;
  const Forward<Real> a = evaluate_forward(p), b = evaluate_forward(shifted);
  const Tolerance t(shifted);
  const Wide shift = p.form == Form::standard
                         ? Wide(static_cast<Real>(p.scale) * c)
                         : Wide(static_cast<Real>(-p.scale / 2) * (c.array() - 1).square());
  CHECK(difference(b.log_sum_exp, a.log_sum_exp + shift) <= 2 * t.log_sum_exp);
  CHECK(difference(b.out.leftCols(p.value_dim()), a.out) <= 2 * t.out);
}

TEMPLATE_TEST_CASE("A constant added to the scores of a row shifts log_sum_exp alone", "[laws]",
                   float, double, long double) {
  check_law<TestType>(shifting_scores);
}

void shifting_prior(const Problem& p, Random& random) {
  Problem prior = p, shifted = p;
  prior.log_prior = p.evaluator->random(p.keys.rows(), 1, random);
  const Real shift = Real(2.5);
  shifted.log_prior = prior.log_prior.array() + shift;
  Result expected = evaluate(prior);
  expected.log_sum_exp.array() += shift;
  check_close(evaluate(shifted), expected, Tolerance(shifted));
}

TEMPLATE_TEST_CASE("A constant added to the log-prior shifts log_sum_exp alone", "[laws]", float,
                   double) {
  check_law<TestType>(Form::surface, shifting_prior);
}

// ---- Weights: sum to one, none negative --------------------------------------------------------

void values_of_one(const Problem& p, Random&) {
  Problem ones = p;
  ones.values.setOnes();
  const Forward<Real> forward = evaluate_forward(ones);
  CHECK(difference(forward.out, Wide::Ones(p.queries.rows(), p.value_dim())) <=
        Tolerance(ones).mean);
}

TEMPLATE_TEST_CASE("Values that are all one give one", "[laws]", float, double, long double) {
  check_law<TestType>(Form::standard, values_of_one);
}

/// The excess of `out` over the bounds, column by column; negative within them.
Real excess(const Wide& out, const Wide& bounds) {
  Real worst = -std::numeric_limits<Real>::infinity();
  for (Index c = 0; c < out.cols(); ++c) {
    worst = std::max(worst, out.col(c).maxCoeff() - bounds.col(c).maxCoeff());
    worst = std::max(worst, bounds.col(c).minCoeff() - out.col(c).minCoeff());
  }
  return worst;
}

/// In the surface form this is the bounding box of the keys.
void within_the_values(const Problem& p, Random&) {
  const double allowed = Tolerance(p).mean * largest(p.values);
  CHECK(static_cast<double>(excess(evaluate_forward(p).out, p.values)) <= allowed);
}

/// A convex set is the intersection of its half-spaces: no direction takes a projection farther
/// than the farthest key.
void within_the_hull(const Problem& p, Random& random) {
  const Wide directions = p.evaluator->random(p.head_dim(), 50, random);
  const Wide projected = evaluate_forward(p).out.lazyProduct(directions);
  const Wide farthest = p.keys.lazyProduct(directions).colwise().maxCoeff();
  const double allowed = Tolerance(p).mean * largest(p.keys) *
                         static_cast<double>(directions.cwiseAbs().colwise().sum().maxCoeff());
  CHECK(static_cast<double>((projected.rowwise() - farthest.row(0)).maxCoeff()) <= allowed);
}

TEMPLATE_TEST_CASE("The output lies between the smallest and the largest value", "[laws]", float,
                   double) {
  check_law<TestType>(within_the_values);
}

TEMPLATE_TEST_CASE("The projection lies in the convex hull of the keys", "[laws]", float, double) {
  check_law<TestType>(Form::surface, within_the_hull);
}

// ---- Motions of the plane ----------------------------------------------------------------------

/// A product of reflections x − 2(x·n)n, one for each dimension, turns a direction into any other.
Wide random_rotation(Index size, Random& random) {
  Wide rotation = Wide::Identity(size, size);
  for (Index n = 0; n < size; ++n) {
    const Wide normal = random_matrix<Real>(1, size, random).normalized();
    rotation -= Wide(2 * rotation.lazyProduct(normal.transpose())).lazyProduct(normal);
  }
  return rotation;
}

Wide rotated(const Wide& points, const Wide& rotation) { return points.lazyProduct(rotation); }

void rotating(const Problem& p, Random& random) {
  const Wide rotation = random_rotation(p.head_dim(), random);
  Problem moved = p;
  moved.queries = rotated(p.queries, rotation);
  moved.set_keys(rotated(p.keys, rotation));
  moved.grad_out = rotated(p.grad_out, rotation);
  const Result a = evaluate(p), b = evaluate(moved);
  // turning a result turns its error, and an error of t in each of d entries has a norm of √d·t
  const double spread = 1 + std::sqrt(count(p.head_dim()));
  const Tolerance t(moved);
  CHECK(difference(b.out, rotated(a.out, rotation)) <= spread * t.out);
  CHECK(difference(b.log_sum_exp, a.log_sum_exp) <= 2 * t.log_sum_exp);
  CHECK(difference(b.grad_queries, rotated(a.grad_queries, rotation)) <= spread * t.grad_queries);
  CHECK(difference(b.grad_keys, rotated(a.grad_keys, rotation)) <= spread * t.grad_keys);
}

void translating(const Problem& p, Random& random) {
  const Wide offset = p.evaluator->random(1, p.head_dim(), random);
  Problem moved = p;
  moved.queries.rowwise() += offset.row(0);
  moved.set_keys(p.keys.rowwise() + offset.row(0));
  Result expected = evaluate(p);
  expected.out.rowwise() += offset.row(0);
  check_close(evaluate(moved), expected, Tolerance(moved));
}

TEMPLATE_TEST_CASE("The projection turns with its points", "[laws]", float, double) {
  check_law<TestType>(Form::surface, rotating);
}

TEMPLATE_TEST_CASE("The projection moves with its points", "[laws]", float, double) {
  check_law<TestType>(Form::surface, translating);
}

/// A power of two scales without rounding: P(aQ; aK, aσ) = a·P(Q; K, σ) bit for bit, and of
/// the gradients only that of the log-prior scales.
void scaling(const Problem& p, Random&) {
  Problem scaled = p, plain = p;
  plain.bandwidth = 1.25;
  scaled.bandwidth = 4 * 1.25;
  scaled.queries *= Real(4);
  scaled.set_keys(Real(4) * p.keys);
  const Result a = evaluate(plain), b = evaluate(scaled);
  CHECK(identical(b.out, Real(4) * a.out));
  CHECK(identical(b.log_sum_exp, a.log_sum_exp));
  CHECK(identical(b.grad_queries, a.grad_queries));
  CHECK(identical(b.grad_keys, a.grad_keys));
  CHECK(identical(b.grad_log_prior, Real(4) * a.grad_log_prior));
  CHECK(b.grad_bandwidth == a.grad_bandwidth);
}

TEMPLATE_TEST_CASE("The projection scales with its points and the bandwidth", "[laws]", float,
                   double) {
  check_law<TestType>(Form::surface, scaling);
}

/// The derivative of the same law in a, at a = 1 (Euler): Σ q·dq + Σ k·dk + σ·dσ = Σ dO·O. Each
/// gradient is off by its tolerance, times the number that it meets here; σ·dσ = −2β·dβ.
void scaling_derivative(const Problem& p, Random& random) {
  Problem with_prior = p;
  with_prior.log_prior = p.evaluator->random(p.keys.rows(), 1, random);
  const Result r = evaluate(with_prior);
  const Tolerance t(with_prior);
  const Real sigma = 1 / std::sqrt(static_cast<Real>(p.scale));
  const Real moved = p.queries.cwiseProduct(r.grad_queries).sum() +
                     p.keys.cwiseProduct(r.grad_keys).sum() + sigma * r.grad_bandwidth;
  const Real expected = p.grad_out.cwiseProduct(r.out).sum();
  const double queries = sum_of_magnitudes(p.queries), keys = sum_of_magnitudes(p.keys);
  const double squares = static_cast<double>(p.keys.squaredNorm());
  const double terms = queries * largest(r.grad_queries) + keys * largest(r.grad_keys) +
                       p.scale * squares * largest(r.grad_log_prior);
  const double allowed = 3 * queries * t.grad_queries + keys * t.grad_keys +
                         p.scale * squares * t.grad_log_prior +
                         sum_of_magnitudes(p.grad_out) * t.out +
                         3 * count(p.queries.size() + p.keys.size()) * p.epsilon() * terms;
  CHECK(std::abs(static_cast<double>(moved - expected)) <= allowed);
}

TEMPLATE_TEST_CASE("The gradients of points and bandwidth add up along a scaling", "[laws]", float,
                   double, long double) {
  check_law<TestType>(Form::surface, scaling_derivative);
}

// ---- Limits of the bandwidth -------------------------------------------------------------------

Index nearest_key(const Problem& p, Index query) {
  Index nearest = 0;
  (p.keys.rowwise() - p.queries.row(query)).rowwise().squaredNorm().minCoeff(&nearest);
  return nearest;
}

/// What the other keys can still move the projection by: Σ_j exp(−(d_j² − d_0²)/(2σ²))·|k_j − k_0|.
double pull_of_the_others(const Problem& p, Index query, Index nearest) {
  const auto squared = (p.keys.rowwise() - p.queries.row(query)).rowwise().squaredNorm().eval();
  double pull = 0;
  for (Index j = 0; j < p.keys.rows(); ++j) {
    const auto excess = static_cast<double>(squared(j) - squared(nearest));
    pull += std::exp(-excess * p.scale / 2) * largest(p.keys.row(j) - p.keys.row(nearest));
  }
  return pull;
}

void small_bandwidth(const Problem& p, Random&) {
  Problem sharp = p;
  for (Index i = 0; i < p.queries.rows(); ++i)
    sharp.queries.row(i) = Real(1.0625) * p.keys.row(i % p.keys.rows());
  sharp.scale = 1000;
  sharp.bandwidth = 1 / std::sqrt(sharp.scale);
  const Wide out = evaluate_forward(sharp).out;
  const double tolerance = Tolerance(sharp).out;
  for (Index i = 0; i < out.rows(); ++i) {
    const Index nearest = nearest_key(sharp, i);
    // the pull itself is known to the relative error of the weights
    const double pull = pull_of_the_others(sharp, i, nearest);
    REQUIRE(difference(out.row(i), sharp.keys.row(nearest)) <= 2 * pull + tolerance);
  }
}

/// Scores between −s and 0 give weights within e^{±s}/n.
void large_bandwidth(const Problem& p, Random&) {
  const double bandwidth = 1e4;
  const double reach = largest_row_norm(p.queries) + largest_row_norm(p.keys);
  const double s = reach * reach / (2 * bandwidth * bandwidth);
  Problem blunt = p;
  blunt.scale = 1 / (bandwidth * bandwidth);
  blunt.bandwidth = bandwidth;
  const Wide out = evaluate_forward(blunt).out;
  const Wide mean = p.keys.colwise().mean().replicate(p.queries.rows(), 1);
  CHECK(difference(out, mean) <= std::expm1(s) * largest(p.keys) + 2 * Tolerance(blunt).out);
}

TEMPLATE_TEST_CASE("A small bandwidth finds the nearest key", "[laws]", float, double) {
  check_law<TestType>(Form::surface, small_bandwidth);
}

TEMPLATE_TEST_CASE("A large bandwidth gives the mean of the keys", "[laws]", float, double) {
  check_law<TestType>(Form::surface, large_bandwidth);
}

// ---- Keys that occur twice ---------------------------------------------------------------------

void duplicating_all_keys(const Problem& p, Random&) {
  Problem twice = p;
  twice.keys = stacked(p.keys, p.keys);
  twice.values = stacked(p.values, p.values);
  const Result a = evaluate(p), b = evaluate(twice);
  const Tolerance t(twice);
  CHECK(difference(b.out, a.out) <= 2 * t.out);
  CHECK(difference(b.log_sum_exp, a.log_sum_exp.array() + std::log(Real(2))) <= 2 * t.log_sum_exp);
  CHECK(difference(b.grad_queries, a.grad_queries) <= 2 * t.grad_queries);
  CHECK(difference(Real(2) * b.grad_keys.topRows(p.keys.rows()), a.grad_keys) <= 3 * t.grad_keys);
  CHECK(difference(Real(2) * b.grad_keys.bottomRows(p.keys.rows()), a.grad_keys) <=
        3 * t.grad_keys);
}

/// The first half of the keys twice, against a prior of two on each of them.
void duplicates_as_prior(const Problem& p, Random&) {
  const Index half = (p.keys.rows() + 1) / 2;
  Problem weighted = p, twice = p;
  weighted.log_prior = Wide::Zero(p.keys.rows(), 1);
  weighted.log_prior.topRows(half).setConstant(std::log(Real(2)));
  twice.set_keys(stacked(p.keys, p.keys.topRows(half)));
  Result a = evaluate(weighted), b = evaluate(twice);
  // the two copies of a key share its gradient
  b.grad_keys.topRows(half) += b.grad_keys.bottomRows(half);
  b.grad_keys = b.grad_keys.topRows(p.keys.rows()).eval();
  b.grad_log_prior.topRows(half) += b.grad_log_prior.bottomRows(half);
  b.grad_log_prior = b.grad_log_prior.topRows(p.keys.rows()).eval();
  twice.log_prior = stacked(weighted.log_prior, weighted.log_prior.topRows(half));
  check_close(a, b, Tolerance(twice));
}

TEMPLATE_TEST_CASE("Every key twice changes log_sum_exp by log 2", "[laws]", float, double) {
  check_law<TestType>(duplicating_all_keys);
}

TEMPLATE_TEST_CASE("A key twice is a prior of two", "[laws]", float, double) {
  check_law<TestType>(Form::surface, duplicates_as_prior);
}

// ---- Heads -------------------------------------------------------------------------------------

Wide head_of(const Wide& matrix, Index head, Index heads) {
  const Index width = matrix.cols() / heads;
  return matrix.middleCols(head * width, width);
}

Problem one_head(const Problem& p, Index head) {
  const Index heads = p.query_heads(), shared = head / p.group(), key_heads = p.key_heads();
  Problem one = p;
  one.heads = {};
  one.queries = head_of(p.queries, head, heads);
  one.keys = head_of(p.keys, shared, key_heads);
  one.values = head_of(p.values, shared, key_heads);
  one.grad_out = head_of(p.grad_out, head, heads);
  if (p.log_prior.size() > 0) one.log_prior = p.log_prior.col(shared);
  return one;
}

void heads_are_independent(const Problem& p) {
  const Result all = evaluate(p);
  const Index heads = p.query_heads();
  Real bandwidth = 0;
  for (Index head = 0; head < heads; ++head) {
    const Result one = evaluate(one_head(p, head));
    CHECK(identical(head_of(all.out, head, heads), one.out));
    CHECK(identical(head_of(all.log_sum_exp, head, heads), one.log_sum_exp));
    CHECK(identical(head_of(all.grad_queries, head, heads), one.grad_queries));
    CHECK(identical(head_of(all.grad_keys, head, heads), one.grad_keys));
    CHECK(identical(head_of(all.grad_values, head, heads), one.grad_values));
    CHECK(identical(head_of(all.grad_log_prior, head, heads), one.grad_log_prior));
    bandwidth += one.grad_bandwidth;
  }
  // all heads have one σ; its gradient, 2β^(3/2)·(Σ q∘dq/β − ½Σ c‖k‖²), is a sum of many terms
  const double terms = largest(p.queries) * sum_of_magnitudes(all.grad_queries) / p.scale +
                       largest_row_norm(p.keys) * largest_row_norm(p.keys) *
                           sum_of_magnitudes(all.grad_log_prior) / 2;
  const double e = count(p.queries.size() + p.keys.size()) * p.epsilon();
  CHECK(std::abs(static_cast<double>(all.grad_bandwidth - bandwidth)) <=
        2 * e * 2 * std::pow(p.scale, 1.5) * terms);
}

/// Not bit for bit: how a problem is cut depends on how many heads share a key.
void groups_share_their_keys(const Problem& p) {
  const Result all = evaluate(p);
  const Tolerance t(p);
  const Index heads = p.query_heads(), key_heads = p.key_heads();
  Wide grad_keys = Wide::Zero(p.keys.rows(), p.keys.cols());
  Wide grad_values = Wide::Zero(p.values.rows(), p.values.cols());
  for (Index head = 0; head < heads; ++head) {
    const Result one = evaluate(one_head(p, head));
    CHECK(difference(head_of(all.out, head, heads), one.out) <= 2 * t.out);
    CHECK(difference(head_of(all.log_sum_exp, head, heads), one.log_sum_exp) <= 2 * t.log_sum_exp);
    CHECK(difference(head_of(all.grad_queries, head, heads), one.grad_queries) <=
          2 * t.grad_queries);
    const Index width = p.keys.cols() / key_heads, shared = head / p.group();
    grad_keys.middleCols(shared * width, width) += one.grad_keys;
    if (p.form == Form::standard) {
      grad_values.middleCols(shared * p.value_dim(), p.value_dim()) += one.grad_values;
    }
  }
  CHECK(difference(all.grad_keys, grad_keys) <= 2 * t.grad_keys);
  if (p.form == Form::standard)
    CHECK(difference(all.grad_values, grad_values) <= 2 * t.grad_values);
}

TEMPLATE_TEST_CASE("Many heads in one call are bit for bit many calls", "[laws]", float, double) {
  Random random = seeded_random();
  CAPTURE(seed());
  for (const Form form : {Form::standard, Form::surface}) {
    for (const Sizes& s : {Sizes{9, 17, 5, 3, 3, 3}, Sizes{65, 257, 8, 17, 2, 2}}) {
      auto p = random_problem(evaluator_of<TestType>, form, s, random);
      p.log_prior = evaluator_of<TestType>.random(s.keys, s.key_value_heads, random);
      heads_are_independent(p);
    }
  }
}

TEMPLATE_TEST_CASE("Grouped heads are heads with the same keys", "[laws]", float, double) {
  Random random = seeded_random();
  CAPTURE(seed());
  for (const Form form : {Form::standard, Form::surface}) {
    for (const Sizes& s :
         {Sizes{9, 17, 5, 3, 6, 2}, Sizes{129, 65, 8, 17, 3, 1}, Sizes{257, 7, 3, 1, 4, 2}}) {
      groups_share_their_keys(random_problem(evaluator_of<TestType>, form, s, random));
    }
  }
}

// ---- Gradients ---------------------------------------------------------------------------------

/// Weights sum to one, so moving all values by a constant moves every output by it.
void gradient_of_a_common_value(const Problem& p, Random&) {
  const Result result = evaluate(p);
  const auto n = count(p.keys.rows() + p.queries.rows());
  const double rounding = n * p.epsilon() * sum_of_magnitudes(p.grad_out);
  const double allowed = count(p.keys.rows()) * Tolerance(p).grad_values + rounding;
  CHECK(difference(result.grad_values.colwise().sum(), p.grad_out.colwise().sum()) <= allowed);
}

/// Moving all queries and keys together moves the projection with them: Σ dQ + Σ dK = Σ dO.
void gradient_of_a_common_offset(const Problem& p, Random&) {
  const Result r = evaluate(p);
  const Tolerance t(p);
  const auto queries = count(p.queries.rows());
  const auto keys = count(p.keys.rows());
  const double magnitude = sum_of_magnitudes(p.grad_out) + sum_of_magnitudes(r.grad_queries) +
                           sum_of_magnitudes(r.grad_keys);
  const double rounding = (queries + keys) * p.epsilon() * magnitude;
  CHECK(difference(r.grad_queries.colwise().sum() + r.grad_keys.colwise().sum(),
                   p.grad_out.colwise().sum()) <=
        queries * t.grad_queries + keys * t.grad_keys + rounding);
}

TEMPLATE_TEST_CASE("The gradients of the values add up to that of the output", "[laws]", float,
                   double, long double) {
  check_law<TestType>(Form::standard, gradient_of_a_common_value);
}

TEMPLATE_TEST_CASE("The gradients of all points add up to that of the projection", "[laws]", float,
                   double, long double) {
  check_law<TestType>(Form::surface, gradient_of_a_common_offset);
}

/// (L(q + h) − L(q − h))/(2h) along column c of every query at once: rows do not depend on each
/// other.
Wide slope_of_log_sum_exp(const Problem& p, Index column, Real step) {
  Problem ahead = p, behind = p;
  ahead.queries.col(column).array() += step;
  behind.queries.col(column).array() -= step;
  return (evaluate_forward(ahead).log_sum_exp - evaluate_forward(behind).log_sum_exp) / (2 * step);
}

/// dL/dq = β·(Σ W·k [− q]), which in the surface form is (P(q) − q)/σ². A central difference is off
/// by h²/6 times the third derivative, a cumulant of β·k: at most (β·(max k − min k))³; and by the
/// errors of L over h.
void slope(const Problem& p, Random&) {
  Problem with_keys = p;
  with_keys.values = p.keys;
  with_keys.grad_out = Wide::Zero(p.queries.rows(), p.head_dim());
  Wide mean = evaluate_forward(with_keys).out;
  if (p.form == Form::surface) mean -= p.queries;
  const Wide expected = static_cast<Real>(p.scale) * mean;
  const Tolerance t(with_keys);
  const double step = std::cbrt(t.log_sum_exp);
  const double third = std::pow(2 * p.scale * largest(p.keys), 3);
  const double q = largest(p.queries) + step;
  // q ± h rounds, too
  const double rounding = q * p.epsilon() / step * (largest(expected) + 1);
  const double allowed =
      step * step / 6 * third + 2 * t.log_sum_exp / step + p.scale * t.out + rounding;
  for (const Index column : {Index{0}, p.head_dim() - 1}) {
    const auto measured = slope_of_log_sum_exp(p, column, static_cast<Real>(step));
    CHECK(difference(measured, expected.col(column)) <= allowed);
  }
}

void slope_with_prior(const Problem& p, Random& random) {
  Problem with_prior = p;
  with_prior.log_prior = p.evaluator->random(p.keys.rows(), 1, random);
  slope(with_prior, random);
}

TEMPLATE_TEST_CASE("The gradient of log_sum_exp points at the projection", "[laws]", double,
                   long double) {
  check_law<TestType>(slope);
  check_law<TestType>(Form::surface, slope_with_prior);
}

// ---- Parts and sums ----------------------------------------------------------------------------

Forward<Real> over_keys(const Problem& p, Index first, Index keys) {
  Problem part = p;
  part.keys = p.keys.middleRows(first, keys);
  part.values = p.values.middleRows(first, keys);
  return evaluate_forward(part);
}

/// Outputs add with weights exp(L_part − L), and log_sum_exps as logarithms; parts without keys
/// have −∞ and weight 0.
Forward<Real> merged(const Forward<Real>& a, const Forward<Real>& b) {
  Forward<Real> whole = a;
  for (Index i = 0; i < a.out.rows(); ++i) {
    const Real la = a.log_sum_exp(i, 0), lb = b.log_sum_exp(i, 0), top = std::max(la, lb);
    const Real l = top + std::log(std::exp(la - top) + std::exp(lb - top));
    whole.log_sum_exp(i, 0) = l;
    whole.out.row(i) = std::exp(la - l) * a.out.row(i) + std::exp(lb - l) * b.out.row(i);
  }
  return whole;
}

void cutting_the_keys(const Problem& p, Random&) {
  const Forward<Real> whole = evaluate_forward(p);
  const Index keys = p.keys.rows();
  const Tolerance t(p);
  for (const Index cut : {Index{0}, keys / 3, keys / 2, keys}) {
    const auto joined = merged(over_keys(p, 0, cut), over_keys(p, cut, keys - cut));
    CHECK(difference(joined.log_sum_exp, whole.log_sum_exp) <= 3 * t.log_sum_exp);
    CHECK(difference(joined.out, whole.out) <= 2 * t.out + 4 * t.log_sum_exp * largest(p.values));
  }
}

TEMPLATE_TEST_CASE("Results over parts of the keys merge into the whole", "[laws]", float, double,
                   long double) {
  check_law<TestType>(cutting_the_keys);
}

void adding_values(const Problem& p, Random& random) {
  Problem other = p, sum = p;
  other.values = p.evaluator->random(p.values.rows(), p.values.cols(), random);
  sum.values = Real(2) * p.values - Real(3) * other.values;
  const Wide expected = Real(2) * evaluate_forward(p).out - Real(3) * evaluate_forward(other).out;
  const double magnitude = 2 * largest(p.values) + 3 * largest(other.values);
  // the weights are the same bits in all three; sums and the combination of the values round
  CHECK(difference(evaluate_forward(sum).out, expected) <=
        2 * (Tolerance(p).mean + 4 * p.epsilon()) * magnitude);
}

TEMPLATE_TEST_CASE("The output is linear in the values", "[laws]", float, double) {
  check_law<TestType>(Form::standard, adding_values);
}

// ---- Masks -------------------------------------------------------------------------------------

/// Query i of the problem alone, with the keys that it sees and no mask.
Problem row_problem(const Problem& p, Index i, const std::vector<Index>& keys) {
  Problem row = p;
  row.queries = p.queries.row(i);
  row.grad_out = p.grad_out.row(i);
  row.keys = rows_in_order(p.keys, keys);
  row.values = rows_in_order(p.values, keys);
  return row;
}

void add_rows(Wide& to, const Wide& rows, const std::vector<Index>& order) {
  for (Index i = 0; i < rows.rows(); ++i) to.row(order[static_cast<std::size_t>(i)]) += rows.row(i);
}

/// What a mask hides might as well not be there: query by query without a mask, added up.
Result without_hidden_keys(const Problem& p, const Matrix<bool>& mask) {
  Result sum = evaluate(p);
  for (Wide* grad : {&sum.grad_keys, &sum.grad_values, &sum.grad_log_prior}) grad->setZero();
  for (Index i = 0; i < p.queries.rows(); ++i) {
    std::vector<Index> keys;
    for (Index j = 0; j < p.keys.rows(); ++j) {
      if (mask(i, j)) keys.push_back(j);
    }
    const Result row = evaluate(row_problem(p, i, keys));
    sum.out.row(i) = row.out;
    sum.log_sum_exp.row(i) = row.log_sum_exp;
    sum.grad_queries.row(i) = row.grad_queries;
    add_rows(sum.grad_keys, row.grad_keys, keys);
    add_rows(sum.grad_values, row.grad_values, keys);
    add_rows(sum.grad_log_prior, row.grad_log_prior, keys);
  }
  return sum;
}

void hiding_keys(const Problem& p, Random& random) {
  Matrix<bool> mask(p.queries.rows(), p.keys.rows());
  for (Index i = 0; i < mask.size(); ++i) mask.data()[i] = random() % 3 == 0;
  // no query without a key: a log_sum_exp of −∞ has no difference to another
  mask.col(p.keys.rows() / 2).setConstant(true);
  check_close(p.evaluator->masked(p, mask), without_hidden_keys(p, mask), Tolerance(p));
}

TEMPLATE_TEST_CASE("A hidden key is a key that is not there", "[laws]", float, double) {
  check_law<TestType>(hiding_keys);
}

// ---- Tiles -------------------------------------------------------------------------------------

void cutting_into_tiles(const Problem& p) {
  constexpr detail::Tiling forward[] = {{1, 1, 1}, {3, 5, 7}, {48, 64, 96}, {300, 600, 900}};
  constexpr detail::Tiling backward[] = {
      {1, 1, 1, 1}, {5, 3, 12, 6}, {16, 64, 256, 128}, {600, 300, 1200, 1200}};
  const Result expected = p.evaluator->tiled(p, nullptr, nullptr);
  for (int n = 0; n < 4; ++n) {
    CAPTURE(n);
    check_close(p.evaluator->tiled(p, &forward[n], &backward[n]), expected, Tolerance(p));
  }
}

TEMPLATE_TEST_CASE("The result does not depend on how the problem is cut into tiles", "[laws]",
                   float, double) {
  Random random = seeded_random();
  CAPTURE(seed());
  for (const Form form : {Form::standard, Form::surface}) {
    for (const Sizes& s : {Sizes{7, 9, 3, 5}, Sizes{33, 65, 17, 8, 4, 2}, Sizes{65, 257, 8, 3}}) {
      cutting_into_tiles(random_problem(evaluator_of<TestType>, form, s, random));
    }
  }
}

}  // namespace
