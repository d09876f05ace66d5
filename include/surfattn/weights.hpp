// surfattn layer 6: the weights of an attention layer in both forms, and the exact way from one to
// the other

#pragma once

#include <optional>
#include <string>
#include <surfattn/detail/adapter.hpp>
#include <surfattn/detail/require.hpp>
#include <surfattn/norms.hpp>
#include <surfattn/rotary.hpp>
#include <surfattn/types.hpp>

namespace surfattn {

/// The four weight matrices of a standard attention layer. With inputs X (Tx × D) for the queries
/// and Y (Ty × Dy) for keys and values:
///
///     Q = X·Wq + bq,   K = Y·Wk + bk,   V = Y·Wv + bv,   layer(X, Y) = attention(Q, K, V)·Wo + bo.
///
/// A bias of size 0 is absent. Queries and keys may be normalised after their projection, head by
/// head, and then rotated by their positions, and the values may be the projected keys as they were
/// before both (k_equals_v):
///
///     attention(rotate(norm(Q)), rotate(norm(K)), K)·Wo + bo.
template <class Scalar>
struct StandardWeights {
  Matrix<Scalar> query;   ///< Wq, D × (Hq·d)
  Matrix<Scalar> key;     ///< Wk, Dy × (Hkv·d)
  Matrix<Scalar> value;   ///< Wv, Dy × (Hkv·dv); 0×0 with k_equals_v
  Matrix<Scalar> output;  ///< Wo, (Hq·dv) × Dout

  RowVector<Scalar> query_bias = {};   ///< bq, Hq·d
  RowVector<Scalar> key_bias = {};     ///< bk, Hkv·d
  RowVector<Scalar> value_bias = {};   ///< bv, Hkv·dv
  RowVector<Scalar> output_bias = {};  ///< bo, Dout

  Heads heads = {};
  std::optional<double> scale = {};  ///< β; 1/√d when not given

  Norm query_norm = Norm::none, key_norm = Norm::none;
  NormWeights<Scalar> query_norm_weights = {}, key_norm_weights = {};
  std::optional<double> norm_epsilon = {};  ///< as in NormOptions

  std::optional<RotaryOptions> rotary = {};  ///< of queries and keys after their norms; see rotate

  bool k_equals_v = false;  ///< V = K as projected, before norm and rotation; no Wv and no bv
};

/// The two weight matrices of an attention layer in the surface form, where the inputs Y themselves
/// sample the surface and all heads share them. For head h
///
///     Q_h = X·A_h + g_h,   layer(X, Y) = Σ_h (P(Q_h)·B_h + r_h) + bo,
///
/// with P the projection onto Y under KeyPrior::sdpa. One cache, Y, serves every head, for keys and
/// for values.
template <class Scalar>
struct SurfaceWeights {
  Matrix<Scalar> metric;   ///< A_h side by side, D × (H·Dy)
  Matrix<Scalar> readout;  ///< B_h one below the other, (H·Dy) × Dout

  RowVector<Scalar> metric_bias = {};  ///< g_h side by side, H·Dy; size 0: absent
  Matrix<Scalar> readout_bias =
      {};  ///< r_h one below the other, H × Dout, for queries that see a key; size 0: absent
  RowVector<Scalar> output_bias = {};  ///< bo, Dout; size 0: absent

  Index heads = 1;
  double scale = 1;  ///< β
};

namespace detail {

inline void require_bias(const Require& require, const char* name, Index size, Index expected) {
  if (size == 0 || size == expected) return;
  require.fail(name, " is 1×", size, " but must be 1×", expected, ", or empty for none");
}

/// The rotation of a matrix of so many heads.
template <class Scalar>
RotaryOptions rotary_options(const StandardWeights<Scalar>& weights, Index heads) {
  RotaryOptions options = *weights.rotary;
  options.heads = heads;
  return options;
}

/// The sizes of a standard layer: a problem with no tokens yet.
template <class Scalar>
Shape layer_shape(const StandardWeights<Scalar>& weights, const Require& require) {
  const Matrix<Scalar>& value = weights.k_equals_v ? weights.key : weights.value;
  if (weights.k_equals_v) {
    require.shape("weights.value", extent(weights.value), {0, 0}, "with k_equals_v there is none");
    require.shape("weights.value_bias", {1, weights.value_bias.size()}, {1, 0},
                  "with k_equals_v there is none");
    require.positive("weights.scale", weights.scale);
  }
  const Shape shape = require.shapes({0, weights.query.cols()}, {0, weights.key.cols()},
                                     {0, value.cols()}, weights.heads, {});
  require.shape("weights.value", extent(value), {weights.key.rows(), value.cols()},
                "as many rows as weights.key, the width of y");
  require.shape("weights.output", extent(weights.output),
                {shape.out_extent().cols, weights.output.cols()},
                "one row for each column of the attention's output");
  require_bias(require, "weights.query_bias", weights.query_bias.size(), weights.query.cols());
  require_bias(require, "weights.key_bias", weights.key_bias.size(), weights.key.cols());
  require_bias(require, "weights.value_bias", weights.value_bias.size(),
               weights.k_equals_v ? 0 : weights.value.cols());
  require_bias(require, "weights.output_bias", weights.output_bias.size(), weights.output.cols());
  require.finite("weights.scale", weights.scale);
  if (weights.query_norm != Norm::none) {
    require_norm(require, "weights.query_norm_weights", weights.query_norm_weights,
                 weights.norm_epsilon, shape.query_heads, "weights.query", extent(weights.query));
  }
  if (weights.key_norm != Norm::none) {
    require_norm(require, "weights.key_norm_weights", weights.key_norm_weights,
                 weights.norm_epsilon, shape.key_value_heads, "weights.key", extent(weights.key));
  }
  if (weights.rotary) {
    rotary_width(require, extent(weights.query), weights.query.rows(),
                 rotary_options(weights, shape.query_heads));
  }
  return shape;
}

/// Checks a surface layer and returns Dy, the width of its surface.
template <class Scalar>
Index surface_width(const SurfaceWeights<Scalar>& weights, const Require& require) {
  if (weights.heads <= 0 || weights.metric.cols() % weights.heads != 0) {
    require.fail("weights.metric is ", extent(weights.metric),
                 ", and its columns do not divide into ", weights.heads, " heads");
  }
  require.shape("weights.readout", extent(weights.readout),
                {weights.metric.cols(), weights.readout.cols()},
                "one row for each column of weights.metric");
  require_bias(require, "weights.metric_bias", weights.metric_bias.size(), weights.metric.cols());
  require_bias(require, "weights.output_bias", weights.output_bias.size(), weights.readout.cols());
  if (weights.readout_bias.size() > 0) {
    require.shape("weights.readout_bias", extent(weights.readout_bias),
                  {weights.heads, weights.readout.cols()}, "one row for each head");
  }
  require.positive("weights.scale", weights.scale);
  return weights.metric.cols() / weights.heads;
}

}  // namespace detail

/// Merges the four matrices of a standard layer into the two of the same layer in the surface form,
/// exactly: for query head h, which reads key/value head g,
///
///     A_h = Wq_h·Wk_gᵀ,   g_h = bq_h·Wk_gᵀ,   B_h = Wv_g·Wo_h,   r_h = bv_g·Wo_h.
///
/// bk adds the same number to all scores of a query and cancels; bv adds r_h because weights sum to
/// 1, but for a query that sees no key. With k_equals_v, Wv = Wk and bv = bk. Time and memory
/// O(H·D·Dy·d). Every head's surface is Dy wide where its keys were d wide, so merging pays where d
/// is not much smaller than Dy, and wherever the cache counts. Errors: weights whose shapes do not fit together; a scale that is not
/// positive, which no bandwidth has; a norm or a rotation of queries or keys. Source: Sanger 2026,
/// arXiv:2602.02521.
template <class Scalar>
SurfaceWeights<Scalar> merge(const StandardWeights<Scalar>& weights) {
  constexpr detail::Require require("merge");
  const detail::Shape shape = detail::layer_shape(weights, require);
  require.positive("weights.scale", weights.scale);
  if (weights.query_norm != Norm::none || weights.key_norm != Norm::none)
    require.fail("weights with a norm between projection and attention do not merge");
  if (weights.rotary)
    require.fail("weights with a rotation between projection and attention do not merge");
  const Index width = weights.key.rows(), d = shape.head_dim, dv = shape.value_dim;
  const Matrix<Scalar>& value = weights.k_equals_v ? weights.key : weights.value;
  const RowVector<Scalar>& value_bias = weights.k_equals_v ? weights.key_bias : weights.value_bias;
  SurfaceWeights<Scalar> merged;
  merged.heads = shape.query_heads;
  merged.scale = detail::scale_or_default<double>(weights.scale, d);
  merged.metric.resize(weights.query.rows(), merged.heads * width);
  merged.readout.resize(merged.heads * width, weights.output.cols());
  if (weights.query_bias.size() > 0) merged.metric_bias.resize(merged.heads * width);
  if (value_bias.size() > 0) merged.readout_bias.resize(merged.heads, weights.output.cols());
  merged.output_bias = weights.output_bias;
  for (Index head = 0; head < merged.heads; ++head) {
    const Index shared = head / shape.group();
    const auto key = weights.key.middleCols(shared * d, d).transpose();
    const auto output = weights.output.middleRows(head * dv, dv);
    merged.metric.middleCols(head * width, width).noalias() =
        weights.query.middleCols(head * d, d) * key;
    merged.readout.middleRows(head * width, width).noalias() =
        value.middleCols(shared * dv, dv) * output;
    if (merged.metric_bias.size() > 0) {
      merged.metric_bias.segment(head * width, width).noalias() =
          weights.query_bias.segment(head * d, d) * key;
    }
    if (merged.readout_bias.size() > 0) {
      merged.readout_bias.row(head).noalias() = value_bias.segment(shared * dv, dv) * output;
    }
  }
  return merged;
}

}  // namespace surfattn
