// Terms beside queries, keys and values of 16 bits, with parameters in float and in 16 bits.
#include "support/terms.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

template <class Scalar>
constexpr double unit_roundoff = std::is_same_v<Scalar, Eigen::bfloat16> ? 0x1p-8 : 0x1p-11;

template <class Scalar>
Matrix<float> wide(const Matrix<Scalar>& matrix) {
  return matrix.template cast<float>();
}

/// The narrow results are those of the same numbers in float, but for the rounding of the stored output, which enters
/// D_i = dO_i·O_i and with it every gradient, and for that of the gradient itself.
template <class Scalar>
void check_close(const char* name, const Matrix<float>& narrow, const Matrix<float>& exact) {
  const double largest = exact.size() ? double(exact.cwiseAbs().maxCoeff()) : 0;
  const double error = exact.size() ? double((narrow - exact).cwiseAbs().maxCoeff()) : 0;
  INFO(name << ": error " << error << " beside " << largest);
  CHECK(error <= 24 * unit_roundoff<Scalar> * (largest + 0.1));
}

template <class Scalar>
void check_kind(TermKind kind, const Sizes& sizes, std::mt19937_64& random) {
  INFO(name_of(kind) << ", " << sizes.queries << " queries");
  TermCase<float> term(kind, sizes, random);
  const Problem<float> drawn(sizes, random);
  const auto narrow = [](const Matrix<float>& m) { return m.template cast<Scalar>().eval(); };
  const Matrix<Scalar> q = narrow(drawn.queries), k = narrow(drawn.keys), v = narrow(drawn.values),
                       g = narrow(drawn.grad_out);
  const Options options{.heads = drawn.heads};
  const auto directed = term.term().gradient_into(term.gradient);
  const auto exact = attention_forward(wide(q), wide(k), wide(v), options, directed);
  const auto exact_grad =
      attention_backward(wide(q), wide(k), wide(v), exact, wide(g), options, directed);
  const Matrix<float> exact_of_term = term.gradient;
  const auto forward = attention_forward(q, k, v, options, directed);
  const auto grad = attention_backward(q, k, v, forward, g, options, directed);
  check_close<Scalar>("out", wide(forward.out), exact.out);
  check_close<Scalar>("queries", wide(grad.queries), exact_grad.queries);
  check_close<Scalar>("keys", wide(grad.keys), exact_grad.keys);
  check_close<Scalar>("values", wide(grad.values), exact_grad.values);
  if (term.is_trainable()) check_close<Scalar>("of the term", term.gradient, exact_of_term);
}

}  // namespace

TEMPLATE_TEST_CASE("terms act on 16-bit inputs as on the same numbers in float", "", Eigen::half,
                   Eigen::bfloat16) {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  for (int kind = 0; kind < term_kinds; ++kind) {
    for (const Sizes& sizes : {Sizes{3, 40, 8, 6, 2, 1}, Sizes{50, 70, 8, 6, 2, 1}})
      check_kind<TestType>(TermKind(kind), sizes, random);
  }
}

TEMPLATE_TEST_CASE("parameters may be of 16 bits, and so are their gradients", "", Eigen::half,
                   Eigen::bfloat16) {
  using Scalar = TestType;
  std::mt19937_64 random = seeded_random();
  const Problem<float> p({30, 40, 8, 6}, random);
  const Matrix<Scalar> bias = random_matrix<float>(30, 40, random).template cast<Scalar>();
  Matrix<Scalar> with_holes = bias;
  with_holes.col(7).setConstant(-std::numeric_limits<Scalar>::infinity());
  const auto run = [&](const auto& parameters) {
    const auto f = attention_forward(p.queries, p.keys, p.values, {}, AdditiveBias{parameters});
    const auto g = attention_backward(p.queries, p.keys, p.values, f, p.grad_out, {},
                                      AdditiveBias{parameters});
    return std::pair(f.out, Matrix<float>(std::get<0>(g.terms).template cast<float>()));
  };
  for (const auto& parameters : {bias, with_holes}) {
    const auto [out, grad] = run(parameters);
    const auto [exact_out, exact_grad] = run(wide(parameters));
    CHECK((out.array() == exact_out.array()).all());
    check_close<Scalar>("bias", grad, exact_grad);
    CHECK(grad.cwiseAbs().maxCoeff() > 0);
  }
}
