// Scores, weights, entropies and neighbours against the reference, in both forms.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <surfattn/inspect.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/same_bits.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::test;

constexpr double infinity = std::numeric_limits<double>::infinity();

/// Natural numbers of the order 1 and rounding at 1e-16 of sums of a few hundred.
void check_close(const Matrix<double>& actual, const Matrix<double>& expected) {
  REQUIRE(actual.rows() == expected.rows());
  REQUIRE(actual.cols() == expected.cols());
  double worst = 0;
  for (Index n = 0; n < actual.size(); ++n) {
    const double a = actual.data()[n], e = expected.data()[n];
    if (a == e) continue;
    const double error = std::abs(a - e) / (1 + std::abs(e));
    worst = error <= worst ? worst : error;
    if (std::isnan(error)) worst = infinity;
  }
  CHECK(worst <= 1e-12);
}

/// What the reference gives, a block of columns for each query head.
struct Expected {
  Matrix<double> weights, scores, entropy;

  Expected(const reference::Forward<double>& forward, Index queries, Index keys) {
    const Index heads = Index(forward.weights.size());
    weights.resize(queries, heads * keys);
    scores.resize(queries, heads * keys);
    entropy.resize(queries, heads);
    for (Index h = 0; h < heads; ++h) {
      const auto& w = forward.weights[std::size_t(h)];
      weights.middleCols(h * keys, keys) = w;
      for (Index i = 0; i < queries; ++i) {
        const double log_sum_exp = forward.log_sum_exp(i, h);
        double sum = log_sum_exp == -infinity ? -infinity : 0;
        for (Index j = 0; j < keys; ++j) {
          scores(i, h * keys + j) = w(i, j) > 0 ? std::log(w(i, j)) + log_sum_exp : -infinity;
          if (w(i, j) > 0) sum -= w(i, j) * std::log(w(i, j));
        }
        entropy(i, h) = sum;
      }
    }
  }
};

void check_neighbours(const Neighbours<double>& actual, const Matrix<double>& weights, Index count,
                      Index keys) {
  for (Index i = 0; i < weights.rows(); ++i) {
    for (Index h = 0; h < weights.cols() / std::max<Index>(keys, 1); ++h) {
      std::vector<Index> order(static_cast<std::size_t>(keys));
      std::iota(order.begin(), order.end(), Index(0));
      const auto weight = [&](Index j) { return weights(i, h * keys + j); };
      std::stable_sort(order.begin(), order.end(),
                       [&](Index a, Index b) { return weight(a) > weight(b); });
      for (Index n = 0; n < count; ++n) {
        const Index key = actual.keys(i, h * count + n);
        const bool is_there = n < keys && weight(order[std::size_t(n)]) > 0;
        REQUIRE(key == (is_there ? order[std::size_t(n)] : -1));
        const double expected = is_there ? weight(key) : 0;
        REQUIRE(std::abs(actual.weights(i, h * count + n) - expected) <= 1e-12);
      }
    }
  }
}

const Sizes all_sizes[] = {
    {1, 1, 3, 2}, {70, 600, 5, 5, 4, 2}, {130, 33, 9, 4, 2, 1}, {5, 0, 3, 3}};
const MaskKind masks[] = {MaskKind::none, MaskKind::causal_top_left, MaskKind::conjunction};

TEST_CASE("scores, entropies and neighbours of attention are the reference's", "[inspect]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  for (const Sizes& s : all_sizes) {
    const Problem<double> p(s, random);
    for (const MaskKind kind : masks) {
      CAPTURE(s.queries, s.keys, int(kind));
      const reference::Heads heads{s.query_heads, s.key_value_heads};
      const auto mask = dense_mask(kind, s.queries, s.keys);
      const auto reference =
          reference::attention_forward<double>(p.queries, p.keys, p.values, 0.4, heads, mask);
      const auto open =
          reference::attention_forward<double>(p.queries, p.keys, p.values, 0.4, heads);
      const Expected expected(reference, s.queries, s.keys);
      const Options options{.scale = 0.4, .heads = p.heads};
      with_terms(kind, s.queries, s.keys, [&](const auto&... terms) {
        const auto at = [&](Stage stage) {
          return attention_scores(p.queries, p.keys, {.stage = stage}, options, terms...);
        };
        check_close(at(Stage::normalised), expected.weights);
        check_close(at(Stage::masked), expected.scores);
        check_close(at(Stage::raw), Expected(open, s.queries, s.keys).scores);
        check_close(attention_entropy(p.queries, p.keys, options, terms...), expected.entropy);
        for (const Index count : {1, 5, 40}) {
          check_neighbours(attention_neighbours(p.queries, p.keys, count, options, terms...),
                           expected.weights, count, s.keys);
        }
      });
    }
  }
}

TEST_CASE("scores, entropies and neighbours of a projection are the reference's", "[inspect]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Sizes s{70, 90, 5, 5, 4, 2};
  const Problem<double> p(s, random);
  const auto mask = dense_mask(MaskKind::dense, 70, 90);
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.7, .prior = p.log_prior};
  const auto reference =
      reference::project_forward<double>(p.queries, p.keys, 1.7, p.log_prior, {4, 2}, mask);
  const auto open = reference::project_forward<double>(p.queries, p.keys, 1.7, p.log_prior, {4, 2});
  const Expected expected(reference, 70, 90);
  const auto at = [&](Stage stage) {
    return projection_scores(p.queries, p.keys, {.stage = stage}, options, BoolMask{mask});
  };
  check_close(at(Stage::normalised), expected.weights);
  check_close(at(Stage::masked), expected.scores);
  check_close(at(Stage::raw), Expected(open, 70, 90).scores);
  check_close(projection_entropy(p.queries, p.keys, options, BoolMask{mask}), expected.entropy);
  check_neighbours(projection_neighbours(p.queries, p.keys, 7, options, BoolMask{mask}),
                   expected.weights, 7, 90);
}

TEST_CASE("chosen rows of a batch are those of the whole", "[inspect]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Problem<double> p({100, 60, 5, 3, 2, 1}, random);
  const std::vector<Index> query_offsets{0, 70, 70, 100}, key_offsets{0, 20, 25, 60};
  const Options options{.heads = p.heads, .sequences = {query_offsets, key_offsets}};
  const Causal causal{Align::bottom_right};
  for (const Stage stage : {Stage::raw, Stage::masked, Stage::normalised}) {
    const auto all = attention_scores(p.queries, p.keys, {.stage = stage}, options, causal);
    REQUIRE(all.cols() == 2 * 35);
    const auto some = attention_scores(p.queries, p.keys, {stage, 60, 25}, options, causal);
    CHECK(same_bits(some, all.middleRows(60, 25)));
    // the last sequence alone
    const Matrix<double> queries = p.queries.bottomRows(30), keys = p.keys.bottomRows(35);
    CHECK(same_bits(attention_scores(queries, keys, {.stage = stage}, {.heads = p.heads}, causal),
                    all.bottomRows(30)));
    const double hidden = stage == Stage::normalised ? 0 : -infinity;
    CHECK((all.block(0, 20, 70, 15).array() == hidden).all());  // beyond the first one's keys
  }
  const auto neighbours = attention_neighbours(p.queries, p.keys, 3, options, causal);
  CHECK(neighbours.keys.topRows(70).maxCoeff() < 20);
  CHECK(neighbours.keys.bottomRows(30).maxCoeff() < 35);
}

TEST_CASE("float is inspected in float, and a NaN stays in its rows", "[inspect]") {
  std::mt19937_64 random = seeded_random();
  Problem<float> p({6, 40, 5, 3}, random);
  p.queries.row(2).setConstant(NAN);
  p.keys.row(39).setConstant(NAN);
  const auto weights = attention_scores(p.queries, p.keys, {}, {}, KeyLengths(39));
  CHECK(weights.row(2).leftCols(39).array().isNaN().all());
  CHECK(weights.col(39).isZero(0));
  for (const Index row : {0, 1, 3, 4, 5}) CHECK(std::abs(weights.row(row).sum() - 1) < 1e-5f);
  const auto entropy = attention_entropy(p.queries, p.keys, {}, KeyLengths(39));
  CHECK(std::isnan(entropy(2, 0)));
  CHECK(entropy(1, 0) <= std::log(39.f));
  CHECK(attention_neighbours(p.queries, p.keys, 2, {}, KeyLengths(39)).keys.row(2).maxCoeff() ==
        -1);
}

TEST_CASE("equal weights have the largest entropy, and neighbours in order", "[inspect]") {
  const Matrix<double> queries = Matrix<double>::Zero(1, 3), keys = Matrix<double>::Ones(50, 3);
  CHECK(std::abs(std::exp(attention_entropy(queries, keys)(0, 0)) - 50) < 1e-12);
  CHECK(std::abs(attention_entropy(queries, keys, {}, KeyLengths(1))(0, 0)) == 0);
  CHECK(attention_entropy(queries, keys, {}, KeyLengths(0))(0, 0) == -infinity);
  const auto first = attention_neighbours(queries, keys, 3);
  CHECK(first.keys(0, 0) == 0);
  CHECK(first.keys(0, 1) == 1);
  CHECK(first.keys(0, 2) == 2);
}

TEST_CASE("each stage shows what the terms before it did", "[inspect]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Problem<double> p({30, 90, 5, 5, 4, 2}, random);
  const Matrix<double> bias = random_matrix<double>(30, 90, random);
  const Matrix<double> logits = random_matrix<double>(1, 4, random);
  const auto check = [&](const auto& scores_at, const auto& forward) {
    const Matrix<double> raw = scores_at(Stage::raw), modified = scores_at(Stage::modified),
                         biased = scores_at(Stage::biased), masked = scores_at(Stage::masked),
                         weights = scores_at(Stage::normalised);
    check_close(modified, (2 * (raw.array() / 2).tanh()).matrix());
    check_close(biased, modified + bias.replicate(1, 4));
    Matrix<double> hidden = biased, expected(30, 360), entropy(30, 4);
    for (Index i = 0; i < 30; ++i) {
      for (Index j = 0; j < 360; ++j) {
        if (j % 90 >= 70) hidden(i, j) = -infinity;
        expected(i, j) = std::exp(hidden(i, j) - forward.log_sum_exp(i, j / 90));
      }
      for (Index h = 0; h < 4; ++h) {
        const auto w = expected.row(i).segment(90 * h, 70).array();
        entropy(i, h) = -(w * w.log()).sum();
      }
    }
    check_close(masked, hidden);
    check_close(weights, expected);
    CHECK(weights.row(0).leftCols(90).sum() < 1);  // the sink has its share
    return entropy;
  };
  const Options options{.scale = 0.7, .heads = p.heads};
  const auto with = [&](const auto& use) {
    return use(SoftCap{2}, AdditiveBias{bias}, KeyLengths(70), Sink{logits});
  };
  with([&](const auto&... terms) {
    const auto entropy = check(
        [&](Stage stage) {
          return attention_scores(p.queries, p.keys, {.stage = stage}, options, terms...);
        },
        attention_forward(p.queries, p.keys, p.values, options, terms...));
    check_close(attention_entropy(p.queries, p.keys, options, terms...), entropy);
  });
  const SurfaceOptions surface{.heads = p.heads, .bandwidth = 1.7};
  with([&](const auto&... terms) {
    const auto entropy = check(
        [&](Stage stage) {
          return projection_scores(p.queries, p.keys, {.stage = stage}, surface, terms...);
        },
        project_forward(p.queries, p.keys, surface, terms...));
    check_close(projection_entropy(p.queries, p.keys, surface, terms...), entropy);
  });
}

TEST_CASE("what cannot be inspected is named", "[inspect][errors]") {
  const Matrix<double> points = Matrix<double>::Zero(4, 3);
  CHECK_THROWS_WITH(attention_scores(points, points, {.first_query = 2, .queries = 3}),
                    contains_text("surfattn::attention_scores: the rows must lie among those of "
                                  "queries, but they are 3 from 2 and queries is 4×3"));
  CHECK_THROWS_WITH(attention_scores(points, points, {.first_query = 5}), contains_text("from 5"));
  CHECK_THROWS_WITH(projection_neighbours(points, points, 0),
                    contains_text("at least 1 neighbour to look for, but it is 0"));
  const Matrix<double> wide = Matrix<double>::Zero(4, 5);
  CHECK_THROWS_WITH(attention_entropy(points, wide), contains_text("surfattn::attention_entropy"));
}

}  // namespace
