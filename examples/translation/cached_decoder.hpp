#pragma once
// The decoder with caches: of the encoder's output, filled once, and of the tokens so far, to which
// each new token adds one row.

#include <utility>
#include <vector>

#include "search.hpp"

namespace translation {

template <class Layer>
class CachedDecoder {
 public:
  using Scalar = typename Model<Layer>::Scalar;

  struct State {
    surfattn::Surface<Scalar> past;  ///< of causal self-attention
    Index position;                  ///< of the next token
  };

  CachedDecoder(const Model<Layer>& model, const std::vector<Token>& source)
      : model_(model),
        encoded_(layer_cache(model.cross_attention.layer,
                             {.capacity = static_cast<Index>(source.size())})) {
    Batch batch;
    batch.source.append(source, static_cast<Index>(source.size()));
    ModelPass<Layer> pass;
    encode(model, batch, pass);
    layer_append(pass.encoded(), model.cross_attention.layer, encoded_);
  }

  State begin() const {
    return {layer_cache(model_.decoder_attention.layer, {.capacity = length()}), 0};
  }
  State fork(const State& state) const {
    return {state.past.fork(length() - state.position), state.position};
  }
  Index length() const { return model_.length(); }

  /// As RecomputingDecoder::next, for the new token alone.
  RowVector<Scalar> next(State& state, Token token) const {
    const Matrix<Scalar> embedded =
        model_.target.tokens.row(token) + model_.target.positions.row(state.position++);
    const Matrix<Scalar> attended =
        block_attend(block_decode(embedded, model_.decoder_attention, state.past),
                     model_.cross_attention, encoded_);
    return log_probabilities(feed_forward(attended, model_.decoder_feed_forward).out,
                             model_.output);
  }

 private:
  const Model<Layer>& model_;
  surfattn::Surface<Scalar> encoded_;
};

}  // namespace translation
