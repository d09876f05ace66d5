// surfattn layer 3: modifiers, the terms that change scores

#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <surfattn/detail/simd/term_rows.hpp>
#include <surfattn/terms/parameter.hpp>
#include <surfattn/terms/term.hpp>
#include <utility>

namespace surfattn {
namespace detail {

/// Calls row(i, scores of row i, record of row i) for the rows of a tile; the record is null where
/// there is none.
template <class Accumulator, class Row>
void for_each_row(const Tile& tile, simd::Tile<Accumulator> scores, simd::Tile<Accumulator> record,
                  const Row& row) {
  for (Index i = 0; i < tile.queries; ++i) {
    row(i, scores.data + i * scores.row_stride,
        record.data ? record.data + i * record.row_stride : nullptr);
  }
}

/// dS ← dS∘derivatives, where a pair without a gradient gets none whatever its derivative is.
template <class Accumulator>
void multiply_gradients(const Tile& tile, simd::Tile<Accumulator> derivatives,
                        simd::Tile<Accumulator> gradients) {
  for_each_row(tile, gradients, derivatives, [&](Index, Accumulator* row, Accumulator* factors) {
    simd::multiply_where_not_zero(factors, row, simd::padded<Accumulator>(tile.keys));
  });
}

struct BoundSoftCap {
  double cap;

  template <class Accumulator>
  void modify(const Tile& tile, simd::Tile<Accumulator> scores,
              simd::Tile<Accumulator> record) const {
    const Index padded_keys = simd::padded<Accumulator>(tile.keys);
    const auto limit = static_cast<Accumulator>(cap) * simd::log2_e<Accumulator>;
    for_each_row(tile, scores, record, [&](Index, Accumulator* row, Accumulator* derivatives) {
      if (derivatives) {
        simd::soft_cap_row<true>(row, limit, derivatives, padded_keys);
      } else {
        simd::soft_cap_row<false>(row, limit, derivatives, padded_keys);
      }
    });
  }

  template <class Accumulator>
  void differentiate(const Tile& tile, simd::Tile<Accumulator> record,
                     simd::Tile<Accumulator> gradients, ItemSums<Accumulator>) const {
    multiply_gradients(tile, record, gradients);
  }
};

template <class Result>
concept gives_value_and_derivative = requires(const Result& result) {
  result.value;
  result.derivative;
};

template <class Function>
struct BoundModifier {
  Function function;

  template <class Accumulator>
  void modify(const Tile& tile, simd::Tile<Accumulator> scores,
              simd::Tile<Accumulator> record) const {
    for_each_row(tile, scores, record, [&](Index i, Accumulator* row, Accumulator* derivatives) {
      Position position{tile.head, tile.first_query + i, tile.first_key};
      for (Index j = 0; j < tile.keys; ++j, ++position.key) {
        const auto result = function(row[j] * simd::ln_2<Accumulator>, std::as_const(position));
        static_assert(gives_value_and_derivative<decltype(result)>,
                      "surfattn: the function of a Modifier must return a ValueAndDerivative");
        row[j] = static_cast<Accumulator>(result.value) * simd::log2_e<Accumulator>;
        if (derivatives) derivatives[j] = static_cast<Accumulator>(result.derivative);
      }
    });
  }

  template <class Accumulator>
  void differentiate(const Tile& tile, simd::Tile<Accumulator> record,
                     simd::Tile<Accumulator> gradients, ItemSums<Accumulator>) const {
    multiply_gradients(tile, record, gradients);
  }
};

}  // namespace detail

/// S ← c·tanh(S/c): scores stay within ±c, natural units (Bello et al. 2016, arXiv:1611.09940, §5;
/// Gemma 2, arXiv:2408.00118). dS ← dS·(1 − tanh²(S/c)). c must be positive and finite.
struct SoftCap {
  double cap;

  constexpr explicit SoftCap(double limit) : cap(limit) {}

  detail::BoundSoftCap bind(const detail::Shape&, const detail::Require& require) const {
    require.positive("the cap of SoftCap", cap);
    return {cap};
  }
};

/// What a modifier's function returns: f(S) and f'(S).
template <class Scalar>
struct ValueAndDerivative {
  Scalar value{};
  Scalar derivative{};
};
template <class Scalar>
ValueAndDerivative(Scalar, Scalar) -> ValueAndDerivative<Scalar>;

/// A modifier of your own: S ← f(S, position), from one function that gives value and derivative,
///
///     Modifier{[](auto score, Position position) {
///       return ValueAndDerivative{score * score / 2, score};
///     }}
///
/// `score` is in natural units, the S of the equations, in the scalar type of the sums (float for
/// float), and so are the results; `position` holds query head, query and key. In the surface form
/// the score is the whole −‖q − k‖²/(2σ²) + log π (with KeyPrior::sdpa: q·k/σ²). The function
/// is called once for each pair of a tile that the masks do not leave empty, forward and again
/// backward, on any thread, hidden pairs included: what it gives for those is thrown away. It must
/// not throw. A value of −∞ gives weight 0, but only a mask hides the pair's value. The derivative
/// can be checked with check_gradient of surfattn/gradcheck.hpp.
template <class Function>
struct Modifier {
  Function function;

  explicit Modifier(Function value_and_derivative) : function(std::move(value_and_derivative)) {}

  detail::BoundModifier<Function> bind(const detail::Shape&, const detail::Require&) const {
    return {function};
  }
};

/// One factor for each query head: S ← τ_h·S, with gradient dτ_h = Σ_ij dS_ij·S_ij. (A larger
/// factor gives sharper weights: it is an inverse temperature.) In the surface form, where S is
/// −‖q − k‖²/(2σ²) + log π, the kernel of head h has the bandwidth σ/√τ_h. A view of a row or
/// column of Hq numbers; the gradient has its shape.
template <class Element>
class Temperature : public detail::TrainableTerm<Temperature<Element>, Element> {
  using Base = detail::TrainableTerm<Temperature<Element>, Element>;

 public:
  using Base::Base;

  Temperature bind(const detail::Shape& shape, const detail::Require& require) const {
    this->check_one_per_head(require, "Temperature", shape);
    return *this;
  }

  template <class Accumulator>
  void modify(const Tile& tile, detail::simd::Tile<Accumulator> scores,
              detail::simd::Tile<Accumulator> record) const {
    const Index padded_keys = detail::simd::padded<Accumulator>(tile.keys);
    detail::for_each_row(tile, scores, record, [&](Index, Accumulator* row, Accumulator* before) {
      if (before && this->wants_gradient()) std::copy(row, row + padded_keys, before);
      detail::simd::scale_row(row, padded_keys, factor<Accumulator>(tile.head));
    });
  }

  template <class Accumulator>
  void differentiate(const Tile& tile, detail::simd::Tile<Accumulator> record,
                     detail::simd::Tile<Accumulator> gradients,
                     detail::ItemSums<Accumulator> sums) const {
    const Index padded_keys = detail::simd::padded<Accumulator>(tile.keys);
    detail::for_each_row(
        tile, gradients, record, [&](Index, Accumulator* row, Accumulator* before) {
          if (this->wants_gradient())
            sums.sums[sums.member] += detail::simd::sum_of_row_products(row, before, tile.keys);
          detail::simd::scale_row(row, padded_keys, factor<Accumulator>(tile.head));
        });
  }

  Index sums_per_item(const detail::Shape& shape) const { return shape.group(); }
  bool wants_row_sums() const { return false; }
  bool wants_column_sums() const { return false; }

  template <class Accumulator>
  void finish_gradient(const detail::GradientSums<Accumulator>& sums) const {
    for (Index head = 0; head < sums.shape.query_heads; ++head) {
      detail::add_to_entry(detail::entry(this->gradient_, head),
                           sums.of_head(head, 0, 1) * detail::simd::ln_2<Accumulator>);
    }
  }

 private:
  template <class Accumulator>
  Accumulator factor(Index head) const {
    return static_cast<Accumulator>(detail::entry(this->parameters_, head));
  }
};

template <detail::StoredMatrix Derived>
explicit Temperature(const Derived&) -> Temperature<detail::scalar_t<Derived>>;

}  // namespace surfattn
