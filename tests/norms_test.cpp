// layer_norm, rms_norm and l2_normalize: against the reference, by central differences, their laws, storage and errors.
// clang-format off
#include "support/no_allocation.hpp"  // before all that includes Eigen
// clang-format on

#include <surfattn/gradcheck.hpp>
#include <surfattn/reference.hpp>
#include <surfattn/surfattn.hpp>

#include "support/accuracy.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

reference::Norm of_reference(Norm norm) {
  if (norm == Norm::layer) return reference::Norm::layer;
  return norm == Norm::rms ? reference::Norm::rms : reference::Norm::l2;
}

constexpr Norm all_norms[] = {Norm::layer, Norm::rms, Norm::l2};

template <class X, class... Arguments>
auto norm_of(Norm kind, const X& x, const Arguments&... arguments) {
  if (kind == Norm::layer) return layer_norm(x, arguments...);
  return kind == Norm::rms ? rms_norm(x, arguments...) : l2_normalize(x, arguments...);
}

template <class X, class... Arguments>
auto norm_backward_of(Norm kind, const X& x, const Arguments&... arguments) {
  if (kind == Norm::layer) return layer_norm_backward(x, arguments...);
  return kind == Norm::rms ? rms_norm_backward(x, arguments...)
                           : l2_normalize_backward(x, arguments...);
}

template <class X, class Out, class... Arguments>
void norm_into_of(Norm kind, const X& x, Out&& out, const Arguments&... arguments) {
  if (kind == Norm::layer) return layer_norm_into(x, out, arguments...);
  if (kind == Norm::rms) return rms_norm_into(x, out, arguments...);
  l2_normalize_into(x, out, arguments...);
}

struct NormCase {
  Index rows, width, heads;
  Index gain, bias;  // sizes in heads: 0 for none, 1 for one that all heads share
};

const NormCase norm_cases[] = {{1, 1, 1, 0, 0},  {5, 7, 1, 1, 1},   {3, 16, 4, 1, 4},
                               {4, 33, 3, 3, 0}, {2, 257, 2, 0, 1}, {0, 4, 1, 1, 1},
                               {3, 0, 2, 0, 0},  {17, 64, 1, 1, 0}};

template <class Scalar>
NormWeights<Scalar> random_norm_weights(const NormCase& c, std::mt19937_64& random) {
  return {RowVector<Scalar>(random_matrix<Scalar>(1, c.gain * c.width, random)),
          RowVector<Scalar>(random_matrix<Scalar>(1, c.bias * c.width, random))};
}

/// x̂ = r·(x − m): the difference errs by u(|x| + g(n)·mean|x|), r by g(n) relative to itself; then a product and a sum.
template <class Scalar>
Doubles norm_bound(const Doubles& x, const Doubles& y, const Doubles& unit, const NormCase& c,
                   double gain, double bias) {
  const double u = double(std::numeric_limits<Scalar>::epsilon()) / 2;
  const double g = 4 * std::sqrt(double(c.width + 4)) * u;
  Doubles bound = 4 * u * y.cwiseAbs();
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index col = 0; col < x.cols(); ++col) {
      const auto block = x.row(i).segment(col / c.width * c.width, c.width);
      const double mean = block.mean(), deviation = std::abs(x(i, col) - mean);
      // |r| = |x̂|/|x − m| where it can be told, and at most 1/√ε
      const double r =
          deviation > 0 ? std::min(316.0, std::abs(unit(i, col)) / deviation + 1) : 316;
      bound(i, col) += gain * (g * std::abs(unit(i, col)) +
                               g * r * (std::abs(x(i, col)) + block.cwiseAbs().mean())) +
                       2 * u * bias;
    }
  }
  return bound;
}

template <class Scalar, class High>
void check_norm(Norm kind, const NormCase& c, std::mt19937_64& random) {
  const auto x = random_matrix<Scalar>(c.rows, c.heads * c.width, random);
  const auto weights = random_norm_weights<Scalar>(c, random);
  const double epsilon = 1e-3;
  const RowVector<High> gain = weights.gain.template cast<High>(),
                        bias = weights.bias.template cast<High>();
  const auto high = Matrix<High>(x.template cast<High>());
  const auto exact =
      reference::norm<High>(of_reference(kind), high, gain, bias, High(Scalar(epsilon)), c.heads);
  const auto unit = reference::norm<High>(of_reference(kind), high, RowVector<High>(),
                                          RowVector<High>(), High(Scalar(epsilon)), c.heads);
  const auto plain = reference::norm<Scalar>(of_reference(kind), x, weights.gain, weights.bias,
                                             Scalar(epsilon), c.heads);
  const double largest_gain = gain.size() ? double(gain.cwiseAbs().maxCoeff()) : 1.0;
  const double largest_bias = bias.size() ? double(bias.cwiseAbs().maxCoeff()) : 0.0;
  check_error(
      "norm", norm_of(kind, x, weights, NormOptions{.epsilon = epsilon, .heads = c.heads}), plain,
      exact,
      norm_bound<Scalar>(doubles(x), doubles(exact), doubles(unit), c, largest_gain, largest_bias));
}

}  // namespace

TEST_CASE("norms agree with the reference in the next higher precision") {
  std::mt19937_64 random = seeded_random();
  for (const Norm kind : all_norms) {
    for (const NormCase& c : norm_cases) {
      CAPTURE(seed(), int(kind), c.rows, c.width, c.heads, c.gain, c.bias);
      check_norm<float, double>(kind, c, random);
      check_norm<double, long double>(kind, c, random);
    }
  }
}

TEST_CASE("gradients of the norms agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  for (const Norm kind : all_norms) {
    for (const NormCase& c : norm_cases) {
      CAPTURE(seed(), int(kind), c.rows, c.width, c.heads, c.gain, c.bias);
      if (c.rows * c.width > 300) continue;
      const auto x = random_matrix<double>(c.rows, c.heads * c.width, random);
      const auto grad_out = random_matrix<double>(c.rows, c.heads * c.width, random);
      const auto weights = random_norm_weights<double>(c, random);
      const NormOptions options{.epsilon = 0.1, .heads = c.heads};
      const auto loss = [&](const auto& at, const NormWeights<double>& w) {
        return norm_of(kind, at, w, options).cwiseProduct(grad_out).sum();
      };
      const auto g = norm_backward_of(kind, x, grad_out, weights, options);
      const GradientCheckOptions<double> tolerance{.tolerance = 1e-8};
      CHECK(check_gradient([&](const auto& at) { return loss(at, weights); }, x, g.x, tolerance));
      CHECK(check_gradient(
          [&](const RowVector<double>& at) {
            return loss(x, {at, weights.bias});
          },
          weights.gain, g.weights.gain, tolerance));
      CHECK(check_gradient(
          [&](const RowVector<double>& at) {
            return loss(x, {weights.gain, at});
          },
          weights.bias, g.weights.bias, tolerance));
    }
  }
}

TEST_CASE("norms: rows have mean 0 and mean square 1, mean square 1, and length 1") {
  std::mt19937_64 random = seeded_random();
  const auto x = random_matrix<double>(9, 12, random);
  const NormOptions options{.epsilon = 0.0, .heads = 3};
  for (Index head = 0; head < 3; ++head) {
    const auto layer = layer_norm(x, {}, options).middleCols(head * 4, 4).eval();
    const auto rms = rms_norm(x, {}, options).middleCols(head * 4, 4).eval();
    const auto l2 = l2_normalize(x, {}, options).middleCols(head * 4, 4).eval();
    for (Index i = 0; i < x.rows(); ++i) {
      CHECK(layer.row(i).sum() == Approx(0).margin(1e-14));
      CHECK(layer.row(i).squaredNorm() == Approx(4));
      CHECK(rms.row(i).squaredNorm() == Approx(4));
      CHECK(l2.row(i).norm() == Approx(1));
      CHECK(l2.row(i).dot(x.row(i).segment(head * 4, 4)) ==
            Approx(x.row(i).segment(head * 4, 4).norm()));
    }
  }
}

TEST_CASE("norms: the default epsilon is 1e-5, of l2_normalize 1e-12") {
  const Matrix<double> x = Matrix<double>::Constant(1, 4, 1e-3);
  CHECK(rms_norm(x)(0, 0) == Approx(1e-3 / std::sqrt(1e-6 + 1e-5)));
  CHECK(layer_norm(Matrix<double>{{1e-3, -1e-3}})(0, 0) == Approx(1e-3 / std::sqrt(1e-6 + 1e-5)));
  CHECK(l2_normalize(Matrix<double>{{1e-6, 0}})(0, 0) == Approx(1e-6 / std::sqrt(2e-12)));
}

TEST_CASE(
    "norms: a block without extent gives its bias and no gradient, a NaN stays in its block") {
  const NormOptions options{.epsilon = 0.0, .heads = 2};
  Matrix<double> x(1, 4);
  x << 2, 2, 1, 3;
  const NormWeights<double> weights{.bias = RowVector<double>::Constant(4, 5.0)};
  const auto layer = layer_norm(x, weights, options);
  CHECK(layer(0, 0) == 5);
  CHECK(layer(0, 1) == 5);
  CHECK(layer(0, 3) == Approx(6));
  const auto gradient = layer_norm_backward(x, Matrix<double>{{1, 2, 3, 5}}, weights, options);
  CHECK(gradient.x(0, 0) == 0);
  CHECK(gradient.x(0, 1) == 0);
  CHECK(gradient.weights.bias(1) == 2);
  CHECK(l2_normalize(Matrix<double>::Zero(1, 4), {}, options).isZero(0));

  x(0, 2) = std::numeric_limits<double>::quiet_NaN();
  for (const Norm kind : all_norms) {
    const auto y = norm_of(kind, x, NormWeights<double>{}, NormOptions{.heads = 2});
    CHECK(y.leftCols(2).allFinite());
    CHECK(y.rightCols(2).array().isNaN().all());
  }
}

TEST_CASE("l2_normalize on each head's keys: the uniform prior has the weights of the sdpa prior") {
  std::mt19937_64 random = seeded_random();
  const auto q = random_matrix<double>(7, 12, random);
  const auto k = l2_normalize(random_matrix<double>(20, 12, random), {}, {.heads = 3});
  const Matrix<double> uniform = project(q, k, {.scale = 3, .heads = {3}});
  const Matrix<double> sdpa = project(q, k, {.scale = 3, .heads = {3}, .prior = KeyPrior::sdpa});
  CHECK((uniform - sdpa).cwiseAbs().maxCoeff() <= 1e-11);
}

TEST_CASE("norms: every storage and in place, without allocating") {
  std::mt19937_64 random = seeded_random();
  const Matrix<float> x = random_matrix<float>(6, 24, random);
  const Matrix<float> grad_out = random_matrix<float>(6, 24, random);
  const NormOptions options{.heads = 3};
  const NormWeights<float> weights{RowVector<float>(random_matrix<float>(1, 8, random)),
                                   RowVector<float>(random_matrix<float>(1, 24, random))};
  for (const Norm kind : all_norms) {
    CAPTURE(int(kind));
    const Matrix<float> expected = norm_of(kind, x, weights, options);
    const auto gradients = norm_backward_of(kind, x, grad_out, weights, options);
    const float u = std::numeric_limits<float>::epsilon();
    const Eigen::MatrixXf column_major = x;
    Eigen::MatrixXf out(6, 24);
    norm_into_of(kind, column_major, out, weights, options);
    CHECK((out - expected).cwiseAbs().maxCoeff() <= 32 * u);
    out = grad_out;
    Eigen::MatrixXf gains = Eigen::MatrixXf::Constant(2, 8, 7.0f),
                    biases = Eigen::MatrixXf::Zero(2, 24);
    const auto backward = [&](auto&& grad_x) {
      if (kind == Norm::layer)
        layer_norm_backward_into(column_major, out, grad_x, gains.row(1), biases.row(0), weights,
                                 options);
      if (kind == Norm::rms)
        rms_norm_backward_into(column_major, out, grad_x, gains.row(1), biases.row(0), weights,
                               options);
      if (kind == Norm::l2)
        l2_normalize_backward_into(column_major, out, grad_x, gains.row(1), biases.row(0), weights,
                                   options);
    };
    backward(out);  // over the gradient that it reads
    CHECK((out - gradients.x).cwiseAbs().maxCoeff() <= 256 * u);
    CHECK((gains.row(1) - gradients.weights.gain).cwiseAbs().maxCoeff() <= 256 * u);
    CHECK((biases.row(0) - gradients.weights.bias).cwiseAbs().maxCoeff() <= 256 * u);
    CHECK((gains.row(0).array() == 7.0f).all());

    Matrix<float> in_place = x, grad_x = x;
    RowVector<float> grad_gain(8), grad_bias(24);
    std::size_t count = 0;
    {
      const NoAllocation watch;
      norm_into_of(kind, in_place, in_place, weights, options);
      if (kind == Norm::layer)
        layer_norm_backward_into(x, grad_out, grad_x, grad_gain, grad_bias, weights, options);
      if (kind == Norm::rms)
        rms_norm_backward_into(x, grad_out, grad_x, grad_gain, grad_bias, weights, options);
      if (kind == Norm::l2)
        l2_normalize_backward_into(x, grad_out, grad_x, grad_gain, grad_bias, weights, options);
      count = watch.count();
    }
    CHECK(count == 0);
    CHECK(in_place == expected);
    CHECK(grad_x == gradients.x);
  }
}

TEST_CASE("normalize is the norm of its name, or nothing") {
  std::mt19937_64 random = seeded_random();
  const auto x = random_matrix<double>(3, 8, random), g = random_matrix<double>(3, 8, random);
  const NormWeights<double> weights{RowVector<double>::Constant(4, 2.0),
                                    RowVector<double>::Constant(8, 0.5)};
  const NormOptions options{.epsilon = 0.1, .heads = 2};
  for (const Norm kind : all_norms) {
    CHECK(normalize(kind, x, weights, options) == norm_of(kind, x, weights, options));
    const auto a = normalize_backward(kind, x, g, weights, options);
    const auto b = norm_backward_of(kind, x, g, weights, options);
    CHECK(a.x == b.x);
    CHECK(a.weights.gain == b.weights.gain);
    CHECK(a.weights.bias == b.weights.bias);
  }
  CHECK(normalize(Norm::none, x) == x);
  CHECK(normalize_backward(Norm::none, x, g).x == g);
}

TEST_CASE("norms name what is wrong before they write") {
  const Matrix<double> x = Matrix<double>::Ones(3, 6);
  Matrix<double> out = Matrix<double>::Constant(3, 6, -7.0);
  const auto says = [&](const NormWeights<double>& weights, const NormOptions& options) {
    try {
      rms_norm_into(x, out, weights, options);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK_THAT(says({}, {.heads = 4}),
             contains_text("surfattn::rms_norm: x is 3×6, and its columns do not divide into 4"));
  CHECK_THAT(says({}, {.heads = 0}), contains_text("0 heads"));
  CHECK_THAT(says({}, {.epsilon = -1.0}), contains_text("epsilon must be finite and not negative"));
  CHECK_THAT(says({}, {.epsilon = std::numeric_limits<double>::quiet_NaN()}),
             contains_text("epsilon"));
  CHECK_THAT(says({.gain = RowVector<double>::Ones(5)}, {.heads = 2}),
             contains_text("weights.gain is 1×5 but must be 1×6, 1×3, or empty"));
  CHECK_THAT(says({.bias = RowVector<double>::Ones(3)}, {}),
             contains_text("weights.bias is 1×3 but must be 1×6, or empty"));
  CHECK((out.array() == -7.0).all());
  Matrix<double> narrow(3, 5);
  CHECK_THROWS_WITH(rms_norm_into(x, narrow),
                    contains_text("out is 3×5 but must be 3×6 (the shape of x)"));
  CHECK_THROWS_WITH(layer_norm_backward(x, narrow),
                    contains_text("layer_norm_backward: grad_out is 3×5 but must be 3×6"));
}
