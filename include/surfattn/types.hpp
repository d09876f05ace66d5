// surfattn layer 1: index and matrix types, and what the public functions return

#pragma once

#include <optional>
#include <surfattn/config.hpp>
#include <tuple>
#include <type_traits>

namespace surfattn {

/// Signed, 64-bit on every 64-bit target: the number of scores Tq·Tk passes 2³¹ easily.
using Index = Eigen::Index;

/// What the returning functions return: tokens are rows, and a token's numbers are contiguous.
template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class Scalar>
using RowVector = Eigen::Matrix<Scalar, 1, Eigen::Dynamic, Eigen::RowMajor>;

/// The scalar in which sums over `Scalar` are formed: float where 16 bits are stored.
template <class Scalar>
struct accumulator {
  using type = Scalar;
};
template <>
struct accumulator<Eigen::half> {
  using type = float;
};
template <>
struct accumulator<Eigen::bfloat16> {
  using type = float;
};
template <class Scalar>
using accumulator_t = typename accumulator<Scalar>::type;

/// The scalars that the engine computes with. Any other runs through surfattn/reference.hpp.
template <class Scalar>
inline constexpr bool is_supported_scalar_v =
    std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double> ||
    std::is_same_v<Scalar, long double> || std::is_same_v<Scalar, Eigen::half> ||
    std::is_same_v<Scalar, Eigen::bfloat16>;

/// How the columns divide into heads: head h is the h-th block of columns. With fewer key/value
/// heads than query heads (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245), query
/// head h reads key/value head h / (query / key_value), and `query` is a multiple of `key_value`.
struct Heads {
  Index query = 1;  ///< number of query heads, Hq
  /// number of key/value heads, Hkv; as many as query heads when not given
  std::optional<Index> key_value = {};
};

/// In the place of values: the value of a key is its own first `columns` numbers, of each head, and
/// the rest of the key is not read out: dv = columns ≤ d. One matrix is then keys and values,
/// packed once, and its gradient is one. So in attention to a shared latent with a position
/// appended to it (DeepSeek-V2 2024, arXiv:2405.04434, section 2.1).
struct LeftColumns {
  Index columns;
};

/// The result of a forward pass, which is all that the backward pass needs besides the inputs.
template <class Scalar>
struct Forward {
  Matrix<Scalar> out;  ///< Tq × (Hq·dv)
  /// Tq × Hq, natural logarithm; −∞ where a query sees no key
  Matrix<accumulator_t<Scalar>> log_sum_exp;
};

/// The gradient of a loss that depends on both results of a forward pass: given to a backward pass
/// in the place of grad_out. A Forward may hold it as well. References, to be used within the call.
template <class Out, class LogSumExp>
struct ForwardGradients {
  const Out& out;  ///< ∂loss/∂out, Tq × (Hq·dv)
  /// ∂loss/∂log_sum_exp, Tq × Hq; not read where a query sees no key
  const LogSumExp& log_sum_exp;
};
template <class Out, class LogSumExp>
ForwardGradients(const Out&, const LogSumExp&) -> ForwardGradients<Out, LogSumExp>;

/// Gradients of a loss with respect to the inputs of `attention`, each of its input's shape.
template <class Scalar>
struct AttentionGradients {
  Matrix<Scalar> queries;  ///< Tq × (Hq·d)
  Matrix<Scalar> keys;     ///< Tk × (Hkv·d)
  Matrix<Scalar> values;   ///< Tk × (Hkv·dv); of no size where they are LeftColumns of the keys
};

/// `Gradients`, and those of the parameters of each trainable term, in the order in which the terms
/// are listed and each of its parameters' shape: std::get<0>(gradients.terms).
template <class Gradients, class... Matrices>
struct WithTermGradients : Gradients {
  std::tuple<Matrices...> terms;
};

/// Gradients of a loss with respect to the inputs of `project`.
template <class Scalar>
struct SurfaceGradients {
  Matrix<Scalar> queries;             ///< Tq × (Hq·d)
  Matrix<Scalar> keys;                ///< Tk × (Hkv·d), through the scores and through the values
  accumulator_t<Scalar> bandwidth{};  ///< ∂loss/∂σ
  /// Tk × Hkv, or Tk × 1 where one explicit prior serves all heads
  Matrix<accumulator_t<Scalar>> log_prior;
};

}  // namespace surfattn
