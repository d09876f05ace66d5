// Layers and blocks: gradients of everything by central differences, norms, k_equals_v, batches, threads, and one step of
// gradient descent in both forms.
#include <surfattn/blocks.hpp>
#include <surfattn/executors/thread_pool.hpp>

#include "support/differences.hpp"
#include "support/layer_weights.hpp"

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
    const auto w = random_weights<double>(6, self ? 6 : 5, 6, s, random);
    check_block_gradients(block_of(w, self, random), Causal{Align::bottom_right});
    check_block_gradients(block_of(merge(w), self, random), Causal{Align::bottom_right});
  }
}

TEST_CASE(
    "gradients of layers with norms, rotation and k_equals_v agree with central differences to "
    "1e-8") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{7, 9, 3, 3, 4, 2};
  const std::pair<Norm, Norm> norms[] = {{Norm::none, Norm::none},
                                         {Norm::rms, Norm::l2},
                                         {Norm::layer, Norm::none},
                                         {Norm::none, Norm::rms}};
  int turn = 0;
  for (const auto& [query_norm, key_norm] : norms) {
    for (const bool shared : {false, true}) {
      const bool rotated = turn++ % 3 != 0;  // with and without either of the others
      CAPTURE(seed(), int(query_norm), int(key_norm), shared, rotated);
      auto w = random_weights<double>(6, 6, 6, s, random);
      w.query_norm = query_norm;
      w.key_norm = key_norm;
      w.norm_epsilon = 0.1;
      if (query_norm != Norm::none) w.query_norm_weights.gain = random_matrix<double>(1, 3, random);
      if (key_norm != Norm::none) w.key_norm_weights.gain = random_matrix<double>(1, 6, random);
      if (rotated) w.rotary = {.pairs = RotaryPairs::adjacent, .base = 10, .width = 2};
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
  const auto w = random_weights<double>(6, 6, 6, {7, 7, 3, 2, 2, 2}, random);
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
  const auto w = random_weights<double>(6, 5, 6, {7, 9, 3, 2, 2, 2}, random);
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
  auto w = random_weights<double>(6, 5, 4, {7, 9, 3, 3, 4, 2}, random);
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

TEST_CASE("a layer that rotates is its parts, at positions that are counted or given") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{12, 12, 4, 4, 4, 2};
  auto w = random_weights<double>(6, 5, 3, s, random);
  w.key_norm = Norm::rms;
  w.rotary = {.pairs = RotaryPairs::halves, .base = 30};
  const auto x = random_matrix<double>(12, 6, random), y = random_matrix<double>(12, 5, random);
  const M queries = (x * w.query).rowwise() + w.query_bias,
          keys = (y * w.key).rowwise() + w.key_bias,
          values = (y * w.value).rowwise() + w.value_bias,
          normed = rms_norm(keys, {}, {.heads = 2});
  const auto expected = [&](const auto& of_x, const auto& of_y, const M& v, const Options& how) {
    const M q = rotate(queries, of_x, {.pairs = RotaryPairs::halves, .heads = 4, .base = 30}),
            k = rotate(normed, of_y, {.pairs = RotaryPairs::halves, .heads = 2, .base = 30});
    return M((attention(q, k, v, how) * w.output).rowwise() + w.output_bias);
  };
  const std::vector<double> times_of_x{0.5, 1, 1.5, 2, 7, 7.25, 8, 9, 9, 10, 11, 30.5},
      times_of_y{-3, 0, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10};
  const LayerOptions given{.x_positions = times_of_x, .y_positions = times_of_y};
  CHECK(difference(layer_forward(x, y, w, given).out,
                   expected(times_of_x, times_of_y, values, {.heads = w.heads})) <= 1e-12);
  const Eigen::VectorXd vector = Eigen::VectorXd::Map(times_of_x.data(), 12);
  CHECK(layer_forward(x, y, w, {.x_positions = vector, .y_positions = times_of_y}).out ==
        layer_forward(x, y, w, given).out);
  // counted anew in each sequence
  const std::vector<int> offsets{0, 5, 5, 12};
  const std::vector<float> counted{0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6};
  const M in_sequences =
      expected(counted, counted, values, {.heads = w.heads, .sequences = offsets});
  CHECK(difference(layer_forward(x, y, w, {.sequences = offsets}).out, in_sequences) <= 1e-12);
  const LayerOptions both{.sequences = offsets, .x_positions = counted, .y_positions = counted};
  CHECK(difference(layer_forward(x, y, w, both).out, in_sequences) <= 1e-12);
  // positions of their own in the backward pass too
  const auto g = random_matrix<double>(12, 3, random);
  const auto f = layer_forward(x, y, w, given);
  check_by_differences(
      "y", [&](const M& at) { return layer_forward(x, at, w, given).out.cwiseProduct(g).sum(); }, y,
      layer_backward(x, y, w, f, g, given).y);
  // the values are the keys from before norm and rotation
  share_keys(w);
  CHECK(difference(layer_forward(x, y, w, given).out,
                   expected(times_of_x, times_of_y, keys, {.heads = w.heads})) <= 1e-12);
}

TEST_CASE("layers: a batch is its sequences, and threads change no bit") {
  std::mt19937_64 random = seeded_random();
  auto w = random_weights<double>(6, 6, 5, {0, 0, 3, 2, 2, 2}, random);
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
    const auto w = random_weights<double>(6, 5, 4, s, random);
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
  auto w = random_weights<double>(6, 6, 5, {0, 0, 3, 2, 2, 2}, random);
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
  CHECK_THROWS_WITH(layer_forward(x, x, normed),
                    contains_text("weights.key_norm_weights.gain is 1×5 but must be 1×"));
  CHECK_THROWS_WITH(layer_forward(x, x, w, {.sequences = Sequences::equal(3)}),
                    contains_text("do not divide into 3 equal sequences"));
  const std::vector<int> places{0, 1, 2, 3}, few{0, 1};
  CHECK_THROWS_WITH(layer_forward(x, x, w, {.x_positions = places, .y_positions = places}),
                    contains_text("are for weights with a rotation"));
  CHECK_THROWS_WITH(layer_forward(x, x, merge(w), {.x_positions = places, .y_positions = places}),
                    contains_text("are for weights with a rotation"));
  auto rotated = random_weights<double>(6, 6, 5, {0, 0, 4, 2, 2, 2}, random);
  rotated.rotary = {.pairs = RotaryPairs::halves};
  CHECK_THROWS_WITH(merge(rotated), contains_text("a rotation between projection and attention"));
  CHECK_THROWS_WITH(layer_forward(x, x, rotated, {.x_positions = places}),
                    contains_text("give both x_positions and y_positions, or neither"));
  CHECK_THROWS_WITH(layer_forward(x, x, rotated, {.x_positions = places, .y_positions = few}),
                    contains_text("y_positions must be one for each row of y, 4, but are 2"));
  CHECK_THROWS_WITH(layer_forward(M(x.topRows(3)), x, rotated),
                    contains_text("needs x_positions and y_positions where x and y have different "
                                  "numbers of rows, but they have 3 and 4"));
  rotated.rotary->width = 3;
  CHECK_THROWS_WITH(layer_forward(x, x, rotated),
                    contains_text("turned columns of a head must be an even number of at most 4"));
}
