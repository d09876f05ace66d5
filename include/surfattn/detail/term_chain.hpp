// surfattn layer 3: a list of terms, bound to a problem, answering as one

#pragma once

#include <algorithm>
#include <array>
#include <surfattn/detail/bound_masks.hpp>
#include <surfattn/detail/simd/term_rows.hpp>
#include <surfattn/terms/term.hpp>
#include <tuple>
#include <utility>

namespace surfattn::detail {

/// Tiles of memory for what a chain of terms records of one tile; no data in a forward pass.
template <class Accumulator, std::size_t count>
using TermRecords = std::array<simd::Tile<Accumulator>, count>;

/// Terms bound to one problem. A query sees a key where every mask lets it.
template <class... Bound>
class TermChain {
 public:
  static_assert(((Mask<Bound> || ScoreModifier<Bound> || ScoreBias<Bound> || SoftmaxSink<Bound> ||
                  WeightDropout<Bound>)&&...),
                "surfattn: a term must act as a mask, a modifier, a bias, a sink or a dropout");

  static constexpr bool modifies_scores = (ScoreModifier<Bound> || ...);
  static constexpr bool has_biases = (ScoreBias<Bound> || ...);
  static constexpr bool has_sinks = (SoftmaxSink<Bound> || ...);
  static constexpr bool drops_weights = (WeightDropout<Bound> || ...);
  static constexpr bool only_masks = !(modifies_scores || has_biases || has_sinks || drops_weights);
  static constexpr bool is_trainable = (TrainableBound<Bound> || ...);
  static constexpr std::size_t modifiers = (std::size_t(ScoreModifier<Bound>) + ... + 0);

  /// Each modifier and then each dropout leaves a record of a tile for the way back.
  static constexpr std::size_t records = modifiers + (std::size_t(WeightDropout<Bound>) + ... + 0);

  /// Whether a number added to all scores of a row would show in the result, as it does not in a
  /// softmax alone.
  static constexpr bool needs_whole_scores = modifies_scores || has_sinks;

  explicit TermChain(const Bound&... bound) : terms_(bound...) {}

  bool allows(Index head, Index query, Index key) const {
    return every_mask([&](const auto& term) { return detail::allows(term, head, query, key); });
  }

  Coverage coverage(const Tile& tile) const {
    bool full = true;
    const bool possible = every_mask([&](const auto& term) {
      const Coverage answer = detail::coverage(term, tile);
      full = full && answer == Coverage::full;
      return answer != Coverage::empty;
    });
    return !possible ? Coverage::empty : full ? Coverage::full : Coverage::partial;
  }

  /// Calls use(part, coverage) for each part of the tile that is not empty: from top to bottom, in parts of
  /// fewer queries where masks have edges or slant, and from left to right the runs of keys that some
  /// of these queries may see. Parts begin at whole groups of `key_step` keys of the tile; of the gaps
  /// between runs, whole groups are left out. They begin at whole groups of `query_step` queries as well,
  /// or lie within one.
  template <class Use>
  void each_part(const Tile& tile, Index query_step, Index key_step, const Use& use) const {
    Tile part = tile;
    for (const Index end = tile.first_query + tile.queries; part.first_query < end;
         part.first_query += part.queries) {
      const Index first = part.first_query - tile.first_query;
      part.queries = tile.queries - first;
      part.queries = queries_of_part(part, first % query_step, query_step);
      each_run(part, key_step, use);
    }
  }

  /// The same of all queries together.
  template <class Use>
  void each_run(const Tile& tile, Index step, const Use& use) const {
    const Index end = tile.first_key + tile.keys;
    const auto group_start = [&](Index key) { return key - (key - tile.first_key) % step; };
    const auto group_end = [&](Index key) { return std::min(end, group_start(key - 1) + step); };
    for (KeyRange run = next_run(tile, tile.first_key); run.first < run.last;) {
      KeyRange next = next_run(tile, run.last);
      while (next.first < group_end(run.last)) {
        run.last = next.last;
        next = next_run(tile, run.last);
      }
      Tile part = tile;
      part.first_key = group_start(run.first);
      part.keys = run.last - part.first_key;
      const Coverage covered = coverage(part);
      if (covered != Coverage::empty) use(part, covered);
      run = next;
    }
  }

  template <class Scalar>
  void hide(const Tile& tile, Scalar* data, Index row_stride, Scalar value) const {
    every_mask(
        [&](const auto& term) { return detail::hide(term, tile, data, row_stride, value), true; });
  }

  /// Modifiers, in the order in which they are listed.
  template <class Accumulator>
  void modify_scores(const Tile& tile, simd::Tile<Accumulator> scores,
                     const TermRecords<Accumulator, records>& kept) const {
    each([&]<std::size_t index>(const auto& term) {
      if constexpr (ScoreModifier<Term<index>>) term.modify(tile, scores, kept[modifier<index>()]);
    });
  }

  template <class Accumulator>
  void add_biases(const Tile& tile, simd::Tile<Accumulator> scores) const {
    each([&]<std::size_t index>(const auto& term) {
      if constexpr (ScoreBias<Term<index>>) term.add_to(tile, scores);
    });
  }

  /// dS of the scores that the softmax takes → dS of the raw scores: the way back through the
  /// modifiers. `of_term(index)` says where a term sums the gradient of its parameters.
  template <class Accumulator, class SumsOfTerm>
  void differentiate(const Tile& tile, const TermRecords<Accumulator, records>& kept,
                     simd::Tile<Accumulator> gradients, const SumsOfTerm& of_term) const {
    each_backwards([&]<std::size_t index>(const auto& term) {
      if constexpr (ScoreModifier<Term<index>>)
        term.differentiate(tile, kept[modifier<index>()], gradients, of_term(index));
    });
  }

  /// Weights times the factors of every dropout.
  template <class Accumulator>
  void drop(const Tile& tile, simd::Tile<Accumulator> weights) const {
    each([&]<std::size_t index>(const auto& term) {
      if constexpr (WeightDropout<Term<index>>) drop_rows(term, tile, weights);
    });
  }

  /// Weights, or their gradients, times the recorded factors of every dropout.
  template <class Accumulator>
  void drop(const Tile& tile, simd::Tile<Accumulator> weights,
            const TermRecords<Accumulator, records>& kept) const {
    each([&]<std::size_t index>(const auto&) {
      if constexpr (WeightDropout<Term<index>>)
        multiply_rows(tile, kept[dropout<index>()], weights);
    });
  }

  /// Records the factors of every dropout.
  template <class Accumulator>
  void record_dropout(const Tile& tile, const TermRecords<Accumulator, records>& kept) const {
    each([&]<std::size_t index>(const auto& term) {
      if constexpr (WeightDropout<Term<index>>) {
        const simd::Tile<Accumulator> factors = kept[dropout<index>()];
        for (Index i = 0; i < tile.queries; ++i) {
          term.factors({tile.head, tile.first_query + i, tile.first_key},
                       simd::padded<Accumulator>(tile.keys), factors.data + i * factors.row_stride);
        }
      }
    });
  }

  /// Calls use(term) for each of the terms of one kind.
  template <class Use>
  void each_sink(const Use& use) const {
    each([&]<std::size_t index>(const auto& term) {
      if constexpr (SoftmaxSink<Term<index>>) use(term);
    });
  }

  /// Whether tiles of different key/value heads add to the same numbers of a gradient.
  bool adds_across_heads() const {
    return any_direct([](const auto& term) { return term.adds_across_heads(); });
  }

  /// Whether tiles of different sequences do.
  bool adds_across_sequences() const {
    return any_direct([](const auto& term) { return term.adds_across_sequences(); });
  }

  /// Calls use(index, term) for each trainable term whose gradient is wanted.
  template <class Use>
  void each_wanted_gradient(const Use& use) const {
    each([&]<std::size_t index>(const auto& term) {
      if constexpr (TrainableBound<Term<index>>) {
        if (term.wants_gradient()) use(index, term);
      }
    });
  }

 private:
  /// How many queries of the tile, whose first has its place in a group, are to be one part: up to an
  /// edge, unless they are then too few to be worth a part; few, where masks slant; and none of the next
  /// group, where they begin within one.
  Index queries_of_part(Tile tile, Index place_in_group, Index group) const {
    constexpr Index fewest = 8;
    const Index few = simd::rounded_up(24, group);
    every_mask([&](const auto& term) {
      const Index edge = detail::next_edge(term, tile.first_query + fewest - 1);
      return tile.queries = std::min(tile.queries, edge - tile.first_query), true;
    });
    if (place_in_group > 0) return std::min(tile.queries, group - place_in_group);
    const auto is_level = [&](const auto& term) { return !detail::slants(term, tile); };
    return tile.queries <= few || every_mask(is_level) ? tile.queries : few;
  }

  template <std::size_t index>
  using Term = std::tuple_element_t<index, std::tuple<Bound...>>;

  template <std::size_t size>
  static constexpr std::size_t count_before(const bool (&marks)[size], std::size_t index) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < index; ++i) count += marks[i];
    return count;
  }

  /// The number of a modifier's record.
  template <std::size_t index>
  static constexpr std::size_t modifier() {
    return count_before({ScoreModifier<Bound>...}, index);
  }

  /// The number of a dropout's record.
  template <std::size_t index>
  static constexpr std::size_t dropout() {
    return modifiers + count_before({WeightDropout<Bound>...}, index);
  }

  template <class Dropout, class Accumulator>
  static void drop_rows(const Dropout& dropout, const Tile& tile, simd::Tile<Accumulator> weights) {
    constexpr Index chunk = 8 * simd::panel_width<Accumulator>;
    alignas(Arena::alignment) Accumulator factors[chunk];
    for (Index i = 0; i < tile.queries; ++i) {
      for (Index j = 0; j < tile.keys; j += chunk) {
        const Index count =
            std::min(chunk, simd::rounded_up(tile.keys - j, simd::lanes<Accumulator>));
        dropout.factors({tile.head, tile.first_query + i, tile.first_key + j}, count, factors);
        simd::select_and_multiply(factors, weights.data + i * weights.row_stride + j, count);
      }
    }
  }

  template <class Accumulator>
  static void multiply_rows(const Tile& tile, simd::Tile<Accumulator> factors,
                            simd::Tile<Accumulator> rows) {
    for (Index i = 0; i < tile.queries; ++i) {
      simd::select_and_multiply(factors.data + i * factors.row_stride,
                                rows.data + i * rows.row_stride,
                                simd::padded<Accumulator>(tile.keys));
    }
  }

  /// The first run of keys from `from` on that every term lets some query see; empty, and at the
  /// tile's end, where there is none.
  KeyRange next_run(Tile tile, Index from) const {
    return common_run(tile, from, [&](const auto& use) {
      every_mask([&](const auto& term) { return use(term), true; });
    });
  }

  template <class Predicate>
  bool any_direct(const Predicate& predicate) const {
    bool any = false;
    each_wanted_gradient([&]<class T>(std::size_t, const T& term) {
      if constexpr (DirectTrainable<T>) any |= predicate(term);
    });
    return any;
  }

  template <class Use>
  void each(const Use& use) const {
    [&]<std::size_t... index>(std::index_sequence<index...>) {
      (use.template operator()<index>(std::get<index>(terms_)), ...);
    }
    (std::index_sequence_for<Bound...>());
  }

  template <class Use>
  void each_backwards(const Use& use) const {
    [&]<std::size_t... index>(std::index_sequence<index...>) {
      [[maybe_unused]] constexpr std::size_t last = sizeof...(Bound) - 1;
      (use.template operator()<last - index>(std::get<last - index>(terms_)), ...);
    }
    (std::index_sequence_for<Bound...>());
  }

  /// Whether the predicate holds for every mask; stops at the first for which it does not.
  template <class Predicate>
  bool every_mask(Predicate&& predicate) const {
    const auto holds = [&]<class T>(const T& term) {
      if constexpr (Mask<T>) {
        return predicate(term);
      } else {
        return true;
      }
    };
    return std::apply([&](const Bound&... terms) { return (holds(terms) && ...); }, terms_);
  }

  std::tuple<Bound...> terms_;
};

template <class... Terms>
auto bind_terms(const Shape& shape, const Require& require, const Terms&... terms) {
  static_assert((Term<Terms> && ...),
                "surfattn: after the options come terms, such as Causal{Align::top_left}; an "
                "argument is not a term");
  return TermChain<decltype(terms.bind(shape, require))...>(terms.bind(shape, require)...);
}

}  // namespace surfattn::detail
