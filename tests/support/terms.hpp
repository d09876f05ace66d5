// Terms of every kind with random parameters, composed at run time, and what the reference makes of them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <surfattn/reference_terms.hpp>
#include <surfattn/surfattn.hpp>
#include <variant>
#include <vector>

#include "support/problem.hpp"

namespace surfattn::test {

/// A modifier as a user writes one, different at every position.
struct Bend {
  template <class S>
  ValueAndDerivative<S> operator()(S score, const Position& position) const {
    using std::sin, std::cos;
    const S a = S(0.1) * S(1 + position.head + (position.query + 2 * position.key) % 3);
    return {score + a * sin(score), 1 + a * cos(score)};
  }
};

/// A term that does nothing.
struct Nothing {
  Nothing bind(const detail::Shape&, const detail::Require&) const { return {}; }
};

template <class... Terms>
struct TermList {
  using Variant = std::variant<Terms...>;
  using Bound = std::variant<decltype(std::declval<Terms>().bind(
      std::declval<detail::Shape>(), std::declval<detail::Require>()))...>;
};

template <class Scalar>
using AllTerms = TermList<Nothing, Causal, SlidingWindow, KeyLengths, BoolMask<bool>, SoftCap,
                          Temperature<Scalar>, Modifier<Bend>, AdditiveBias<Scalar>, Alibi<Scalar>,
                          RelativePositionBias<Scalar>, ForgetGate<Scalar>,
                          TimeDecay<Scalar, Scalar>, Sink<Scalar>, Dropout>;

/// A bound term chosen at run time. To the engine it is all kinds of term at once, and for each that
/// it is not it gives the neutral answer.
template <class Scalar>
class AnyBound {
 public:
  explicit AnyBound(typename AllTerms<Scalar>::Bound bound) : bound_(std::move(bound)) {}

  bool allows(Index head, Index query, Index key) const {
    return visit([&]<class T>(const T& term) {
      if constexpr (detail::Mask<T>) return detail::allows(term, head, query, key);
      return true;
    });
  }

  Coverage coverage(const Tile& tile) const {
    return visit([&]<class T>(const T& term) {
      if constexpr (detail::Mask<T>) return detail::coverage(term, tile);
      return Coverage::full;
    });
  }

  /// Masks have edges here and there: these say how tiles are cut and nothing more.
  Index next_edge(Index query) const {
    constexpr Index distance = 13;
    return visit([&]<class T>(const T&) {
      return detail::Mask<T> ? (query / distance + 1) * distance
                             : std::numeric_limits<Index>::max();
    });
  }

  template <class A>
  void modify(const Tile& tile, detail::simd::Tile<A> scores, detail::simd::Tile<A> record) const {
    visit([&]<class T>(const T& term) {
      if constexpr (detail::ScoreModifier<T>) term.modify(tile, scores, record);
    });
  }

  template <class A>
  void differentiate(const Tile& tile, detail::simd::Tile<A> record,
                     detail::simd::Tile<A> gradients, detail::ItemSums<A> sums) const {
    visit([&]<class T>(const T& term) {
      if constexpr (detail::ScoreModifier<T>) term.differentiate(tile, record, gradients, sums);
    });
  }

  template <class A>
  void add_to(const Tile& tile, detail::simd::Tile<A> scores) const {
    visit([&]<class T>(const T& term) {
      if constexpr (detail::ScoreBias<T>) term.add_to(tile, scores);
    });
  }

  template <class A>
  A logit(Index head) const {
    return visit([&]<class T>(const T& term) {
      if constexpr (detail::SoftmaxSink<T>) return term.template logit<A>(head);
      return -std::numeric_limits<A>::infinity();
    });
  }

  template <class A>
  void add_gradient(Index head, A gradient) const {
    visit([&]<class T>(const T& term) {
      if constexpr (detail::SoftmaxSink<T>) term.add_gradient(head, gradient);
    });
  }

  template <class A>
  void factors(const Position& first, Index keys, A* out) const {
    visit([&]<class T>(const T& term) {
      if constexpr (detail::WeightDropout<T>) {
        term.factors(first, keys, out);
      } else {
        std::fill(out, out + keys, A(1));
      }
    });
  }

  bool wants_gradient() const {
    return visit([]<class T>(const T& term) {
      if constexpr (detail::TrainableBound<T> || detail::SoftmaxSink<T>)
        return term.wants_gradient();
      return false;
    });
  }
  Index sums_per_item(const detail::Shape& shape) const {
    return visit([&]<class T>(const T& term) {
      if constexpr (detail::TrainableBound<T>) return term.sums_per_item(shape);
      return Index(0);
    });
  }
  bool wants_row_sums() const {
    return visit([]<class T>(const T& term) {
      if constexpr (detail::TrainableBound<T>) return term.wants_row_sums();
      return false;
    });
  }
  bool wants_column_sums() const {
    return visit([]<class T>(const T& term) {
      if constexpr (detail::TrainableBound<T>) return term.wants_column_sums();
      return false;
    });
  }
  bool adds_across_heads() const {
    return visit([]<class T>(const T& term) {
      if constexpr (detail::DirectTrainable<T>) return term.adds_across_heads();
      return false;
    });
  }
  bool adds_across_sequences() const {
    return visit([]<class T>(const T& term) {
      if constexpr (detail::DirectTrainable<T>) return term.adds_across_sequences();
      return false;
    });
  }
  template <class A>
  void add_gradient(const Tile& tile, detail::simd::Tile<A> gradients,
                    detail::ItemSums<A> sums) const {
    visit([&]<class T>(const T& term) {
      if constexpr (detail::TileTrainable<T>) term.add_gradient(tile, gradients, sums);
    });
  }
  template <class A>
  void finish_gradient(const detail::GradientSums<A>& sums) const {
    visit([&]<class T>(const T& term) {
      if constexpr (detail::TrainableBound<T>) term.finish_gradient(sums);
    });
  }

 private:
  template <class Use>
  auto visit(const Use& use) const {
    return std::visit(use, bound_);
  }

  typename AllTerms<Scalar>::Bound bound_;
};

/// A term chosen at run time.
template <class Scalar>
struct AnyTerm {
  typename AllTerms<Scalar>::Variant term;

  AnyBound<Scalar> bind(const detail::Shape& shape, const detail::Require& require) const {
    return std::visit([&](const auto& t) { return AnyBound<Scalar>(t.bind(shape, require)); },
                      term);
  }

  void clear_gradient() const {
    std::visit([](const auto& t) { detail::clear_gradient(t); }, term);
  }

  /// The same, told where its gradient goes if it has one.
  AnyTerm gradient_into(Matrix<Scalar>& gradient) const {
    return std::visit(
        [&]<class T>(const T& t) {
          if constexpr (detail::TrainableTermType<T>) return AnyTerm{t.gradient_into(gradient)};
          return AnyTerm{t};
        },
        term);
  }
};

enum class TermKind {
  causal_top_left,
  causal_bottom_right,
  window,
  key_lengths,
  bool_mask,
  soft_cap,
  temperature,
  modifier,
  bias,
  bias_of_heads,
  bias_row,
  bias_row_of_heads,
  bias_with_holes,
  alibi,
  relative_both_ways,
  relative_backwards,
  forget_gate,
  shared_forget_gate,
  time_decay,
  sink,
  dropout,
  count
};
inline constexpr int term_kinds = int(TermKind::count);

inline const char* name_of(TermKind kind) {
  constexpr std::array<const char*, std::size_t(term_kinds)> names{"causal top-left",
                                                                   "causal bottom-right",
                                                                   "window",
                                                                   "key lengths",
                                                                   "bool mask",
                                                                   "soft cap",
                                                                   "temperature",
                                                                   "modifier",
                                                                   "bias",
                                                                   "bias of heads",
                                                                   "bias row",
                                                                   "bias row of heads",
                                                                   "bias with holes",
                                                                   "alibi",
                                                                   "relative both ways",
                                                                   "relative backwards",
                                                                   "forget gate",
                                                                   "shared forget gate",
                                                                   "time decay",
                                                                   "sink",
                                                                   "dropout"};
  return names[std::size_t(kind)];
}

/// One term with parameters for a problem of given sizes. The term views the matrices here.
template <class Scalar>
struct TermCase {
  TermKind kind;
  Sizes sizes;
  Matrix<Scalar> parameters, gradient;
  Matrix<Scalar> query_times, key_times;
  reference::Mask mask;

  TermCase(TermKind wanted, const Sizes& s, std::mt19937_64& random) : kind(wanted), sizes(s) {
    const Index tq = s.queries, tk = s.keys, hq = s.query_heads;
    const auto normal = [&](Index rows, Index cols) {
      return random_matrix<Scalar>(rows, cols, random);
    };
    if ((kind == TermKind::forget_gate || kind == TermKind::shared_forget_gate) && tq > tk)
      kind = TermKind::alibi;
    switch (kind) {
      case TermKind::bool_mask:
        mask = dense_mask(MaskKind::dense, tq, tk);
        break;
      case TermKind::temperature:
        parameters = (normal(1, hq) * Scalar(0.3)).array() + 1;
        break;
      case TermKind::bias:
        parameters = normal(tq, tk);
        break;
      case TermKind::bias_of_heads:
        parameters = normal(tq, hq * tk);
        break;
      case TermKind::bias_row:
        parameters = normal(1, tk);
        break;
      case TermKind::bias_row_of_heads:
        parameters = normal(1, hq * tk);
        break;
      case TermKind::bias_with_holes:
        parameters = normal(tq, hq * tk);
        for (Index n = 0; n < parameters.size(); ++n) {
          if (random() % 3 == 0) parameters.data()[n] = -std::numeric_limits<Scalar>::infinity();
        }
        break;
      case TermKind::alibi:
        parameters = normal(1, hq) * Scalar(0.2);
        break;
      case TermKind::relative_both_ways:
      case TermKind::relative_backwards:
        parameters = normal(9, hq);
        break;
      case TermKind::forget_gate:
        parameters = cumulative_log_gates((normal(tk, hq) * Scalar(0.2)).eval());
        break;
      case TermKind::shared_forget_gate:
        parameters = cumulative_log_gates((normal(tk, 1) * Scalar(0.2)).eval());
        break;
      case TermKind::time_decay:
        parameters = normal(1, hq) * Scalar(0.3);
        query_times = normal(tq, 1);
        key_times = normal(tk, 1);
        break;
      case TermKind::sink:
        parameters = normal(1, hq);
        break;
      default:
        break;
    }
    gradient = Matrix<Scalar>::Constant(parameters.rows(), parameters.cols(),
                                        std::numeric_limits<Scalar>::quiet_NaN());
  }

  bool is_trainable() const { return parameters.cols() > 0; }
  Align align() const {
    return kind == TermKind::causal_top_left ? Align::top_left : Align::bottom_right;
  }
  Index offset() const { return sizes.keys - sizes.queries; }
  static constexpr Index max_distance = 12;
  static constexpr double cap = 1.5, probability = 0.375;
  static constexpr std::uint64_t dropout_seed = 0x123456789abcdefull, dropout_offset = 77;

  AnyTerm<Scalar> term() const {
    switch (kind) {
      case TermKind::causal_top_left:
      case TermKind::causal_bottom_right:
        return {Causal{align()}};
      case TermKind::window:
        return {SlidingWindow{.left = 5, .right = 2, .align = align()}};
      case TermKind::key_lengths:
        return {KeyLengths{sizes.keys - sizes.keys / 3}};
      case TermKind::bool_mask:
        return {BoolMask{mask}};
      case TermKind::soft_cap:
        return {SoftCap{cap}};
      case TermKind::temperature:
        return {Temperature{parameters}};
      case TermKind::modifier:
        return {Modifier{Bend{}}};
      case TermKind::alibi:
        return {Alibi{parameters, align()}};
      case TermKind::relative_both_ways:
      case TermKind::relative_backwards:
        return {RelativePositionBias{parameters,
                                     {.bidirectional = kind == TermKind::relative_both_ways,
                                      .max_distance = max_distance,
                                      .align = align()}}};
      case TermKind::forget_gate:
      case TermKind::shared_forget_gate:
        return {ForgetGate{parameters, align()}};
      case TermKind::time_decay:
        return {TimeDecay{parameters, query_times, key_times}};
      case TermKind::sink:
        return {Sink{parameters}};
      case TermKind::dropout:
        return {
            Dropout{.probability = probability, .seed = dropout_seed, .offset = dropout_offset}};
      default:
        return {AdditiveBias{parameters}};
    }
  }

  /// What the reference is to do. `parameters` as given, of which these may be a perturbed copy.
  template <class S>
  void add_to(reference::Terms<S>& terms, const Matrix<S>& p) const {
    const Index tq = sizes.queries, tk = sizes.keys, hq = sizes.query_heads;
    switch (kind) {
      case TermKind::causal_top_left:
        return add_mask(MaskKind::causal_top_left, terms.mask);
      case TermKind::causal_bottom_right:
        return add_mask(MaskKind::causal_bottom_right, terms.mask);
      case TermKind::window:
        return add_mask(MaskKind::window, terms.mask);
      case TermKind::key_lengths:
        return add_mask(MaskKind::key_lengths, terms.mask);
      case TermKind::bool_mask:
        return add_mask(MaskKind::dense, terms.mask);
      case TermKind::soft_cap:
        return terms.modifiers.push_back(reference::soft_cap<S>(S(cap)));
      case TermKind::temperature:
        return terms.modifiers.push_back(reference::temperature<S>(p));
      case TermKind::modifier:
        return terms.modifiers.push_back({[](const S& s, Index h, Index i, Index j) {
                                            return Bend{}(s, {h, i, j}).value;
                                          },
                                          [](const S& s, Index h, Index i, Index j) {
                                            return Bend{}(s, {h, i, j}).derivative;
                                          }});
      case TermKind::alibi:
        return terms.biases.push_back(reference::alibi_bias<S>(p, tq, tk, offset()));
      case TermKind::relative_both_ways:
      case TermKind::relative_backwards:
        return terms.biases.push_back(reference::relative_position_bias<S>(
            p, tq, tk, offset(), kind == TermKind::relative_both_ways, max_distance));
      case TermKind::forget_gate:
      case TermKind::shared_forget_gate:
        return terms.biases.push_back(reference::forget_gate_bias<S>(p, hq, tq, offset()));
      case TermKind::time_decay:
        return terms.biases.push_back(reference::time_decay_bias<S>(
            p, query_times.template cast<S>(), key_times.template cast<S>()));
      case TermKind::sink:
        return terms.sinks.push_back(p);
      case TermKind::dropout:
        return terms.weight_factors.push_back(reference::dropout_factors<S>(
            probability, dropout_seed, dropout_offset, 0, hq, tq, tk));
      default:
        return terms.biases.push_back(reference::dense_bias<S>(p, hq, tq, tk));
    }
  }

  /// The gradient of the parameters; `modifier` and `sink` count those listed before.
  template <class S>
  Matrix<S> reference_gradient(const reference::TermGradients<S>& grad, std::size_t modifier,
                               std::size_t sink) const {
    const Matrix<S> p = parameters.template cast<S>();
    switch (kind) {
      case TermKind::temperature:
        return reference::temperature_backward<S>(grad.modifier_inputs[modifier],
                                                  grad.modifier_outputs[modifier]);
      case TermKind::alibi:
        return reference::alibi_backward<S>(grad.scores, offset());
      case TermKind::relative_both_ways:
      case TermKind::relative_backwards:
        return reference::relative_position_backward<S>(
            grad.scores, p.rows(), offset(), kind == TermKind::relative_both_ways, max_distance);
      case TermKind::forget_gate:
      case TermKind::shared_forget_gate:
        return reference::forget_gate_backward<S>(grad.scores, p, offset());
      case TermKind::time_decay:
        return reference::time_decay_backward<S>(grad.scores, query_times.template cast<S>(),
                                                 key_times.template cast<S>());
      case TermKind::sink:
        return grad.sinks[sink];
      default:
        return reference::dense_bias_backward<S>(grad.scores, p, sizes.keys);
    }
  }

  bool is_modifier() const {
    return kind == TermKind::soft_cap || kind == TermKind::temperature ||
           kind == TermKind::modifier;
  }

 private:
  void add_mask(MaskKind mask_kind, reference::Mask& to) const {
    const reference::Mask own = dense_mask(mask_kind, sizes.queries, sizes.keys);
    to = to.size() == 0 ? own : reference::Mask(to && own);
  }
};

/// Up to four terms for one problem.
template <class Scalar>
class Composition {
 public:
  static constexpr std::size_t most = 4;

  Composition(const std::vector<TermKind>& kinds, const Sizes& sizes, std::mt19937_64& random) {
    for (const TermKind kind : kinds)
      cases_.push_back(std::make_unique<TermCase<Scalar>>(kind, sizes, random));
  }

  std::string text() const {
    std::string text;
    for (const auto& c : cases_) text += std::string(text.empty() ? "" : " + ") + name_of(c->kind);
    return text;
  }

  std::size_t size() const { return cases_.size(); }
  TermCase<Scalar>& operator[](std::size_t n) const { return *cases_[n]; }

  /// Calls use(term, term, term, term), each told where its gradient goes.
  template <class Use>
  auto with_terms(const Use& use) const {
    std::array<AnyTerm<Scalar>, most> terms;
    for (std::size_t n = 0; n < cases_.size(); ++n)
      terms[n] = cases_[n]->term().gradient_into(cases_[n]->gradient);
    return std::apply(use, terms);
  }

  /// The parameters in another precision.
  template <class S>
  std::vector<Matrix<S>> parameters() const {
    std::vector<Matrix<S>> all;
    for (const auto& c : cases_) all.push_back(c->parameters.template cast<S>());
    return all;
  }

  template <class S>
  reference::Terms<S> reference_terms(const std::vector<Matrix<S>>& parameters) const {
    reference::Terms<S> terms;
    for (std::size_t n = 0; n < cases_.size(); ++n) cases_[n]->add_to(terms, parameters[n]);
    return terms;
  }

  /// Of each term that has parameters, their gradient; of the others, nothing.
  template <class S>
  std::vector<Matrix<S>> reference_gradients(const reference::TermGradients<S>& grad) const {
    std::vector<Matrix<S>> all;
    std::size_t modifiers = 0, sinks = 0;
    for (const auto& c : cases_) {
      all.push_back(c->is_trainable() ? c->reference_gradient(grad, modifiers, sinks)
                                      : Matrix<S>());
      modifiers += c->is_modifier();
      sinks += c->kind == TermKind::sink;
    }
    return all;
  }

 private:
  std::vector<std::unique_ptr<TermCase<Scalar>>> cases_;
};

}  // namespace surfattn::test
