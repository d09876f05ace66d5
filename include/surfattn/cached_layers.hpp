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
/// alone with k_equals_v and no norm of keys.
namespace surfattn {

/// The memory of a layer's cache, as in CacheOptions.
struct LayerCacheOptions {
  Index capacity = 0;
  std::optional<Index> window = {};
};

namespace detail {

template <class Scalar>
Surface<Scalar> make_cache(const StandardWeights<Scalar>& weights, const LayerCacheOptions& options,
                           const Require& require) {
  const Shape shape = layer_shape(weights, require);
  CacheOptions cache{.scale = weights.scale,
                     .heads = weights.heads,
                     .capacity = options.capacity,
                     .window = options.window};
  if (!shares_keys(weights))
    return {weights.key.cols(), shape.key_value_heads * shape.value_dim, cache};
  cache.prior = KeyPrior::sdpa;
  return Surface<Scalar>(weights.key.cols(), cache);
}

template <class Scalar>
Surface<Scalar> make_cache(const SurfaceWeights<Scalar>& weights, const LayerCacheOptions& options,
                           const Require& require) {
  const Index width = surface_width(weights, require);
  return Surface<Scalar>(width, {.scale = weights.scale,
                                 .heads = {.query = weights.heads, .key_value = 1},
                                 .prior = KeyPrior::sdpa,
                                 .capacity = options.capacity,
                                 .window = options.window});
}

/// A cache made for these weights: compared with one that is.
template <class Weights, class Scalar>
void require_cache(const Require& require, const Weights& weights, const Surface<Scalar>& cache) {
  const Surface<Scalar> expected = make_cache(weights, {}, require);
  const bool fits = cache.has_shape_of(expected);
  if (fits) return;
  const auto widths = [](const Surface<Scalar>& of) {
    return of.values_are_keys() ? std::to_string(of.key_width()) + " numbers"
                                : "keys of " + std::to_string(of.key_width()) + " and values of " +
                                      std::to_string(of.value_width()) + " numbers";
  };
  require.fail("cache holds " + widths(cache) + " a token but these weights need " +
               widths(expected) + ", with their heads and scale: make it with layer_cache");
}

template <class Y, class Scalar>
void append_tokens(const Y& y, const StandardWeights<Scalar>& weights, Surface<Scalar>& cache) {
  StandardLayerForward<Scalar> projected;
  project_keys(weights, y, projected);
  if (cache.values_are_keys()) {
    cache.append(projected.keys);
  } else {
    cache.append(projected.keys, layer_values(weights, projected));
  }
}

template <class Y, class Scalar>
void append_tokens(const Y& y, const SurfaceWeights<Scalar>&, Surface<Scalar>& cache) {
  cache.append(y);
}

template <class X, class Scalar, class... Terms>
Matrix<Scalar> attend_to_cache(const X& x, const StandardWeights<Scalar>& weights,
                               const Surface<Scalar>& cache, const QueryOptions& options,
                               const Terms&... terms) {
  StandardLayerForward<Scalar> projected;
  project_queries(weights, x, projected);
  return affine(cache.attend(projected.queries, options, terms...), weights.output,
                weights.output_bias);
}

template <class X, class Scalar, class... Terms>
Matrix<Scalar> attend_to_cache(const X& x, const SurfaceWeights<Scalar>& weights,
                               const Surface<Scalar>& cache, const QueryOptions& options,
                               const Terms&... terms) {
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

template <class Input>
void require_tokens(const Require& require, const char* name, const Input& rows, Index width) {
  require.shape(name, extent(rows), {static_cast<Index>(rows.rows()), width},
                "the width that the weights take");
}

/// post_norm(x + attend(pre_norm(x))), each part as far as the weights name it.
template <class X, class Layer, class Attend>
auto around(const Require& require, const X& x, const BlockWeights<Layer>& weights,
            const Attend& attend) {
  require_residual(require, x, weights);
  const NormOptions norm{.epsilon = weights.norm_epsilon};
  auto sum = attend(normalize(weights.pre_norm, x, weights.pre_norm_weights, norm));
  if (weights.residual) sum += x;
  return normalize(weights.post_norm, sum, weights.post_norm_weights, norm);
}

}  // namespace detail

/// An empty cache for a layer, of StandardWeights or SurfaceWeights. Errors: weights whose shapes do
/// not fit together; a negative capacity, a window below 1.
template <class Weights>
auto layer_cache(const Weights& weights, const LayerCacheOptions& options = {}) {
  return detail::make_cache(weights, options, detail::Require("layer_cache"));
}

/// Appends the tokens y: m × Dy to a layer's cache: their keys and values, or in the surface form y
/// itself. Errors: a cache that was made for other weights, a y of another width.
template <class Y, class Weights, class Scalar>
void layer_append(const Y& y, const Weights& weights, Surface<Scalar>& cache) {
  constexpr detail::Require require("layer_append");
  detail::check_inputs_at_compile_time<Y, Matrix<Scalar>>();
  detail::require_cache(require, weights, cache);
  detail::require_tokens(require, "y", y, detail::key_input_width(weights));
  detail::append_tokens(detail::stored(y), weights, cache);
}

/// What layer_forward gives for x: Tx × D and the tokens that the cache holds. Terms count keys from
/// the oldest that is held. Allocates the result, the queries and a workspace. Errors: a cache made
/// for other weights, or an empty one; an x of another width.
template <class X, class Weights, class Scalar, class... Terms>
Matrix<Scalar> layer_attend(const X& x, const Weights& weights, const Surface<Scalar>& cache,
                            const QueryOptions& options = {}, const Terms&... terms) {
  constexpr detail::Require require("layer_attend");
  detail::check_inputs_at_compile_time<X, Matrix<Scalar>>();
  detail::require_cache(require, weights, cache);
  detail::require_tokens(require, "x", x, detail::query_input_width(weights));
  return detail::attend_to_cache(detail::stored(x), weights, cache, options, terms...);
}

/// The next tokens x: m × D of causal self-attention: each sees those before it, which the cache
/// holds, and itself. The same rows as layer_forward(all, all, weights, {}, Causal{…}, terms…) gives
/// for all tokens so far. They are appended to the cache; where its window is too small for all of
/// them, one by one, so that each sees as many tokens as the window has. Errors as for layer_attend.
template <class X, class Weights, class Scalar, class... Terms>
Matrix<Scalar> layer_decode(const X& x, const Weights& weights, Surface<Scalar>& cache,
                            const QueryOptions& options = {}, const Terms&... terms) {
  constexpr detail::Require require("layer_decode");
  detail::check_inputs_at_compile_time<X, Matrix<Scalar>>();
  detail::require_cache(require, weights, cache);
  detail::require_tokens(require, "x", x, detail::query_input_width(weights));
  detail::require_tokens(require, "x", x, detail::key_input_width(weights));
  const auto& tokens = detail::stored(x);
  const bool at_once = !cache.window() || cache.size() + tokens.rows() <= *cache.window();
  const Index step = at_once ? std::max<Index>(tokens.rows(), 1) : 1;
  Matrix<Scalar> out(tokens.rows(), detail::output_width(weights));
  for (Index first = 0; first < tokens.rows(); first += step) {
    const auto next = tokens.middleRows(first, step);
    detail::append_tokens(next, weights, cache);
    out.middleRows(first, step) = detail::attend_to_cache(next, weights, cache, options,
                                                          Causal{Align::bottom_right}, terms...);
  }
  return out;
}

/// The next tokens of a block of causal self-attention: post_norm(x + layer_decode(pre_norm(x))).
/// The cache is one of weights.layer.
template <class X, class Layer, class Scalar, class... Terms>
Matrix<Scalar> block_decode(const X& x, const BlockWeights<Layer>& weights, Surface<Scalar>& cache,
                            const QueryOptions& options = {}, const Terms&... terms) {
  return detail::around(detail::Require("block_decode"), x, weights, [&](const auto& normed) {
    return layer_decode(normed, weights.layer, cache, options, terms...);
  });
}

/// A block of cross-attention to what the cache of weights.layer holds:
/// post_norm(x + layer_attend(pre_norm(x))).
template <class X, class Layer, class Scalar, class... Terms>
Matrix<Scalar> block_attend(const X& x, const BlockWeights<Layer>& weights,
                            const Surface<Scalar>& cache, const QueryOptions& options = {},
                            const Terms&... terms) {
  return detail::around(detail::Require("block_attend"), x, weights, [&](const auto& normed) {
    return layer_attend(normed, weights.layer, cache, options, terms...);
  });
}

}  // namespace surfattn
