// Rotary position embedding: against its definition, its laws, and through attention.
#include <array>
#include <cmath>
#include <complex>
#include <numeric>
#include <surfattn/gradcheck.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/same_bits.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::test;

std::vector<double> positions_from(double first, Index count) {
  std::vector<double> positions(static_cast<std::size_t>(count));
  std::iota(positions.begin(), positions.end(), first);
  return positions;
}

TEST_CASE("each pair is a complex number times a phase", "[rotary]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Index heads = 3, width = 8, of_head = 10;  // the last two columns of each head stay
  const auto x = random_matrix<double>(6, heads * of_head, random);
  const std::array<int, 6> positions{0, 1, 5, -2, 1000, 7};
  for (const RotaryPairs pairs : {RotaryPairs::adjacent, RotaryPairs::halves}) {
    const bool adjacent = pairs == RotaryPairs::adjacent;
    const auto turned =
        rotate(x, positions, {.pairs = pairs, .heads = heads, .base = 500, .width = width});
    for (Index i = 0; i < 6; ++i) {
      for (Index h = 0; h < heads; ++h) {
        for (Index c = 0; c < width / 2; ++c) {
          const Index a = h * of_head + (adjacent ? 2 * c : c),
                      b = adjacent ? a + 1 : a + width / 2;
          const double angle =
              positions[std::size_t(i)] * std::exp(-2.0 * double(c) / 8 * std::log(500.0));
          const auto z = std::complex<double>(x(i, a), x(i, b)) * std::polar(1.0, angle);
          CHECK(std::abs(turned(i, a) - z.real()) <= 1e-12);
          CHECK(std::abs(turned(i, b) - z.imag()) <= 1e-12);
        }
        CHECK(same_bits(turned.block(i, h * of_head + width, 1, 2),
                        x.block(i, h * of_head + width, 1, 2)));
      }
    }
  }
}

TEST_CASE("attention depends on differences of positions alone", "[rotary]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Problem<double> p({5, 9, 6, 3, 4, 2}, random);
  const auto out_at = [&](double first) {
    const auto q = rotate(p.queries, positions_from(first + 4, 5),
                          {.pairs = RotaryPairs::adjacent, .heads = 4});
    const auto k =
        rotate(p.keys, positions_from(first, 9), {.pairs = RotaryPairs::adjacent, .heads = 2});
    return attention(q, k, p.values, {.heads = p.heads});
  };
  const auto here = out_at(0), there = out_at(37);
  CHECK((here - there).cwiseAbs().maxCoeff() <= 1e-12);
  CHECK((here - attention(p.queries, p.keys, p.values, {.heads = p.heads})).norm() > 0.1);
}

TEST_CASE("the way back is the inverse, and the gradient through attention", "[rotary]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Problem<double> p({4, 6, 4, 3, 2, 1}, random);
  const RotaryOptions of_queries{.pairs = RotaryPairs::halves, .heads = 2},
      of_keys{.pairs = RotaryPairs::halves};
  const auto at_queries = positions_from(2, 4), at_keys = positions_from(0, 6);
  CHECK((rotate_backward(rotate(p.keys, at_keys, of_keys), at_keys, of_keys) - p.keys)
            .cwiseAbs()
            .maxCoeff() <= 1e-14);
  const auto loss = [&](const Matrix<double>& queries, const Matrix<double>& keys) {
    return attention(rotate(queries, at_queries, of_queries), rotate(keys, at_keys, of_keys),
                     p.values, {.heads = p.heads})
        .cwiseProduct(p.grad_out)
        .sum();
  };
  const auto q = rotate(p.queries, at_queries, of_queries), k = rotate(p.keys, at_keys, of_keys);
  const auto f = attention_forward(q, k, p.values, {.heads = p.heads});
  auto g = attention_backward(q, k, p.values, f, p.grad_out, {.heads = p.heads});
  rotate_backward_into(g.queries, at_queries, g.queries, of_queries);  // in place
  rotate_backward_into(g.keys, at_keys, g.keys, of_keys);
  const auto queries = check_gradient([&](const auto& x) { return loss(x, p.keys); }, p.queries,
                                      g.queries, {.tolerance = 1e-8});
  const auto keys = check_gradient([&](const auto& x) { return loss(p.queries, x); }, p.keys,
                                   g.keys, {.tolerance = 1e-8});
  INFO(queries << '\n' << keys);
  CHECK(queries.passed());
  CHECK(keys.passed());
}

TEST_CASE("storage and place do not matter", "[rotary]") {
  std::mt19937_64 random = seeded_random();
  Matrix<float> x = random_matrix<float>(7, 12, random);
  const auto at = positions_from(3, 7);
  const RotaryOptions options{.pairs = RotaryPairs::halves, .heads = 2};
  const auto expected = rotate(x, at, options);
  const Eigen::MatrixXf columns = x;
  CHECK(same_bits(rotate(columns, at, options), expected));
  Eigen::MatrixXf out(7, 12);
  rotate_into(x, at, out, options);
  CHECK(same_bits(out, expected));
  rotate_into(x, at, x, options);
  CHECK(same_bits(x, expected));
  CHECK(rotate(Matrix<float>(0, 12), std::vector<int>(), options).rows() == 0);
}

TEST_CASE("mistakes in a rotation are named", "[rotary][errors]") {
  const Matrix<double> x = Matrix<double>::Zero(3, 10);
  const std::vector<int> three(3), two(2);
  const auto says = [](const std::string& part) {
    return contains_text("surfattn::rotate: " + part);
  };
  CHECK_THROWS_WITH(rotate(x, three, {.pairs = RotaryPairs::halves, .heads = 3}),
                    says("the matrix is 3×10, and its columns do not divide into 3 heads"));
  CHECK_THROWS_WITH(
      rotate(x, three, {.pairs = RotaryPairs::halves, .heads = 2}),
      says("the turned columns of a head must be an even number of at most 5, but are 5"));
  CHECK_THROWS_WITH(rotate(x, three, {.pairs = RotaryPairs::halves, .width = 12}),
                    says("the turned"));
  CHECK_THROWS_WITH(rotate(x, two, {.pairs = RotaryPairs::halves}),
                    says("there must be one position for each row, but there are 2"));
  CHECK_THROWS_WITH(rotate(x, three, {.pairs = RotaryPairs::halves, .base = 0}),
                    says("base must be positive"));
  Matrix<double> out = Matrix<double>::Constant(3, 9, 5);
  CHECK_THROWS_WITH(rotate_into(x, three, out, {.pairs = RotaryPairs::halves}),
                    says("out is 3×9 but must be 3×10"));
  CHECK((out.array() == 5).all());
}

}  // namespace
