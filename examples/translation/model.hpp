#pragma once
// The transformer for sequences to sequences (Vaswani et al. 2017) in the size of the Keras example:
// one block that encodes, one that decodes. Generic over the weights of its attention layers,
// StandardWeights or SurfaceWeights.

#include <utility>
#include <vector>

#include "batch.hpp"
#include "embedding.hpp"
#include "feed_forward.hpp"
#include "output_layer.hpp"
#include "part_times.hpp"

namespace translation {

struct ModelSize {
  Index width = 256, heads = 8, head_width = 256, feed_forward = 2048;
  Index source_vocabulary = 15000, target_vocabulary = 15000;
  Index length = 10;  ///< tokens of a sentence at most
};

template <class Layer>
struct Model {
  using Scalar = typename decltype(Layer::output_bias)::Scalar;

  Embedding<Scalar> source, target;
  BlockWeights<Layer> encoder_attention, decoder_attention, cross_attention;
  FeedForward<Scalar> encoder_feed_forward, decoder_feed_forward;
  OutputLayer<Scalar> output;

  Index length() const { return source.positions.rows(); }
};

/// The gradient of a loss by every parameter, in its place, but for the tables of tokens.
template <class Layer>
struct ModelGradients {
  using Scalar = typename Model<Layer>::Scalar;
  Model<Layer> dense;
  RowGradients<Scalar> source_tokens, target_tokens;
};

/// Calls visit(part, parameter...) for the tables of tokens of these models of one form and size.
template <class Visit, class... Models>
void visit_tables(Visit&& visit, Models&... models) {
  visit(Part::embedding, models.source.tokens...);
  visit(Part::embedding, models.target.tokens...);
}

/// The same for all other parameters.
template <class Layer, class Visit, class... Models>
void visit_dense(Visit&& visit, Models&... models) {
  visit(Part::embedding, models.source.positions...);
  visit(Part::embedding, models.target.positions...);
  visit_block<Layer>(visit, models.encoder_attention...);
  visit_feed_forward(visit, models.encoder_feed_forward...);
  visit_block<Layer>(visit, models.decoder_attention...);
  visit_block<Layer>(visit, models.cross_attention...);
  visit_feed_forward(visit, models.decoder_feed_forward...);
  visit(Part::output, models.output.weight...);
  visit(Part::output, models.output.bias...);
}

template <class Layer, class Visit, class... Models>
void visit_parameters(Visit&& visit, Models&... models) {
  visit_tables(visit, models...);
  visit_dense<Layer>(visit, models...);
}

namespace model_detail {

template <class Layer>
void draw_block(BlockWeights<Layer>& block, const ModelSize& size, Random random) {
  draw_attention(block.layer, {size.width, size.heads, size.head_width}, random);
  block.post_norm = surfattn::Norm::layer;
  block.norm_epsilon = norm_epsilon;
  draw_norm(block.post_norm_weights, size.width);
}

}  // namespace model_detail

/// A model to start from. What is no attention layer has the same numbers in both forms.
template <class Layer>
Model<Layer> draw_model(const ModelSize& size, std::uint64_t seed) {
  const auto random = [&](std::uint64_t number) { return Random(seed, /*purpose=*/2, number); };
  const auto draw_rest = [&](auto&& draw_part, std::uint64_t number) {
    Random numbers = random(number);
    draw_part(numbers);
  };
  Model<Layer> model;
  model_detail::draw_block(model.encoder_attention, size, random(0));
  model_detail::draw_block(model.decoder_attention, size, random(1));
  model_detail::draw_block(model.cross_attention, size, random(2));
  draw_rest(
      [&](Random& numbers) {
        draw_embedding(model.source, size.source_vocabulary, size.length, size.width, numbers);
        draw_embedding(model.target, size.target_vocabulary, size.length, size.width, numbers);
        draw_feed_forward(model.encoder_feed_forward, size.width, size.feed_forward, numbers);
        draw_feed_forward(model.decoder_feed_forward, size.width, size.feed_forward, numbers);
        draw_output(model.output, size.width, size.target_vocabulary, numbers);
      },
      3);
  return model;
}

/// The same function in the surface form.
template <class Scalar>
Model<SurfaceWeights<Scalar>> merged(const Model<StandardWeights<Scalar>>& model) {
  return {model.source,
          model.target,
          merged(model.encoder_attention),
          merged(model.decoder_attention),
          merged(model.cross_attention),
          model.encoder_feed_forward,
          model.decoder_feed_forward,
          model.output};
}

/// What the backward pass needs of the forward pass.
template <class Layer>
struct ModelPass {
  using Scalar = typename Model<Layer>::Scalar;
  using Block = decltype(surfattn::block_forward(std::declval<const Matrix<Scalar>&>(),
                                                 std::declval<const BlockWeights<Layer>&>()));

  Matrix<Scalar> source, target;  ///< embedded
  Block encoder_attention, decoder_attention, cross_attention;
  FeedForwardPass<Scalar> encoder_feed_forward, decoder_feed_forward;

  const Matrix<Scalar>& encoded() const { return encoder_feed_forward.out; }
  const Matrix<Scalar>& decoded() const { return decoder_feed_forward.out; }
};

namespace model_detail {

/// Who sees whom: each sentence itself alone, and of the source's rows the tokens, not the padding.
/// The target's padding follows its tokens, so that causal attention hides it.
struct Attention {
  explicit Attention(const Batch& batch)
      : encoder{.sequences = batch.source.offsets},
        decoder{.sequences = batch.target.offsets},
        cross{.sequences = {batch.target.offsets, batch.source.offsets}},
        source_lengths(batch.source.lengths) {}

  surfattn::LayerOptions encoder, decoder, cross;
  surfattn::KeyLengths source_lengths;
  surfattn::Causal causal{surfattn::Align::top_left};
};

}  // namespace model_detail

/// The encoder's part of a pass.
template <class Layer>
void encode(const Model<Layer>& model, const Batch& batch, ModelPass<Layer>& pass,
            PartTimes* times = nullptr) {
  const model_detail::Attention attention(batch);
  timed(times, Part::embedding, [&] { pass.source = embed(batch.source, model.source); });
  timed(times, Part::attention, [&] {
    pass.encoder_attention = block_forward(pass.source, model.encoder_attention, attention.encoder,
                                           attention.source_lengths);
  });
  timed(times, Part::feed_forward, [&] {
    pass.encoder_feed_forward =
        feed_forward(pass.encoder_attention.out, model.encoder_feed_forward);
  });
}

/// The decoder's part, given what the encoder made of the source.
template <class Layer>
void decode(const Model<Layer>& model, const Batch& batch, ModelPass<Layer>& pass,
            PartTimes* times = nullptr) {
  const model_detail::Attention attention(batch);
  timed(times, Part::embedding, [&] { pass.target = embed(batch.target, model.target); });
  timed(times, Part::attention, [&] {
    pass.decoder_attention =
        block_forward(pass.target, model.decoder_attention, attention.decoder, attention.causal);
    pass.cross_attention =
        block_forward(pass.decoder_attention.out, pass.encoded(), model.cross_attention,
                      attention.cross, attention.source_lengths);
  });
  timed(times, Part::feed_forward, [&] {
    pass.decoder_feed_forward = feed_forward(pass.cross_attention.out, model.decoder_feed_forward);
  });
}

/// Back through the decoder; returns the gradient of what the encoder gave.
template <class Layer, class Scalar>
Matrix<Scalar> decode_backward(const Model<Layer>& model, const Batch& batch,
                               const ModelPass<Layer>& pass, const Matrix<Scalar>& grad_decoded,
                               ModelGradients<Layer>& gradients, PartTimes* times = nullptr) {
  const model_detail::Attention attention(batch);
  Matrix<Scalar> gradient, of_encoded;
  timed(times, Part::feed_forward, [&] {
    gradient = feed_forward_backward(pass.cross_attention.out, model.decoder_feed_forward,
                                     pass.decoder_feed_forward, grad_decoded,
                                     gradients.dense.decoder_feed_forward);
  });
  timed(times, Part::attention, [&] {
    auto of_cross =
        block_backward(pass.decoder_attention.out, pass.encoded(), model.cross_attention,
                       pass.cross_attention, gradient, attention.cross, attention.source_lengths);
    of_encoded = std::move(of_cross.y);
    gradients.dense.cross_attention = std::move(of_cross.weights);
    auto of_self = block_backward(pass.target, model.decoder_attention, pass.decoder_attention,
                                  of_cross.x, attention.decoder, attention.causal);
    gradient = std::move(of_self.x);
    gradients.dense.decoder_attention = std::move(of_self.weights);
  });
  timed(times, Part::embedding, [&] {
    embed_backward(batch.target, gradient, gradients.target_tokens,
                   gradients.dense.target.positions);
  });
  return of_encoded;
}

/// Back through the encoder.
template <class Layer, class Scalar>
void encode_backward(const Model<Layer>& model, const Batch& batch, const ModelPass<Layer>& pass,
                     const Matrix<Scalar>& grad_encoded, ModelGradients<Layer>& gradients,
                     PartTimes* times = nullptr) {
  const model_detail::Attention attention(batch);
  Matrix<Scalar> gradient;
  timed(times, Part::feed_forward, [&] {
    gradient = feed_forward_backward(pass.encoder_attention.out, model.encoder_feed_forward,
                                     pass.encoder_feed_forward, grad_encoded,
                                     gradients.dense.encoder_feed_forward);
  });
  timed(times, Part::attention, [&] {
    auto of_self = block_backward(pass.source, model.encoder_attention, pass.encoder_attention,
                                  gradient, attention.encoder, attention.source_lengths);
    gradient = std::move(of_self.x);
    gradients.dense.encoder_attention = std::move(of_self.weights);
  });
  timed(times, Part::embedding, [&] {
    embed_backward(batch.source, gradient, gradients.source_tokens,
                   gradients.dense.source.positions);
  });
}

/// Memory that steps use again and again.
template <class Scalar>
struct OutputScratch {
  Matrix<Scalar> hidden;  ///< the decoder's rows that have a label
  Matrix<Scalar> logits;
};

/// The loss of a batch, the mean over its labels being what is differentiated. `dropout` multiplies
/// the decoder's labelled rows; empty: none is dropped.
template <class Layer, class Scalar>
LossSums loss_and_gradients(const Model<Layer>& model, const Batch& batch,
                            const Matrix<Scalar>& dropout, OutputScratch<Scalar>& scratch,
                            ModelGradients<Layer>& gradients, PartTimes* times = nullptr) {
  ModelPass<Layer> pass;
  encode(model, batch, pass, times);
  decode(model, batch, pass, times);
  LossSums sums;
  Matrix<Scalar> of_decoded;
  timed(times, Part::output, [&] {
    scratch.hidden = pass.decoded()(batch.labelled, Eigen::all);
    if (dropout.size() > 0) scratch.hidden.array() *= dropout.array();
    compute_logits(scratch.hidden, model.output, scratch.logits);
    sums = cross_entropy(scratch.logits, model.output.bias, batch.labels);
    Matrix<Scalar> of_hidden =
        output_backward(scratch.hidden, model.output, scratch.logits, gradients.dense.output);
    if (dropout.size() > 0) of_hidden.array() *= dropout.array();
    of_decoded.setZero(pass.decoded().rows(), pass.decoded().cols());
    of_decoded(batch.labelled, Eigen::all) = of_hidden;
  });
  const Matrix<Scalar> of_encoded =
      decode_backward(model, batch, pass, of_decoded, gradients, times);
  encode_backward(model, batch, pass, of_encoded, gradients, times);
  return sums;
}

/// The loss of a batch alone, without dropout.
template <class Layer, class Scalar>
LossSums loss_of(const Model<Layer>& model, const Batch& batch, OutputScratch<Scalar>& scratch) {
  ModelPass<Layer> pass;
  encode(model, batch, pass);
  decode(model, batch, pass);
  scratch.hidden = pass.decoded()(batch.labelled, Eigen::all);
  compute_logits(scratch.hidden, model.output, scratch.logits);
  return cross_entropy(scratch.logits, model.output.bias, batch.labels);
}

/// Gradients of the right shapes for this model, with nothing in them yet.
template <class Layer>
ModelGradients<Layer> gradients_for(const Model<Layer>& model) {
  ModelGradients<Layer> gradients;
  visit_dense<Layer>([](Part, const auto& parameter,
                        auto& gradient) { gradient.setZero(parameter.rows(), parameter.cols()); },
                     model, gradients.dense);
  return gradients;
}

}  // namespace translation
