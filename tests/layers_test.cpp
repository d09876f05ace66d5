// Layers and blocks: gradients of everything by central differences, norms, k_equals_v, batches, threads, and one step of
// gradient descent in both forms.
#include "support/layers.hpp"

#include <surfattn/blocks.hpp>
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/gradcheck.hpp>

using namespace surfattn;
using namespace surfattn::test;

namespace {

using M = Matrix<double>;
using Row = RowVector<double>;

double difference(const M& a, const M& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  return a.size() ? (a - b).cwiseAbs().maxCoeff() : 0;
}

/// Calls visit(name, of_a, of_b) with every trainable number of two sets of weights, pairwise.
template <class A, class B, class Visit>
void for_each_weight(A& a, B& b, const Visit& visit) requires requires {
  a.query;
}
{
  visit("Wq", a.query, b.query);
  visit("Wk", a.key, b.key);
  visit("Wv", a.value, b.value);
  visit("Wo", a.output, b.output);
  visit("bq", a.query_bias, b.query_bias);
  visit("bk", a.key_bias, b.key_bias);
  visit("bv", a.value_bias, b.value_bias);
  visit("bo", a.output_bias, b.output_bias);
  visit("query gain", a.query_norm_weights.gain, b.query_norm_weights.gain);
  visit("query norm bias", a.query_norm_weights.bias, b.query_norm_weights.bias);
  visit("key gain", a.key_norm_weights.gain, b.key_norm_weights.gain);
  visit("key norm bias", a.key_norm_weights.bias, b.key_norm_weights.bias);
}
template <class A, class B, class Visit>
void for_each_weight(A& a, B& b, const Visit& visit) requires requires {
  a.metric;
}
{
  visit("A", a.metric, b.metric);
  visit("B", a.readout, b.readout);
  visit("g", a.metric_bias, b.metric_bias);
  visit("r", a.readout_bias, b.readout_bias);
  visit("bo", a.output_bias, b.output_bias);
}

template <class Layer>
struct BlockProblem {
  BlockWeights<Layer> block;
  M x, y, grad_out;  // y of no rows: self-attention

  bool is_self() const { return y.size() == 0; }

  template <class... Terms>
  double loss(const M& at_x, const M& at_y, const BlockWeights<Layer>& at,
              const Terms&... terms) const {
    const auto f = is_self() ? block_forward(at_x, at, {}, terms...)
                             : block_forward(at_x, at_y, at, {}, terms...);
    return f.out.cwiseProduct(grad_out).sum();
  }
};

template <class Point, class Analytic, class Function>
void check_by_differences(const char* name, const Function& loss, const Point& at,
                          const Analytic& analytic) {
  const auto check = check_gradient(loss, at, analytic, {.tolerance = 1e-8});
  INFO(name << ": " << check);
  CHECK(check.passed());
}

template <class Layer, class... Terms>
void check_block_gradients(const BlockProblem<Layer>& p, const Terms&... terms) {
  const auto f = p.is_self() ? block_forward(p.x, p.block, {}, terms...)
                             : block_forward(p.x, p.y, p.block, {}, terms...);
  auto g = p.is_self() ? block_backward(p.x, p.block, f, p.grad_out, {}, terms...)
                       : block_backward(p.x, p.y, p.block, f, p.grad_out, {}, terms...);
  check_by_differences(
      "x", [&](const M& at) { return p.loss(at, p.y, p.block, terms...); }, p.x, g.x);
  check_by_differences(
      "y", [&](const M& at) { return p.loss(p.x, at, p.block, terms...); }, p.y, g.y);
  BlockWeights<Layer> moved = p.block;
  const auto check = [&](const char* name, auto& weight, const auto& gradient) {
    const auto point = weight;
    check_by_differences(
        name,
        [&](const auto& at) {
          weight = at;
          return p.loss(p.x, p.y, moved, terms...);
        },
        point, gradient);
    weight = point;
  };
  for_each_weight(moved.layer, g.weights.layer, check);
  check("pre gain", moved.pre_norm_weights.gain, g.weights.pre_norm_weights.gain);
  check("pre bias", moved.pre_norm_weights.bias, g.weights.pre_norm_weights.bias);
  check("post gain", moved.post_norm_weights.gain, g.weights.post_norm_weights.gain);
  check("post bias", moved.post_norm_weights.bias, g.weights.post_norm_weights.bias);
}

template <class Layer>
BlockProblem<Layer> block_of(const Layer& layer, bool self, std::mt19937_64& random) {
  const auto gain = [&](Index size) { return Row(random_matrix<double>(1, size, random)); };
  BlockProblem<Layer> p;
  p.block.layer = layer;
  p.block.pre_norm = Norm::layer;
  p.block.post_norm = Norm::rms;
  p.block.norm_epsilon = 0.1;
  p.block.pre_norm_weights = {gain(6), gain(6)};
  p.block.post_norm_weights = {gain(6), {}};
  p.x = random_matrix<double>(7, 6, random);
  if (!self) p.y = random_matrix<double>(9, 5, random);
  p.grad_out = random_matrix<double>(7, 6, random);
  return p;
}

}  // namespace

TEST_CASE("gradients of blocks agree with central differences to 1e-8, in both forms") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{7, 9, 3, 2, 4, 2};
  for (const bool self : {false, true}) {
    CAPTURE(seed(), self);
    const auto w = random_weights(6, self ? 6 : 5, 6, s, random);
    check_block_gradients(block_of(w, self, random), Causal{Align::bottom_right});
    check_block_gradients(block_of(merge(w), self, random), Causal{Align::bottom_right});
  }
}

TEST_CASE("gradients of layers with norms and k_equals_v agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{7, 9, 3, 3, 4, 2};
  const std::pair<Norm, Norm> norms[] = {{Norm::none, Norm::none},
                                         {Norm::rms, Norm::l2},
                                         {Norm::layer, Norm::none},
                                         {Norm::none, Norm::rms}};
  for (const auto& [query_norm, key_norm] : norms) {
    for (const bool shared : {false, true}) {
      CAPTURE(seed(), int(query_norm), int(key_norm), shared);
      auto w = random_weights(6, 6, 6, s, random);
      w.query_norm = query_norm;
      w.key_norm = key_norm;
      w.norm_epsilon = 0.1;
      if (query_norm != Norm::none) w.query_norm_weights.gain = random_matrix<double>(1, 3, random);
      if (key_norm != Norm::none) w.key_norm_weights.gain = random_matrix<double>(1, 6, random);
      if (shared) share_keys(w);
      auto p = block_of(w, true, random);
      p.block.pre_norm = p.block.post_norm = Norm::none;
      p.block.pre_norm_weights = p.block.post_norm_weights = {};
      check_block_gradients(p, Causal{Align::top_left});
    }
  }
}

TEST_CASE("layers and blocks give the gradients of terms with parameters, in both forms") {
  std::mt19937_64 random = seeded_random();
  const auto w = random_weights(6, 6, 6, {7, 7, 3, 2, 2, 2}, random);
  M bias = random_matrix<double>(7, 7, random);
  const auto check = [&](const auto& p) {
    const auto f = block_forward(p.x, p.block, {}, AdditiveBias{bias});
    const auto g = block_backward(p.x, p.block, f, p.grad_out, {}, AdditiveBias{bias});
    check_by_differences(
        "bias", [&](const M& at) { return p.loss(p.x, p.y, p.block, AdditiveBias{at}); }, bias,
        std::get<0>(g.terms));
    check_by_differences(
        "x", [&](const M& at) { return p.loss(at, p.y, p.block, AdditiveBias{bias}); }, p.x, g.x);
  };
  check(block_of(w, true, random));
  check(block_of(merge(w), true, random));
}

TEST_CASE("a block is its parts") {
  std::mt19937_64 random = seeded_random();
  const auto w = random_weights(6, 5, 6, {7, 9, 3, 2, 2, 2}, random);
  auto p = block_of(w, false, random);
  const NormOptions norm{.epsilon = 0.1};
  const M normed = layer_norm(p.x, p.block.pre_norm_weights, norm);
  const M sum = p.x + layer_forward(normed, p.y, w).out;
  CHECK(difference(block_forward(p.x, p.y, p.block).out,
                   rms_norm(sum, p.block.post_norm_weights, norm)) <= 1e-14);
  p.block.residual = false;
  p.block.pre_norm = p.block.post_norm = Norm::none;
  CHECK(difference(block_forward(p.x, p.y, p.block).out, layer_forward(p.x, p.y, w).out) == 0);
}

TEST_CASE("k_equals_v is the layer whose values are its keys, and merges") {
  std::mt19937_64 random = seeded_random();
  const auto x = random_matrix<double>(7, 6, random), y = random_matrix<double>(9, 5, random);
  auto w = random_weights(6, 5, 4, {7, 9, 3, 3, 4, 2}, random);
  w.value = w.key;
  w.value_bias = w.key_bias;
  auto shared = w;
  share_keys(shared);
  const Causal causal{Align::bottom_right};
  CHECK(difference(layer_forward(x, y, w, {}, causal).out,
                   layer_forward(x, y, shared, {}, causal).out) <= 1e-13);
  CHECK(difference(layer_forward(x, y, merge(shared), {}, causal).out,
                   layer_forward(x, y, shared, {}, causal).out) <= 1e-12);
  // with a norm of the keys, the values are the keys before it
  w.key_norm = shared.key_norm = Norm::l2;
  CHECK(difference(layer_forward(x, y, w).out, layer_forward(x, y, shared).out) <= 1e-13);
}

TEST_CASE("layers: a batch is its sequences, and threads change no bit") {
  std::mt19937_64 random = seeded_random();
  auto w = random_weights(6, 6, 5, {0, 0, 3, 2, 2, 2}, random);
  const auto merged = merge(w);
  const auto x = random_matrix<double>(24, 6, random), g = random_matrix<double>(24, 5, random);
  ThreadPool pool(3);
  const LayerOptions batch{.sequences = Sequences::equal(3)},
      parallel{.executor = &pool, .sequences = Sequences::equal(3)};
  const auto check = [&](const auto& weights) {
    const auto f = layer_forward(x, x, weights, batch, Causal{Align::top_left});
    const auto b = layer_backward(x, x, weights, f, g, batch, Causal{Align::top_left});
    const auto fp = layer_forward(x, x, weights, parallel, Causal{Align::top_left});
    const auto bp = layer_backward(x, x, weights, fp, g, parallel, Causal{Align::top_left});
    CHECK(f.out == fp.out);
    CHECK(b.x == bp.x);
    CHECK(b.y == bp.y);
    auto sum = b.weights;
    for_each_weight(sum, b.weights, [](const char*, auto& s, const auto&) { s.setZero(); });
    for (Index s = 0; s < 3; ++s) {
      const M xs = x.middleRows(8 * s, 8), gs = g.middleRows(8 * s, 8);
      const auto fs = layer_forward(xs, xs, weights, {}, Causal{Align::top_left});
      const auto bs = layer_backward(xs, xs, weights, fs, gs, {}, Causal{Align::top_left});
      CHECK(difference(f.out.middleRows(8 * s, 8), fs.out) <= 1e-13);
      CHECK(difference(b.x.middleRows(8 * s, 8), bs.x) <= 1e-13);
      for_each_weight(sum, bs.weights, [](const char*, auto& to, const auto& from) { to += from; });
    }
    for_each_weight(sum, b.weights, [](const char* name, const auto& to, const auto& from) {
      INFO(name);
      CHECK(difference(to, from) <= 1e-12);
    });
  };
  check(w);
  check(merged);
}

TEST_CASE(
    "one step of gradient descent along merged weights lowers the loss as their gradient says, in "
    "both forms") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{9, 11, 3, 4, 4, 2};
  for (const bool causal : {false, true}) {
    CAPTURE(seed(), causal);
    const auto w = random_weights(6, 5, 4, s, random);
    const auto x = random_matrix<double>(s.queries, 6, random),
               y = random_matrix<double>(s.keys, 5, random);
    const auto target = random_matrix<double>(s.queries, 4, random);
    const Index length = causal ? 8 : s.keys;
    const auto step = [&](auto weights, double rate) {
      const auto f = layer_forward(x, y, weights, {}, KeyLengths{length});
      const auto g = layer_backward(x, y, weights, f, f.out - target, {}, KeyLengths{length});
      double squares = 0;
      for_each_weight(weights, g.weights, [&](const char*, auto& at, const auto& gradient) {
        squares += gradient.squaredNorm();
        at -= rate * gradient;
      });
      const auto loss = [&](const M& out) { return (out - target).squaredNorm() / 2; };
      const double before = loss(f.out);
      const double after = loss(layer_forward(x, y, weights, {}, KeyLengths{length}).out);
      CHECK((before - after) / (rate * squares) == Approx(1).epsilon(1e-4));
      return weights;
    };
    const double rate = 1e-7;
    const auto stepped = step(w, rate);
    step(merge(w), rate);
    // The standard weights after their step, merged, and the merged weights moved by what that step means for them,
    // dA = dWq·Wkᵀ + Wq·dWkᵀ, are the same layer to second order in the rate.
    const auto moved = merge(stepped);
    CHECK(difference(layer_forward(x, y, moved).out, layer_forward(x, y, stepped).out) <= 1e-11);
  }
}

TEST_CASE("layers and blocks name what is wrong") {
  std::mt19937_64 random = seeded_random();
  const auto x = random_matrix<double>(4, 6, random);
  auto w = random_weights(6, 6, 5, {0, 0, 3, 2, 2, 2}, random);
  CHECK_THROWS_WITH(block_forward(x, BlockWeights<StandardWeights<double>>{.layer = w}),
                    contains_text("x is 4×6 but must be as wide as the layer's output, 5"));
  auto normed = w;
  normed.key_norm = Norm::rms;
  CHECK_THROWS_WITH(merge(normed), contains_text("do not merge"));
  const auto unnormed = layer_forward(x, x, w);
  CHECK_THROWS_WITH(layer_backward(x, x, normed, unnormed, unnormed.out),
                    contains_text("forward.raw_keys is 0×0 but must be 4×6"));
  auto shared = w;
  shared.k_equals_v = true;
  CHECK_THROWS_WITH(layer_forward(x, x, shared),
                    contains_text("weights.value is 6×4 but must be 0×0"));
  normed.key_norm_weights.gain = Row::Ones(5);
  CHECK_THROWS_WITH(layer_forward(x, x, normed), contains_text("weights.gain is 1×5"));
  CHECK_THROWS_WITH(layer_forward(x, x, w, {.sequences = Sequences::equal(3)}),
                    contains_text("do not divide into 3 equal sequences"));
}
