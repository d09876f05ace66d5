// Memory of other shapes, through views alone: packed projections, heads before tokens, values
// within keys, and a past that is not copied.
#include <Eigen/Core>
#include <limits>
#include <random>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/random.hpp"
#include "support/same_bits.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::test;

TEST_CASE("queries, keys and values may be blocks of one matrix, and so their gradients",
          "[layouts]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Problem<float> p(Sizes{70, 70, 5, 3, 4, 2}, random);
  const Causal causal{Align::top_left};
  const Options options{.heads = p.heads};
  const auto expected = attention_forward(p.queries, p.keys, p.values, options, causal);
  const auto gradients =
      attention_backward(p.queries, p.keys, p.values, expected, p.grad_out, options, causal);
  Matrix<float> packed(70, 20 + 10 + 6), grad_packed = Matrix<float>::Constant(70, 36, NAN);
  packed << p.queries, p.keys, p.values;
  const auto q = packed.leftCols(20), k = packed.middleCols(20, 10), v = packed.rightCols(6);
  const auto f = attention_forward(q, k, v, options, causal);
  CHECK(same_bits(f.out, expected.out));
  attention_backward_into(q, k, v, f.out, f.log_sum_exp, p.grad_out, grad_packed.leftCols(20),
                          grad_packed.middleCols(20, 10), grad_packed.rightCols(6),
                          Workspace(workspace_size(Pass::backward, q, k, v, options, causal)),
                          options, causal);
  CHECK(same_bits(grad_packed.leftCols(20), gradients.queries));
  CHECK(same_bits(grad_packed.middleCols(20, 10), gradients.keys));
  CHECK(same_bits(grad_packed.rightCols(6), gradients.values));
}

template <class Scalar>
using Columns = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>;

/// Both passes with every matrix stored by columns. Few queries read such keys and values as they lie, in
/// another order: their forward pass is checked below.
template <class Scalar>
void check_columns(const Sizes& sizes, bool few_queries = false) {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed(), sizes.queries, sizes.keys, sizes.head_dim);
  const Problem<Scalar> p(sizes, random);
  const Options options{.heads = p.heads};
  const auto expected = attention_forward(p.queries, p.keys, p.values, options);
  const auto gradients =
      attention_backward(p.queries, p.keys, p.values, expected, p.grad_out, options);

  const Columns<Scalar> q = p.queries, k = p.keys, v = p.values, grad_out = p.grad_out;
  Columns<Scalar> out = grad_out, grad_q = q, grad_k = k, grad_v = v;
  Columns<accumulator_t<Scalar>> log_sum_exp = expected.log_sum_exp;
  if (few_queries) {
    out = expected.out;
  } else {
    attention_forward_into(q, k, v, out, log_sum_exp,
                           Workspace(workspace_size(Pass::forward, q, k, v, options)), options);
    CHECK(same_bits(out, expected.out));
    CHECK(log_sum_exp == expected.log_sum_exp);
    const Matrix<Scalar> surface = project(p.queries, p.keys, {.heads = p.heads});
    CHECK(same_bits(project(q, k, {.heads = p.heads}), surface));
  }
  attention_backward_into(q, k, v, out, log_sum_exp, grad_out, grad_q, grad_k, grad_v,
                          Workspace(workspace_size(Pass::backward, q, k, v, options)), options);
  CHECK(same_bits(grad_q, gradients.queries));
  CHECK(same_bits(grad_k, gradients.keys));
  CHECK(same_bits(grad_v, gradients.values));
}

TEMPLATE_TEST_CASE("matrices stored by columns give the bits of those stored by rows", "[layouts]",
                   float, double, Eigen::half, Eigen::bfloat16) {
  check_columns<TestType>({101, 150, 40, 35, 4, 2});
  check_columns<TestType>({33, 47, 300, 257});
  check_columns<TestType>({10, 11, 64, 64, 2, 2}, true);
  check_columns<TestType>({3, 300, 17, 16, 2, 1}, true);
  check_columns<TestType>({1, 70, 16, 16}, true);
}

/// Calls use(keys, values) with the keys, the values, and both stored by columns.
template <class Scalar, class Use>
void with_columns(const Matrix<Scalar>& keys, const Matrix<Scalar>& values, const Use& use) {
  const Columns<Scalar> k = keys, v = values;
  use(k, values);
  use(keys, v);
  use(k, v);
}

TEST_CASE("few queries read columns as accurately as a plain evaluation does", "[layouts]") {
  std::mt19937_64 random = seeded_random();
  int turn = 0;
  for (const Index queries : {1, 2, 3, 4, 7, 8, 16}) {
    for (const Index keys : {1, 5, 16, 63, 64, 130, 1025}) {
      const bool grouped = turn % 3 == 0 && queries <= 8;
      const Sizes s{queries, keys, turn % 2 ? 32 : 19, turn % 5 ? 33 : 16, grouped ? 4 : 2, 2};
      const Problem<float> p(s, random);
      const MaskKind mask = all_masks[turn % std::size(all_masks)];
      const PriorKind prior = PriorKind(turn % 3);
      ++turn;
      CAPTURE(seed(), queries, keys, s.head_dim, s.value_dim, s.query_heads, int(mask), int(prior));
      const auto with = [&](const auto& use) { with_terms(mask, queries, keys, use); };
      const auto dense = dense_mask(mask, queries, keys);
      check_standard_form<float, double>(
          p, dense, Loss::of_out, with,
          [&](const Options& options, const auto& check, const auto&... terms) {
            with_columns(p.keys, p.values, [&](const auto& k, const auto& v) {
              check(attention_forward(p.queries, k, v, options, terms...));
            });
          });
      check_surface_form<float, double>(
          p, dense, prior, Loss::of_out, with,
          [&](const SurfaceOptions& options, const auto& check, const auto&... terms) {
            check(project_forward(p.queries, Columns<float>(p.keys), options, terms...));
          });
    }
  }
}

TEMPLATE_TEST_CASE(
    "columns of 16 bits give few queries what the same numbers in float give, rounded", "[layouts]",
    Eigen::half, Eigen::bfloat16) {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {1, 3, 9}) {
    CAPTURE(seed(), queries);
    const Problem<TestType> p(Sizes{queries, 150, 40, 35, 2, 2}, random);
    const Matrix<float> q = p.queries.template cast<float>();
    const Columns<float> k = p.keys.template cast<float>(), v = p.values.template cast<float>();
    const Options options{.heads = p.heads};
    const Matrix<TestType> rounded = attention(q, k, v, options).template cast<TestType>();
    const Columns<TestType> narrow_k = p.keys, narrow_v = p.values;
    CHECK(same_bits(attention(p.queries, narrow_k, narrow_v, options), rounded));
  }
}

TEST_CASE("what is not finite in columns behind a mask is not seen by few queries", "[layouts]") {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {1, 3, 9}) {
    CAPTURE(seed(), queries);
    const Problem<float> p(Sizes{queries, 150, 40, 35, 2, 2}, random);
    const Options options{.heads = p.heads};
    const Causal causal{Align::top_left};
    const Columns<float> k = p.keys, v = p.values;
    Columns<float> spoilt = v;
    spoilt.bottomRows(150 - queries).setConstant(std::numeric_limits<float>::quiet_NaN());
    const Matrix<float> seen = attention(p.queries, k, spoilt, options, causal);
    CHECK(seen.allFinite());
    const Matrix<float> all = attention(p.queries, k, v, options, causal);
    CHECK((seen - all).cwiseAbs().maxCoeff() <= 1e-5f);
  }
}

TEST_CASE("queries whose rows lie a multiple of 4096 bytes apart have the bits of others",
          "[layouts]") {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {4, 5, 8, 16}) {
    CAPTURE(seed(), queries);
    const Problem<float> p(Sizes{queries, 300, 128, 16, 8, 8}, random);
    Matrix<float> wider = Matrix<float>::Constant(queries, 8 * 128 + 16, 77);
    wider.leftCols(8 * 128) = p.queries;
    CHECK(same_bits(attention(p.queries, p.keys, p.values, {.heads = p.heads}),
                    attention(wider.leftCols(8 * 128), p.keys, p.values, {.heads = p.heads})));
  }
}

TEST_CASE("few queries of a batch read columns to the bits that they have alone", "[layouts]") {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {1, 3, 9}) {
    CAPTURE(seed(), queries);
    const Problem<float> p(Sizes{3 * queries, 3 * 150, 40, 35, 2, 2}, random);
    const Columns<float> k = p.keys, v = p.values;
    const Matrix<float> together =
        attention(p.queries, k, v, {.heads = p.heads, .sequences = Sequences::equal(3)});
    for (Index b = 0; b < 3; ++b) {
      const auto of = [&](const auto& rows, Index count) {
        return rows.middleRows(b * count, count);
      };
      CHECK(same_bits(attention(of(p.queries, queries), of(k, 150), of(v, 150), {.heads = p.heads}),
                      Matrix<float>(of(together, queries))));
    }
  }
}

/// (batch, length, heads·width) → (batch, heads, length, width).
Matrix<float> heads_first(const Matrix<float>& tokens, Index batch, Index heads) {
  const Index length = tokens.rows() / batch, width = tokens.cols() / heads;
  Matrix<float> rows(batch * heads * length, width);
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      rows.middleRows((b * heads + h) * length, length) =
          tokens.block(b * length, h * width, length, width);
    }
  }
  return rows;
}

TEST_CASE("heads before tokens in memory are sequences of one head", "[layouts]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Index batch = 3, heads = 4;
  const Problem<float> p(Sizes{batch * 40, batch * 90, 5, 3, heads, heads}, random);
  const Causal causal{Align::bottom_right};
  const Options tokens_first{.heads = {.query = heads}, .sequences = Sequences::equal(batch)};
  const Options heads_as_sequences{.sequences = Sequences::equal(batch * heads)};
  const auto expected = attention_forward(p.queries, p.keys, p.values, tokens_first, causal);
  const auto gradients =
      attention_backward(p.queries, p.keys, p.values, expected, p.grad_out, tokens_first, causal);
  const auto q = heads_first(p.queries, batch, heads), k = heads_first(p.keys, batch, heads),
             v = heads_first(p.values, batch, heads), g = heads_first(p.grad_out, batch, heads);
  const auto f = attention_forward(q, k, v, heads_as_sequences, causal);
  CHECK(same_bits(f.out, heads_first(expected.out, batch, heads)));
  CHECK(same_bits(f.log_sum_exp, heads_first(expected.log_sum_exp, batch, heads)));
  const auto h = attention_backward(q, k, v, f, g, heads_as_sequences, causal);
  const auto agree = [](const Matrix<float>& a, const Matrix<float>& b) {
    return (a - b).cwiseAbs().maxCoeff() <= 1e-5f * (1 + b.cwiseAbs().maxCoeff());
  };
  CHECK(agree(h.queries, heads_first(gradients.queries, batch, heads)));
  CHECK(agree(h.keys, heads_first(gradients.keys, batch, heads)));
  CHECK(agree(h.values, heads_first(gradients.values, batch, heads)));
}

TEST_CASE("values may be the left columns of the keys, with one gradient", "[layouts]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  // few queries and many; one key head and several; a width that fills whole packets and one that
  // does not
  for (const Index queries : {2, 150}) {
    for (const Index key_heads : {1, 2}) {
      for (const Index read_out : {0, 7, 12, 32, 40}) {
        CAPTURE(queries, key_heads, read_out);
        const Index width = 40, keys = 300;
        const Problem<double> p(Sizes{queries, keys, width, read_out, 4, key_heads}, random);
        const Options options{.heads = p.heads};
        const Causal causal{Align::bottom_right};
        Matrix<double> values(keys, key_heads * read_out);
        for (Index h = 0; h < key_heads; ++h) {
          values.middleCols(h * read_out, read_out) = p.keys.middleCols(h * width, read_out);
        }
        const LeftColumns columns{read_out};
        const auto expected = attention_forward(p.queries, p.keys, values, options, causal);
        const auto f = attention_forward(p.queries, p.keys, columns, options, causal);
        const auto close = [](const Matrix<double>& a, const Matrix<double>& b) {
          return a.rows() == b.rows() && a.cols() == b.cols() &&
                 (a.size() == 0 || (a - b).cwiseAbs().maxCoeff() <= 1e-12);
        };
        CHECK(close(f.out, expected.out));
        CHECK(close(f.log_sum_exp, expected.log_sum_exp));
        CHECK(same_bits(attention(p.queries, p.keys, columns, options, causal), f.out));
        const auto two =
            attention_backward(p.queries, p.keys, values, expected, p.grad_out, options, causal);
        Matrix<double> grad_keys = two.keys;
        for (Index h = 0; h < key_heads; ++h) {
          grad_keys.middleCols(h * width, read_out) +=
              two.values.middleCols(h * read_out, read_out);
        }
        const auto g =
            attention_backward(p.queries, p.keys, columns, f, p.grad_out, options, causal);
        CHECK(close(g.queries, two.queries));
        CHECK(close(g.keys, grad_keys));
        CHECK(g.values.size() == 0);
        Matrix<double> grad_queries = p.queries, grad_into = p.keys;
        attention_backward_into(
            p.queries, p.keys, columns, f.out, f.log_sum_exp, p.grad_out, grad_queries, grad_into,
            columns,
            Workspace(workspace_size(Pass::backward, p.queries, p.keys, columns, options, causal)),
            options, causal);
        CHECK(same_bits(grad_into, g.keys));
        CHECK(same_bits(grad_queries, g.queries));
      }
    }
  }
}

TEST_CASE("more left columns than a key has are named", "[layouts][errors]") {
  const Matrix<double> points = Matrix<double>::Zero(4, 6);
  for (const Index columns : {4, -1}) {
    CHECK_THROWS_WITH(attention(points, points, LeftColumns{columns}, {.heads = {.query = 2}}),
                      surfattn::test::contains_text("surfattn::attention: LeftColumns must be "
                                                    "between 0 and the width of a key") &&
                          surfattn::test::contains_text("4×6 (2 heads)"));
  }
}

TEST_CASE("a past and new tokens attend as one, and the past is not copied", "[layouts]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Problem<double> p(Sizes{6, 206, 5, 3, 4, 2}, random);
  const Options options{.heads = p.heads};
  const auto whole =
      attention_forward(p.queries, p.keys, p.values, options, Causal{Align::bottom_right});
  const auto past =
      attention_forward(p.queries, p.keys.topRows(200), p.values.topRows(200), options);
  const auto present = attention_forward(p.queries, p.keys.bottomRows(6), p.values.bottomRows(6),
                                         options, Causal{Align::top_left});
  const auto merged = merge_partials(past, present);
  CHECK((merged.out - whole.out).cwiseAbs().maxCoeff() <= 1e-13);
  CHECK((merged.log_sum_exp - whole.log_sum_exp).cwiseAbs().maxCoeff() <= 1e-13);
}

}  // namespace
