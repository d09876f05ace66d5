// surfattn layer 6: normalisation of the rows of a matrix, or of each head's part of them, forward
// and backward

#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <surfattn/detail/require.hpp>
#include <surfattn/types.hpp>
#include <utility>

/// Every norm here has one form. For a block x of n columns (a whole row, or a head's part of it):
///
///     x̂ = r·(x − m),   y = gain∘x̂ + bias,
///     layer: m = mean x,  r = 1/√(mean (x − m)² + ε)
///     rms:   m = 0,       r = 1/√(mean x² + ε)
///     l2:    m = 0,       r = 1/√(Σ x² + ε)
///
/// and one gradient: with u = gain∘dy and κ = 1/n (layer, rms) or 1 (l2),
///
///     dx = r·(u − [layer] mean u − x̂·κ·Σ u∘x̂),   dgain = Σ dy∘x̂,   dbias = Σ dy.
///
/// Where ε = 0 and the block has no extent, r is 0: it gives its bias and has gradient 0. Squares are
/// taken in the type of the matrix, so numbers beyond the square root of its range count as infinite,
/// with r = 0, and those below that of its smallest number as 0.
namespace surfattn {

/// Which norm: none leaves its input as it is.
enum class Norm { none, layer, rms, l2 };

/// Options of the norms.
struct NormOptions {
  /// ε, added to the mean (layer, rms) or the sum (l2) of squares; 1e-5 for layer_norm and
  /// rms_norm, 1e-12 for l2_normalize when not given
  std::optional<double> epsilon = {};
  Index heads = 1;  ///< each of so many equal blocks of columns is normalised by itself
};

/// What a norm multiplies by and adds afterwards. Each has one number for each column, or one for
/// each column of a head, shared by all heads; size 0: absent.
template <class Scalar>
struct NormWeights {
  RowVector<Scalar> gain = {};
  RowVector<Scalar> bias = {};
};

/// Gradients of a loss with respect to a norm's input and weights, each of its input's shape.
template <class Scalar>
struct NormGradients {
  Matrix<Scalar> x;
  NormWeights<Scalar> weights;
};

namespace detail {

/// A block of one row, its numbers `Stride` apart; with Stride 1 Eigen vectorises what is done to
/// it.
template <class Scalar, int Stride>
using NormBlock = Eigen::Map<
    std::conditional_t<std::is_const_v<Scalar>,
                       const Eigen::Array<std::remove_const_t<Scalar>, 1, Eigen::Dynamic>,
                       Eigen::Array<Scalar, 1, Eigen::Dynamic>>,
    Eigen::Unaligned, Eigen::InnerStride<Stride>>;

template <int Stride, class Scalar>
NormBlock<Scalar, Stride> norm_block(MatrixView<Scalar> view, Index row, Index first, Index width) {
  return {view.row(row) + first * view.col_stride, width,
          Eigen::InnerStride<Stride>(view.col_stride)};
}

/// Calls `use` with the stride of all views if it is 1, so that their blocks are vectorised, or
/// else with Eigen::Dynamic.
template <class Use, class... Scalars>
void with_norm_stride(const Use& use, MatrixView<Scalars>... views) {
  if (((views.col_stride == 1) && ...)) {
    use(std::integral_constant<int, 1>());
  } else {
    use(std::integral_constant<int, Eigen::Dynamic>());
  }
}

/// The sizes of a norm and what it normalises with, checked.
template <class Scalar>
struct NormProblem {
  using Numbers = Eigen::Map<const Eigen::Array<Scalar, 1, Eigen::Dynamic>>;

  Index rows = 0, cols = 0, heads = 1;
  Scalar epsilon{};
  const RowVector<Scalar>* gain = nullptr;
  const RowVector<Scalar>* bias = nullptr;

  Index width() const { return cols / heads; }

  /// Where the numbers of a head begin among weights that heads may share.
  Index first_weight(const RowVector<Scalar>& weights, Index head) const {
    return weights.size() == cols ? head * width() : 0;
  }
  Numbers of_head(const RowVector<Scalar>& weights, Index head) const {
    return {weights.data() + first_weight(weights, head), width()};
  }
};

/// Checks the weights and the ε of a norm: `name` is where the caller put the weights, and `because` the
/// matrix that gives the normalised rows their width, of so many heads.
template <class Scalar>
void require_norm(const Require& require, const char* name, const NormWeights<Scalar>& weights,
                  std::optional<double> epsilon, Index heads, const char* because, Extent matrix) {
  if (epsilon && !(*epsilon >= 0 && std::isfinite(*epsilon)))
    require.fail("epsilon must be finite and not negative, but is ", *epsilon);
  const Index cols = matrix.cols;
  for (const auto& [part, size] :
       {std::pair{".gain", weights.gain.size()}, std::pair{".bias", weights.bias.size()}}) {
    if (size == 0 || size == cols || size == cols / heads) continue;
    require.fail(name, part, " is 1×", size, " but must be 1×", cols,
                 (heads > 1 ? ", 1×" + std::to_string(cols / heads) : ""),
                 ", or empty for none, because ", because, " is ", matrix);
  }
}

template <Norm kind, class Scalar>
NormProblem<Scalar> norm_problem(Extent x, const NormWeights<Scalar>& weights,
                                 const NormOptions& options, const Require& require) {
  refuse_16_bits_at_compile_time<Scalar>();
  if (options.heads < 1 || x.cols % options.heads != 0) {
    require.fail("x is ", x, ", and its columns do not divide into ", options.heads, " heads");
  }
  require_norm(require, "weights", weights, options.epsilon, options.heads, "x", x);
  const double epsilon = options.epsilon.value_or(kind == Norm::l2 ? 1e-12 : 1e-5);
  return {x.rows,        x.cols,       options.heads, static_cast<Scalar>(epsilon),
          &weights.gain, &weights.bias};
}

/// m and r of one block.
template <class Scalar>
struct NormStatistics {
  Scalar mean{};
  Scalar factor{};
};

template <Norm kind, class Block, class Scalar>
NormStatistics<Scalar> norm_statistics(const Block& x, Scalar epsilon) {
  NormStatistics<Scalar> statistics;
  const Scalar count = static_cast<Scalar>(x.size());
  if constexpr (kind == Norm::layer) statistics.mean = x.sum() / count;
  Scalar squares = (x - statistics.mean).square().sum();
  if constexpr (kind != Norm::l2) squares /= count;
  const Scalar variance = squares + epsilon;
  statistics.factor = variance == Scalar(0) ? Scalar(0) : 1 / std::sqrt(variance);
  return statistics;
}

/// y = gain∘x̂ + bias, block by block.
template <Norm kind, int Stride, class Scalar>
void norm_rows(const NormProblem<Scalar>& problem, MatrixView<const Scalar> x,
               MatrixView<Scalar> out) {
  const Index width = problem.width();
  for (Index i = 0; i < problem.rows; ++i) {
    for (Index head = 0; head < problem.heads && width > 0; ++head) {
      const auto from = norm_block<Stride>(x, i, head * width, width);
      auto to = norm_block<Stride>(out, i, head * width, width);
      const auto [mean, factor] = norm_statistics<kind>(from, problem.epsilon);
      to = (from - mean) * factor;
      if (problem.gain->size() > 0) to *= problem.of_head(*problem.gain, head);
      if (problem.bias->size() > 0) to += problem.of_head(*problem.bias, head);
    }
  }
}

/// Where the gradients of gain and bias go, 1×0 where they are absent.
template <class Scalar>
struct NormWeightSums {
  MatrixView<Scalar> gain;
  MatrixView<Scalar> bias;
};

/// The backward of one block. dgain and dbias are added to, before dx may overwrite dy.
template <Norm kind, class Scalar, class X, class Grad, class Out>
void norm_block_backward(const NormProblem<Scalar>& problem, Index head, const X& x,
                         const Grad& grad_out, NormWeightSums<Scalar> sums, Out& grad_x) {
  const auto sum_of = [&](MatrixView<Scalar> sum, const RowVector<Scalar>& weights) {
    return norm_block<Eigen::Dynamic>(sum, 0, problem.first_weight(weights, head), x.size());
  };
  const auto [mean, factor] = norm_statistics<kind>(x, problem.epsilon);
  const auto normalised = (x - mean) * factor;
  if (sums.gain.cols > 0) sum_of(sums.gain, *problem.gain) += grad_out * normalised;
  if (sums.bias.cols > 0) sum_of(sums.bias, *problem.bias) += grad_out;
  const auto pull_back = [&, factor = factor](const auto& scaled) {
    const Scalar count = static_cast<Scalar>(x.size());
    const Scalar along = (scaled * normalised).sum() / (kind == Norm::l2 ? Scalar(1) : count);
    const Scalar shift = kind == Norm::layer ? Scalar(scaled.sum() / count) : Scalar(0);
    grad_x = factor * (scaled - shift - normalised * along);
  };
  if (problem.gain->size() > 0) {
    pull_back(grad_out * problem.of_head(*problem.gain, head));
  } else {
    pull_back(grad_out);
  }
}

template <Norm kind, class X, class Out>
void norm_into(const char* function, const X& x, Out&& out, const NormWeights<scalar_t<X>>& weights,
               const NormOptions& options) {
  using Scalar = scalar_t<X>;
  check_inputs_at_compile_time<X>();
  check_outputs_at_compile_time<Scalar, Out>();
  const Require require(function);
  const auto& input = stored(x);
  const auto problem = norm_problem<kind>(extent(input), weights, options, require);
  require.shape("out", extent(out), extent(input), "the shape of x");
  const MatrixView<const Scalar> from = view(input);
  const MatrixView<Scalar> to = view(out);
  with_norm_stride(
      [&](auto stride) { norm_rows<kind, decltype(stride)::value>(problem, from, to); }, from, to);
}

template <Norm kind, class X, class GradOut, class GradX, class GradGain, class GradBias>
void norm_backward_into(const char* function, const X& x, const GradOut& grad_out, GradX&& grad_x,
                        GradGain&& grad_gain, GradBias&& grad_bias,
                        const NormWeights<scalar_t<X>>& weights, const NormOptions& options) {
  using Scalar = scalar_t<X>;
  check_inputs_at_compile_time<X, GradOut>();
  check_outputs_at_compile_time<Scalar, GradX, GradGain, GradBias>();
  const Require require(function);
  const auto& input = stored(x);
  const auto& upstream = stored(grad_out);
  const auto problem = norm_problem<kind>(extent(input), weights, options, require);
  require.shape("grad_out", extent(upstream), extent(input), "the shape of x");
  require.shape("grad_x", extent(grad_x), extent(input), "the shape of x");
  require.shape("grad_gain", extent(grad_gain), extent(weights.gain), "the shape of weights.gain");
  require.shape("grad_bias", extent(grad_bias), extent(weights.bias), "the shape of weights.bias");
  grad_gain.setZero();
  grad_bias.setZero();
  const NormWeightSums<Scalar> sums{view(grad_gain), view(grad_bias)};
  const MatrixView<const Scalar> from = view(input), gradient = view(upstream);
  const MatrixView<Scalar> to = view(grad_x);
  const Index width = problem.width();
  with_norm_stride(
      [&](auto stride) {
        constexpr int step = decltype(stride)::value;
        for (Index i = 0; i < problem.rows; ++i) {
          for (Index head = 0; head < problem.heads && width > 0; ++head) {
            auto result = norm_block<step>(to, i, head * width, width);
            norm_block_backward<kind>(problem, head, norm_block<step>(from, i, head * width, width),
                                      norm_block<step>(gradient, i, head * width, width), sums,
                                      result);
          }
        }
      },
      from, gradient, to);
}

template <Norm kind, class X>
Matrix<scalar_t<X>> norm(const char* function, const X& x, const NormWeights<scalar_t<X>>& weights,
                         const NormOptions& options) {
  check_inputs_at_compile_time<X>();
  Matrix<scalar_t<X>> out(x.rows(), x.cols());
  norm_into<kind>(function, x, out, weights, options);
  return out;
}

template <Norm kind, class X, class GradOut>
NormGradients<scalar_t<X>> norm_backward(const char* function, const X& x, const GradOut& grad_out,
                                         const NormWeights<scalar_t<X>>& weights,
                                         const NormOptions& options) {
  using Scalar = scalar_t<X>;
  check_inputs_at_compile_time<X, GradOut>();
  NormGradients<Scalar> gradients{
      Matrix<Scalar>(x.rows(), x.cols()),
      {RowVector<Scalar>(weights.gain.size()), RowVector<Scalar>(weights.bias.size())}};
  norm_backward_into<kind>(function, x, grad_out, gradients.x, gradients.weights.gain,
                           gradients.weights.bias, weights, options);
  return gradients;
}

}  // namespace detail

/// Layer normalisation (Ba, Kiros and Hinton 2016, arXiv:1607.06450): each row of x, or each head's
/// block of its columns,
///
///     y = gain∘(x − mean x)/√(mean (x − mean x)² + ε) + bias.
///
/// x: T × (H·n), any Eigen expression of float, double or long double in any storage; returns its
/// shape. A constant row gives its bias; a NaN reaches its own block alone; an x without rows or
/// columns gives an empty result. Time O(T·H·n), allocates the result. Errors: columns that do not
/// divide into heads, gain or bias of another size than H·n or n, an ε that is negative or not
/// finite.
template <class X>
auto layer_norm(const X& x, const NormWeights<detail::scalar_t<X>>& weights = {},
                const NormOptions& options = {}) {
  return detail::norm<Norm::layer>("layer_norm", x, weights, options);
}

/// `layer_norm` into `out`, of x's shape and any storage, without allocating. `out` may be x.
template <class X, class Out>
void layer_norm_into(const X& x, Out&& out, const NormWeights<detail::scalar_t<X>>& weights = {},
                     const NormOptions& options = {}) {
  detail::norm_into<Norm::layer>("layer_norm", x, out, weights, options);
}

/// Gradients of a loss with respect to x, gain and bias, given grad_out = ∂loss/∂y: the formula
/// above. Recomputes mean and variance from x. Allocates the gradients. Errors as for the forward.
template <class X, class GradOut>
auto layer_norm_backward(const X& x, const GradOut& grad_out,
                         const NormWeights<detail::scalar_t<X>>& weights = {},
                         const NormOptions& options = {}) {
  return detail::norm_backward<Norm::layer>("layer_norm_backward", x, grad_out, weights, options);
}

/// The same without allocating; `grad_gain` and `grad_bias` are of the shapes of gain and bias.
/// `grad_x` may be `grad_out`; otherwise nothing may overlap.
template <class X, class GradOut, class GradX, class GradGain, class GradBias>
void layer_norm_backward_into(const X& x, const GradOut& grad_out, GradX&& grad_x,
                              GradGain&& grad_gain, GradBias&& grad_bias,
                              const NormWeights<detail::scalar_t<X>>& weights = {},
                              const NormOptions& options = {}) {
  detail::norm_backward_into<Norm::layer>("layer_norm_backward", x, grad_out, grad_x, grad_gain,
                                          grad_bias, weights, options);
}

/// Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467):
///
///     y = gain∘x/√(mean x² + ε) + bias.
///
/// Shapes, cost and errors as for `layer_norm`.
template <class X>
auto rms_norm(const X& x, const NormWeights<detail::scalar_t<X>>& weights = {},
              const NormOptions& options = {}) {
  return detail::norm<Norm::rms>("rms_norm", x, weights, options);
}

/// `rms_norm` into `out`, of x's shape and any storage, without allocating. `out` may be x.
template <class X, class Out>
void rms_norm_into(const X& x, Out&& out, const NormWeights<detail::scalar_t<X>>& weights = {},
                   const NormOptions& options = {}) {
  detail::norm_into<Norm::rms>("rms_norm", x, out, weights, options);
}

/// Gradients of `rms_norm`, as for `layer_norm_backward`.
template <class X, class GradOut>
auto rms_norm_backward(const X& x, const GradOut& grad_out,
                       const NormWeights<detail::scalar_t<X>>& weights = {},
                       const NormOptions& options = {}) {
  return detail::norm_backward<Norm::rms>("rms_norm_backward", x, grad_out, weights, options);
}

/// The same without allocating, as for `layer_norm_backward_into`.
template <class X, class GradOut, class GradX, class GradGain, class GradBias>
void rms_norm_backward_into(const X& x, const GradOut& grad_out, GradX&& grad_x,
                            GradGain&& grad_gain, GradBias&& grad_bias,
                            const NormWeights<detail::scalar_t<X>>& weights = {},
                            const NormOptions& options = {}) {
  detail::norm_backward_into<Norm::rms>("rms_norm_backward", x, grad_out, grad_x, grad_gain,
                                        grad_bias, weights, options);
}

/// Normalisation to length 1:
///
///     y = gain∘x/√(Σ x² + ε) + bias.
///
/// Keys normalised so, after their projection and head by head, lie on a sphere: the surface form
/// under the uniform prior then has the weights of scaled dot-product attention. Shapes, cost and
/// errors as for `layer_norm`.
template <class X>
auto l2_normalize(const X& x, const NormWeights<detail::scalar_t<X>>& weights = {},
                  const NormOptions& options = {}) {
  return detail::norm<Norm::l2>("l2_normalize", x, weights, options);
}

/// `l2_normalize` into `out`, of x's shape and any storage, without allocating. `out` may be x.
template <class X, class Out>
void l2_normalize_into(const X& x, Out&& out, const NormWeights<detail::scalar_t<X>>& weights = {},
                       const NormOptions& options = {}) {
  detail::norm_into<Norm::l2>("l2_normalize", x, out, weights, options);
}

/// Gradients of `l2_normalize`, as for `layer_norm_backward`.
template <class X, class GradOut>
auto l2_normalize_backward(const X& x, const GradOut& grad_out,
                           const NormWeights<detail::scalar_t<X>>& weights = {},
                           const NormOptions& options = {}) {
  return detail::norm_backward<Norm::l2>("l2_normalize_backward", x, grad_out, weights, options);
}

/// The same without allocating, as for `layer_norm_backward_into`.
template <class X, class GradOut, class GradX, class GradGain, class GradBias>
void l2_normalize_backward_into(const X& x, const GradOut& grad_out, GradX&& grad_x,
                                GradGain&& grad_gain, GradBias&& grad_bias,
                                const NormWeights<detail::scalar_t<X>>& weights = {},
                                const NormOptions& options = {}) {
  detail::norm_backward_into<Norm::l2>("l2_normalize_backward", x, grad_out, grad_x, grad_gain,
                                       grad_bias, weights, options);
}

/// The norm of that kind: `layer_norm`, `rms_norm`, `l2_normalize`, or x itself.
template <class X>
Matrix<detail::scalar_t<X>> normalize(Norm norm, const X& x,
                                      const NormWeights<detail::scalar_t<X>>& weights = {},
                                      const NormOptions& options = {}) {
  switch (norm) {
    case Norm::layer:
      return layer_norm(x, weights, options);
    case Norm::rms:
      return rms_norm(x, weights, options);
    case Norm::l2:
      return l2_normalize(x, weights, options);
    case Norm::none:
      break;
  }
  return x;
}

/// Gradients of `normalize`, as for `layer_norm_backward`.
template <class X, class GradOut>
NormGradients<detail::scalar_t<X>> normalize_backward(
    Norm norm, const X& x, const GradOut& grad_out,
    const NormWeights<detail::scalar_t<X>>& weights = {}, const NormOptions& options = {}) {
  switch (norm) {
    case Norm::layer:
      return layer_norm_backward(x, grad_out, weights, options);
    case Norm::rms:
      return rms_norm_backward(x, grad_out, weights, options);
    case Norm::l2:
      return l2_normalize_backward(x, grad_out, weights, options);
    case Norm::none:
      break;
  }
  return {grad_out, {}};
}

}  // namespace surfattn
