// surfattn layer 6: a standard layer whose values are its keys, where these can be turned back into
// the layer's inputs

#pragma once

#include <Eigen/LU>
#include <limits>
#include <string>
#include <surfattn/weights.hpp>

namespace surfattn {

/// Weights whose values are their keys, and how many digits that may have cost.
template <class Scalar>
struct ValuesFromKeys {
  StandardWeights<Scalar> weights;  ///< with k_equals_v
  /// An estimate of 1/(‖Wk_g‖₁·‖Wk_g⁻¹‖₁) for each key/value head, 1 × Hkv: at 10⁻ⁿ, n digits of
  /// the values are uncertain that were not before
  RowVector<Scalar> reciprocal_condition;
};

namespace detail {

/// M_g = Wk_g⁻¹·Wv_g, and the reciprocal condition of Wk_g.
template <class Scalar>
Matrix<Scalar> key_to_value(const StandardWeights<Scalar>& weights, const Shape& shape, Index head,
                            Scalar& reciprocal_condition, const Require& require) {
  const Index d = shape.head_dim, dv = shape.value_dim;
  const Eigen::PartialPivLU<Matrix<Scalar>> factors(weights.key.middleCols(head * d, d));
  reciprocal_condition = factors.rcond();
  if (!(reciprocal_condition > Scalar(d) * std::numeric_limits<Scalar>::epsilon())) {
    require.fail("weights.key must be invertible, head by head, but that of head ", head,
                 " is singular to the precision of its numbers");
  }
  return factors.solve(weights.value.middleCols(head * dv, dv));
}

}  // namespace detail

/// The same layer with k_equals_v, so that a cache holds keys alone: for key/value head g, whose Wk_g
/// is square and invertible, the keys K_g as projected give the values back,
///
///     V_g = (K_g − bk_g)·M_g + bv_g,   M_g = Wk_g⁻¹·Wv_g,
///
/// and what stands behind the keys goes into the output of the query heads h that read them:
///
///     Wo'_h = M_g·Wo_h,   bo' = bo + Σ_h (bv_g − bk_g·M_g)·Wo_h.
///
/// Norms and rotation stay as they are: k_equals_v takes the keys from before both. The layers are one
/// function, but for a query that sees no key, which gives bo' in the place of bo. Weights that have
/// k_equals_v are returned as they are. (Where heads are narrower than y, `merge` drops both caches
/// for y itself.) Allocates its result. Time O(Hkv·d³ + Hq·d²·(dv + Dout)). Errors: weights whose
/// shapes do not fit together; heads of keys that are not as wide as y; a Wk_g that is singular, that
/// is, of a reciprocal condition below d·ε. Source: equivalence 4 of Sanger 2026, arXiv:2602.02521.
template <class Scalar>
ValuesFromKeys<Scalar> values_from_keys(const StandardWeights<Scalar>& weights) {
  constexpr detail::Require require("values_from_keys");
  const detail::Shape shape = detail::layer_shape(weights, require);
  const Index d = shape.head_dim, dv = shape.value_dim;
  ValuesFromKeys<Scalar> result{weights, RowVector<Scalar>::Ones(shape.key_value_heads)};
  if (weights.k_equals_v) return result;
  if (weights.key.rows() != d) {
    require.fail("weights.key must be square, head by head, but it is ",
                 detail::extent(weights.key), " (", shape.key_value_heads, " heads of width ", d,
                 ")");
  }
  StandardWeights<Scalar>& shared = result.weights;
  shared.k_equals_v = true;
  shared.value.resize(0, 0);
  shared.value_bias.resize(0);
  shared.output.resize(shape.query_heads * d, weights.output.cols());
  const bool has_constant = weights.key_bias.size() > 0 || weights.value_bias.size() > 0;
  if (has_constant && shared.output_bias.size() == 0)
    shared.output_bias = RowVector<Scalar>::Zero(weights.output.cols());
  for (Index group = 0; group < shape.key_value_heads; ++group) {
    const Matrix<Scalar> readout =
        detail::key_to_value(weights, shape, group, result.reciprocal_condition[group], require);
    RowVector<Scalar> constant = RowVector<Scalar>::Zero(dv);
    if (weights.value_bias.size() > 0) constant += weights.value_bias.segment(group * dv, dv);
    if (weights.key_bias.size() > 0)
      constant.noalias() -= weights.key_bias.segment(group * d, d) * readout;
    for (Index head = group * shape.group(); head < (group + 1) * shape.group(); ++head) {
      const auto output = weights.output.middleRows(head * dv, dv);
      shared.output.middleRows(head * d, d).noalias() = readout * output;
      if (has_constant) shared.output_bias.noalias() += constant * output;
    }
  }
  return result;
}

}  // namespace surfattn
