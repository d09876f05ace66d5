// Decoding with a cache gives what the layer gives for all tokens at once, in both forms.
#include <surfattn/cached_layers.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/layer_weights.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

using M = Matrix<double>;

/// Layers of both forms that are one function, and standard ones that do not merge.
struct Layers {
  StandardWeights<double> standard, normed, rotated, shared, normed_and_shared;
  SurfaceWeights<double> merged;

  explicit Layers(std::mt19937_64& random)
      : standard(random_weights<double>(6, 6, 6, {0, 0, 4, 3, 4, 2}, random)),
        merged(merge(standard)) {
    normed = standard;
    normed.query_norm = normed.key_norm = Norm::rms;
    rotated = normed;
    rotated.rotary = RotaryOptions{RotaryPairs::halves};
    shared = random_weights<double>(6, 6, 6, {0, 0, 4, 4, 4, 2}, random);
    share_keys(shared);
    normed_and_shared = shared;
    normed_and_shared.query_norm = normed_and_shared.key_norm = Norm::l2;
    normed_and_shared.rotary = RotaryOptions{RotaryPairs::adjacent};
  }

  template <class Use>
  void each(const Use& use) const {
    use("standard", standard);
    use("normed", normed);
    use("rotated", rotated);
    use("k_equals_v", shared);
    use("normed, k_equals_v", normed_and_shared);
    use("merged", merged);
  }
};

template <class Weights>
bool rotates(const Weights& weights) {
  return detail::rotates(weights);
}

/// Positions of x and y, for weights that rotate.
template <class Weights>
LayerOptions at(const Weights& weights, const std::vector<double>& of_x,
                const std::vector<double>& of_y) {
  if (!rotates(weights)) return {};
  return {.x_positions = of_x, .y_positions = of_y};
}

double difference(const M& a, const M& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  return (a - b).cwiseAbs().maxCoeff();
}

TEST_CASE("Decoding token by token, or several at a time, equals the whole layer", "[cache]") {
  std::mt19937_64 random = seeded_random();
  const M x = random_matrix<double>(20, 6, random);
  const Causal causal{Align::bottom_right};
  Layers(random).each([&](const char* name, const auto& weights) {
    for (const Index step : {1, 3, 20}) {
      CAPTURE(seed(), name, step);
      const M whole = layer_forward(x, x, weights, {}, causal).out;
      auto cache = layer_cache(weights, {.capacity = 20});
      for (Index first = 0; first < x.rows(); first += step) {
        const Index count = std::min(step, x.rows() - first);
        const M out = layer_decode(x.middleRows(first, count), weights, cache);
        CHECK(difference(out, whole.middleRows(first, count)) <= 1e-13);
      }
      CHECK(cache.size() == 20);
      CHECK(cache.capacity() == 20);
    }
  });
}

TEST_CASE("A window is a sliding window", "[cache]") {
  std::mt19937_64 random = seeded_random();
  const M x = random_matrix<double>(30, 6, random);
  const SlidingWindow window{.left = 6, .right = 0, .align = Align::bottom_right};
  Layers(random).each([&](const char* name, const auto& weights) {
    CAPTURE(seed(), name);
    const M whole = layer_forward(x, x, weights, {}, window).out;
    auto cache = layer_cache(weights, {.window = 7});
    M out(30, 6);
    for (Index first = 0; first < 30; first += 10)
      out.middleRows(first, 10) = layer_decode(x.middleRows(first, 10), weights, cache);
    CHECK(difference(out, whole) <= 1e-13);
  });
}

TEST_CASE("Cross-attention to a cache, and beams that share it", "[cache]") {
  std::mt19937_64 random = seeded_random();
  const M x = random_matrix<double>(5, 6, random), y = random_matrix<double>(9, 6, random);
  const std::vector<double> x_positions{2, 0, 7.5, 3, 1}, counted{0, 1, 2, 3, 4, 5, 6, 7, 8};
  Layers(random).each([&](const char* name, const auto& weights) {
    CAPTURE(seed(), name);
    auto cache = layer_cache(weights);
    layer_append(y.topRows(4), weights, cache);
    layer_append(y.bottomRows(5), weights, cache);
    const LayerOptions options = at(weights, x_positions, counted);
    const TokenOptions tokens{.positions = options.x_positions};
    const M expected = layer_forward(x, y, weights, options).out;
    CHECK(difference(layer_attend(x, weights, cache, tokens), expected) <= 1e-13);
    CHECK(difference(layer_attend(x, weights, cache, tokens, KeyLengths(6)),
                     layer_forward(x, y, weights, options, KeyLengths(6)).out) <= 1e-13);
    auto beam = cache.fork();
    layer_decode(x, weights, beam);
    CHECK(beam.size() == 14);
    CHECK(beam.appended() == 14);
    CHECK(difference(layer_attend(x, weights, cache, tokens), expected) <= 1e-13);
  });
}

TEST_CASE("Blocks decode with their norms and residual", "[cache]") {
  std::mt19937_64 random = seeded_random();
  const M x = random_matrix<double>(12, 6, random), y = random_matrix<double>(9, 6, random);
  Layers(random).each([&](const char* name, const auto& weights) {
    CAPTURE(seed(), name);
    using Layer = std::remove_cvref_t<decltype(weights)>;
    const BlockWeights<Layer> block{weights, Norm::layer, Norm::rms};
    const M whole = block_forward(x, block, {}, Causal{Align::bottom_right}).out;
    auto past = layer_cache(weights), encoded = layer_cache(weights);
    for (Index t = 0; t < 12; ++t)
      CHECK(difference(block_decode(x.row(t), block, past), whole.row(t)) <= 1e-13);
    layer_append(y, weights, encoded);
    if (rotates(weights)) return;
    CHECK(difference(block_attend(x, block, encoded), block_forward(x, y, block).out) <= 1e-13);
  });
}

TEST_CASE("The surface form of a layer whose keys are as wide as its input keeps half", "[cache]") {
  std::mt19937_64 random = seeded_random();
  auto weights = random_weights<double>(8, 8, 8, {0, 0, 8, 8, 1, 1}, random);
  CHECK(2 * layer_cache(merge(weights)).bytes_per_key() == layer_cache(weights).bytes_per_key());
}

TEST_CASE("A cache that does not fit its layer is refused", "[cache]") {
  std::mt19937_64 random = seeded_random();
  const Layers layers(random);
  auto cache = layer_cache(layers.standard);
  const M x = M::Random(2, 6);
  CHECK_THROWS_WITH(
      layer_append(x, layers.merged, cache),
      "surfattn::layer_append: cache holds keys of 8 and values of 6 numbers for 4 query heads on "
      "2 "
      "but these weights need keys of 6 numbers for 4 query heads on 1: make it with layer_cache");
  auto rescaled = layers.standard;
  rescaled.scale = 0.1;
  CHECK_THROWS_WITH(layer_decode(x, rescaled, cache),
                    "surfattn::layer_decode: cache has the scale 0.5 but these weights need "
                    "0.1: make it with layer_cache");
  const Eigen::Matrix<bool, 2, 3> mask = Eigen::Matrix<bool, 2, 3>::Constant(true);
  CHECK_THROWS_AS(layer_decode(x, layers.standard, cache, {}, BoolMask(mask)),
                  std::invalid_argument);
  CHECK_THROWS_WITH(
      layer_append(M(2, 5), layers.standard, cache),
      "surfattn::layer_append: y is 2×5 but must be 2×6 (the width that the weights take)");
  CHECK_THROWS_WITH(layer_attend(x, layers.standard, cache),
                    "surfattn::Surface::attend: the cache is empty: append keys first");
  CHECK_THROWS_AS(layer_decode(M(2, 5), layers.standard, cache), std::invalid_argument);
  auto normed = layers.standard;
  normed.query_norm = Norm::rms;
  normed.query_norm_weights.gain = RowVector<double>::Ones(7);
  CHECK_THROWS_WITH(layer_decode(x, normed, cache),
                    contains_text("surfattn::layer_decode: weights.query_norm_weights.gain is 1×7 "
                                  "but must be 1×"));
  BlockWeights<StandardWeights<double>> block{layers.standard};
  block.post_norm = Norm::layer;
  block.post_norm_weights.bias = RowVector<double>::Ones(3);
  block.residual = false;
  CHECK_THROWS_WITH(block_decode(x, block, cache),
                    contains_text("surfattn::block_decode: weights.post_norm_weights.bias is 1×3 "
                                  "but must be 1×"));
  CHECK(cache.is_empty());  // after all these errors
  const std::vector<double> positions{1, 2, 3};
  CHECK_THROWS_WITH(layer_append(x, layers.standard, cache, {.positions = positions}),
                    "surfattn::layer_append: positions are for weights with a rotation");
  auto rotated = layer_cache(layers.rotated);
  CHECK_THROWS_WITH(
      layer_append(x, layers.rotated, rotated, {.positions = positions}),
      "surfattn::layer_append: positions must be one for each row of y, 2, but are 3");
  layer_append(x, layers.rotated, rotated);
  CHECK_THROWS_WITH(layer_attend(x, layers.rotated, rotated),
                    "surfattn::layer_attend: weights.rotary needs the positions of x");
  CHECK(cache.is_empty());
}

}  // namespace
