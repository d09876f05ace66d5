#pragma once
// Both forms of an attention layer's weights: drawn at random, merged, and visited one by one.

#include <cmath>
#include <optional>
#include <string>
#include <surfattn/surfattn.hpp>

#include "random.hpp"

namespace translation {

using surfattn::BlockWeights;
using surfattn::StandardWeights;
using surfattn::SurfaceWeights;

/// What a parameter belongs to.
enum class Part { embedding, attention, norm, feed_forward, output };

struct AttentionSize {
  Index width, heads, head_width;
};

/// The limit of uniform numbers for a matrix, after Glorot and Bengio 2010.
inline double glorot_limit(Index inputs, Index outputs) {
  return std::sqrt(6.0 / static_cast<double>(inputs + outputs));
}

template <class Scalar>
void draw(Matrix<Scalar>& matrix, Index rows, Index cols, Random& random) {
  matrix.resize(rows, cols);
  random.fill(matrix, glorot_limit(rows, cols));
}

/// Four matrices; biases are 0, and keys have none, since it would cancel.
template <class Scalar>
void draw_attention(StandardWeights<Scalar>& weights, const AttentionSize& size, Random& random) {
  const Index inner = size.heads * size.head_width;
  draw(weights.query, size.width, inner, random);
  draw(weights.key, size.width, inner, random);
  draw(weights.value, size.width, inner, random);
  draw(weights.output, inner, size.width, random);
  weights.query_bias.setZero(inner);
  weights.value_bias.setZero(inner);
  weights.output_bias.setZero(size.width);
  weights.heads = {.query = size.heads};
}

/// Two matrices; biases are 0.
template <class Scalar>
void draw_attention(SurfaceWeights<Scalar>& weights, const AttentionSize& size, Random& random) {
  const Index inner = size.heads * size.width;
  draw(weights.metric, size.width, inner, random);
  draw(weights.readout, inner, size.width, random);
  weights.metric_bias.setZero(inner);
  weights.output_bias.setZero(size.width);
  weights.heads = size.heads;
  weights.scale = 1 / std::sqrt(static_cast<double>(size.width));
}

template <class Scalar>
BlockWeights<SurfaceWeights<Scalar>> merged(const BlockWeights<StandardWeights<Scalar>>& block) {
  return {merge(block.layer),      block.pre_norm,     block.post_norm, block.pre_norm_weights,
          block.post_norm_weights, block.norm_epsilon, block.residual};
}

/// Calls visit(part, parameter...) with each parameter of these weights, which are of one form and
/// one size: parameters of the first, their gradients of the second, and so on.
template <class Scalar, class Visit, class... Weights>
void visit_layer(std::type_identity<StandardWeights<Scalar>>, Visit&& visit, Weights&... weights) {
  visit(Part::attention, weights.query...);
  visit(Part::attention, weights.key...);
  visit(Part::attention, weights.value...);
  visit(Part::attention, weights.output...);
  visit(Part::attention, weights.query_bias...);
  visit(Part::attention, weights.value_bias...);
  visit(Part::attention, weights.output_bias...);
}
template <class Scalar, class Visit, class... Weights>
void visit_layer(std::type_identity<SurfaceWeights<Scalar>>, Visit&& visit, Weights&... weights) {
  visit(Part::attention, weights.metric...);
  visit(Part::attention, weights.readout...);
  visit(Part::attention, weights.metric_bias...);
  visit(Part::attention, weights.readout_bias...);
  visit(Part::attention, weights.output_bias...);
}

template <class Layer, class Visit, class... Blocks>
void visit_block(Visit&& visit, Blocks&... blocks) {
  visit_layer(std::type_identity<Layer>(), visit, blocks.layer...);
  visit(Part::norm, blocks.post_norm_weights.gain...);
  visit(Part::norm, blocks.post_norm_weights.bias...);
}

}  // namespace translation
