// What single terms promise beyond the laws that all of them keep.
#include "support/terms.hpp"

#include <array>
#include <surfattn/executors/thread_pool.hpp>

#include "support/same_bits.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
using Rows = Matrix<double>;

double largest_difference(const Rows& a, const Rows& b) { return (a - b).cwiseAbs().maxCoeff(); }

/// The weights: with unit vectors as values they are the output.
template <class... Terms>
Rows weights(const Rows& q, const Rows& k, const Terms&... terms) {
  return attention(q, k, Rows(Rows::Identity(k.rows(), k.rows())), {}, terms...);
}

template <class Scalar>
void check_tanh() {
  using Wide = std::conditional_t<std::is_same_v<Scalar, float>, double, long double>;
  constexpr Index count = 4096;
  alignas(64) static Scalar row[count], derivatives[count];
  double worst = 0;
  for (const Scalar range : {Scalar(1e-6), Scalar(0.3), Scalar(2), Scalar(30)}) {
    for (Index n = 0; n < count; ++n) row[n] = range * (Scalar(2 * n + 1) / count - 1);
    std::array<Scalar, count> x;
    std::copy(row, row + count, x.begin());
    detail::simd::soft_cap_row<true>(row, Scalar(1), derivatives, count);
    for (Index n = 0; n < count; ++n) {
      const Wide exact = std::tanh(Wide(x[std::size_t(n)]));
      worst = std::max(worst, double(std::abs((Wide(row[n]) - exact) / exact)));
      CHECK(std::abs(Wide(derivatives[n]) - (1 - exact * exact)) <=
            Wide(8 * std::numeric_limits<Scalar>::epsilon()));
    }
  }
  INFO("worst relative error " << worst);
  CHECK(worst <= 4 * double(std::numeric_limits<Scalar>::epsilon()));
}

}  // namespace

TEST_CASE("the hyperbolic tangent of SoftCap is right to 4 ulp, and keeps infinities and NaN") {
  check_tanh<float>();
  check_tanh<double>();
  check_tanh<long double>();
  alignas(64) double row[64] = {infinity, -infinity, not_a_number, 0.0, -0.0, 1e300};
  detail::simd::soft_cap_row<false, double>(row, 2.0, nullptr, 64);
  CHECK(row[0] == 2);
  CHECK(row[1] == -2);
  CHECK(std::isnan(row[2]));
  CHECK(row[3] == 0);
  CHECK(row[4] == 0);
  CHECK(row[5] == 2);
}

TEST_CASE("buckets of distances are those of T5") {
  const detail::DistanceBuckets both{32, 128, true}, backwards{32, 128, false};
  // distance, bucket both ways, bucket backwards
  const std::array<Index, 3> known[] = {
      {0, 0, 0},     {-1, 1, 1},    {1, 17, 0},     {-7, 7, 7},      {7, 23, 0},
      {-8, 8, 8},    {8, 24, 0},    {-15, 9, 15},   {-16, 10, 16},   {16, 26, 0},
      {-31, 11, 21}, {-64, 14, 26}, {-127, 15, 31}, {-1000, 15, 31}, {1000, 31, 0}};
  for (const auto& [distance, two_sided, one_sided] : known) {
    CAPTURE(distance);
    CHECK(both(distance) == two_sided);
    CHECK(backwards(distance) == one_sided);
  }
  for (Index distance = -300; distance <= 300; ++distance) {
    CHECK(both(distance) == reference::relative_position_bucket(distance, 32, 128, true));
    CHECK(backwards(distance) == reference::relative_position_bucket(distance, 32, 128, false));
  }
}

TEST_CASE("slopes of ALiBi are those of the paper") {
  const auto eight = alibi_slopes<double>(8), twelve = alibi_slopes<double>(12);
  for (Index h = 0; h < 8; ++h) {
    CHECK(eight(h) == std::exp2(-double(h + 1)));
    CHECK(twelve(h) == eight(h));
  }
  for (Index h = 8; h < 12; ++h) CHECK(twelve(h) == std::exp2(-(double(h - 8) + 0.5)));
  CHECK(alibi_slopes<float>(1)(0) == std::exp2(-8.0f));
}

TEST_CASE("modifiers act in the order in which they are listed, other kinds wherever they stand") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({20, 30, 4, 3, 2, 1}, random);
  const Rows tau = Rows::Constant(1, 2, 3.0), bias = random_matrix<double>(20, 30, random);
  const auto run = [&](const auto&... terms) {
    return attention(p.queries, p.keys, p.values, {.scale = 1.0, .heads = p.heads}, terms...);
  };
  const Causal causal{Align::bottom_right};
  const Rows cap_first = run(SoftCap{1}, Temperature{tau}, AdditiveBias{bias}, causal);
  CHECK(same_bits(cap_first, run(causal, SoftCap{1}, AdditiveBias{bias}, Temperature{tau})));
  CHECK(same_bits(cap_first, run(AdditiveBias{bias}, SoftCap{1}, causal, Temperature{tau})));
  CHECK(largest_difference(cap_first,
                           run(Temperature{tau}, SoftCap{1}, AdditiveBias{bias}, causal)) > 0.01);
}

TEST_CASE("a modifier of the user's sees the score in natural units and where it stands") {
  const Rows q = Rows::Constant(20, 2, 0.5), k = Rows::Constant(3, 1, 3.0);
  Rows seen = Rows::Zero(20, 2 * 3);
  const Modifier record{[&seen](auto score, Position position) {
    seen(position.query, position.head * 3 + position.key) = score;
    return ValueAndDerivative{score, score};
  }};
  attention(q, k, k, {.scale = 2.0, .heads = {2, 1}}, record);
  CHECK(largest_difference(seen, Rows::Constant(20, 6, 3.0)) < 1e-14);
  project(q, k, {.heads = {2, 1}, .bandwidth = 0.5}, record);
  CHECK(largest_difference(seen, Rows::Constant(20, 6, -0.5 * 2.5 * 2.5 / 0.25)) < 1e-13);
  const Modifier cap{[](double score, const Position&) {
    const double t = std::tanh(score / 2);
    return ValueAndDerivative{2 * t, 1 - t * t};
  }};
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({20, 30, 4, 3}, random);
  CHECK(largest_difference(attention(p.queries, p.keys, p.values, {}, cap),
                           attention(p.queries, p.keys, p.values, {}, SoftCap{2})) < 1e-14);
}

TEST_CASE("a bias of -infinity hides a pair as a mask does") {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {3, 40}) {
    const Sizes s{queries, 600, 4, 3, 2, 1};
    Problem<double> p(s, random);
    reference::Mask mask = dense_mask(MaskKind::dense, s.queries, s.keys);
    mask.col(5).setConstant(false);
    mask.row(2).setConstant(false);
    p.keys.row(5).setConstant(not_a_number);
    p.values.row(5).setConstant(infinity);
    const Rows zero_or_hidden = Rows::NullaryExpr(
        s.queries, s.keys, [&](Index i, Index j) { return mask(i, j) ? 0.0 : -infinity; });
    const Options options{.heads = p.heads};
    const auto check = [&](const auto& out, const auto& masked) {
      CHECK(same_bits(out.out, masked.out));
      CHECK(same_bits(out.log_sum_exp, masked.log_sum_exp));
      CHECK(out.out.allFinite());
      CHECK(out.out.row(2).isZero(0));
    };
    const auto forward =
        attention_forward(p.queries, p.keys, p.values, options, AdditiveBias{zero_or_hidden});
    check(forward, attention_forward(p.queries, p.keys, p.values, options, BoolMask{mask}));
    const auto g = attention_backward(p.queries, p.keys, p.values, forward, p.grad_out, options,
                                      AdditiveBias{zero_or_hidden});
    const auto of_mask = attention_backward(p.queries, p.keys, p.values, forward, p.grad_out,
                                            options, BoolMask{mask});
    CHECK(same_bits(g.queries, of_mask.queries));
    CHECK(same_bits(g.keys, of_mask.keys));
    CHECK(same_bits(g.values, of_mask.values));
    const Rows& grad_bias = std::get<0>(g.terms);
    CHECK(grad_bias.allFinite());
    CHECK(grad_bias.cwiseAbs().maxCoeff() > 0);
    CHECK(grad_bias.row(2).isZero(0));
    CHECK(grad_bias.col(5).isZero(0));
  }
}

TEST_CASE("a bias may be stored in any way, also one that hides") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({101, 300, 4, 3}, random);
  for (const bool hides : {false, true}) {
    Rows bias = random_matrix<double>(101, 300, random);
    if (hides) bias = (bias.array() > 0.5).select(-infinity, bias);
    const Eigen::MatrixXd columns = bias;
    const auto by_rows = attention_forward(p.queries, p.keys, p.values, {}, AdditiveBias{bias}),
               by_columns =
                   attention_forward(p.queries, p.keys, p.values, {}, AdditiveBias{columns});
    CHECK(largest_difference(by_rows.out, by_columns.out) <= 1e-14);
    CHECK(largest_difference(by_rows.log_sum_exp, by_columns.log_sum_exp) <= 1e-14);
    const auto gradients = [&](const auto& term) {
      return attention_backward(p.queries, p.keys, p.values, by_rows, p.grad_out, {}, term);
    };
    const auto of_rows = gradients(AdditiveBias{bias}),
               of_columns = gradients(AdditiveBias{columns});
    CHECK(largest_difference(of_rows.keys, of_columns.keys) <= 1e-13);
    CHECK(largest_difference(std::get<0>(of_rows.terms), std::get<0>(of_columns.terms)) <= 1e-14);
  }
}

TEST_CASE("NaN in a bias reaches its row and no other") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({20, 30, 4, 3}, random);
  for (const double poison : {not_a_number, infinity}) {
    Rows bias = Rows::Zero(20, 30);
    bias(7, 11) = poison;
    const Rows out = attention(p.queries, p.keys, p.values, {}, AdditiveBias{bias});
    for (Index i = 0; i < 20; ++i) {
      CHECK((i == 7 ? out.row(i).array().isNaN().all() : out.row(i).allFinite()));
    }
  }
}

TEST_CASE("a query that sees no key but has a sink gets 0, and the sink is its log-sum-exp") {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {2, 60}) {
    const Problem<double> p({queries, 5, 4, 3, 2, 1}, random);
    Rows sink(1, 2);
    sink << 0.7, -infinity;
    const Causal causal{Align::bottom_right};  // the first queries see nothing if there are many
    const Options options{.heads = p.heads};
    const auto f = attention_forward(p.queries, p.keys, p.values, options, Sink{sink}, causal);
    const auto plain = attention_forward(p.queries, p.keys, p.values, options, causal);
    const auto g =
        attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options, Sink{sink}, causal);
    for (Index i = 0; i + 5 < queries; ++i) {
      CHECK(f.out.row(i).isZero(0));
      CHECK(f.log_sum_exp(i, 0) == Approx(0.7).epsilon(1e-15));
      CHECK(f.log_sum_exp(i, 1) == -infinity);
      CHECK(g.queries.row(i).isZero(0));
    }
    // a sink of −∞ is none
    CHECK(same_bits(f.out.rightCols(3), plain.out.rightCols(3)));
    const Rows& grad_sink = std::get<0>(g.terms);
    CHECK(std::isfinite(grad_sink(0, 0)));
    CHECK(grad_sink(0, 0) != 0);
    CHECK(grad_sink(0, 1) == 0);
    CHECK(g.keys.allFinite());
  }
}

TEST_CASE("without any key, a sink gives 0 in both forms") {
  const Rows q = Rows::Ones(3, 2), none(0, 2), sink = Rows::Constant(1, 1, 0.25);
  const auto f = attention_forward(q, none, none, {}, Sink{sink});
  CHECK(f.out.isZero(0));
  CHECK(f.log_sum_exp.isConstant(0.25));
  const auto p = project_forward(q, none, {}, Sink{sink});
  CHECK(p.out.isZero(0));
  CHECK(p.log_sum_exp.isConstant(0.25));
  const auto g = project_backward(q, none, p, Rows(Rows::Ones(3, 2)), {}, Sink{sink});
  CHECK(g.queries.isZero(0));
  CHECK(std::get<0>(g.terms).isZero(0));
}

TEST_CASE("dropout depends on seed, offset, sequence, head, query and key alone") {
  const Rows q = Rows::Zero(100, 2), k = Rows::Zero(700, 2);
  const Dropout dropout{.probability = 0.25, .seed = 42, .offset = 7};
  const Rows all = weights(q, k, dropout);
  const auto kept = (all.array() != 0).template cast<double>();
  CHECK(kept.mean() == Approx(0.75).epsilon(0.01));
  CHECK(largest_difference(all, (kept / (0.75 * 700)).matrix()) < 1e-17);
  // a few queries, which go another way through the keys, and queries and keys of a mask
  CHECK(same_bits(Rows(all.topRows(3)), weights(q.topRows(3), k, dropout)));
  const Rows windowed =
      weights(q, k, dropout, SlidingWindow{.left = 90, .right = 333, .align = Align::bottom_right});
  for (Index i = 0; i < 100; ++i) {
    for (Index j = std::max<Index>(0, 600 + i - 90); j < std::min<Index>(700, 600 + i + 334); ++j)
      CHECK((windowed(i, j) != 0) == (all(i, j) != 0));
  }
  const auto differs = [&](Dropout other) {
    const Rows changed = weights(q, k, other);
    return ((changed.array() != 0) != (all.array() != 0)).template cast<double>().mean();
  };
  // two independent choices differ at 2·0.25·0.75 of the places
  CHECK(differs({.probability = 0.25, .seed = 43, .offset = 7}) == Approx(0.375).epsilon(0.02));
  CHECK(differs({.probability = 0.25, .seed = 42, .offset = 8}) == Approx(0.375).epsilon(0.02));
  CHECK(differs({.probability = 0.25, .seed = 42, .offset = 7, .first_sequence = 1}) ==
        Approx(0.375).epsilon(0.02));
  CHECK(differs(dropout) == 0);
}

TEST_CASE("dropout with probability 0 changes no bit, and keeps the mean of the output") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({40, 90, 4, 3, 2, 1}, random);
  const Options options{.heads = p.heads};
  const Rows plain = attention(p.queries, p.keys, p.values, options);
  CHECK(same_bits(plain, attention(p.queries, p.keys, p.values, options, Dropout{})));
  Rows mean = Rows::Zero(plain.rows(), plain.cols());
  constexpr int calls = 2000;
  for (int n = 0; n < calls; ++n) {
    mean += attention(p.queries, p.keys, p.values, options,
                      Dropout{.probability = 0.5, .seed = 1, .offset = std::uint64_t(n)}) /
            calls;
  }
  // the deviation of one call is √(p/(1 − p)·Σ_j (W_ij·v_jc)²) = √Σ_j (W_ij·v_jc)² here, at most
  // that of all weight on one key, 4; six of those of the mean
  CHECK(largest_difference(mean, plain) < 6 * 4 / std::sqrt(double(calls)));
  CHECK(largest_difference(mean, plain) > 0);
}

TEST_CASE("gradients of terms come in the order of the terms, or go where they are sent") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({20, 30, 4, 3, 2, 1}, random);
  const Rows slopes = random_matrix<double>(2, 1, random),
             bias = random_matrix<double>(20, 30, random),
             sink = random_matrix<double>(1, 2, random);
  const Options options{.heads = p.heads};
  const auto backward = [&](const auto&... terms) {
    const auto f = attention_forward(p.queries, p.keys, p.values, options, terms...);
    return attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options, terms...);
  };
  const Align align = Align::bottom_right;
  const auto returned = backward(Alibi{slopes, align}, SoftCap{3}, AdditiveBias{bias}, Sink{sink});
  static_assert(std::tuple_size_v<decltype(returned.terms)> == 3);
  CHECK(std::get<0>(returned.terms).rows() == 2);
  CHECK(std::get<1>(returned.terms).cols() == 30);
  CHECK(std::get<2>(returned.terms).cols() == 2);

  Eigen::MatrixXd grad_bias = Eigen::MatrixXd::Constant(20, 30, not_a_number);
  const auto sent = backward(Alibi{slopes, align}, SoftCap{3},
                             AdditiveBias{bias}.gradient_into(grad_bias), Sink{sink});
  CHECK(same_bits(std::get<0>(sent.terms), std::get<0>(returned.terms)));
  CHECK(std::get<1>(sent.terms).size() == 0);
  CHECK(same_bits(grad_bias, std::get<1>(returned.terms)));
  CHECK(same_bits(std::get<2>(sent.terms), std::get<2>(returned.terms)));
  CHECK(same_bits(sent.queries, returned.queries));
}

TEST_CASE("without parameters a term leaves the type of the gradients as it is") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({4, 5, 2, 2}, random);
  const auto f = attention_forward(p.queries, p.keys, p.values, {}, SoftCap{3});
  const auto g = attention_backward(p.queries, p.keys, p.values, f, p.grad_out, {}, SoftCap{3});
  static_assert(std::is_same_v<decltype(g), const AttentionGradients<double>>);
  CHECK(g.queries.allFinite());
}

TEST_CASE("equal gates, equal times and ALiBi are the same decay under a causal mask") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({25, 40, 4, 3, 2, 1}, random);
  const Options options{.heads = p.heads};
  const Causal causal{Align::bottom_right};
  const Rows rates = Rows::Constant(1, 2, 0.125),
             gates = cumulative_log_gates(Rows::Constant(40, 2, -0.125));
  const Rows key_times = Eigen::VectorXd::LinSpaced(40, 0, 39),
             query_times = key_times.bottomRows(25);
  const Rows decay = attention(p.queries, p.keys, p.values, options, causal,
                               TimeDecay{rates, query_times, key_times});
  CHECK(largest_difference(decay, attention(p.queries, p.keys, p.values, options, causal,
                                            ForgetGate{gates, Align::bottom_right})) < 1e-13);
  CHECK(largest_difference(decay, attention(p.queries, p.keys, p.values, options, causal,
                                            Alibi{rates, Align::bottom_right})) < 1e-13);
}

TEST_CASE("the gradient of cumulative log gates goes back to the gates") {
  std::mt19937_64 random = seeded_random();
  const Rows gates = random_matrix<double>(7, 2, random),
             upstream = random_matrix<double>(7, 2, random),
             other = random_matrix<double>(7, 2, random);
  // <upstream, C·other> = <Cᵀ·upstream, other>
  CHECK(upstream.cwiseProduct(cumulative_log_gates(other)).sum() ==
        Approx(log_gate_gradient(upstream).cwiseProduct(other).sum()).epsilon(1e-13));
  CHECK(cumulative_log_gates(gates).row(0) == gates.row(0));
}

TEST_CASE("a gradient that many heads add to has the same bits on any number of threads") {
  std::mt19937_64 random = seeded_random();
  const Problem<float> p({400, 300, 2, 2, 8, 8}, random);
  const auto bias = random_matrix<float>(400, 300, random);
  ThreadPool pool(4);
  const auto gradient = [&](Executor* executor) {
    const Options options{.heads = p.heads, .executor = executor};
    const auto f = attention_forward(p.queries, p.keys, p.values, options, AdditiveBias{bias});
    return std::get<0>(
        attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options, AdditiveBias{bias})
            .terms);
  };
  const auto alone = gradient(nullptr);
  for (int n = 0; n < 20; ++n) CHECK(same_bits(alone, gradient(&pool)));
}

TEST_CASE("gradients have the same bits whether a thread takes all keys or some at a time") {
  std::mt19937_64 random = seeded_random();
  const Problem<float> p({150, 1100, 4, 4}, random);
  const Align align = Align::top_left;
  // every query sees all keys
  const Matrix<float> tau = Matrix<float>::Constant(1, 1, 0.7f), slopes = tau / 1000,
                      gates = random_matrix<float>(1100, 1, random) / 1000;
  const auto gradients = [&](Executor* executor) {
    const SurfaceOptions options{.executor = executor};
    const auto run = [&](const auto&... terms) {
      const auto f = project_forward(p.queries, p.keys, options, terms...);
      return project_backward(p.queries, p.keys, f, p.grad_projection, options, terms...);
    };
    const auto g = run(Temperature{tau}, Alibi{slopes, align}, ForgetGate{gates, align});
    return std::tuple_cat(std::tuple(g.queries, g.keys), g.terms);
  };
  ThreadPool pool(2);
  const auto alone = gradients(nullptr), shared = gradients(&pool);
  [&]<std::size_t... n>(std::index_sequence<n...>) {
    for (const bool same : {same_bits(std::get<n>(alone), std::get<n>(shared))...}) CHECK(same);
  }
  (std::make_index_sequence<std::tuple_size_v<decltype(alone)>>());
}
