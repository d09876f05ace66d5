// surfattn layer 6: one whole attention layer, forward and backward, in both forms

#pragma once

#include <string>
#include <surfattn/attention.hpp>
#include <surfattn/surface.hpp>
#include <surfattn/weights.hpp>
#include <type_traits>
#include <utility>

namespace surfattn {

/// The result of a standard layer and what its backward needs.
template <class Scalar>
struct StandardLayerForward {
  Matrix<Scalar> out;                    ///< Tx × Dout
  Matrix<Scalar> queries, keys, values;  ///< projected inputs
  Forward<Scalar> attention;
};

/// The result of a layer in the surface form and what its backward needs.
template <class Scalar>
struct SurfaceLayerForward {
  Matrix<Scalar> out;      ///< Tx × Dout
  Matrix<Scalar> queries;  ///< X·A + g, Tx × (H·Dy)
  Forward<Scalar> projection;
};

/// Gradients of a loss with respect to a layer's inputs and weights. In self-attention, where x and
/// y are one, the gradient of the input is x + y.
template <class Weights>
struct LayerGradients {
  using Scalar = typename decltype(Weights::output_bias)::Scalar;
  Matrix<Scalar> x;
  Matrix<Scalar> y;
  /// The gradient of each matrix and bias in its place; heads and scale are copied.
  Weights weights;
};

namespace detail {

template <class Scalar, class Input>
Matrix<Scalar> affine(const Input& x, const Matrix<Scalar>& weight, const RowVector<Scalar>& bias) {
  Matrix<Scalar> out(x.rows(), weight.cols());
  out.noalias() = x * weight;
  if (bias.size() > 0) out.rowwise() += bias;
  return out;
}

/// Gradient of a bias that was added to every row; absent where the bias is.
template <class Scalar>
RowVector<Scalar> bias_gradient(const Matrix<Scalar>& grad_out, const RowVector<Scalar>& bias) {
  return bias.size() > 0 ? RowVector<Scalar>(grad_out.colwise().sum()) : RowVector<Scalar>();
}

/// Adds r_h to each row for every head in which that query saw a key.
template <class Scalar>
void add_readout_bias(const Matrix<Scalar>& bias, const Matrix<Scalar>& log_sum_exp,
                      Matrix<Scalar>& out) {
  for (Index head = 0; head < bias.rows(); ++head) {
    for (Index i = 0; i < out.rows(); ++i) {
      if (log_sum_exp(i, head) != simd::minus_infinity<Scalar>) out.row(i) += bias.row(head);
    }
  }
}

template <class Scalar>
Matrix<Scalar> readout_bias_gradient(const Matrix<Scalar>& bias, const Matrix<Scalar>& log_sum_exp,
                                     const Matrix<Scalar>& grad_out) {
  Matrix<Scalar> gradient = Matrix<Scalar>::Zero(bias.rows(), bias.cols());
  for (Index head = 0; head < bias.rows(); ++head) {
    for (Index i = 0; i < grad_out.rows(); ++i) {
      if (log_sum_exp(i, head) != simd::minus_infinity<Scalar>)
        gradient.row(head) += grad_out.row(i);
    }
  }
  return gradient;
}

template <class X, class Y>
void require_layer_inputs(const Require& require, const X& x, const Y& y, Index x_width,
                          Index y_width) {
  require.shape("x", extent(x), {x.rows(), x_width},
                "the width that the weights take queries from");
  require.shape("y", extent(y), {y.rows(), y_width},
                "the width that the weights take keys and values from");
}

inline constexpr const char* from_layer_forward =
    "what layer_forward gives for these inputs and weights";

template <class Scalar>
void require_forward(const Require& require, const char* name, const Forward<Scalar>& forward,
                     Extent out, Extent log_sum_exp) {
  require.shape((std::string(name) + ".out").c_str(), extent(forward.out), out, from_layer_forward);
  require.shape((std::string(name) + ".log_sum_exp").c_str(), extent(forward.log_sum_exp),
                log_sum_exp, from_layer_forward);
}

template <class Scalar>
void require_projected(const Require& require, const char* name, const Matrix<Scalar>& projected,
                       Index rows, Index cols) {
  require.shape(name, extent(projected), {rows, cols}, from_layer_forward);
}

template <class Scalar>
Options layer_options(const StandardWeights<Scalar>& weights) {
  return {.scale = weights.scale, .heads = weights.heads};
}

template <class Scalar>
SurfaceOptions layer_options(const SurfaceWeights<Scalar>& weights) {
  return {.scale = weights.scale,
          .heads = {.query = weights.heads, .key_value = 1},
          .prior = KeyPrior::sdpa};
}

}  // namespace detail

/// A standard layer: attention(X·Wq + bq, Y·Wk + bk, Y·Wv + bv)·Wo + bo, for x: Tx × D and y: Ty ×
/// Dy. `terms` as for `attention`. Allocates its result, the projections and a workspace. Errors:
/// weights or inputs whose shapes do not fit together.
template <class X, class Y, class Scalar, class... Terms>
StandardLayerForward<Scalar> layer_forward(const X& x, const Y& y,
                                           const StandardWeights<Scalar>& weights,
                                           const Terms&... terms) {
  detail::check_inputs_at_compile_time<X, Y, Matrix<Scalar>>();
  constexpr detail::Require require("layer_forward");
  detail::layer_shape(weights, require);
  detail::require_layer_inputs(require, x, y, weights.query.rows(), weights.key.rows());
  StandardLayerForward<Scalar> forward;
  forward.queries = detail::affine(x, weights.query, weights.query_bias);
  forward.keys = detail::affine(y, weights.key, weights.key_bias);
  forward.values = detail::affine(y, weights.value, weights.value_bias);
  forward.attention = attention_forward(forward.queries, forward.keys, forward.values,
                                        detail::layer_options(weights), terms...);
  forward.out = detail::affine(forward.attention.out, weights.output, weights.output_bias);
  return forward;
}

/// A layer in the surface form: Σ_h (P(X·A_h + g_h)·B_h + r_h) + bo, for x: Tx × D and y: Ty × Dy,
/// where P projects onto the surface that the rows of y sample, with the weights of scaled
/// dot-product attention. Of merged weights, the same function as the standard layer. A query that
/// sees no key gives bo. Allocates its result, the queries and a workspace. Time O(H·Tx·Dy·(D + 2Ty
/// + Dout)). Errors: weights or inputs whose shapes do not fit together.
template <class X, class Y, class Scalar, class... Terms>
SurfaceLayerForward<Scalar> layer_forward(const X& x, const Y& y,
                                          const SurfaceWeights<Scalar>& weights,
                                          const Terms&... terms) {
  detail::check_inputs_at_compile_time<X, Y, Matrix<Scalar>>();
  constexpr detail::Require require("layer_forward");
  const Index width = detail::surface_width(weights, require);
  detail::require_layer_inputs(require, x, y, weights.metric.rows(), width);
  SurfaceLayerForward<Scalar> forward;
  forward.queries = detail::affine(x, weights.metric, weights.metric_bias);
  forward.projection =
      project_forward(forward.queries, y, detail::layer_options(weights), terms...);
  forward.out = detail::affine(forward.projection.out, weights.readout, weights.output_bias);
  detail::add_readout_bias(weights.readout_bias, forward.projection.log_sum_exp, forward.out);
  return forward;
}

/// Gradients of a loss with respect to x, y and every weight of a standard layer, given grad_out =
/// ∂loss/∂out, Tx × Dout, and what layer_forward returned for the same inputs, weights and terms.
/// Rows of x and y must be finite, masked or not: the weights' gradients are products over all
/// rows.
template <class X, class Y, class Scalar, class... Terms>
LayerGradients<StandardWeights<Scalar>> layer_backward(
    const X& x, const Y& y, const StandardWeights<Scalar>& weights,
    const StandardLayerForward<Scalar>& forward,
    const std::type_identity_t<Matrix<Scalar>>& grad_out, const Terms&... terms) {
  constexpr detail::Require require("layer_backward");
  detail::layer_shape(weights, require);
  detail::require_layer_inputs(require, x, y, weights.query.rows(), weights.key.rows());
  require.shape("grad_out", detail::extent(grad_out), {x.rows(), weights.output.cols()},
                "the shape of the layer's output");
  detail::require_forward(require, "forward.attention", forward.attention,
                          {x.rows(), weights.output.rows()}, {x.rows(), weights.heads.query});
  detail::require_projected(require, "forward.queries", forward.queries, x.rows(),
                            weights.query.cols());
  detail::require_projected(require, "forward.keys", forward.keys, y.rows(), weights.key.cols());
  detail::require_projected(require, "forward.values", forward.values, y.rows(),
                            weights.value.cols());
  // out = attention·Wo + bo
  const Matrix<Scalar> grad_attention = grad_out * weights.output.transpose();
  const auto inner =
      attention_backward(forward.queries, forward.keys, forward.values, forward.attention,
                         grad_attention, detail::layer_options(weights), terms...);
  LayerGradients<StandardWeights<Scalar>> gradients;
  gradients.weights.heads = weights.heads;
  gradients.weights.scale = weights.scale;
  gradients.weights.output = forward.attention.out.transpose() * grad_out;
  gradients.weights.output_bias = detail::bias_gradient(grad_out, weights.output_bias);
  // Q = X·Wq + bq
  gradients.weights.query = x.transpose() * inner.queries;
  gradients.weights.query_bias = detail::bias_gradient(inner.queries, weights.query_bias);
  gradients.x = inner.queries * weights.query.transpose();
  // K = Y·Wk + bk,  V = Y·Wv + bv
  gradients.weights.key = y.transpose() * inner.keys;
  gradients.weights.key_bias = detail::bias_gradient(inner.keys, weights.key_bias);
  gradients.weights.value = y.transpose() * inner.values;
  gradients.weights.value_bias = detail::bias_gradient(inner.values, weights.value_bias);
  gradients.y = inner.keys * weights.key.transpose() + inner.values * weights.value.transpose();
  return gradients;
}

/// The same for a layer in the surface form: with U = dS·Y, dA = β·XᵀU, dX = β·U·Aᵀ, dY = Wᵀ(dO·Bᵀ)
/// + β·dSᵀ(X·A + g), dB = P(Q)ᵀ·dO.
template <class X, class Y, class Scalar, class... Terms>
LayerGradients<SurfaceWeights<Scalar>> layer_backward(
    const X& x, const Y& y, const SurfaceWeights<Scalar>& weights,
    const SurfaceLayerForward<Scalar>& forward,
    const std::type_identity_t<Matrix<Scalar>>& grad_out, const Terms&... terms) {
  constexpr detail::Require require("layer_backward");
  const Index width = detail::surface_width(weights, require);
  detail::require_layer_inputs(require, x, y, weights.metric.rows(), width);
  require.shape("grad_out", detail::extent(grad_out), {x.rows(), weights.readout.cols()},
                "the shape of the layer's output");
  detail::require_forward(require, "forward.projection", forward.projection,
                          {x.rows(), weights.readout.rows()}, {x.rows(), weights.heads});
  detail::require_projected(require, "forward.queries", forward.queries, x.rows(),
                            weights.metric.cols());
  // out = P·B + r + bo
  const Matrix<Scalar> grad_projection = grad_out * weights.readout.transpose();
  auto inner = project_backward(forward.queries, y, forward.projection, grad_projection,
                                detail::layer_options(weights), terms...);
  LayerGradients<SurfaceWeights<Scalar>> gradients;
  gradients.weights.heads = weights.heads;
  gradients.weights.scale = weights.scale;
  gradients.weights.readout = forward.projection.out.transpose() * grad_out;
  gradients.weights.output_bias = detail::bias_gradient(grad_out, weights.output_bias);
  gradients.weights.readout_bias =
      detail::readout_bias_gradient(weights.readout_bias, forward.projection.log_sum_exp, grad_out);
  // Q = X·A + g
  gradients.weights.metric = x.transpose() * inner.queries;
  gradients.weights.metric_bias = detail::bias_gradient(inner.queries, weights.metric_bias);
  gradients.x = inner.queries * weights.metric.transpose();
  gradients.y = std::move(inner.keys);
  return gradients;
}

}  // namespace surfattn
