// The log-sum-exp as a result that a loss may depend on, and results over parts of the keys that
// merge into the result over all of them, forward and backward.
#include <limits>
#include <span>
#include <string>
#include <surfattn/gradcheck.hpp>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/same_bits.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::test;

constexpr double infinity = std::numeric_limits<double>::infinity();
const Sizes sizes{37, 150, 9, 5, 4, 2};

double product(const Matrix<double>& a, const Matrix<double>& b) { return a.cwiseProduct(b).sum(); }

/// dO·O + dL·L
double loss_of(const Forward<double>& f, const Matrix<double>& grad_out,
               const Matrix<double>& grad_log_sum_exp) {
  return product(f.out, grad_out) + product(f.log_sum_exp, grad_log_sum_exp);
}

template <class Function>
void check_by_differences(const char* name, const Function& loss, const Matrix<double>& at,
                          const Matrix<double>& analytic) {
  const auto check = check_gradient(loss, at, analytic, {.tolerance = 1e-8});
  INFO(name << ": " << check);
  CHECK(check.passed());
}

// ---- Gradients of a loss that depends on the log-sum-exp ---------------------------------------

TEST_CASE("gradients through log_sum_exp agree with central differences", "[log_sum_exp]") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({7, 9, 3, 2, 4, 2}, random);
  const Options options{.scale = 0.7, .heads = p.heads};
  const Causal causal{Align::bottom_right};
  const auto loss = [&](const auto& q, const auto& k, const auto& v) {
    return loss_of(attention_forward(q, k, v, options, causal), p.grad_out, p.grad_log_sum_exp);
  };
  const auto f = attention_forward(p.queries, p.keys, p.values, options, causal);
  const auto g =
      attention_backward(p.queries, p.keys, p.values, f,
                         ForwardGradients{p.grad_out, p.grad_log_sum_exp}, options, causal);
  check_by_differences(
      "queries", [&](const auto& x) { return loss(x, p.keys, p.values); }, p.queries, g.queries);
  check_by_differences(
      "keys", [&](const auto& x) { return loss(p.queries, x, p.values); }, p.keys, g.keys);
  check_by_differences(
      "values", [&](const auto& x) { return loss(p.queries, p.keys, x); }, p.values, g.values);
}

TEST_CASE("gradients through log_sum_exp of a projection agree with central differences",
          "[log_sum_exp]") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({7, 9, 3, 3, 4, 2}, random);
  const Causal causal{Align::bottom_right};
  for (const PriorKind kind : {PriorKind::uniform, PriorKind::sdpa, PriorKind::explicit_weights}) {
    INFO("prior " << int(kind));
    const SurfaceOptions options{
        .heads = p.heads, .bandwidth = 1.3, .prior = library_prior(kind, p.log_prior)};
    const auto loss = [&](const auto& q, const auto& k, const SurfaceOptions& o) {
      return loss_of(project_forward(q, k, o, causal), p.grad_projection, p.grad_log_sum_exp);
    };
    const auto f = project_forward(p.queries, p.keys, options, causal);
    const auto g =
        project_backward(p.queries, p.keys, f,
                         ForwardGradients{p.grad_projection, p.grad_log_sum_exp}, options, causal);
    check_by_differences(
        "queries", [&](const auto& x) { return loss(x, p.keys, options); }, p.queries, g.queries);
    check_by_differences(
        "keys", [&](const auto& x) { return loss(p.queries, x, options); }, p.keys, g.keys);
    const auto check = check_gradient(
        [&](double bandwidth) {
          SurfaceOptions moved = options;
          moved.bandwidth = bandwidth;
          return loss(p.queries, p.keys, moved);
        },
        1.3, g.bandwidth, {.tolerance = 1e-8});
    INFO("bandwidth: " << check);
    CHECK(check.passed());
  }
}

TEST_CASE("gradients through log_sum_exp pass through every kind of term", "[log_sum_exp]") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({8, 10, 3, 3, 4, 2}, random);
  const Matrix<double> bias = random_matrix<double>(4, 5, random),
                       logits = random_matrix<double>(1, 4, random);
  const ForwardGradients gradient{p.grad_projection, p.grad_log_sum_exp};
  const Sequences sequences = Sequences::equal(2);
  const SurfaceOptions options{.heads = p.heads, .sequences = sequences, .bandwidth = 1.3};
  const auto loss = [&](const auto& q, const auto& k, double bandwidth, const auto& b,
                        const auto& sink) {
    SurfaceOptions moved = options;
    moved.bandwidth = bandwidth;
    return loss_of(project_forward(q, k, moved, SoftCap{3}, AdditiveBias{b}, Sink{sink},
                                   Causal{Align::bottom_right}),
                   p.grad_projection, p.grad_log_sum_exp);
  };
  const auto with = [&](const auto& use) {
    return use(SoftCap{3}, AdditiveBias{bias}, Sink{logits}, Causal{Align::bottom_right});
  };
  const auto f = with(
      [&](const auto&... terms) { return project_forward(p.queries, p.keys, options, terms...); });
  const auto g = with([&](const auto&... terms) {
    return project_backward(p.queries, p.keys, f, gradient, options, terms...);
  });
  check_by_differences(
      "queries", [&](const auto& x) { return loss(x, p.keys, 1.3, bias, logits); }, p.queries,
      g.queries);
  check_by_differences(
      "keys", [&](const auto& x) { return loss(p.queries, x, 1.3, bias, logits); }, p.keys, g.keys);
  check_by_differences(
      "bias", [&](const auto& x) { return loss(p.queries, p.keys, 1.3, x, logits); }, bias,
      std::get<0>(g.terms));
  check_by_differences(
      "sink", [&](const auto& x) { return loss(p.queries, p.keys, 1.3, bias, x); }, logits,
      std::get<1>(g.terms));
  const auto check = check_gradient(
      [&](double bandwidth) { return loss(p.queries, p.keys, bandwidth, bias, logits); }, 1.3,
      g.bandwidth, {.tolerance = 1e-8});
  INFO("bandwidth: " << check);
  CHECK(check.passed());
}

TEST_CASE("a zero gradient of log_sum_exp changes no bit", "[log_sum_exp]") {
  std::mt19937_64 random = seeded_random();
  const Problem<float> p(sizes, random);
  const Options options{.heads = p.heads};
  const Matrix<float> zero = Matrix<float>::Zero(37, 4);
  const auto f = attention_forward(p.queries, p.keys, p.values, options);
  const auto without = attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options);
  const auto with =
      attention_backward(p.queries, p.keys, p.values, f, Forward<float>{p.grad_out, zero}, options);
  CHECK(same_bits(with.queries, without.queries));
  CHECK(same_bits(with.keys, without.keys));
  CHECK(same_bits(with.values, without.values));
}

TEST_CASE("a query that sees no key takes no gradient of its log_sum_exp", "[log_sum_exp]") {
  std::mt19937_64 random = seeded_random();
  Problem<double> p({5, 5, 3, 3}, random);
  p.queries.row(0).setConstant(NAN);  // sees nothing: the window lies before the first key
  p.grad_log_sum_exp(0, 0) = NAN;
  const SlidingWindow window{.left = 3, .right = 0, .align = Align::bottom_right};
  const Matrix<double> keys = p.keys.topRows(4), values = p.values.topRows(4);
  const ForwardGradients gradient{p.grad_out, p.grad_log_sum_exp};
  const auto f = attention_forward(p.queries, keys, values, {}, window);
  REQUIRE(f.log_sum_exp(0, 0) == -infinity);
  const auto g = attention_backward(p.queries, keys, values, f, gradient, {}, window);
  CHECK(g.queries.row(0).isZero(0));
  CHECK(g.queries.allFinite());
  CHECK(g.keys.allFinite());
  const auto s = project_forward(p.queries, keys, {}, window);
  const auto h = project_backward(p.queries, keys, s, gradient, {}, window);
  CHECK(h.queries.row(0).isZero(0));
  CHECK(h.queries.allFinite());
  CHECK(h.keys.allFinite());
  CHECK(std::isfinite(h.bandwidth));
}

TEST_CASE("the gradient of log_sum_exp has the shape of log_sum_exp", "[log_sum_exp][errors]") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p(sizes, random);
  const Options options{.heads = p.heads};
  const auto f = attention_forward(p.queries, p.keys, p.values, options);
  const Matrix<double> wrong = Matrix<double>::Zero(37, 3);
  CHECK_THROWS_WITH(attention_backward(p.queries, p.keys, p.values, f,
                                       ForwardGradients{p.grad_out, wrong}, options),
                    contains_text("surfattn::attention_backward: grad_out.log_sum_exp is 37×3 but "
                                  "must be 37×4"));
}

TEST_CASE("the bandwidth's gradient does not need a key whose c_j is not 0", "[log_sum_exp]") {
  Matrix<double> queries(2, 1), keys(2, 1), grad_queries(2, 1);
  queries << 0.5, -0.25;
  keys << 1, -1;
  grad_queries << 3, -3;
  const SurfaceOptions options{.scale = 2};
  const auto operands =
      detail::surface_operands(queries, keys, options, detail::Require("partials_test"));
  const Matrix<double> cancelled = Matrix<double>::Zero(2, 1);
  const Matrix<double>& grad = grad_queries;
  // dβ = (1/β)·Σ q∘dq
  CHECK(detail::scale_gradient<double>(operands, 0, detail::view(grad), detail::view(cancelled),
                                       {}) == (0.5 * 3 + 0.25 * 3) / 2);
}

// ---- Parts -------------------------------------------------------------------------------------

/// Cuts that leave parts empty, and a mask that leaves others without a key for some queries or
/// all.
const std::vector<std::vector<Index>> all_cuts = {
    {0, 150}, {0, 0, 150}, {0, 64, 65, 150, 150}, {0, 30, 60, 90, 120, 150}, {0, 149, 150}};

reference::Mask mask_with_gaps(Index queries, Index keys) {
  reference::Mask mask(queries, keys);
  for (Index i = 0; i < queries; ++i) {
    for (Index j = 0; j < keys; ++j) {
      mask(i, j) = i != 3 && !(30 <= j && j < 60) && (i * 7 + j * 5) % 11 < 6 && j <= 4 * i;
    }
  }
  return mask;
}

/// One call over each part of the keys. The mask's columns are cut like the keys.
template <class Scalar, class Call>
void for_parts(const Problem<Scalar>& p, const reference::Mask& mask,
               const std::vector<Index>& cuts, const Call& call) {
  for (std::size_t n = 0; n + 1 < cuts.size(); ++n) {
    const Index first = cuts[n], count = cuts[n + 1] - cuts[n];
    const Matrix<bool> seen = mask.middleCols(first, count);
    call(n, p.keys.middleRows(first, count), p.values.middleRows(first, count), BoolMask{seen});
  }
}

/// Three times the bound on the whole: O = Σ exp(L_p − L)·O_p has the errors of O_p, of L_p and of
/// L, each of them within the bound on O.
Bounds merged_bounds(Bounds bounds) {
  for (Doubles* b : {&bounds.out, &bounds.log_sum_exp, &bounds.grad_queries, &bounds.grad_keys,
                     &bounds.grad_values, &bounds.grad_key_bias, &bounds.grad_keys_of_surface}) {
    *b *= 3;
  }
  bounds.grad_scale *= 3;
  return bounds;
}

template <class Scalar, class High>
void check_parts(const std::vector<Index>& cuts) {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Problem<Scalar> p(sizes, random);
  const auto mask = mask_with_gaps(sizes.queries, sizes.keys);
  const reference::Heads heads{4, 2};
  const double scale = 0.4;
  const Options options{.scale = scale, .heads = p.heads};
  const auto cast = [](const Matrix<Scalar>& m) { return Matrix<High>(m.template cast<High>()); };
  const auto q = cast(p.queries), k = cast(p.keys), v = cast(p.values);
  const auto exact = reference::attention_forward<High>(q, k, v, High(scale), heads, mask);
  const auto plain =
      reference::attention_forward<Scalar>(p.queries, p.keys, p.values, Scalar(scale), heads, mask);
  const auto dl = [&]<class S>(S) {
    return grad_log_sum_exp<S>(p, Loss::of_out_and_log_sum_exp,
                               Matrix<S>(exact.log_sum_exp.template cast<S>()));
  };
  const auto exact_grad = reference::attention_backward<High>(q, k, v, High(scale), heads, mask,
                                                              cast(p.grad_out), dl(High()));
  const auto plain_grad = reference::attention_backward<Scalar>(
      p.queries, p.keys, p.values, Scalar(scale), heads, mask, p.grad_out, dl(Scalar()));
  WholeBounds whole_bounds(p, p.values.cols());
  for (Index head = 0; head < heads.query; ++head) {
    auto one = exact_head<High>(doubles(p.queries), doubles(p.keys), doubles(p.values),
                                doubles(p.grad_out), exact, head, 4, 2, scale);
    one.grad_log_sum_exp = doubles(dl(High())).col(head);
    whole_bounds.add(ErrorModel<Scalar>(one).bounds(), head);
  }
  const Bounds bounds = merged_bounds(whole_bounds.sum);

  std::vector<Forward<Scalar>> parts;
  for_parts(p, mask, cuts, [&](std::size_t, const auto& keys, const auto& values, auto seen) {
    parts.push_back(attention_forward(p.queries, keys, values, options, seen));
  });
  const auto whole = merge_partials(parts);
  check_error("out", whole.out, plain.out, exact.out, bounds.out);
  check_error("log_sum_exp", whole.log_sum_exp, plain.log_sum_exp, exact.log_sum_exp,
              bounds.log_sum_exp);
  CHECK(whole.log_sum_exp(3, 0) == -infinity);
  CHECK(whole.out.row(3).isZero(0));

  const auto gradients =
      merge_partials_backward(parts, whole, ForwardGradients{p.grad_out, p.grad_log_sum_exp});
  Matrix<Scalar> grad_queries = Matrix<Scalar>::Zero(p.queries.rows(), p.queries.cols()),
                 grad_keys = p.keys, grad_values = p.values;
  for_parts(p, mask, cuts, [&](std::size_t n, const auto& keys, const auto& values, auto seen) {
    const auto g =
        attention_backward(p.queries, keys, values, parts[n], gradients[n], options, seen);
    grad_queries += g.queries;
    grad_keys.middleRows(cuts[n], keys.rows()) = g.keys;
    grad_values.middleRows(cuts[n], keys.rows()) = g.values;
  });
  check_error("grad queries", grad_queries, plain_grad.queries, exact_grad.queries,
              bounds.grad_queries);
  check_error("grad keys", grad_keys, plain_grad.keys, exact_grad.keys, bounds.grad_keys);
  check_error("grad values", grad_values, plain_grad.values, exact_grad.values, bounds.grad_values);
}

TEST_CASE("parts of the keys merge into the whole, forward and backward", "[partials]") {
  for (const auto& cuts : all_cuts) {
    INFO(cuts.size() - 1 << " parts");
    check_parts<float, double>(cuts);
    check_parts<double, long double>(cuts);
  }
}

/// Agreement to 1e-11 of the larger, in double: far above rounding, far below any mistake.
bool agree(const Matrix<double>& a, const Matrix<double>& b) {
  return (a - b).cwiseAbs().maxCoeff() <= 1e-11 * (1 + b.cwiseAbs().maxCoeff());
}

TEST_CASE("parts of the surface merge into the whole, forward and backward", "[partials]") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({37, 150, 9, 9, 4, 2}, random);
  const auto mask = mask_with_gaps(37, 150);
  const Matrix<bool> all = mask;
  for (const PriorKind kind : {PriorKind::uniform, PriorKind::sdpa}) {
    const SurfaceOptions options{
        .heads = p.heads, .bandwidth = 2.5, .prior = library_prior(kind, p.log_prior)};
    const ForwardGradients gradient{p.grad_projection, p.grad_log_sum_exp};
    const auto expected = project_forward(p.queries, p.keys, options, BoolMask{all});
    const auto expected_grad =
        project_backward(p.queries, p.keys, expected, gradient, options, BoolMask{all});
    for (const auto& cuts : all_cuts) {
      std::vector<Forward<double>> parts;
      for_parts(p, mask, cuts, [&](std::size_t, const auto& keys, const auto&, auto seen) {
        parts.push_back(project_forward(p.queries, keys, options, seen));
      });
      const auto whole = merge_partials(std::span<const Forward<double>>(parts));
      CHECK(agree(whole.out, expected.out));
      const auto gradients = merge_partials_backward(parts, whole, gradient);
      Matrix<double> grad_queries = Matrix<double>::Zero(37, 36), grad_keys = p.keys;
      double grad_bandwidth = 0;
      for_parts(p, mask, cuts, [&](std::size_t n, const auto& keys, const auto&, auto seen) {
        const auto g = project_backward(p.queries, keys, parts[n], gradients[n], options, seen);
        grad_queries += g.queries;
        grad_keys.middleRows(cuts[n], keys.rows()) = g.keys;
        grad_bandwidth += g.bandwidth;
      });
      CHECK(agree(grad_queries, expected_grad.queries));
      CHECK(agree(grad_keys, expected_grad.keys));
      CHECK(grad_bandwidth == Approx(expected_grad.bandwidth).epsilon(1e-11));
    }
  }
}

TEST_CASE("the merged result serves the backward pass of each part", "[partials]") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p(sizes, random);
  const auto mask = mask_with_gaps(37, 150);
  const Matrix<bool> all = mask;
  const Options options{.heads = p.heads};
  const auto f = attention_forward(p.queries, p.keys, p.values, options, BoolMask{all});
  const auto expected =
      attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options, BoolMask{all});
  Matrix<double> grad_queries = Matrix<double>::Zero(37, 36), grad_keys = p.keys;
  const std::vector<Index> cuts{0, 30, 60, 150};
  for_parts(p, mask, cuts, [&](std::size_t n, const auto& keys, const auto& values, auto seen) {
    const auto g = attention_backward(p.queries, keys, values, f, p.grad_out, options, seen);
    grad_queries += g.queries;
    grad_keys.middleRows(cuts[n], keys.rows()) = g.keys;
  });
  CHECK(agree(grad_queries, expected.queries));
  CHECK(agree(grad_keys, expected.keys));
}

TEST_CASE("parts merge in any order and in stages", "[partials]") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p(sizes, random);
  const Options options{.heads = p.heads};
  std::vector<Forward<double>> parts;
  for_parts(p, reference::Mask::Constant(37, 150, true), {0, 10, 80, 150},
            [&](std::size_t, const auto& keys, const auto& values, auto) {
              parts.push_back(attention_forward(p.queries, keys, values, options));
            });
  const auto expected = attention_forward(p.queries, p.keys, p.values, options);
  const auto backwards = merge_partials(parts[2], parts[1], parts[0]);
  const auto staged = merge_partials(parts[0], merge_partials(parts[1], parts[2]));
  for (const Forward<double>* merged : {&backwards, &staged}) {
    CHECK(agree(merged->out, expected.out));
    CHECK(agree(merged->log_sum_exp, expected.log_sum_exp));
  }
  const auto alone = merge_partials(parts[1]);
  CHECK(same_bits(alone.out, parts[1].out));
  CHECK(same_bits(alone.log_sum_exp, parts[1].log_sum_exp));
}

TEST_CASE("a part that saw no key counts for nothing, whatever its row holds", "[partials]") {
  const double very_large = 1e308;
  const Forward<double> seen{Matrix<double>::Constant(2, 3, 7), Matrix<double>::Constant(2, 1, 2)};
  Forward<double> unseen{Matrix<double>::Constant(2, 3, NAN),
                         Matrix<double>::Constant(2, 1, -infinity)};
  CHECK((merge_partials(unseen, seen).out.array() == 7).all());
  CHECK((merge_partials(seen, unseen).log_sum_exp.array() == 2).all());
  const auto nothing = merge_partials(unseen, unseen);
  CHECK(nothing.out.isZero(0));
  CHECK((nothing.log_sum_exp.array() == -infinity).all());
  const std::vector<Forward<double>> parts{seen, unseen};
  const auto gradients = merge_partials_backward(
      parts, merge_partials(parts), Matrix<double>(Matrix<double>::Constant(2, 3, very_large)));
  CHECK((gradients[0].out.array() == very_large).all());
  CHECK(gradients[0].log_sum_exp.isZero(0));
  CHECK(gradients[1].out.isZero(0));
  CHECK(gradients[1].log_sum_exp.isZero(0));
}

TEST_CASE("a NaN in a part stays in its query and head", "[partials]") {
  Forward<double> a{Matrix<double>::Constant(2, 2, 1), Matrix<double>::Constant(2, 2, 0)}, b = a;
  a.log_sum_exp(1, 0) = NAN;
  for (const auto& merged : {merge_partials(a, b), merge_partials(b, a)}) {
    CHECK(std::isnan(merged.out(1, 0)));
    CHECK(std::isnan(merged.log_sum_exp(1, 0)));
    CHECK(merged.out(1, 1) == 1);
    CHECK(merged.out.row(0).allFinite());
  }
}

TEST_CASE("parts that do not fit are named", "[partials][errors]") {
  const auto part = [](Index queries, Index width, Index heads) {
    return Forward<double>{Matrix<double>::Zero(queries, width),
                           Matrix<double>::Zero(queries, heads)};
  };
  CHECK_THROWS_WITH(merge_partials(std::vector<Forward<double>>()),
                    contains_text("surfattn::merge_partials: there must be at least one part"));
  CHECK_THROWS_WITH(merge_partials(part(3, 4, 2), part(3, 4, 2), part(2, 4, 2)),
                    contains_text("parts[2].out is 2×4 but must be 3×4"));
  CHECK_THROWS_WITH(merge_partials(part(3, 4, 2), part(3, 4, 1)),
                    contains_text("parts[1].log_sum_exp is 3×1 but must be 3×2"));
  CHECK_THROWS_WITH(merge_partials(part(3, 4, 3)), contains_text("parts[0].out must have"));
  const std::vector<Forward<double>> parts{part(3, 4, 2), part(3, 4, 2)};
  Matrix<double> out = Matrix<double>::Constant(3, 5, 7), log_sum_exp(3, 2);
  CHECK_THROWS_WITH(merge_partials_into(parts, out, log_sum_exp),
                    contains_text("out is 3×5 but must be 3×4"));
  CHECK((out.array() == 7).all());
  CHECK_THROWS_WITH(merge_partials_backward(parts, part(3, 4, 1), out),
                    contains_text("whole.log_sum_exp is 3×1 but must be 3×2"));
  CHECK_THROWS_WITH(merge_partials_backward(parts, parts[0], out),
                    contains_text("grad_out.out is 3×5 but must be 3×4"));
}

}  // namespace
