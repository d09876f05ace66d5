// surfattn layer 8: attention layers that keep the keys of earlier tokens

#pragma once

#include <optional>
#include <string>
#include <surfattn/blocks.hpp>
#include <surfattn/layers.hpp>
#include <surfattn/surface_cache.hpp>
#include <surfattn/terms/masks.hpp>

/// Inference with a cache, for layers and blocks of either form of weights:
///
///     auto past = layer_cache(weights, {.capacity = 1024});      // self-attention
///     out = layer_decode(x, weights, past);                      // one token, or several
///
///     auto encoded = layer_cache(weights, {.capacity = length}); // cross-attention
///     layer_append(y, weights, encoded);                         // once
///     out = layer_attend(x, weights, encoded);                   // as often as there is a token
///
/// A layer in the surface form keeps its inputs, Dy numbers a token for keys and values of all heads
/// together; a standard layer keeps its projected keys and values, Hkv·(d + dv) numbers, or the keys
/// alone with k_equals_v and neither norm nor rotation of keys.
namespace surfattn {

/// The memory of a layer's cache, as in CacheOptions.
struct LayerCacheOptions {
  Index capacity = 0;
  std::optional<Index> window = {};
};

/// Options of a call that appends tokens to a layer's cache, or reads it.
struct TokenOptions {
  /// who runs the tasks of the attention; the calling thread alone where there is none
  Executor* executor = nullptr;
  /// The positions of the tokens, one for each row, for weights that rotate; without them, appended
  /// tokens are counted from cache.appended() on.
  Positions positions = {};
};

namespace detail {

/// The positions of some tokens: as given from row `first` on, or counted from `first` on.
struct TokenPositions {
  Positions given;
  Index first = 0;

  double operator()(Index row) const {
    return given.is_given() ? given[first + row] : static_cast<double>(first + row);
  }
};

template <class Scalar>
void rotate_tokens(const StandardWeights<Scalar>& weights, Index heads,
                   const TokenPositions& positions, Matrix<Scalar>& matrix) {
  if (!weights.rotary) return;
  const RotaryOptions options = rotary_options(weights, heads);
  const MatrixView<Scalar> all = view(matrix);
  rotate<Scalar>(all, positions, all, options, options.width.value_or(matrix.cols() / heads), 1);
}

template <class Scalar>
CacheOptions cache_options(const StandardWeights<Scalar>& weights,
                           const LayerCacheOptions& options) {
  return {.scale = weights.scale,
          .heads = weights.heads,
          .prior = shares_keys(weights) ? KeyPrior::sdpa : KeyPrior::uniform,
          .capacity = options.capacity,
          .window = options.window};
}
template <class Scalar>
CacheOptions cache_options(const SurfaceWeights<Scalar>& weights,
                           const LayerCacheOptions& options) {
  return {.scale = weights.scale,
          .heads = {.query = weights.heads, .key_value = 1},
          .prior = KeyPrior::sdpa,
          .capacity = options.capacity,
          .window = options.window};
}

template <class Scalar>
CacheShape<Scalar> cache_shape(const StandardWeights<Scalar>& weights, const CacheOptions& options,
                               const Require& require) {
  const Shape shape = layer_shape(weights, require);
  if (shares_keys(weights)) return surface_cache_shape<Scalar>(weights.key.cols(), options);
  return standard_cache_shape<Scalar>(weights.key.cols(), shape.values_extent().cols, options);
}
template <class Scalar>
CacheShape<Scalar> cache_shape(const SurfaceWeights<Scalar>& weights, const CacheOptions& options,
                               const Require& require) {
  return surface_cache_shape<Scalar>(surface_width(weights, require), options);
}

/// Compares a cache with one made for these weights.
template <class Weights, class Scalar>
void require_cache(const Require& require, const Weights& weights, const Surface<Scalar>& cache) {
  static_assert(std::is_same_v<Scalar, typename decltype(Weights::output_bias)::Scalar>,
                "surfattn: the cache of a layer must be of the scalar type of its weights");
  const auto expected = cache_shape(weights, cache_options(weights, {}), require);
  if (!cache.shape().has_sizes_of(expected)) {
    const auto words = [](const CacheShape<Scalar>& shape) {
      return (shape.values_are_keys ? "keys of " + std::to_string(shape.key_width)
                                    : "keys of " + std::to_string(shape.key_width) +
                                          " and values of " + std::to_string(shape.value_width)) +
             " numbers for " + std::to_string(shape.heads.query) + " query heads on " +
             std::to_string(shape.key_value_heads());
    };
    require.fail("cache holds ", words(cache.shape()), " but these weights need ", words(expected),
                 ": make it with layer_cache");
  }
  if (cache.scale() != expected.scale) {
    require.fail("cache has the scale ", cache.scale(), " but these weights need ", expected.scale,
                 ": make it with layer_cache");
  }
}

template <class Y, class Scalar>
void append_tokens(const Y& y, const StandardWeights<Scalar>& weights,
                   const TokenPositions& positions, Surface<Scalar>& cache) {
  StandardLayerForward<Scalar> projected;
  project_keys(weights, y, projected);
  rotate_tokens(weights, key_norm_options(weights).heads, positions, projected.keys);
  if (cache.values_are_keys()) {
    cache.append(projected.keys);
  } else {
    cache.append(projected.keys, layer_values(weights, projected));
  }
}

template <class Y, class Scalar>
void append_tokens(const Y& y, const SurfaceWeights<Scalar>&, const TokenPositions&,
                   Surface<Scalar>& cache) {
  cache.append(y);
}

template <class X, class Scalar, class... Terms>
Matrix<Scalar> attend_to_cache(const X& x, const StandardWeights<Scalar>& weights,
                               const TokenPositions& positions, const Surface<Scalar>& cache,
                               const QueryOptions& options, const Terms&... terms) {
  StandardLayerForward<Scalar> projected;
  project_queries(weights, x, projected);
  rotate_tokens(weights, weights.heads.query, positions, projected.queries);
  return affine(cache.attend(projected.queries, options, terms...), weights.output,
                weights.output_bias);
}

template <class X, class Scalar, class... Terms>
Matrix<Scalar> attend_to_cache(const X& x, const SurfaceWeights<Scalar>& weights,
                               const TokenPositions&, const Surface<Scalar>& cache,
                               const QueryOptions& options, const Terms&... terms) {
  const auto projection =
      cache.attend_forward(affine(x, weights.metric, weights.metric_bias), options, terms...);
  Matrix<Scalar> out = affine(projection.out, weights.readout, weights.output_bias);
  add_readout_bias(weights.readout_bias, projection.log_sum_exp, out);
  return out;
}

template <class Scalar>
Index query_input_width(const StandardWeights<Scalar>& weights) {
  return weights.query.rows();
}
template <class Scalar>
Index query_input_width(const SurfaceWeights<Scalar>& weights) {
  return weights.metric.rows();
}
template <class Scalar>
Index key_input_width(const StandardWeights<Scalar>& weights) {
  return weights.key.rows();
}
template <class Scalar>
Index key_input_width(const SurfaceWeights<Scalar>& weights) {
  return weights.metric.cols() / weights.heads;
}

/// Calls use(first, count, keys) for each run of tokens that is appended at once, after which the
/// cache holds `keys` keys: as many as a window has room for, then one by one.
template <class Scalar, class Use>
void for_each_run(const Surface<Scalar>& cache, Index tokens, const Use& use) {
  const Index held = cache.size(), most = cache.window().value_or(held + tokens);
  for (Index first = 0, count; first < tokens; first += count) {
    count = std::clamp<Index>(most - held - first, 1, tokens - first);
    use(first, count, std::min(most, held + first + count));
  }
}

template <class Scalar>
bool rotates(const StandardWeights<Scalar>& weights) {
  return weights.rotary.has_value();
}
template <class Scalar>
bool rotates(const SurfaceWeights<Scalar>&) {
  return false;
}

/// Checks the tokens of one call; `can_count` where positions need not be given.
template <class Input, class Weights>
void require_tokens(const Require& require, const char* name, const Input& rows, Index width,
                    const Weights& weights, const Positions& positions, bool can_count) {
  require.shape(name, extent(rows), {static_cast<Index>(rows.rows()), width},
                "the width that the weights take");
  if (!rotates(weights) && positions.is_given())
    require.fail("positions are for weights with a rotation");
  if (rotates(weights) && !positions.is_given() && !can_count)
    require.fail("weights.rotary needs the positions of ", name);
  if (positions.is_given() && positions.size() != rows.rows()) {
    require.fail("positions must be one for each row of ", name, ", ", rows.rows(), ", but are ",
                 positions.size());
  }
}

/// The output of a layer, of which nothing is kept for a backward pass.
template <class Scalar>
struct LayerOutput {
  Matrix<Scalar> out;
};

}  // namespace detail

/// An empty cache for a layer, of StandardWeights or SurfaceWeights. Errors: weights whose shapes do
/// not fit together; a negative capacity, a window below 1.
template <class Weights>
auto layer_cache(const Weights& weights, const LayerCacheOptions& options = {}) {
  using Scalar = typename decltype(Weights::output_bias)::Scalar;
  const CacheOptions cache = detail::cache_options(weights, options);
  const auto shape = detail::cache_shape(weights, cache, detail::Require("layer_cache"));
  return shape.values_are_keys ? Surface<Scalar>(shape.key_width, cache)
                               : Surface<Scalar>(shape.key_width, shape.value_width, cache);
}

/// Appends the tokens y: m × Dy to a layer's cache: their keys and values, or in the surface form y
/// itself. Errors: a cache that was made for other weights, a y of another width, positions that are
/// not one for each row.
template <class Y, class Weights, class Scalar>
void layer_append(const Y& y, const Weights& weights, Surface<Scalar>& cache,
                  const TokenOptions& options = {}) {
  constexpr detail::Require require("layer_append");
  detail::check_inputs_at_compile_time<Y, Matrix<Scalar>>();
  detail::require_cache(require, weights, cache);
  detail::require_tokens(require, "y", y, detail::key_input_width(weights), weights,
                         options.positions, true);
  const detail::TokenPositions positions{options.positions,
                                         options.positions.is_given() ? 0 : cache.appended()};
  detail::append_tokens(detail::stored(y), weights, positions, cache);
}

/// What layer_forward gives for x: Tx × D and the tokens that the cache holds. Terms count keys from
/// the oldest that is held. Allocates the result, the queries and a workspace. Errors: a cache made
/// for other weights, or an empty one; an x of another width; weights that rotate and no positions.
template <class X, class Weights, class Scalar, class... Terms>
Matrix<Scalar> layer_attend(const X& x, const Weights& weights, const Surface<Scalar>& cache,
                            const TokenOptions& options = {}, const Terms&... terms) {
  constexpr detail::Require require("layer_attend");
  detail::check_inputs_at_compile_time<X, Matrix<Scalar>>();
  detail::require_cache(require, weights, cache);
  detail::require_tokens(require, "x", x, detail::query_input_width(weights), weights,
                         options.positions, false);
  return detail::attend_to_cache(detail::stored(x), weights, {options.positions}, cache,
                                 {options.executor}, terms...);
}

/// The next tokens x: m × D of causal self-attention: each sees those before it, which the cache
/// holds, and itself. They are appended to the cache; once its window is full, one by one, so that
/// each sees as many tokens as the window has. Gives the rows that layer_forward(all, all, weights,
/// {}, Causal{…}, terms…) gives for all tokens so far, with terms that depend on how far query and
/// key lie from the end (Align::bottom_right) or on neither; a term that counts from the first query
/// or key, such as Dropout, MaskFunction or a matrix of biases, counts within the call and from the
/// oldest key held. Errors as for layer_append, and of the terms; nothing is appended then.
template <class X, class Weights, class Scalar, class... Terms>
Matrix<Scalar> layer_decode(const X& x, const Weights& weights, Surface<Scalar>& cache,
                            const TokenOptions& options = {}, const Terms&... terms) {
  constexpr detail::Require require("layer_decode");
  detail::check_inputs_at_compile_time<X, Matrix<Scalar>>();
  detail::require_cache(require, weights, cache);
  for (const Index width : {detail::query_input_width(weights), detail::key_input_width(weights)})
    detail::require_tokens(require, "x", x, width, weights, options.positions, true);
  detail::for_each_run(cache, x.rows(), [&](Index, Index count, Index keys) {
    cache.check_terms(require, count, keys, terms...);
  });
  const auto& tokens = detail::stored(x);
  Matrix<Scalar> out(tokens.rows(), detail::output_width(weights));
  detail::for_each_run(cache, tokens.rows(), [&](Index first, Index count, Index) {
    const auto next = tokens.middleRows(first, count);
    const detail::TokenPositions positions{options.positions,
                                           options.positions.is_given() ? first : cache.appended()};
    detail::append_tokens(next, weights, positions, cache);
    out.middleRows(first, count) = detail::attend_to_cache(
        next, weights, positions, cache, {options.executor}, Causal{Align::bottom_right}, terms...);
  });
  return out;
}

/// The next tokens of a block of causal self-attention: post_norm(x + layer_decode(pre_norm(x))).
/// The cache is one of weights.layer.
template <class X, class Layer, class Scalar, class... Terms>
Matrix<Scalar> block_decode(const X& x, const BlockWeights<Layer>& weights, Surface<Scalar>& cache,
                            const TokenOptions& options = {}, const Terms&... terms) {
  const auto layer = [&](const Matrix<Scalar>& normed) {
    return detail::LayerOutput<Scalar>{
        layer_decode(normed, weights.layer, cache, options, terms...)};
  };
  return detail::around(detail::Require("block_decode"), x, weights, layer).out;
}

/// A block of cross-attention to what the cache of weights.layer holds:
/// post_norm(x + layer_attend(pre_norm(x))).
template <class X, class Layer, class Scalar, class... Terms>
Matrix<Scalar> block_attend(const X& x, const BlockWeights<Layer>& weights,
                            const Surface<Scalar>& cache, const TokenOptions& options = {},
                            const Terms&... terms) {
  const auto layer = [&](const Matrix<Scalar>& normed) {
    return detail::LayerOutput<Scalar>{
        layer_attend(normed, weights.layer, cache, options, terms...)};
  };
  return detail::around(detail::Require("block_attend"), x, weights, layer).out;
}

}  // namespace surfattn
