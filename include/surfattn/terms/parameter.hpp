// surfattn layer 3: the numbers that a term reads, and where their gradient goes

#pragma once

#include <string>
#include <surfattn/detail/require.hpp>
#include <surfattn/detail/view.hpp>
#include <surfattn/terms/term.hpp>
#include <type_traits>

namespace surfattn::detail {

/// The type of a forwarding reference to a matrix that would be gone before a view of it is used.
template <class T>
concept TemporaryMatrix = !std::is_lvalue_reference_v<T> && OwningMatrix<T>;

/// Base of a term with parameters: views of a matrix or vector of them, which must outlive the call,
/// and of where the backward pass writes its gradient.
template <class Term, class Element>
class TrainableTerm {
 public:
  using ParameterScalar = std::remove_const_t<Element>;

  template <StoredMatrix Derived>
  explicit TrainableTerm(const Derived& parameters) : parameters_(view(parameters)) {
    static_assert(is_supported_scalar_v<ParameterScalar>,
                  "surfattn: the parameters of a term must be float, double, long double or a "
                  "16-bit number of Eigen's");
  }

  /// A temporary would be gone before it is used.
  template <OwningMatrix Derived>
  explicit TrainableTerm(const Derived&&) = delete;

  /// The same term, told where the backward pass writes ∂loss/∂parameters: a matrix of their shape
  /// and scalar type, in any storage, which must outlive the call and overlap nothing else. It is
  /// overwritten. A forward pass leaves it alone.
  template <WritableMatrix Gradient>
  Term gradient_into(Gradient&& gradient) const {
    static_assert(std::is_same_v<scalar_t<Gradient>, ParameterScalar>,
                  "surfattn: the gradient of a term must be of the scalar type of its parameters");
    static_assert(!TemporaryMatrix<Gradient>,
                  "surfattn: the gradient of a term would go into a temporary matrix");
    return gradient_into(view(gradient));
  }

  Term gradient_into(MatrixView<ParameterScalar> gradient) const {
    Term term = static_cast<const Term&>(*this);
    term.gradient_ = gradient;
    return term;
  }

  /// Sets the gradient to 0, before a backward pass adds to it.
  void clear_gradient() const {
    for (Index i = 0; i < gradient_.rows; ++i) {
      for (Index j = 0; j < gradient_.cols; ++j) gradient_(i, j) = ParameterScalar(0);
    }
  }

  /// Rows and columns of the parameters, and so of their gradient.
  Extent parameter_extent() const { return extent(parameters_); }

  bool wants_gradient() const { return gradient_.data != nullptr; }

 protected:
  void check_gradient_shape(const Require& require, const char* name) const {
    if (!wants_gradient() || extent(gradient_) == parameter_extent()) return;
    require.shape(std::string("the gradient of ").append(name).c_str(), extent(gradient_),
                  parameter_extent(), "the shape of its parameters");
  }

  /// Checks that there is one number for each query head, in a row or in a column.
  void check_one_per_head(const Require& require, const char* name, const Shape& shape) const {
    const Extent actual = parameter_extent();
    if (actual != Extent{1, shape.query_heads} && actual != Extent{shape.query_heads, 1}) {
      require.fail(name, " must have one number for each query head, ",
                   words_of_either({1, shape.query_heads}, {shape.query_heads, 1}), ", but it is ",
                   actual);
    }
    check_gradient_shape(require, name);
  }

  MatrixView<const ParameterScalar> parameters_;
  MatrixView<ParameterScalar> gradient_{};
};

/// The number at `index` of a row or a column.
template <class Element>
Element& entry(MatrixView<Element> numbers, Index index) {
  return numbers.rows == 1 ? numbers(0, index) : numbers(index, 0);
}

/// Adds to a number of a gradient.
template <class Element, class Accumulator>
void add_to_entry(Element& entry, Accumulator added) {
  entry = static_cast<Element>(static_cast<Accumulator>(entry) + added);
}

/// The rows that belong to one sequence: all, or its part of the rows of a whole batch.
template <class Element>
MatrixView<Element> sequence_rows(MatrixView<Element> matrix, Index rows, Index first) {
  return matrix.rows == rows ? matrix : matrix.block_rows(first, rows);
}

/// A term whose gradient the returning functions give.
template <class T>
concept TrainableTermType = requires(const T& term,
                                     MatrixView<typename T::ParameterScalar> gradient) {
  { term.gradient_into(gradient) } -> std::same_as<T>;
  { term.parameter_extent() } -> std::same_as<Extent>;
  { term.wants_gradient() } -> std::same_as<bool>;
  term.clear_gradient();
};

template <class Term>
void clear_gradient(const Term& term) {
  if constexpr (requires { term.clear_gradient(); }) term.clear_gradient();
}

}  // namespace surfattn::detail
