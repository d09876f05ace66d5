// surfattn layer 6: an attention layer with its residual connection and norms

#pragma once

#include <surfattn/layers.hpp>

/// x̂ = pre_norm(x),   s = x + layer(x̂, ·),   out = post_norm(s): self-attention, where the layer's
/// second input is x̂ too, or cross-attention to y, which is taken as it is.
namespace surfattn {

/// A layer, of StandardWeights or SurfaceWeights, and what surrounds it.
template <class Layer>
struct BlockWeights {
  using Scalar = typename decltype(Layer::output_bias)::Scalar;

  Layer layer;
  Norm pre_norm = Norm::none, post_norm = Norm::none;
  NormWeights<Scalar> pre_norm_weights = {}, post_norm_weights = {};
  std::optional<double> norm_epsilon = {};  ///< as in NormOptions
  bool residual = true;                     ///< whether x is added to the layer's output
};

/// The result of a block and what its backward needs.
template <class LayerForward>
struct BlockForward {
  decltype(LayerForward::out) out;     ///< Tx × Dout
  decltype(LayerForward::out) normed;  ///< x̂
  decltype(LayerForward::out) sum;     ///< s
  LayerForward layer;
};

/// Gradients of a loss with respect to a block's inputs and weights.
template <class Layer>
struct BlockGradients {
  using Scalar = typename BlockWeights<Layer>::Scalar;
  Matrix<Scalar> x;
  Matrix<Scalar> y;  ///< 0×0 in self-attention
  /// The gradient of each matrix, bias and gain in its place; all else is copied.
  BlockWeights<Layer> weights;
};

namespace detail {

template <class Scalar>
Index output_width(const StandardWeights<Scalar>& weights) {
  return weights.output.cols();
}
template <class Scalar>
Index output_width(const SurfaceWeights<Scalar>& weights) {
  return weights.readout.cols();
}

/// Checks what the block adds to its layer.
template <class X, class Layer>
void require_block(const Require& require, const X& x, const BlockWeights<Layer>& weights) {
  const Index width = output_width(weights.layer);
  if (weights.pre_norm != Norm::none) {
    require_norm(require, "weights.pre_norm_weights", weights.pre_norm_weights,
                 weights.norm_epsilon, 1, "x", extent(x));
  }
  if (weights.post_norm != Norm::none) {
    require_norm(require, "weights.post_norm_weights", weights.post_norm_weights,
                 weights.norm_epsilon, 1, "the layer's output", {x.rows(), width});
  }
  if (!weights.residual || x.cols() == width) return;
  require.fail("x is ", extent(x), " but must be as wide as the layer's output, ", width,
               ", to be added to it");
}

/// post_norm(x + layer(pre_norm(x))), each part as far as the weights name it, where run(x̂) computes
/// the layer: something whose `out` is the layer's output.
template <class X, class Layer, class Run>
auto around(const Require& require, const X& x, const BlockWeights<Layer>& weights,
            const Run& run) {
  using Scalar = typename BlockWeights<Layer>::Scalar;
  require_block(require, x, weights);
  const NormOptions norm{.epsilon = weights.norm_epsilon};
  Matrix<Scalar> normed = normalize(weights.pre_norm, x, weights.pre_norm_weights, norm);
  auto layer = run(normed);
  Matrix<Scalar> sum = layer.out;
  if (weights.residual) sum += x;
  Matrix<Scalar> out = normalize(weights.post_norm, sum, weights.post_norm_weights, norm);
  return BlockForward<decltype(layer)>{std::move(out), std::move(normed), std::move(sum),
                                       std::move(layer)};
}

/// `y` is null in self-attention.
template <class X, class Y, class Layer, class... Terms>
auto block_forward(const X& x, const Y* y, const BlockWeights<Layer>& weights,
                   const LayerOptions& options, const Terms&... terms) {
  using Scalar = typename BlockWeights<Layer>::Scalar;
  check_inputs_at_compile_time<X, Y, Matrix<Scalar>>();
  return around(Require("block_forward"), x, weights, [&](const auto& normed) {
    return y ? layer_forward(normed, *y, weights.layer, options, terms...)
             : layer_forward(normed, normed, weights.layer, options, terms...);
  });
}

template <class X, class Y, class Layer, class LayerForward, class... Terms>
void run_block_backward(const X& x, const Y* y, const BlockWeights<Layer>& weights,
                        const BlockForward<LayerForward>& forward,
                        const Matrix<typename BlockWeights<Layer>::Scalar>& grad_out,
                        const LayerOptions& options, BlockGradients<Layer>& gradients,
                        const Terms&... terms) {
  using Scalar = typename BlockWeights<Layer>::Scalar;
  check_inputs_at_compile_time<X, Y, Matrix<Scalar>>();
  constexpr Require require("block_backward");
  require_block(require, x, weights);
  require.shape("grad_out", extent(grad_out), {x.rows(), output_width(weights.layer)},
                "the shape of the block's output");
  require.shape("forward.normed", extent(forward.normed), extent(x), "the shape of x");
  require.shape("forward.sum", extent(forward.sum), extent(grad_out),
                "the shape of the block's output");
  const NormOptions norm{.epsilon = weights.norm_epsilon};
  // out = post_norm(s)
  auto of_sum =
      normalize_backward(weights.post_norm, forward.sum, grad_out, weights.post_norm_weights, norm);
  // s = x + layer(x̂, y)
  LayerGradients<Layer> of_layer;
  const auto pull_back = [&](const auto& keys) {
    run_layer_backward(forward.normed, keys, weights.layer, forward.layer, of_sum.x, options,
                       of_layer, terms...);
  };
  if (y) {
    pull_back(*y);
  } else {
    pull_back(forward.normed);
  }
  if (!y) of_layer.x += of_layer.y;
  // x̂ = pre_norm(x)
  auto of_x = normalize_backward(weights.pre_norm, x, of_layer.x, weights.pre_norm_weights, norm);
  gradients.x = std::move(of_x.x);
  if (weights.residual) gradients.x += of_sum.x;
  if (y) gradients.y = std::move(of_layer.y);
  gradients.weights = {
      std::move(of_layer.weights), weights.pre_norm,     weights.post_norm, std::move(of_x.weights),
      std::move(of_sum.weights),   weights.norm_epsilon, weights.residual};
}

template <class X, class Y, class Layer, class LayerForward, class... Terms>
auto block_backward(const X& x, const Y* y, const BlockWeights<Layer>& weights,
                    const BlockForward<LayerForward>& forward,
                    const Matrix<typename BlockWeights<Layer>::Scalar>& grad_out,
                    const LayerOptions& options, const Terms&... terms) {
  return with_term_gradients(
      BlockGradients<Layer>{},
      [&](auto& gradients, const auto&... directed) {
        run_block_backward(x, y, weights, forward, grad_out, options, gradients, directed...);
      },
      terms...);
}

}  // namespace detail

/// A block of self-attention, for x: T × D: post_norm(x + layer(pre_norm(x), pre_norm(x))), each part
/// as far as the weights name it. Allocates what layer_forward does and three matrices of x's shape.
/// Errors as for layer_forward; weights of norms of another size than x or the output; an x to be added to
/// an output of another width.
template <class X, class Layer, class... Terms>
auto block_forward(const X& x, const BlockWeights<Layer>& weights, const LayerOptions& options = {},
                   const Terms&... terms) {
  const X* none = nullptr;
  return detail::block_forward(x, none, weights, options, terms...);
}

/// A block of cross-attention to y: Ty × Dy: post_norm(x + layer(pre_norm(x), y)).
template <class X, class Y, class Layer, class... Terms>
auto block_forward(const X& x, const Y& y, const BlockWeights<Layer>& weights,
                   const LayerOptions& options = {}, const Terms&... terms) {
  return detail::block_forward(x, &y, weights, options, terms...);
}

/// Gradients of a loss with respect to x and every weight of a block of self-attention, given
/// grad_out = ∂loss/∂out and what block_forward returned for the same inputs, weights, options and
/// terms: back through post_norm, to x by the residual, through the layer, whose two inputs are one,
/// and through pre_norm.
template <class X, class Layer, class LayerForward, class... Terms>
auto block_backward(
    const X& x, const BlockWeights<Layer>& weights, const BlockForward<LayerForward>& forward,
    const std::type_identity_t<Matrix<typename BlockWeights<Layer>::Scalar>>& grad_out,
    const LayerOptions& options = {}, const Terms&... terms) {
  const X* none = nullptr;
  return detail::block_backward(x, none, weights, forward, grad_out, options, terms...);
}

/// The same for cross-attention, with respect to y too.
template <class X, class Y, class Layer, class LayerForward, class... Terms>
auto block_backward(
    const X& x, const Y& y, const BlockWeights<Layer>& weights,
    const BlockForward<LayerForward>& forward,
    const std::type_identity_t<Matrix<typename BlockWeights<Layer>::Scalar>>& grad_out,
    const LayerOptions& options = {}, const Terms&... terms) {
  return detail::block_backward(x, &y, weights, forward, grad_out, options, terms...);
}

}  // namespace surfattn
