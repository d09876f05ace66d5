// surfattn layer 6: from the weights of the surface form back to those of the standard form

#pragma once

#include <Eigen/SVD>
#include <algorithm>
#include <surfattn/weights.hpp>

namespace surfattn {

/// Weights of the standard form and how well they stand for those of the surface form.
template <class Scalar>
struct SplitWeights {
  StandardWeights<Scalar> weights;  ///< as many key/value heads as query heads
  /// ‖[A_h; g_h] − [Wq_h; bq_h]·Wk_hᵀ‖/‖[A_h; g_h]‖ in the Frobenius norm, 1 × H
  RowVector<Scalar> metric_error;
  /// ‖[B_h; r_h] − [Wv_h; bv_h]·Wo_h‖/‖[B_h; r_h]‖, 1 × H
  RowVector<Scalar> readout_error;
};

namespace detail {

/// M ≈ left·right of rank `rank` at most, both factors with the roots of the singular values; and
/// the relative error.
template <class Scalar>
struct LowRank {
  Matrix<Scalar> left, right;
  Scalar error;
};

template <class Scalar>
LowRank<Scalar> low_rank(const Matrix<Scalar>& matrix, Index rank) {
  LowRank<Scalar> result{Matrix<Scalar>::Zero(matrix.rows(), rank),
                         Matrix<Scalar>::Zero(rank, matrix.cols()), Scalar(0)};
  const Eigen::BDCSVD<Matrix<Scalar>> svd(matrix, Eigen::ComputeThinU | Eigen::ComputeThinV);
  const auto& values = svd.singularValues();
  const Index kept = std::min(rank, values.size());
  const auto roots = values.head(kept).cwiseSqrt().eval();
  result.left.leftCols(kept) = svd.matrixU().leftCols(kept) * roots.asDiagonal();
  result.right.topRows(kept) = roots.asDiagonal() * svd.matrixV().leftCols(kept).transpose();
  const Scalar whole = values.norm();
  if (whole > Scalar(0)) result.error = values.tail(values.size() - kept).norm() / whole;
  return result;
}

/// One matrix over one row, which is 0 where it is absent.
template <class Scalar, class Top, class Row>
Matrix<Scalar> stacked(const Top& top, const Row& row, bool present) {
  Matrix<Scalar> whole = Matrix<Scalar>::Zero(top.rows() + (present ? 1 : 0), top.cols());
  whole.topRows(top.rows()) = top;
  if (present) whole.row(top.rows()) = row;
  return whole;
}

}  // namespace detail

/// The standard layer of the given widths that is nearest to a layer in the surface form, head by
/// head, by truncated singular value decomposition (Eckart and Young 1936): of [A_h; g_h], the
/// metric over its bias, into [Wq_h; bq_h]·Wk_hᵀ, and of [B_h; r_h] into [Wv_h; bv_h]·Wo_h.
///
/// d, the width of a head's queries and keys, and dv, that of its values, are ranks: exact, up to
/// rounding, for weights that `merge` made of heads no wider, and for every layer from d =
/// min(D + 1, Dy) and dv = min(Dy + 1, Dout) on. The errors are those of the matrices, relative; the
/// layer's own follows from its inputs. Allocates its result. Time O(H·(D·Dy² + Dy·Dout²)). Errors:
/// weights whose shapes do not fit together, a width below 1.
template <class Scalar>
SplitWeights<Scalar> split(const SurfaceWeights<Scalar>& surface, Index head_dim, Index value_dim) {
  constexpr detail::Require require("split");
  const Index width = detail::surface_width(surface, require), heads = surface.heads;
  if (head_dim < 1 || value_dim < 1) {
    require.fail("head_dim and value_dim must be positive, but are ", head_dim, " and ", value_dim);
  }
  const bool has_metric_bias = surface.metric_bias.size() > 0,
             has_readout_bias = surface.readout_bias.size() > 0;
  const Index x_width = surface.metric.rows(), out_width = surface.readout.cols();
  SplitWeights<Scalar> split;
  StandardWeights<Scalar>& weights = split.weights;
  weights.query.resize(x_width, heads * head_dim);
  weights.key.resize(width, heads * head_dim);
  weights.value.resize(width, heads * value_dim);
  weights.output.resize(heads * value_dim, out_width);
  if (has_metric_bias) weights.query_bias.resize(heads * head_dim);
  if (has_readout_bias) weights.value_bias.resize(heads * value_dim);
  weights.output_bias = surface.output_bias;
  weights.heads = {.query = heads};
  weights.scale = surface.scale;
  split.metric_error.resize(heads);
  split.readout_error.resize(heads);
  for (Index h = 0; h < heads; ++h) {
    const RowVector<Scalar> none;
    const auto metric = detail::low_rank<Scalar>(
        detail::stacked<Scalar>(
            surface.metric.middleCols(h * width, width),
            has_metric_bias ? RowVector<Scalar>(surface.metric_bias.segment(h * width, width))
                            : none,
            has_metric_bias),
        head_dim);
    weights.query.middleCols(h * head_dim, head_dim) = metric.left.topRows(x_width);
    weights.key.middleCols(h * head_dim, head_dim) = metric.right.transpose();
    if (has_metric_bias)
      weights.query_bias.segment(h * head_dim, head_dim) = metric.left.row(x_width);
    split.metric_error[h] = metric.error;
    const auto readout = detail::low_rank<Scalar>(
        detail::stacked<Scalar>(
            surface.readout.middleRows(h * width, width),
            has_readout_bias ? RowVector<Scalar>(surface.readout_bias.row(h)) : none,
            has_readout_bias),
        value_dim);
    weights.value.middleCols(h * value_dim, value_dim) = readout.left.topRows(width);
    weights.output.middleRows(h * value_dim, value_dim) = readout.right;
    if (has_readout_bias)
      weights.value_bias.segment(h * value_dim, value_dim) = readout.left.row(width);
    split.readout_error[h] = readout.error;
  }
  return split;
}

}  // namespace surfattn
