// Values from keys on whole layers: forward, every gradient mapped through the conversion, one step of gradient descent, and what
// cannot be inverted.
#include <Eigen/LU>
#include <surfattn/layers.hpp>
#include <surfattn/values_from_keys.hpp>

#include "support/layer_weights.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

using M = Matrix<double>;
using Row = RowVector<double>;
using Weights = StandardWeights<double>;

double difference(const M& a, const M& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  return a.size() ? (a - b).cwiseAbs().maxCoeff() : 0;
}

/// A layer whose keys are as wide per head as y, 5, and well conditioned.
Weights square_weights(const Sizes& s, bool biases, std::mt19937_64& random) {
  Weights w = random_weights<double>(6, s.head_dim, 4, s, random, biases);
  for (Index g = 0; g < s.key_value_heads; ++g) {
    auto key = w.key.middleCols(g * s.head_dim, s.head_dim);
    key = (key * 0.3 + M::Identity(s.head_dim, s.head_dim)).eval();
  }
  return w;
}

/// The gradients of the weights that follow from those, g, of the weights made of them, through Wo' = M·Wo, bo' = bo + (bv − bk·M)·Wo
/// and M = Wk⁻¹·Wv: with dM = dWo'·Woᵀ − bkᵀ·dbo'·Woᵀ, dWv = Wk⁻ᵀ·dM and dWk = g.key − Wk⁻ᵀ·dM·Mᵀ.
Weights pull_back(const Weights& w, const Weights& g, const Sizes& s) {
  const Index d = s.head_dim, dv = s.value_dim, group = s.query_heads / s.key_value_heads;
  Weights r = g;
  r.output = M::Zero(w.output.rows(), w.output.cols());
  r.value = M::Zero(d, w.value.cols());
  r.value_bias = Row::Zero(w.value_bias.size());
  const bool biases = w.key_bias.size() > 0;
  for (Index h = 0; h < s.query_heads; ++h) {
    const Index shared = h / group;
    const M inverse = M(w.key.middleCols(shared * d, d)).inverse();
    const M m = inverse * w.value.middleCols(shared * dv, dv);
    const M wo = w.output.middleRows(h * dv, dv), grad = g.output.middleRows(h * d, d);
    r.output.middleRows(h * dv, dv) += m.transpose() * grad;
    M grad_m = grad * wo.transpose();
    if (biases) {
      const Row bk = w.key_bias.segment(shared * d, d), bv = w.value_bias.segment(shared * dv, dv),
                upstream = g.output_bias * wo.transpose();
      r.output.middleRows(h * dv, dv) += (bv - bk * m).transpose() * g.output_bias;
      r.value_bias.segment(shared * dv, dv) += upstream;
      r.key_bias.segment(shared * d, d) -= upstream * m.transpose();
      grad_m -= bk.transpose() * upstream;
    }
    r.value.middleCols(shared * dv, dv) += inverse.transpose() * grad_m;
    r.key.middleCols(shared * d, d) -= inverse.transpose() * grad_m * m.transpose();
  }
  return r;
}

template <class... Terms>
void check_layer(const Weights& w, const Sizes& s, const M& x, const M& y, std::mt19937_64& random,
                 const Terms&... terms) {
  const auto shared = values_from_keys(w).weights;
  const auto standard = layer_forward(x, y, w, {}, terms...);
  const auto of_keys = layer_forward(x, y, shared, {}, terms...);
  CHECK(difference(standard.out, of_keys.out) <= 1e-12);
  const M grad_out = random_matrix<double>(x.rows(), 4, random);
  const auto a = layer_backward(x, y, w, standard, grad_out, {}, terms...);
  const auto b = layer_backward(x, y, shared, of_keys, grad_out, {}, terms...);
  CHECK(difference(a.x, b.x) <= 1e-11);
  CHECK(difference(a.y, b.y) <= 1e-11);
  const Weights pulled = pull_back(w, b.weights, s);
  for_each_weight(a.weights, pulled, [](const char* name, const auto& of_a, const auto& of_b) {
    INFO(name);
    CHECK(difference(of_a, of_b) <= 1e-10);
  });
  Weights stepped = w, stepped_by_pulled = w;
  for_each_weight(stepped, a.weights, [](const char*, auto& at, const auto& g) { at -= 0.01 * g; });
  for_each_weight(stepped_by_pulled, pulled,
                  [](const char*, auto& at, const auto& g) { at -= 0.01 * g; });
  CHECK(difference(
            layer_forward(x, y, stepped, {}, terms...).out,
            layer_forward(x, y, values_from_keys(stepped_by_pulled).weights, {}, terms...).out) <=
        1e-10);
}

}  // namespace

TEST_CASE("equivalence 4: a layer whose values come from its keys is the same layer") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : {Sizes{7, 9, 5, 3}, Sizes{7, 9, 5, 4, 4, 2}, Sizes{9, 9, 5, 7, 3, 1}}) {
    for (const bool biases : {false, true}) {
      for (const bool normed : {false, true}) {
        CAPTURE(seed(), s.query_heads, s.key_value_heads, biases, normed);
        Weights w = square_weights(s, biases, random);
        if (normed) {
          w.key_norm = w.query_norm = Norm::rms;
          w.key_norm_weights.gain = random_matrix<double>(1, 5, random);
          w.rotary = {.pairs = RotaryPairs::halves, .width = 4};
        }
        const M x = random_matrix<double>(9, 6, random), y = random_matrix<double>(9, 5, random);
        check_layer(w, s, x, y, random);
        check_layer(w, s, x, y, random, Causal{Align::top_left});
      }
    }
  }
}

TEST_CASE("values_from_keys says how well the keys can be inverted") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{0, 0, 5, 3, 2, 2};
  Weights w = square_weights(s, false, random);
  const M key = w.key.leftCols(5);
  const M inverse = key.inverse();
  const auto norm = [](const M& m) { return m.cwiseAbs().colwise().sum().maxCoeff(); };
  // an estimate, of the inverse's norm from below
  const double exact = 1 / (norm(key) * norm(inverse));
  CHECK(values_from_keys(w).reciprocal_condition[0] >= exact * (1 - 1e-12));
  CHECK(values_from_keys(w).reciprocal_condition[0] <= 3 * exact);
  // a power of ten off the values for each power of ten of the condition
  w.key.col(9) = w.key.col(8) + 1e-6 * w.key.col(9);
  const auto poor = values_from_keys(w);
  CHECK(poor.reciprocal_condition[1] < 1e-6);
  const M x = random_matrix<double>(4, 6, random), y = random_matrix<double>(6, 5, random);
  const double error =
      difference(layer_forward(x, y, w).out, layer_forward(x, y, poor.weights).out);
  CHECK(error <= 1e-15 / poor.reciprocal_condition[1] * 100);
  // weights that share them already stay as they are
  const auto again = values_from_keys(poor.weights);
  CHECK(again.weights.output == poor.weights.output);
  CHECK(again.reciprocal_condition.isOnes(0));
}

TEST_CASE("values_from_keys names what is wrong") {
  std::mt19937_64 random = seeded_random();
  Weights w = square_weights({0, 0, 5, 3, 2, 2}, true, random);
  Weights singular = w;
  singular.key.col(7) = singular.key.col(6);
  CHECK_THROWS_WITH(values_from_keys(singular),
                    contains_text("surfattn::values_from_keys: weights.key must be invertible, "
                                  "head by head, but that of head 1 is singular"));
  singular.key.setZero();
  CHECK_THROWS_WITH(values_from_keys(singular), contains_text("head 0 is singular"));
  singular.key.setConstant(std::numeric_limits<double>::quiet_NaN());
  CHECK_THROWS_WITH(values_from_keys(singular), contains_text("head 0 is singular"));
  Weights narrow = random_weights<double>(6, 8, 4, {0, 0, 4, 3, 2, 2}, random);
  CHECK_THROWS_WITH(
      values_from_keys(narrow),
      contains_text("must be square, head by head, but it is 8×8 (2 heads of width 4)"));
  narrow.output.resize(3, 4);
  CHECK_THROWS_WITH(values_from_keys(narrow), contains_text("weights.output is 3×4"));
}
