// The vectorised 2ˣ keeps the bounds that its docstring states.
#include <Eigen/Core>
#include <cmath>
#include <limits>
#include <surfattn/detail/simd/exp2.hpp>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/detail/subnormals.hpp>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"

using namespace surfattn::detail;
using surfattn::Index;

namespace {

/// 2^(x − origin) of each number, a packet at a time.
template <class Scalar>
std::vector<Scalar> vector_exp2(std::vector<Scalar> x, Scalar origin = 0) {
  constexpr auto lanes = static_cast<std::size_t>(simd::lanes<Scalar>);
  const std::size_t count = x.size();
  x.resize((count + lanes - 1) / lanes * lanes);
  alignas(64) Scalar buffer[64];
  for (std::size_t i = 0; i < x.size(); i += lanes) {
    simd::Packet<Scalar> packets[] = {simd::load_unaligned(&x[i])};
    simd::exp2<Scalar>(packets, simd::Exp2Origin<Scalar>(origin));
    simd::store(buffer, packets[0]);
    std::copy(buffer, buffer + lanes, &x[i]);
  }
  x.resize(count);
  return x;
}

/// Error of the result in units in the last place of the exact value.
template <class Scalar>
double worst_ulps(const std::vector<Scalar>& x, Scalar origin = 0) {
  const auto y = vector_exp2(x, origin);
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double exact = std::exp2(static_cast<long double>(x[i]) - origin);
    const auto rounded = static_cast<Scalar>(exact);
    const long double next = std::nextafter(rounded, std::numeric_limits<Scalar>::infinity());
    const long double ulp = next - rounded;  // where subnormals count as zeros too
    const double error =
        static_cast<double>(std::abs(static_cast<long double>(y[i]) - exact) / ulp);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

template <class Scalar>
std::vector<Scalar> grid(Scalar first, Scalar last, int count) {
  std::vector<Scalar> x;
  for (int i = 0; i <= count; ++i) x.push_back(first + (last - first) * Scalar(i) / Scalar(count));
  return x;
}

/// Whether the target fuses products and sums: (1 + e)(1 − e) − 1 is −e² then, and 0 otherwise.
bool fuses() {
  volatile float above = 1 + 0x1p-20f, below = 1 - 0x1p-20f;
  alignas(64) float result[64];
  simd::store(result, simd::multiply_add(simd::broadcast(float(above)),
                                         simd::broadcast(float(below)), simd::broadcast(-1.0f)));
  return result[0] != 0;
}

/// What the docstring promises, for float and double.
template <class Scalar>
double bound_in_ulps() {
  return std::is_same_v<Scalar, float> && !fuses() ? 2.5 : 2;
}

}  // namespace

TEST_CASE("exp2 in float: at most 2 ulp from -126 to 127, 2.5 without fused operations") {
  const double bound = bound_in_ulps<float>();
  CHECK(worst_ulps(grid<float>(-126.0f, 127.0f, 2000003)) <= bound);
  CHECK(worst_ulps(grid<float>(-1.0f, 1.0f, 2000003)) <= bound);
}

TEST_CASE("exp2 in double: at most 2 ulp from -1022 to 1023") {
  CHECK(worst_ulps(grid<double>(-1022.0, 1023.0, 1000003)) <= 2);
  CHECK(worst_ulps(grid<double>(-1.0, 1.0, 1000003)) <= 2);
}

TEMPLATE_TEST_CASE("exp2 of the special arguments of a softmax", "", float, double, long double) {
  const TestType infinity = std::numeric_limits<TestType>::infinity();
  const TestType nan = std::numeric_limits<TestType>::quiet_NaN();
  // every position within a packet
  for (int position = 0; position < 17; ++position) {
    std::vector<TestType> x(17, TestType(-0.5));
    const auto at = static_cast<std::size_t>(position);
    x[at] = -infinity;
    CHECK(vector_exp2(x)[at] == 0);
    x[at] = TestType(-1e30);
    CHECK(vector_exp2(x)[at] == 0);
    x[at] = 0;
    CHECK(vector_exp2(x)[at] == 1);
    x[at] = nan;
    CHECK(std::isnan(vector_exp2(x)[at]));
    x[at] = TestType(std::nan("12345"));
    CHECK(std::isnan(vector_exp2(x)[at]));
    x[at] = infinity;
    CHECK(!(std::isfinite(vector_exp2(x)[at])));
    x[at] = TestType(-0.5);
    CHECK(vector_exp2(x)[at] == vector_exp2(x)[(at + 1) % 17]);
  }
}

TEMPLATE_TEST_CASE("exp2 of what is left when an origin is taken away", "", float, double) {
  constexpr TestType lowest = std::numeric_limits<TestType>::min_exponent - 1;  // of normal results
  constexpr TestType limit = simd::exp2_origin_limit<TestType>;
  const auto check = [&](TestType origin) {
    INFO("origin " << origin);
    // Beside a large origin rounded to fewer, and then exact numbers again.
    std::vector<TestType> x;
    for (TestType rest = lowest; rest <= 0; rest += TestType(0.03125)) x.push_back(origin + rest);
    CHECK(worst_ulps(x, origin) <= bound_in_ulps<TestType>());
    CHECK(vector_exp2<TestType>({origin}, origin)[0] == 1);
    CHECK(vector_exp2<TestType>({origin + lowest - 1}, origin)[0] == 0);
    CHECK(vector_exp2<TestType>({-std::numeric_limits<TestType>::infinity()}, origin)[0] == 0);
  };
  for (const TestType origin : {TestType(1), TestType(1000), limit - 1, limit}) {
    check(origin), check(-origin);
    const SubnormalsAsZeros mode;
    check(origin), check(-origin);
  }
}

TEMPLATE_TEST_CASE("a row of powers of two and its sum, beyond the limit of origins too", "", float,
                   double) {
  constexpr TestType limit = simd::exp2_origin_limit<TestType>;
  for (const TestType origin : {TestType(0), TestType(-3), limit, 2 * limit, -2 * limit}) {
    for (Index packets = 0; packets <= 9; ++packets) {
      INFO("origin " << origin << ", " << packets << " packets");
      const Index count = packets * simd::lanes<TestType>;
      Eigen::Array<TestType, Eigen::Dynamic, 1> row(count + 1), expected(count);
      for (Index j = 0; j < count; ++j) {
        const TestType rest = -TestType(j % 7);
        row[j] = origin + rest;
        expected[j] = std::exp2(rest);
      }
      row[count] = 77;
      // powers of two: the sum is exact
      CHECK(simd::exp2_row(row.data(), count, origin) == expected.sum());
      CHECK((row.head(count) == expected).all());
      CHECK(row[count] == 77);
    }
  }
}

TEMPLATE_TEST_CASE("the exponent of a number is split from it as std::frexp does", "", float,
                   double, long double) {
  using Limits = std::numeric_limits<TestType>;
  for (const TestType x :
       {TestType(1), TestType(0.5), TestType(0.75), 1 - Limits::epsilon(), TestType(1e-30),
        TestType(3e20), Limits::min(), Limits::max(), Limits::denorm_min(), Limits::min() / 4}) {
    int exponent;
    const TestType fraction = std::frexp(x, &exponent);
    const auto split = simd::split_exponent(x);
    CHECK(split.fraction == fraction);
    CHECK(split.exponent == static_cast<TestType>(exponent));
  }
  CHECK(simd::split_exponent(Limits::infinity()).fraction == Limits::infinity());
  CHECK(std::isnan(simd::split_exponent(Limits::quiet_NaN()).fraction));
}
