// surfattn layer 3: what a term is

#pragma once

#include <concepts>
#include <optional>
#include <string>
#include <surfattn/detail/require.hpp>
#include <surfattn/detail/simd/tile_products.hpp>
#include <surfattn/types.hpp>

/// A term is named after the options of a public function: `attention(q, k, v, {},
/// Causal{Align::top_left}, SoftCap{30})`. There are five kinds, and the order in which they act is
/// fixed:
///
///  1. modifiers (SoftCap, Temperature, Modifier) change a score, each what the one before it left:
///     among them the order in which they are listed counts;
///  2. biases (AdditiveBias, Alibi, RelativePositionBias, ForgetGate, TimeDecay) add to it;
///  3. masks (Causal, BoolMask, …) hide it, by selection: a query sees the keys that every mask
///     lets it see;
///  4. sinks (Sink) add to the denominator of the softmax;
///  5. Dropout acts on the weights after the softmax.
///
/// The place of a term among terms of other kinds means nothing. The engine asks masks about whole
/// tiles first: an empty tile is never computed, and a full one pays nothing for the mask.
namespace surfattn {

/// A rectangle of scores: queries [first_query, first_query + queries) of one query head against
/// keys [first_key, first_key + keys).
struct Tile {
  Index head = 0;
  Index first_query = 0;
  Index queries = 0;
  Index first_key = 0;
  Index keys = 0;
};

/// The pair of a query and a key that a score belongs to, and its query head.
struct Position {
  Index head = 0;
  Index query = 0;
  Index key = 0;
};

/// How much of a tile a mask lets through.
enum class Coverage { empty, partial, full };

/// Keys [first, last).
struct KeyRange {
  Index first = 0;
  Index last = 0;
};

/// How positions of queries and keys correspond where Tq ≠ Tk.
enum class Align {
  top_left,      ///< query 0 stands at key 0
  bottom_right,  ///< the last query stands at the last key, as when earlier keys come from a cache
};

namespace detail {

/// The key position at which query 0 stands.
inline Index first_position(Align align, const Shape& shape) {
  return align == Align::top_left ? 0 : shape.keys - shape.queries;
}

/// The same for a term that may leave its alignment out where Tq = Tk.
inline Index first_position(const char* term, std::optional<Align> align, const Shape& shape,
                            const Require& require) {
  if (!align && shape.queries != shape.keys) {
    require.fail(term,
                 " must name its alignment (Align::top_left or Align::bottom_right) where queries "
                 "and keys differ in number, but queries is ",
                 shape.queries_extent(), " and keys is ", shape.keys_extent());
  }
  return first_position(align.value_or(Align::top_left), shape);
}

/// A mask bound to the sizes of a problem that lets each query see one run of keys: `range(query)`.
template <class Mask>
concept RangeMask = requires(const Mask& mask, Index query) {
  { mask.range(query) } -> std::same_as<KeyRange>;
};

/// A mask bound to the sizes of a problem that answers pair by pair and tile by tile, the same for
/// every head.
template <class Mask>
concept SharedPairMask = requires(const Mask& mask, const Tile& tile, Index query, Index key) {
  { mask.allows(query, key) } -> std::same_as<bool>;
  { mask.coverage(tile) } -> std::same_as<Coverage>;
};

/// The same for a mask that differs from head to head.
template <class Mask>
concept HeadPairMask = requires(const Mask& mask, const Tile& tile, Index head, Index query,
                                Index key) {
  { mask.allows(head, query, key) } -> std::same_as<bool>;
  { mask.coverage(tile) } -> std::same_as<Coverage>;
};

template <class Mask>
concept PairMask = SharedPairMask<Mask> || HeadPairMask<Mask>;

/// Where a term sums the gradient of its parameters over one item of work: numbers of its own,
/// zero at the item's start. Items have one key/value head each; `member` counts the query heads
/// that share it.
template <class Accumulator>
struct ItemSums {
  Accumulator* sums = nullptr;
  Index member = 0;
};

/// A bound term that changes scores, which it sees in units of ln 2. A pair that a mask hides is
/// changed as well, whatever that gives.
///
///     modify(tile, scores, record)
///     differentiate(tile, record, gradients, sums)
///
/// `record` is a tile of memory in which modify may leave what differentiate wants to know; it has
/// no data in a forward pass. `differentiate` turns ∂loss/∂output into ∂loss/∂input; an entry that
/// is 0 stays 0, whatever the score was.
template <class T>
concept ScoreModifier = requires(const T& term, const Tile& tile, simd::Tile<float> scores,
                                 ItemSums<float> sums) {
  term.modify(tile, scores, scores);
  term.differentiate(tile, scores, scores, sums);
};

/// A bound term that adds to scores, which it sees in units of ln 2.
template <class T>
concept ScoreBias = requires(const T& term, const Tile& tile, simd::Tile<float> scores) {
  term.add_to(tile, scores);
};

/// A bound term that adds exp(logit(head)) to the denominators of a head's softmax.
template <class T>
concept SoftmaxSink = requires(const T& term, Index head, float gradient) {
  { term.template logit<float>(head) } -> std::same_as<float>;
  { term.wants_gradient() } -> std::same_as<bool>;
  term.add_gradient(head, gradient);
};

/// A bound term that multiplies weights by factors of its own, 0 where it drops one.
template <class T>
concept WeightDropout = requires(const T& term, const Position& first, Index keys, float* factors) {
  term.factors(first, keys, factors);
};

/// The sums over all queries and keys from which a term forms the gradient of its parameters, of
/// dS = ∂loss/∂(the scores that the softmax takes).
template <class Accumulator>
struct GradientSums {
  Shape shape;
  Index items = 0;                          ///< key/value head by key/value head
  const Accumulator* of_items = nullptr;    ///< each item's own sums
  Index item_stride = 0;                    ///< from those of one item to those of the next
  const Accumulator* of_rows = nullptr;     ///< Σ_j dS_ij at head·Tq + i
  const Accumulator* of_columns = nullptr;  ///< Σ_i dS_ij at head·Tk + j

  /// The sums over items of the number at `index` of query head `head`, of `count` numbers for each
  /// head, in the order of the items.
  Accumulator of_head(Index head, Index index, Index count) const {
    const Index group = shape.group(), per_head = items / shape.key_value_heads;
    const Accumulator* from =
        of_items + head / group * per_head * item_stride + head % group * count + index;
    Accumulator total(0);
    for (Index item = 0; item < per_head; ++item) total += from[item * item_stride];
    return total;
  }
};

/// A bound term whose gradient is formed from sums. It is bound to each sequence of a batch and adds
/// to a gradient that was 0 before, sequence by sequence. It is asked only where somebody wants that gradient
/// (`wants_gradient`), and then for what it needs: so many numbers for each item of work, and
/// whether the sums of dS along its rows or down its columns.
template <class T>
concept TrainableBound = requires(const T& term, const Shape& shape, GradientSums<float> sums) {
  { term.wants_gradient() } -> std::same_as<bool>;
  { term.sums_per_item(shape) } -> std::same_as<Index>;
  { term.wants_row_sums() } -> std::same_as<bool>;
  { term.wants_column_sums() } -> std::same_as<bool>;
  term.finish_gradient(sums);
};

/// One that sums over each tile of dS.
template <class T>
concept TileTrainable = requires(const T& term, const Tile& tile, simd::Tile<float> gradients,
                                 ItemSums<float> sums) {
  term.add_gradient(tile, gradients, sums);
};

/// One that adds to its gradient itself, tile by tile. Where tiles of different key/value heads add
/// to the same numbers, or those of different sequences of a batch, which then have one shape, the
/// engine sees to their order.
template <class T>
concept DirectTrainable = requires(const T& term) {
  { term.adds_across_heads() } -> std::same_as<bool>;
  { term.adds_across_sequences() } -> std::same_as<bool>;
};

/// A term that takes a score for −‖q − k‖²/(2σ²), and nothing else.
template <class T>
concept DistanceKernel = requires {
  requires T::is_distance_kernel;
};

template <class T>
concept Term = requires(const T& term, const Shape& shape, const Require& require) {
  {term.bind(shape, require)};
};

}  // namespace detail
}  // namespace surfattn
