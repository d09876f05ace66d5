// surfattn layer 6: one whole attention layer, forward and backward, in both forms

#pragma once

#include <string>
#include <surfattn/attention.hpp>
#include <surfattn/norms.hpp>
#include <surfattn/surface.hpp>
#include <surfattn/weights.hpp>
#include <type_traits>
#include <utility>

namespace surfattn {

/// The result of a standard layer and what its backward needs.
template <class Scalar>
struct StandardLayerForward {
  Matrix<Scalar> out;                    ///< Tx × Dout
  Matrix<Scalar> queries, keys, values;  ///< what attends; no values with k_equals_v
  /// as projected: before their norms, and keys also where they are the values before a rotation;
  /// 0×0 otherwise
  Matrix<Scalar> raw_queries, raw_keys;
  Forward<Scalar> attention;
};

/// The result of a layer in the surface form and what its backward needs.
template <class Scalar>
struct SurfaceLayerForward {
  Matrix<Scalar> out;      ///< Tx × Dout
  Matrix<Scalar> queries;  ///< X·A + g, Tx × (H·Dy)
  Forward<Scalar> projection;
};

/// Options of a call of a layer.
struct LayerOptions {
  /// who runs the tasks of the attention; the calling thread alone where there is none
  Executor* executor = nullptr;
  /// how the rows of x and y divide into sequences: the projections are of the whole batch at once
  Sequences sequences = {};
  /// The positions of the rows of x and of y, where the weights rotate. Without them rows are counted
  /// from 0 in each sequence, if that has as many rows of x as of y.
  Positions x_positions = {}, y_positions = {};
};

/// Gradients of a loss with respect to a layer's inputs and weights. In self-attention, where x and
/// y are one, the gradient of the input is x + y.
template <class Weights>
struct LayerGradients {
  using Scalar = typename decltype(Weights::output_bias)::Scalar;
  Matrix<Scalar> x;
  Matrix<Scalar> y;
  /// The gradient of each matrix, bias and gain in its place; all else is copied.
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

/// a·b into a new matrix, without a temporary.
template <class A, class B>
auto product(const A& a, const B& b) {
  Matrix<scalar_t<A>> out(a.rows(), b.cols());
  out.noalias() = a * b;
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

/// Positions belong to weights that rotate: one for each row of x and of y, or none, where each
/// sequence has as many of both.
inline void require_positions(const Require& require, bool rotates, const LayerOptions& options,
                              const Shape& shape) {
  const bool x_given = options.x_positions.is_given(), y_given = options.y_positions.is_given();
  if (!rotates && (x_given || y_given))
    require.fail("x_positions and y_positions are for weights with a rotation");
  if (!rotates) return;
  if (x_given != y_given) require.fail("give both x_positions and y_positions, or neither");
  const auto check_count = [&](const char* name, Index count, const char* rows, Index expected) {
    if (!x_given || count == expected) return;
    require.fail(name, " must be one for each row of ", rows, ", ", expected, ", but are ", count);
  };
  check_count("x_positions", options.x_positions.size(), "x", shape.queries);
  check_count("y_positions", options.y_positions.size(), "y", shape.keys);
  for (Index s = 0; !x_given && s < shape.sequences.count(); ++s) {
    const Shape one = shape.of_sequence(s);
    if (one.queries == one.keys) continue;
    require.about(one).fail(
        "weights.rotary needs x_positions and y_positions where x and y have "
        "different numbers of rows, but they have ",
        one.queries, " and ", one.keys);
  }
}

/// Checks weights, inputs, sequences and positions of a standard layer.
template <class X, class Y, class Scalar>
Shape standard_layer_shape(const Require& require, const X& x, const Y& y,
                           const StandardWeights<Scalar>& weights, const LayerOptions& options) {
  const Shape widths = layer_shape(weights, require);
  require_layer_inputs(require, x, y, weights.query.rows(), weights.key.rows());
  const Shape shape =
      require.shapes({x.rows(), weights.query.cols()}, {y.rows(), weights.key.cols()},
                     {y.rows(), widths.values_extent().cols}, weights.heads, options.sequences);
  require_positions(require, weights.rotary.has_value(), options, shape);
  return shape;
}

template <class Scalar>
Options layer_options(const StandardWeights<Scalar>& weights, const LayerOptions& options) {
  return {.scale = weights.scale,
          .heads = weights.heads,
          .executor = options.executor,
          .sequences = options.sequences};
}

/// With values that are the keys, the surface form of the same attention.
template <class Scalar>
SurfaceOptions shared_options(const StandardWeights<Scalar>& weights, const LayerOptions& options) {
  return {.scale = weights.scale,
          .heads = weights.heads,
          .executor = options.executor,
          .sequences = options.sequences,
          .prior = KeyPrior::sdpa};
}

template <class Scalar>
SurfaceOptions layer_options(const SurfaceWeights<Scalar>& weights, const LayerOptions& options) {
  return {.scale = weights.scale,
          .heads = {.query = weights.heads, .key_value = 1},
          .executor = options.executor,
          .sequences = options.sequences,
          .prior = KeyPrior::sdpa};
}

template <class Scalar>
NormOptions query_norm_options(const StandardWeights<Scalar>& weights) {
  return {.epsilon = weights.norm_epsilon, .heads = weights.heads.query};
}
template <class Scalar>
NormOptions key_norm_options(const StandardWeights<Scalar>& weights) {
  return {.epsilon = weights.norm_epsilon,
          .heads = weights.heads.key_value.value_or(weights.heads.query)};
}

/// Whether keys and values of the attention are the same matrix.
template <class Scalar>
bool shares_keys(const StandardWeights<Scalar>& weights) {
  return weights.k_equals_v && weights.key_norm == Norm::none && !weights.rotary;
}

/// Whether the keys are kept as they were projected, for a norm's backward or as values.
template <class Scalar>
bool keeps_raw_keys(const StandardWeights<Scalar>& weights) {
  return weights.key_norm != Norm::none || (weights.k_equals_v && weights.rotary);
}

/// Q = norm(X·Wq + bq)
template <class X, class Scalar>
void project_queries(const StandardWeights<Scalar>& weights, const X& x,
                     StandardLayerForward<Scalar>& forward) {
  forward.queries = affine(x, weights.query, weights.query_bias);
  if (weights.query_norm == Norm::none) return;
  forward.raw_queries = std::move(forward.queries);
  forward.queries = normalize(weights.query_norm, forward.raw_queries, weights.query_norm_weights,
                              query_norm_options(weights));
}

/// K = norm(Y·Wk + bk),  V = Y·Wv + bv
template <class Y, class Scalar>
void project_keys(const StandardWeights<Scalar>& weights, const Y& y,
                  StandardLayerForward<Scalar>& forward) {
  forward.keys = affine(y, weights.key, weights.key_bias);
  if (keeps_raw_keys(weights)) {
    forward.raw_keys = std::move(forward.keys);
    forward.keys = normalize(weights.key_norm, forward.raw_keys, weights.key_norm_weights,
                             key_norm_options(weights));
  }
  if (!weights.k_equals_v) forward.values = affine(y, weights.value, weights.value_bias);
}

/// What stands for V: the values, or with k_equals_v the keys as projected.
template <class Scalar>
const Matrix<Scalar>& layer_values(const StandardWeights<Scalar>& weights,
                                   const StandardLayerForward<Scalar>& forward) {
  if (!weights.k_equals_v) return forward.values;
  return shares_keys(weights) ? forward.keys : forward.raw_keys;
}

/// Turns the rows of a matrix in place by their positions, or by those that its sequences count:
/// `rows_of(sequence)` is the first of its rows and their number. `turn` is −1 for the way back.
template <class Scalar, class RowsOf>
void rotate_rows(const RotaryOptions& options, const Positions& positions, const Shape& shape,
                 const RowsOf& rows_of, double turn, Matrix<Scalar>& matrix) {
  const MatrixView<Scalar> all = view(matrix);
  const Index width = options.width.value_or(matrix.cols() / options.heads);
  if (positions.is_given()) {
    const auto given = [&](Index row) { return positions[row]; };
    return rotate<Scalar>(all, given, all, options, width, turn);
  }
  const auto counted = [](Index row) { return row; };
  for (Index s = 0; s < shape.sequences.count(); ++s) {
    const auto [first, count] = rows_of(shape.of_sequence(s));
    const MatrixView<Scalar> rows = all.block_rows(first, count);
    rotate<Scalar>(rows, counted, rows, options, width, turn);
  }
}

template <class Scalar>
void rotate_queries(const StandardWeights<Scalar>& weights, const LayerOptions& options,
                    const Shape& shape, double turn, Matrix<Scalar>& queries) {
  rotate_rows(
      rotary_options(weights, shape.query_heads), options.x_positions, shape,
      [](const Shape& one) { return std::pair(one.first_query, one.queries); }, turn, queries);
}

template <class Scalar>
void rotate_keys(const StandardWeights<Scalar>& weights, const LayerOptions& options,
                 const Shape& shape, double turn, Matrix<Scalar>& keys) {
  rotate_rows(
      rotary_options(weights, shape.key_value_heads), options.y_positions, shape,
      [](const Shape& one) { return std::pair(one.first_key, one.keys); }, turn, keys);
}

template <class Scalar, class... Terms>
Forward<Scalar> attend(const StandardWeights<Scalar>& weights,
                       const StandardLayerForward<Scalar>& forward, const LayerOptions& options,
                       const Terms&... terms) {
  if (shares_keys(weights))
    return project_forward(forward.queries, forward.keys, shared_options(weights, options),
                           terms...);
  return attention_forward(forward.queries, forward.keys, layer_values(weights, forward),
                           layer_options(weights, options), terms...);
}

/// Gradients of `attend`, with respect to the values apart, but for shared ones, which are in `keys`.
/// Terms write the gradients of their parameters where they have been told.
template <class Scalar, class... Terms>
AttentionGradients<Scalar> attend_backward(const StandardWeights<Scalar>& weights,
                                           const StandardLayerForward<Scalar>& forward,
                                           const Matrix<Scalar>& grad_out,
                                           const LayerOptions& options, const Terms&... terms) {
  const Matrix<Scalar>&q = forward.queries, &k = forward.keys;
  AttentionGradients<Scalar> gradients{
      Matrix<Scalar>(q.rows(), q.cols()), Matrix<Scalar>(k.rows(), k.cols()), {}};
  if (shares_keys(weights)) {
    project_backward_of_layer(q, k, forward.attention, grad_out, gradients.queries, gradients.keys,
                              shared_options(weights, options), terms...);
    return gradients;
  }
  const Matrix<Scalar>& v = layer_values(weights, forward);
  const Options apart = layer_options(weights, options);
  gradients.values.resize(v.rows(), v.cols());
  attention_backward_into(q, k, v, forward.attention.out, forward.attention.log_sum_exp, grad_out,
                          gradients.queries, gradients.keys, gradients.values,
                          Workspace(workspace_size(Pass::backward, q, k, v, apart, terms...)),
                          apart, terms...);
  return gradients;
}

template <class Scalar>
void require_standard_forward(const Require& require, const StandardWeights<Scalar>& weights,
                              const StandardLayerForward<Scalar>& forward, Index x_rows,
                              Index y_rows) {
  const auto projected = [&](const char* name, const Matrix<Scalar>& matrix, Index rows,
                             Index cols) { require_projected(require, name, matrix, rows, cols); };
  require_forward(require, "forward.attention", forward.attention, {x_rows, weights.output.rows()},
                  {x_rows, weights.heads.query});
  projected("forward.queries", forward.queries, x_rows, weights.query.cols());
  projected("forward.keys", forward.keys, y_rows, weights.key.cols());
  if (!weights.k_equals_v)
    projected("forward.values", forward.values, y_rows, weights.value.cols());
  if (weights.query_norm != Norm::none)
    projected("forward.raw_queries", forward.raw_queries, x_rows, weights.query.cols());
  if (keeps_raw_keys(weights))
    projected("forward.raw_keys", forward.raw_keys, y_rows, weights.key.cols());
}

/// Pulls the gradients of queries and keys back through rotation and norms, in place, and adds that
/// of values which are the keys as projected.
template <class Scalar>
void pull_back_to_projections(const StandardWeights<Scalar>& weights,
                              const StandardLayerForward<Scalar>& forward,
                              const LayerOptions& options, const Shape& shape,
                              AttentionGradients<Scalar>& gradients,
                              StandardWeights<Scalar>& of_weights) {
  if (weights.rotary) {
    rotate_queries(weights, options, shape, -1, gradients.queries);
    rotate_keys(weights, options, shape, -1, gradients.keys);
  }
  if (weights.query_norm != Norm::none) {
    auto normed = normalize_backward(weights.query_norm, forward.raw_queries, gradients.queries,
                                     weights.query_norm_weights, query_norm_options(weights));
    gradients.queries = std::move(normed.x);
    of_weights.query_norm_weights = std::move(normed.weights);
  }
  if (weights.key_norm != Norm::none) {
    auto normed = normalize_backward(weights.key_norm, forward.raw_keys, gradients.keys,
                                     weights.key_norm_weights, key_norm_options(weights));
    gradients.keys = std::move(normed.x);
    of_weights.key_norm_weights = std::move(normed.weights);
  }
  if (weights.k_equals_v && !shares_keys(weights)) gradients.keys += gradients.values;
}

/// What a layer's gradient copies of its weights.
template <class Scalar>
StandardWeights<Scalar> without_numbers(const StandardWeights<Scalar>& weights) {
  StandardWeights<Scalar> copy;
  copy.heads = weights.heads;
  copy.scale = weights.scale;
  copy.query_norm = weights.query_norm;
  copy.key_norm = weights.key_norm;
  copy.norm_epsilon = weights.norm_epsilon;
  copy.rotary = weights.rotary;
  copy.k_equals_v = weights.k_equals_v;
  return copy;
}

}  // namespace detail

/// A standard layer: attention(X·Wq + bq, Y·Wk + bk, Y·Wv + bv)·Wo + bo, with norms and rotation of
/// queries and keys and with k_equals_v as the weights say, for x: Tx × D and y: Ty × Dy, of one
/// sequence or of a batch, of float, double or long double. `terms` as for `attention`. Allocates its
/// result, the projections and a workspace. Errors: weights or inputs whose shapes do not fit
/// together; weights that rotate without positions where x and y differ in length, positions for
/// weights that do not.
template <class X, class Y, class Scalar, class... Terms>
StandardLayerForward<Scalar> layer_forward(const X& x, const Y& y,
                                           const StandardWeights<Scalar>& weights,
                                           const LayerOptions& options = {},
                                           const Terms&... terms) {
  detail::check_inputs_at_compile_time<X, Y, Matrix<Scalar>>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
  constexpr detail::Require require("layer_forward");
  const detail::Shape shape = detail::standard_layer_shape(require, x, y, weights, options);
  StandardLayerForward<Scalar> forward;
  detail::project_queries(weights, detail::stored(x), forward);
  detail::project_keys(weights, detail::stored(y), forward);
  if (weights.rotary) {
    detail::rotate_queries(weights, options, shape, 1, forward.queries);
    detail::rotate_keys(weights, options, shape, 1, forward.keys);
  }
  forward.attention = detail::attend(weights, forward, options, terms...);
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
                                          const LayerOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<X, Y, Matrix<Scalar>>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
  constexpr detail::Require require("layer_forward");
  const Index width = detail::surface_width(weights, require);
  detail::require_layer_inputs(require, x, y, weights.metric.rows(), width);
  detail::require_positions(require, false, options, {});
  const auto& from = detail::stored(x);
  const auto& to = detail::stored(y);
  SurfaceLayerForward<Scalar> forward;
  forward.queries = detail::affine(from, weights.metric, weights.metric_bias);
  forward.projection =
      project_forward(forward.queries, to, detail::layer_options(weights, options), terms...);
  forward.out = detail::affine(forward.projection.out, weights.readout, weights.output_bias);
  detail::add_readout_bias(weights.readout_bias, forward.projection.log_sum_exp, forward.out);
  return forward;
}

namespace detail {

/// Of a standard layer; the terms know where the gradients of their parameters go.
template <class X, class Y, class Scalar, class... Terms>
void run_layer_backward(const X& x, const Y& y, const StandardWeights<Scalar>& weights,
                        const StandardLayerForward<Scalar>& forward, const Matrix<Scalar>& grad_out,
                        const LayerOptions& options,
                        LayerGradients<StandardWeights<Scalar>>& gradients, const Terms&... terms) {
  constexpr Require require("layer_backward");
  const Shape shape = standard_layer_shape(require, x, y, weights, options);
  require.shape("grad_out", extent(grad_out), {x.rows(), weights.output.cols()},
                "the shape of the layer's output");
  require_standard_forward(require, weights, forward, x.rows(), y.rows());
  const auto& from = stored(x);
  const auto& to = stored(y);
  StandardWeights<Scalar>& of_weights = gradients.weights;
  of_weights = without_numbers(weights);
  // out = attention·Wo + bo
  of_weights.output = product(forward.attention.out.transpose(), grad_out);
  of_weights.output_bias = bias_gradient(grad_out, weights.output_bias);
  auto inner = attend_backward(weights, forward, product(grad_out, weights.output.transpose()),
                               options, terms...);
  pull_back_to_projections(weights, forward, options, shape, inner, of_weights);
  // Q = X·Wq + bq
  of_weights.query = product(from.transpose(), inner.queries);
  of_weights.query_bias = bias_gradient(inner.queries, weights.query_bias);
  gradients.x = product(inner.queries, weights.query.transpose());
  // K = Y·Wk + bk,  V = Y·Wv + bv
  of_weights.key = product(to.transpose(), inner.keys);
  of_weights.key_bias = bias_gradient(inner.keys, weights.key_bias);
  gradients.y = product(inner.keys, weights.key.transpose());
  if (weights.k_equals_v) return;
  of_weights.value = product(to.transpose(), inner.values);
  of_weights.value_bias = bias_gradient(inner.values, weights.value_bias);
  gradients.y.noalias() += inner.values * weights.value.transpose();
}

/// Of a layer in the surface form.
template <class X, class Y, class Scalar, class... Terms>
void run_layer_backward(const X& x, const Y& y, const SurfaceWeights<Scalar>& weights,
                        const SurfaceLayerForward<Scalar>& forward, const Matrix<Scalar>& grad_out,
                        const LayerOptions& options,
                        LayerGradients<SurfaceWeights<Scalar>>& gradients, const Terms&... terms) {
  constexpr Require require("layer_backward");
  const Index width = surface_width(weights, require);
  require_layer_inputs(require, x, y, weights.metric.rows(), width);
  require.shape("grad_out", extent(grad_out), {x.rows(), weights.readout.cols()},
                "the shape of the layer's output");
  require_forward(require, "forward.projection", forward.projection,
                  {x.rows(), weights.readout.rows()}, {x.rows(), weights.heads});
  require_projected(require, "forward.queries", forward.queries, x.rows(), weights.metric.cols());
  const auto& from = stored(x);
  const auto& to = stored(y);
  gradients.weights.heads = weights.heads;
  gradients.weights.scale = weights.scale;
  // out = P·B + r + bo
  gradients.weights.readout = product(forward.projection.out.transpose(), grad_out);
  gradients.weights.output_bias = bias_gradient(grad_out, weights.output_bias);
  gradients.weights.readout_bias =
      readout_bias_gradient(weights.readout_bias, forward.projection.log_sum_exp, grad_out);
  Matrix<Scalar> grad_queries(forward.queries.rows(), forward.queries.cols());
  gradients.y.resize(y.rows(), y.cols());
  project_backward_of_layer(forward.queries, to, forward.projection,
                            product(grad_out, weights.readout.transpose()), grad_queries,
                            gradients.y, layer_options(weights, options), terms...);
  // Q = X·A + g
  gradients.weights.metric = product(from.transpose(), grad_queries);
  gradients.weights.metric_bias = bias_gradient(grad_queries, weights.metric_bias);
  gradients.x = product(grad_queries, weights.metric.transpose());
}

}  // namespace detail

/// Gradients of a loss with respect to x, y and every weight of a standard layer, given grad_out =
/// ∂loss/∂out, Tx × Dout, and what layer_forward returned for the same inputs, weights, options and
/// terms. Rows of x and y must be finite, masked or not: the weights' gradients are products over
/// all rows. Gradients of terms with parameters as for attention_backward.
template <class X, class Y, class Scalar, class... Terms>
auto layer_backward(const X& x, const Y& y, const StandardWeights<Scalar>& weights,
                    const StandardLayerForward<Scalar>& forward,
                    const std::type_identity_t<Matrix<Scalar>>& grad_out,
                    const LayerOptions& options = {}, const Terms&... terms) {
  return detail::with_term_gradients(
      LayerGradients<StandardWeights<Scalar>>{},
      [&](auto& gradients, const auto&... directed) {
        detail::run_layer_backward(x, y, weights, forward, grad_out, options, gradients,
                                   directed...);
      },
      terms...);
}

/// The same for a layer in the surface form: with U = dS·Y, dA = β·XᵀU, dX = β·U·Aᵀ, dY = Wᵀ(dO·Bᵀ)
/// + β·dSᵀ(X·A + g), dB = P(Q)ᵀ·dO.
template <class X, class Y, class Scalar, class... Terms>
auto layer_backward(const X& x, const Y& y, const SurfaceWeights<Scalar>& weights,
                    const SurfaceLayerForward<Scalar>& forward,
                    const std::type_identity_t<Matrix<Scalar>>& grad_out,
                    const LayerOptions& options = {}, const Terms&... terms) {
  return detail::with_term_gradients(
      LayerGradients<SurfaceWeights<Scalar>>{},
      [&](auto& gradients, const auto&... directed) {
        detail::run_layer_backward(x, y, weights, forward, grad_out, options, gradients,
                                   directed...);
      },
      terms...);
}

}  // namespace surfattn
