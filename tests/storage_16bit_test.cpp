// Numbers stored in 16 bits: sums are formed in float, so that a result is off by its own rounding,
// by what float arithmetic leaves (tests/support/bounds.hpp), and, in gradients, by the rounding of
// the stored output that D_i = dO_i·O_i reads.
#include <Eigen/Core>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/reference.hpp>
#include <surfattn/surfattn.hpp>
#include <type_traits>
#include <vector>

#include "support/bounds.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using namespace surfattn;
using test::Bounds;
using test::Doubles;
using test::ErrorModel;
using test::ExactHead;

template <class Scalar>
constexpr double unit_roundoff = std::is_same_v<Scalar, Eigen::bfloat16> ? 0x1p-8 : 0x1p-11;

/// Half the distance of the subnormal numbers, for results that are one.
template <class Scalar>
constexpr double smallest_rounding = std::is_same_v<Scalar, Eigen::bfloat16> ? 0 : 0x1p-25;

/// The weights of the forward pass where they are rounded to 16 bits before they meet the values.
template <class Scalar>
constexpr double weight_roundoff = std::is_same_v<Scalar, Eigen::bfloat16> ? 0x1p-8 : 0;

struct Sizes {
  Index queries, keys, head_dim, value_dim;
};

/// Straddle packets, panels and tiles; up to 16 queries take the path that reads keys in place.
const Sizes all_sizes[] = {
    {1, 1, 1, 1},     {1, 700, 64, 64},  {3, 33, 17, 5},     {16, 31, 32, 48},  {17, 32, 31, 33},
    {64, 64, 64, 64}, {65, 129, 16, 63}, {63, 513, 128, 64}, {257, 96, 40, 24}, {129, 1025, 8, 96}};

template <class Scalar>
struct Problem {
  Matrix<Scalar> queries, keys, values, grad_out;

  Problem(const Sizes& s, std::mt19937_64& random) {
    const auto draw = [&](Index rows, Index cols) {
      std::normal_distribution<double> normal;
      return Doubles::NullaryExpr(rows, cols, [&] { return normal(random); })
          .template cast<float>()
          .template cast<Scalar>()
          .eval();
    };
    queries = draw(s.queries, s.head_dim);
    keys = draw(s.keys, s.head_dim);
    values = draw(s.keys, s.value_dim);
    grad_out = draw(s.queries, s.value_dim);
  }
};

template <class Derived>
Doubles wide(const Eigen::MatrixBase<Derived>& matrix) {
  return matrix.template cast<double>();
}

/// |actual − exact| ≤ bound + the rounding of `actual` to 16 bits, entry by entry.
template <class Actual, class Scalar = typename Actual::Scalar>
void check(const char* what, const Actual& actual, const Doubles& exact, const Doubles& bound,
           double rounding) {
  const Doubles error = (wide(actual) - exact).cwiseAbs();
  const Doubles allowed =
      ((1 + rounding) * bound + rounding * exact.cwiseAbs()).array() + smallest_rounding<Scalar>;
  INFO(what << ": worst ratio of error to bound "
            << (error.size() ? error.cwiseQuotient(allowed).maxCoeff() : 0));
  CHECK((error.array() <= allowed.array()).all());
}

/// What rounding the output adds to the bounds of the gradients, and rounding the weights to that of
/// the output.
template <class Scalar>
void add_storage_errors(const ExactHead& head, Bounds& b) {
  const double u = unit_roundoff<Scalar>;
  const Doubles& w = head.weights;
  b.out += weight_roundoff<Scalar> * w * head.values.cwiseAbs();
  const Doubles stored = b.out + u * head.out.cwiseAbs();
  const Doubles delta = head.grad_out.cwiseAbs().cwiseProduct(stored).rowwise().sum();
  const Doubles e = delta.col(0).asDiagonal() * w;
  const double scale = std::abs(head.scale);
  b.grad_queries += scale * e * head.keys.cwiseAbs();
  b.grad_keys += scale * e.transpose() * head.queries.cwiseAbs();
  b.grad_key_bias += e.colwise().sum().transpose();
  if (b.grad_keys_of_surface.size() == 0) return;  // of the standard form
  b.grad_keys_of_surface +=
      scale * (e.transpose() * head.queries.cwiseAbs() +
               Doubles(e.colwise().sum().transpose().asDiagonal() * head.keys.cwiseAbs()));
}

template <class Scalar>
ExactHead exact_head(const Problem<Scalar>& p, const Doubles& values, const Doubles& key_bias,
                     const Doubles& query_bias, const reference::Forward<double>& forward) {
  ExactHead head;
  head.queries = wide(p.queries);
  head.keys = wide(p.keys);
  head.values = values;
  head.grad_out = wide(p.grad_out);
  head.weights = forward.weights.front();
  head.out = forward.out;
  head.log_sum_exp = forward.log_sum_exp;
  head.scale = 1 / std::sqrt(double(p.queries.cols()));
  head.query_bias = query_bias;
  head.key_bias_magnitude = key_bias;
  return head;
}

}  // namespace

TEMPLATE_TEST_CASE("16-bit storage in the standard form", "", Eigen::half, Eigen::bfloat16) {
  using Scalar = TestType;
  std::mt19937_64 random = test::seeded_random();
  for (const Sizes& s : all_sizes) {
    INFO("queries " << s.queries << ", keys " << s.keys << ", widths " << s.head_dim << " and "
                    << s.value_dim << ", seed " << test::seed());
    const Problem<Scalar> p(s, random);
    const reference::Matrix<double> q = wide(p.queries), k = wide(p.keys), v = wide(p.values);
    const double scale = 1 / std::sqrt(double(s.head_dim));
    const auto exact = reference::attention_forward<double>(q, k, v, scale);
    const ExactHead head =
        exact_head(p, v, Doubles::Zero(s.keys, 1), Doubles::Zero(s.queries, 1), exact);
    Bounds bounds = ErrorModel<float>(head).bounds();
    add_storage_errors<Scalar>(head, bounds);
    const double u = unit_roundoff<Scalar>;

    const auto forward = attention_forward(p.queries, p.keys, p.values);
    static_assert(std::is_same_v<decltype(forward.log_sum_exp), Matrix<float>>);
    check("out", forward.out, head.out, bounds.out, u);
    check("log_sum_exp", forward.log_sum_exp, head.log_sum_exp, bounds.log_sum_exp, 0);

    const auto gradients = attention_backward(p.queries, p.keys, p.values, forward, p.grad_out);
    const auto exact_gradients =
        reference::attention_backward<double>(q, k, v, scale, {}, {}, wide(p.grad_out));
    check("grad queries", gradients.queries, exact_gradients.queries, bounds.grad_queries, u);
    check("grad keys", gradients.keys, exact_gradients.keys, bounds.grad_keys, u);
    check("grad values", gradients.values, exact_gradients.values, bounds.grad_values, u);
  }
}

TEMPLATE_TEST_CASE("16-bit storage in the surface form", "", Eigen::half, Eigen::bfloat16) {
  using Scalar = TestType;
  std::mt19937_64 random = test::seeded_random();
  for (const Sizes& s : all_sizes) {
    INFO("queries " << s.queries << ", keys " << s.keys << ", width " << s.head_dim << ", seed "
                    << test::seed());
    const Problem<Scalar> p({s.queries, s.keys, s.head_dim, s.head_dim}, random);
    const reference::Matrix<double> q = wide(p.queries), k = wide(p.keys);
    const double scale = 1 / std::sqrt(double(s.head_dim)), bandwidth = 1 / std::sqrt(scale);
    const auto exact = reference::project_forward<double>(q, k, bandwidth);
    const ExactHead head = exact_head(p, k, scale / 2 * k.rowwise().squaredNorm(),
                                      scale / 2 * q.rowwise().squaredNorm(), exact);
    Bounds bounds = ErrorModel<float>(head).bounds();
    add_storage_errors<Scalar>(head, bounds);
    const double u = unit_roundoff<Scalar>;

    const auto forward = project_forward(p.queries, p.keys);
    check("out", forward.out, head.out, bounds.out, u);
    check("log_sum_exp", forward.log_sum_exp, head.log_sum_exp, bounds.log_sum_exp, 0);

    const auto gradients = project_backward(p.queries, p.keys, forward, p.grad_out);
    static_assert(std::is_same_v<decltype(gradients.log_prior), Matrix<float>>);
    const auto exact_gradients =
        reference::project_backward<double>(q, k, bandwidth, {}, {}, {}, wide(p.grad_out));
    check("grad queries", gradients.queries, exact_gradients.queries, bounds.grad_queries, u);
    check("grad keys", gradients.keys, exact_gradients.keys, bounds.grad_keys_of_surface, u);
    check("grad log prior", gradients.log_prior, exact_gradients.log_prior, bounds.grad_key_bias,
          0);
  }
}

TEMPLATE_TEST_CASE("16-bit numbers in any storage give the same bits", "", Eigen::half,
                   Eigen::bfloat16) {
  using Scalar = TestType;
  std::mt19937_64 random = test::seeded_random();
  const auto bits = [](const Matrix<Scalar>& m) {
    return std::vector<Scalar>(m.data(), m.data() + m.size());
  };
  for (const Sizes& s : {Sizes{5, 70, 33, 18}, Sizes{70, 90, 34, 17}}) {
    const Problem<Scalar> p(s, random);
    using Columns = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>;
    const Columns q = p.queries, k = p.keys, v = p.values, g = p.grad_out;
    const auto one = attention_forward(p.queries, p.keys, p.values);
    const auto other = attention_forward(q, k, v);
    // Few queries add along columns, in another order: layouts_test checks what they give.
    if (s.queries > 16) CHECK(bits(one.out) == bits(other.out));
    const auto grad = attention_backward(p.queries, p.keys, p.values, one, p.grad_out);
    const auto other_grad = attention_backward(q, k, v, one, g);
    CHECK(bits(grad.queries) == bits(other_grad.queries));
    CHECK(bits(grad.keys) == bits(other_grad.keys));
    CHECK(bits(grad.values) == bits(other_grad.values));
  }
}

TEMPLATE_TEST_CASE("16-bit numbers on several threads give the same bits", "", Eigen::half,
                   Eigen::bfloat16) {
  using Scalar = TestType;
  std::mt19937_64 random = test::seeded_random();
  ThreadPool pool(3);
  for (const Sizes& s : {Sizes{2, 5000, 24, 24}, Sizes{700, 900, 24, 24}}) {
    const Problem<Scalar> p(s, random);
    const auto alone = attention_forward(p.queries, p.keys, p.values);
    const auto together = attention_forward(p.queries, p.keys, p.values, {.executor = &pool});
    CHECK((alone.out.array() == together.out.array()).all());
    const auto grad = attention_backward(p.queries, p.keys, p.values, alone, p.grad_out);
    const auto grad_together =
        attention_backward(p.queries, p.keys, p.values, alone, p.grad_out, {.executor = &pool});
    CHECK((grad.queries.array() == grad_together.queries.array()).all());
    CHECK((grad.keys.array() == grad_together.keys.array()).all());
    CHECK((grad.values.array() == grad_together.values.array()).all());
  }
}

TEMPLATE_TEST_CASE("A NaN behind a mask reaches nothing in 16-bit storage", "", Eigen::half,
                   Eigen::bfloat16) {
  using Scalar = TestType;
  std::mt19937_64 random = test::seeded_random();
  for (const Sizes& s : {Sizes{4, 50, 32, 32}, Sizes{60, 50, 32, 31}}) {
    Problem<Scalar> p(s, random);
    const auto before = attention_forward(p.queries, p.keys, p.values, {}, KeyLengths{37});
    const auto grad_before =
        attention_backward(p.queries, p.keys, p.values, before, p.grad_out, {}, KeyLengths{37});
    const auto nan = static_cast<Scalar>(std::numeric_limits<float>::quiet_NaN());
    p.keys.bottomRows(13).setConstant(nan);
    p.values.bottomRows(13).setConstant(nan);
    const auto after = attention_forward(p.queries, p.keys, p.values, {}, KeyLengths{37});
    CHECK((before.out.array() == after.out.array()).all());
    const auto grad_after =
        attention_backward(p.queries, p.keys, p.values, after, p.grad_out, {}, KeyLengths{37});
    CHECK((grad_before.queries.array() == grad_after.queries.array()).all());
    CHECK((grad_before.keys.array() == grad_after.keys.array()).all());
    CHECK((grad_before.values.array() == grad_after.values.array()).all());
    // seen, it reaches every output
    const auto seen = attention(p.queries, p.keys, p.values);
    CHECK(wide(seen).array().isNaN().all());
  }
}

TEMPLATE_TEST_CASE("16-bit numbers become packets of floats and back", "", Eigen::half,
                   Eigen::bfloat16) {
  using Stored = TestType;
  namespace simd = surfattn::detail::simd;
  constexpr Index lanes = simd::lanes<float>;
  constexpr Index count = Index(1) << 16;
  const auto bits = [](Stored x) { return Eigen::numext::bit_cast<std::uint16_t>(x); };
  std::vector<Stored> all(count), back(count);
  for (Index i = 0; i < count; ++i)
    all[std::size_t(i)] = Eigen::numext::bit_cast<Stored>(static_cast<std::uint16_t>(i));
  std::vector<float> wide(count);
  for (Index i = 0; i < count; i += lanes) {
    const auto packet = simd::load_as<float>(&all[std::size_t(i)]);
    simd::store_unaligned(&wide[std::size_t(i)], packet);
    simd::store_as<float>(&back[std::size_t(i)], packet);
  }
  Index different = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const float expected = static_cast<float>(all[i]);
    const bool is_nan = std::isnan(expected);
    different += is_nan ? !std::isnan(wide[i]) || !std::isnan(static_cast<float>(back[i]))
                        : !(wide[i] == expected) || bits(back[i]) != bits(all[i]);
  }
  CHECK(different == 0);

  auto random = test::seeded_random();
  const Matrix<float> numbers = test::random_matrix<float>(1, count, random);
  for (Index i = 0; i < count; i += lanes)
    simd::store_as<float>(&back[std::size_t(i)], simd::load_unaligned(numbers.data() + i));
  for (Index i = 0; i < count; ++i)
    different += bits(back[std::size_t(i)]) != bits(static_cast<Stored>(numbers(0, i)));
  CHECK(different == 0);
}
