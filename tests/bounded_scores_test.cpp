// Many queries take bounds of their scores for the largest ones, and make weights of products at once. That
// changes no bit of a result: a bias of zeros, which keeps them from doing so, gives the same.
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <surfattn/surfattn.hpp>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/same_bits.hpp"

namespace {

using namespace surfattn;
using surfattn::test::Problem;
using surfattn::test::random_matrix;
using surfattn::test::same_bits;
using surfattn::test::seeded_random;
using surfattn::test::Sizes;

using Random = std::mt19937_64;

/// With the bias that keeps scores from being bounded.
template <class Scalar>
struct Inputs : Problem<Scalar> {
  Matrix<accumulator_t<Scalar>> zeros;

  Inputs(const Sizes& s, Random& random)
      : Problem<Scalar>(s, random), zeros(Matrix<accumulator_t<Scalar>>::Zero(s.queries, s.keys)) {}
};

/// Whether all numbers are the same, any NaN the same as any other.
template <class Scalar>
bool same_numbers(Matrix<Scalar> a, Matrix<Scalar> b) {
  for (Matrix<Scalar>* matrix : {&a, &b}) {
    for (Scalar& number : matrix->reshaped()) {
      if (number != number) number = std::numeric_limits<Scalar>::quiet_NaN();
    }
  }
  return same_bits(a, b);
}

template <class Scalar>
void require_same(const Forward<Scalar>& bounded, const Forward<Scalar>& looked_at) {
  REQUIRE(same_numbers(bounded.out, looked_at.out));
  REQUIRE(same_numbers(bounded.log_sum_exp, looked_at.log_sum_exp));
}

template <class Scalar, class... Masks>
void compare_standard(const Inputs<Scalar>& in, const Masks&... masks) {
  const Options options{.heads = in.heads};
  require_same(
      attention_forward(in.queries, in.keys, in.values, options, masks...),
      attention_forward(in.queries, in.keys, in.values, options, masks..., AdditiveBias(in.zeros)));
}

template <class Scalar, class... Masks>
void compare_surface(const Inputs<Scalar>& in, const SurfaceOptions& options,
                     const Masks&... masks) {
  require_same(project_forward(in.queries, in.keys, options, masks...),
               project_forward(in.queries, in.keys, options, masks..., AdditiveBias(in.zeros)));
}

}  // namespace

TEMPLATE_TEST_CASE("bounds of scores give the bits of the scores' maxima", "", float, double,
                   Eigen::bfloat16, Eigen::half) {
  Random random = seeded_random();
  for (const Sizes& sizes : {Sizes{127, 70, 16, 16}, Sizes{128, 1, 5, 3}, Sizes{129, 31, 16, 7},
                             Sizes{131, 32, 33, 16}, Sizes{135, 33, 8, 40}, Sizes{200, 64, 64, 64},
                             Sizes{260, 97, 1, 1}, Sizes{150, 2100, 24, 5}, Sizes{2100, 140, 7, 9},
                             Sizes{65, 130, 16, 8, 4, 2}, Sizes{140, 0, 4, 4}}) {
    CAPTURE(sizes.queries, sizes.keys, sizes.head_dim);
    const Inputs<TestType> in(sizes, random);
    compare_standard(in);
    compare_standard(in, Causal(Align::top_left));
    compare_standard(in, KeyLengths((2 * sizes.keys + 2) / 3));
    compare_surface(in, {.heads = in.heads});
    compare_surface(in, {.heads = in.heads, .bandwidth = 3.0}, Causal(Align::bottom_right));
  }
}

TEMPLATE_TEST_CASE("so they do beside scores too far apart for them", "", float, double) {
  Random random = seeded_random();
  Inputs<TestType> in({330, 2300, 20, 20}, random);
  const TestType far = std::numeric_limits<TestType>::max_exponent;
  in.queries.middleRows(70, 3) *= far;
  in.queries.row(300) /= far;
  in.keys.middleRows(1100, 2) *= far;
  in.keys.row(2299) /= far;
  compare_standard(in);
  compare_standard(in, Causal(Align::top_left));
  compare_surface(in, {});
  compare_surface(in, {.bandwidth = 20.0});

  SECTION("beside what is not finite") {
    constexpr auto nan = std::numeric_limits<TestType>::quiet_NaN();
    constexpr auto infinity = std::numeric_limits<TestType>::infinity();
    in.queries(10, 3) = nan;
    in.queries(200, 0) = infinity;
    in.keys(2250, 1) = -infinity;
    in.keys(2260, 1) = nan;
    compare_standard(in, KeyLengths(2250));
    compare_surface(in, {}, KeyLengths(2250));
    compare_standard(in);
  }
}

TEMPLATE_TEST_CASE("so they do with priors, near, far and without bounds", "", float, double) {
  Random random = seeded_random();
  const Inputs<TestType> in({150, 333, 12, 12}, random);
  Matrix<TestType> log_prior = random_matrix<TestType>(333, 1, random);
  const auto compare = [&] { compare_surface(in, {.prior = KeyPrior(log_prior)}); };
  compare();
  log_prior.array() += TestType(700);
  compare();
  log_prior.array() += TestType(3e7);
  compare();
  log_prior(7) = TestType(-1000);
  compare();
  log_prior(8) = -std::numeric_limits<TestType>::infinity();
  compare();
}

TEMPLATE_TEST_CASE("so they do beside what masks hide, whatever it holds", "", float, double) {
  Random random = seeded_random();
  Inputs<TestType> in({130, 200, 4, 4}, random);
  Matrix<TestType> log_prior = Matrix<TestType>::Zero(200, 1);
  log_prior.topRows(100).setConstant(TestType(800));
  constexpr auto nan = std::numeric_limits<TestType>::quiet_NaN();
  log_prior(131) = nan;
  compare_surface(in, {.prior = KeyPrior(log_prior)}, KeyLengths(100));
  in.keys.topRows(100) /= 100;
  in.keys.bottomRows(60) *= 20;
  in.keys(131, 1) = nan;
  compare_surface(in, {.bandwidth = 1.0}, KeyLengths(100));
}

TEMPLATE_TEST_CASE("so they do where squares underflow", "", float, double) {
  Random random = seeded_random();
  Inputs<TestType> in({130, 300, 16, 16}, random);
  const TestType tiny =
      std::ldexp(TestType(1), -std::numeric_limits<TestType>::max_exponent / 2 - 4);
  in.queries *= tiny;
  const Options large{.scale = 10 / double(tiny)};
  require_same(attention_forward(in.queries, in.keys, in.values, large),
               attention_forward(in.queries, in.keys, in.values, large, AdditiveBias(in.zeros)));
  in.keys *= tiny, in.queries /= tiny, in.queries /= tiny;
  const Options usual{.scale = 2.0};
  require_same(attention_forward(in.queries, in.keys, in.values, usual),
               attention_forward(in.queries, in.keys, in.values, usual, AdditiveBias(in.zeros)));
}

TEMPLATE_TEST_CASE("sinks see the whole scores of many queries", "", float, double) {
  Random random = seeded_random();
  const Inputs<TestType> in({140, 50, 6, 6}, random);
  const Matrix<TestType> logits = random_matrix<TestType>(1, 1, random);
  const auto all = project_forward(in.queries, in.keys, SurfaceOptions{}, Sink(logits));
  const auto few = project_forward(Matrix<TestType>(in.queries.topRows(70)), in.keys,
                                   SurfaceOptions{}, Sink(logits));
  REQUIRE(same_bits(Matrix<TestType>(all.out.topRows(70)), few.out));
}

TEST_CASE("numbers far below 1 are summed without loss where bounds are far above scores") {
  Random random = seeded_random();
  Inputs<float> in({130, 50, 40, 8}, random);
  in.keys.rowwise().normalize();
  in.queries.rowwise().normalize();
  in.queries *= 15;  // the bounds are 15·log2(e) = 21.6
  const Matrix<float> values = in.values;
  const float tiny = 0x1p-60f;
  in.values *= tiny;
  const Options options{.scale = 1.0};
  REQUIRE(same_bits(
      Matrix<float>(attention_forward(in.queries, in.keys, in.values, options).out / tiny),
      attention_forward(in.queries, in.keys, values, options).out));
}
