// surfattn layer 1: run-time options of the public functions

#pragma once

#include <optional>
#include <surfattn/detail/view.hpp>
#include <surfattn/sequences.hpp>
#include <surfattn/types.hpp>

namespace surfattn {

class Executor;

/// Options of the standard form.
struct Options {
  std::optional<double> scale = {};  ///< β, multiplies q·k; 1/√d when not given
  Heads heads = {};                  ///< how the columns divide into heads
  /// who runs the tasks of the call; the calling thread alone where there is none
  Executor* executor = nullptr;
  Sequences sequences = {};  ///< how the rows divide into sequences; all are one by default
};

/// The prior π of each key on the surface: how much a query counts on it before any distance is
/// measured.
///
/// `uniform` and `sdpa` are the two named choices. An explicit prior is made from a column of
/// log-weights, Tk × 1 (shared by all heads) or Tk × Hkv, of the scalar type of the queries; it is
/// a view, so the matrix must outlive the prior and its copies.
class KeyPrior {
 public:
  /// log π_j = 0: a Nadaraya–Watson estimate with a Gaussian kernel
  static const KeyPrior uniform;
  /// log π_j = β‖k_j‖²/2: the weights are those of scaled dot-product attention
  static const KeyPrior sdpa;

  /// Implicit, so that `.prior = log_weights` reads as it should.
  template <detail::DenseMatrix Derived>
  KeyPrior(const Derived& log_weights)
      : kind_(Kind::explicit_weights), scalar_tag_(&tag<typename Derived::Scalar>) {
    static_assert(detail::StoredMatrix<Derived>,
                  "surfattn: an explicit key prior is a view: pass a stored matrix of log-weights, "
                  "not an expression");
    const auto weights = detail::view(log_weights);
    weights_ = {weights.data, weights.rows, weights.cols, weights.row_stride, weights.col_stride};
  }

  /// A temporary matrix would be gone before the prior is used.
  template <detail::OwningMatrix Derived>
  KeyPrior(const Derived&&) = delete;

  bool is_sdpa() const { return kind_ == Kind::sdpa; }
  bool is_explicit() const { return kind_ == Kind::explicit_weights; }

  Index rows() const { return weights_.rows; }
  Index cols() const { return weights_.cols; }

  template <class Scalar>
  bool holds() const {
    return scalar_tag_ == &tag<Scalar>;
  }

  /// The explicit log-weights; the caller has checked that they are of this scalar type.
  template <class Scalar>
  detail::MatrixView<const Scalar> log_weights() const {
    return {static_cast<const Scalar*>(weights_.data), weights_.rows, weights_.cols,
            weights_.row_stride, weights_.col_stride};
  }

 private:
  enum class Kind { uniform, sdpa, explicit_weights };
  struct ErasedView {
    const void* data = nullptr;
    Index rows = 0, cols = 0, row_stride = 0, col_stride = 0;
  };

  constexpr explicit KeyPrior(Kind kind) : kind_(kind) {}

  template <class Scalar>
  inline static constexpr char tag = 0;  // its address names the type, also where there is no RTTI

  Kind kind_;
  const char* scalar_tag_ = nullptr;
  ErasedView weights_;
};

inline constexpr KeyPrior KeyPrior::uniform{KeyPrior::Kind::uniform};
inline constexpr KeyPrior KeyPrior::sdpa{KeyPrior::Kind::sdpa};

/// Options of the surface form. β = 1/σ²: give `bandwidth` or `scale`, not both.
struct SurfaceOptions {
  std::optional<double> scale = {};  ///< β; 1/√d when neither is given
  Heads heads = {};                  ///< how the columns divide into heads
  /// who runs the tasks of the call; the calling thread alone where there is none
  Executor* executor = nullptr;
  Sequences sequences = {};  ///< how the rows divide into sequences; all are one by default
  std::optional<double> bandwidth = {};  ///< σ, in the units of the keys
  KeyPrior prior = KeyPrior::uniform;    ///< log π_j
};

}  // namespace surfattn
