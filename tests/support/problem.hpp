// Random attention problems and the masks they are run with.
#pragma once

#include <random>
#include <surfattn/reference.hpp>
#include <surfattn/surfattn.hpp>
#include <variant>

#include "support/random.hpp"

namespace surfattn::test {

struct Sizes {
  Index queries, keys, head_dim, value_dim;
  Index query_heads = 1, key_value_heads = 1;
};

template <class Scalar>
struct Problem {
  Sizes sizes;
  Matrix<Scalar> queries, keys, values, grad_out, grad_projection, log_prior, grad_log_sum_exp;
  Heads heads;

  Problem(const Sizes& s, std::mt19937_64& random)
      : sizes(s),
        queries(random_matrix<Scalar>(s.queries, s.query_heads * s.head_dim, random)),
        keys(random_matrix<Scalar>(s.keys, s.key_value_heads * s.head_dim, random)),
        values(random_matrix<Scalar>(s.keys, s.key_value_heads * s.value_dim, random)),
        grad_out(random_matrix<Scalar>(s.queries, s.query_heads * s.value_dim, random)),
        grad_projection(random_matrix<Scalar>(s.queries, s.query_heads * s.head_dim, random)),
        log_prior(random_matrix<Scalar>(s.keys, s.key_value_heads, random)),
        grad_log_sum_exp(random_matrix<Scalar>(s.queries, s.query_heads, random)),
        heads{s.query_heads, s.key_value_heads} {}
};

enum class MaskKind {
  none,
  causal_top_left,
  causal_bottom_right,
  window,
  key_lengths,
  dense,
  conjunction
};
inline constexpr MaskKind all_masks[] = {
    MaskKind::none,       MaskKind::causal_top_left, MaskKind::causal_bottom_right,
    MaskKind::window,     MaskKind::key_lengths,     MaskKind::dense,
    MaskKind::conjunction};

/// What query i sees, pair by pair, written from the definitions.
inline bool sees(MaskKind kind, Index i, Index j, Index queries, Index keys) {
  const Index from_end = i + keys - queries;
  switch (kind) {
    case MaskKind::none:
      return true;
    case MaskKind::causal_top_left:
      return j <= i;
    case MaskKind::causal_bottom_right:
      return j <= from_end;
    case MaskKind::window:
      return from_end - 5 <= j && j <= from_end + 2;
    case MaskKind::key_lengths:
      return j < keys - keys / 3;
    case MaskKind::dense:
      return (i * 7 + j * 5) % 11 < 6;
    case MaskKind::conjunction:
      return (i * 7 + j * 5) % 11 < 6 && j <= i && j < keys - keys / 3;
  }
  return false;
}

inline reference::Mask dense_mask(MaskKind kind, Index queries, Index keys) {
  if (kind == MaskKind::none) return {};
  reference::Mask mask(queries, keys);
  for (Index i = 0; i < queries; ++i) {
    for (Index j = 0; j < keys; ++j) mask(i, j) = sees(kind, i, j, queries, keys);
  }
  return mask;
}

/// A mask that gives each query a run of keys, one of the library's chosen at run time: the engine is compiled once for all of
/// them, which the tests of masks compile it for one by one.
class RunMask {
 public:
  template <class Mask>
  explicit RunMask(const Mask& mask) : mask_(mask) {}

  struct Bound {
    static constexpr bool is_monotone = true;
    std::variant<detail::CausalRange, detail::WindowRange, detail::LengthRange> mask;

    KeyRange range(Index query) const {
      return std::visit([query](const auto& bound) { return bound.range(query); }, mask);
    }
  };

  Bound bind(const detail::Shape& shape, const detail::Require& require) const {
    return std::visit([&](const auto& mask) { return Bound{mask.bind(shape, require)}; }, mask_);
  }

 private:
  std::variant<Causal, SlidingWindow, KeyLengths> mask_;
};

/// Calls `use` with terms for that mask.
template <class Use>
auto with_terms(MaskKind kind, Index queries, Index keys, Use&& use) {
  const RunMask lengths(KeyLengths{keys - keys / 3});
  const auto dense = dense_mask(MaskKind::dense, queries, keys);
  switch (kind) {
    case MaskKind::causal_top_left:
      return use(RunMask(Causal{Align::top_left}));
    case MaskKind::causal_bottom_right:
      return use(RunMask(Causal{Align::bottom_right}));
    case MaskKind::window:
      return use(RunMask(SlidingWindow{.left = 5, .right = 2, .align = Align::bottom_right}));
    case MaskKind::key_lengths:
      return use(lengths);
    case MaskKind::dense:
      return use(BoolMask{dense});
    case MaskKind::conjunction:
      return use(BoolMask{dense}, RunMask(Causal{Align::top_left}), lengths);
    case MaskKind::none:
      break;
  }
  return use();
}

}  // namespace surfattn::test
