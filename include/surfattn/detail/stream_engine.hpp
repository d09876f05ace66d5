// surfattn layer 4: the forward pass for few queries

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/simd/streaming.hpp>
#include <surfattn/detail/softmax_rows.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/workspace.hpp>

/// With few queries (decoding) a call is as fast as keys and values can be read. A task owns a part
/// of the keys and all heads; it reads them in the order in which they lie in memory, a run of
/// tokens at a time, each row once for all query heads that share it: for the score, and while it
/// is still in the cache for the output. Where the values are the keys that is half as much to
/// read. The parts are merged by their log-sum-exp.
///
/// That order is what makes it fast: the prefetchers of the hardware then run ahead as they do for a
/// plain loop over the same memory, and reach what software prefetches cannot, of which a core has
/// few under way at a time.
namespace surfattn::detail {

/// How a sequence of few queries is shared out: one item for each part of the keys.
template <class Scalar>
struct StreamPlan {
  using Accumulator = accumulator_t<Scalar>;

  Shape shape;
  Index run_of_rows;  ///< keys that one task visits at a time at most, for all heads
  Index run;          ///< the same where keys or values are columns; what buffers have room for
  Index part;         ///< keys of one item
  Index items;

  explicit StreamPlan(const Shape& sequence);

  Index rows() const { return shape.query_heads * shape.queries; }

  /// Parts that are to be merged lie in memory of the whole call; a single one in its worker's. Room for
  /// the parts of fewer keys, of which there may be more.
  std::size_t shared_bytes() const {
    const Index most = std::min(most_items, blocks(shape.keys, fewest_keys));
    return most > 1 ? static_cast<std::size_t>(most) * bytes_per_item() : 0;
  }
  std::size_t bytes_per_worker() const;

  /// The sums of one of several parts.
  SoftmaxRows<Accumulator> part_of(Arena shared, Index item) const {
    shared.skip(static_cast<std::size_t>(item) * bytes_per_item());
    return SoftmaxRows<Accumulator>(shared, rows(), shape.value_dim);
  }

  /// Up to so many rows for each key/value head, packing keys and values would cost more than it
  /// saves; where the keys are few as well, so would tiles, for more rows.
  static constexpr Index most_rows = 16, most_rows_of_few_keys = 128, few_keys = 16;
  static bool fits(const Shape& shape) {
    const Index rows = shape.group() * shape.queries;
    return rows <= most_rows || (shape.keys <= few_keys && rows <= most_rows_of_few_keys);
  }

  /// What one worker needs for fewer queries or keys than a sequence that does not fit has, parts included.
  static std::size_t bytes_for_fewer(const Shape& sequence) {
    if (fits(sequence)) return 0;
    const auto bytes = [&](Index rows, Index keys) {
      Shape fewer = sequence;
      fewer.queries = std::min(sequence.queries, rows / sequence.group());
      fewer.keys = std::min(sequence.keys, keys);
      const StreamPlan plan(fewer);
      return plan.bytes_per_worker() + plan.shared_bytes();
    };
    return std::max(bytes(most_rows, sequence.keys), bytes(most_rows_of_few_keys, few_keys));
  }

 private:
  static constexpr Index most_items = 16, fewest_keys = 1024;  ///< items, and keys of each

  SURFATTN_NEVER_INLINE std::size_t bytes_per_item() const {
    Arena counter;
    SoftmaxRows<Accumulator>(counter, rows(), shape.value_dim);
    return counter.used();
  }
};

/// Keys of a short run at most, see StreamProducts.
inline constexpr Index longest_short_run = 64;

/// Buffers of one worker; over an empty arena, their size.
template <class Accumulator>
struct StreamBuffers {
  Index query_stride;
  Index score_stride;
  Accumulator* queries;
  Accumulator* key_bias;     ///< of the run at hand, one row for each key/value head
  Accumulator* packed_rows;  ///< of a step that cannot be used as they lie
  Accumulator* scores;
  Index* non_finite_values;
  Coverage* coverage;             ///< of the run at hand, for each key/value head
  SoftmaxRows<Accumulator> outs;  ///< of a sequence that is not cut into parts
  ShortRunSoftmax<Accumulator> short_runs;

  StreamBuffers(Arena& arena, const Shape& shape, Index run)
      : query_stride(simd::padded<Accumulator>(shape.head_dim)),
        score_stride(detail::score_stride<Accumulator>(run)) {
    const Index rows = shape.query_heads * shape.queries;
    queries = arena.take<Accumulator>(rows * query_stride);
    key_bias = arena.take<Accumulator>(shape.key_value_heads * score_stride);
    packed_rows = arena.take<Accumulator>(
        run * simd::padded<Accumulator>(std::max(shape.head_dim, shape.value_dim)));
    scores = arena.take<Accumulator>(rows * score_stride);
    non_finite_values = arena.take<Index>(run);
    coverage = arena.take<Coverage>(shape.key_value_heads);
    outs = SoftmaxRows<Accumulator>(arena, rows, shape.value_dim);
    short_runs = ShortRunSoftmax<Accumulator>(arena, shape.key_value_heads, longest_short_run);
  }
};

template <class Scalar>
SURFATTN_NEVER_INLINE StreamPlan<Scalar>::StreamPlan(const Shape& sequence) : shape(sequence) {
  // A run of rows stays in the second-level cache: its keys or its values, which are read one after the
  // other, or, where several queries may ask for the next run meanwhile, the keys of both; values of their
  // own leave room for halves. One head's rows of it fit the first-level cache.
  const bool in_blocks = simd::rows_in_blocks(shape.group() * shape.queries) > 0;
  const Index of_token =
      in_blocks ? shape.head_dim + shape.value_dim : std::max(shape.head_dim, shape.value_dim);
  const Index width = shape.key_value_heads * of_token;
  constexpr Index first_level = (Index(1) << 15) / static_cast<Index>(sizeof(Accumulator));
  const Index of_head = std::max<Index>(16, first_level / std::max<Index>(shape.head_dim, 1));
  // Columns are read in half the time of shorter pieces a kilobyte at a time. The room must not depend on
  // the number of queries: who has enough for several has for one.
  constexpr Index most = 256;
  run = std::min(most, std::max<Index>(shape.keys, 1));
  run_of_rows = std::min({tile_rows<Accumulator>(most, width), of_head, run});
  part = std::max(fewest_keys, blocks(blocks(shape.keys, most_items), run) * run);
  items = std::max<Index>(1, blocks(shape.keys, part));
}

template <class Scalar>
SURFATTN_NEVER_INLINE std::size_t StreamPlan<Scalar>::bytes_per_worker() const {
  Arena counter;
  StreamBuffers<Accumulator>(counter, shape, run);
  return counter.used();
}

/// What is done for few queries whatever the terms are: the products with keys, and those of weights with
/// values. Compiled once for all terms.
///
/// One query of each head visits keys that are the values in short runs, whose rows stay in the first-level
/// cache until they have been read as values too; meanwhile it asks for the next run. All heads of a run are
/// weighed at once, since that it has few keys is felt in all that is done for each row of scores.
template <class Scalar>
class StreamProducts {
 protected:
  using Accumulator = accumulator_t<Scalar>;

  /// `only_masks`: whether terms do no more than to hide keys.
  StreamProducts(const Operands<Scalar>& operands, const StreamPlan<Scalar>& plan,
                 StreamBuffers<Accumulator>& buffers, bool only_masks)
      : operands_(operands),
        shape_(operands.shape),
        buffers_(buffers),
        group_(shape_.group()),
        rows_(group_ * shape_.queries),
        visits_short_runs_(only_masks && rows_ == 1 && operands.values_are_keys &&
                           operands.keys.col_stride == 1),
        run_(visits_short_runs_ ? std::min({keys_of_step(), plan.run_of_rows, longest_short_run})
             : reads_columns()  ? plan.run
                                : plan.run_of_rows),
        step_(may_ask_ahead() || reads_columns() ? run_ : keys_of_step()),
        score_stride_(visits_short_runs_ ? run_ : buffers.score_stride),
        short_runs_(buffers.short_runs, run_),
        queries_lie_ready_(lie_ready(operands.queries) &&
                           (takes_head_by_head() || !compete(row_distance(operands.queries)))) {
    if (visits_short_runs_) clear_places();
    for (Index head = 0; head < shape_.query_heads && !queries_lie_ready_; ++head) {
      simd::pack_rows(operands_.query_head(head), Accumulator(1),
                      buffers_.queries + head * shape_.queries * buffers_.query_stride);
    }
  }

  /// Whether all keys are one run, and each head is best taken by itself. One or a few queries read the
  /// rows of all heads as they lie, which are far apart within a head and compete for the same lines of
  /// the cache: that saves a seventh to a third of the time.
  bool takes_head_by_head() const {
    return takes_blocks() && shape_.keys <= run_ &&
           operands_.run_of_keys(0, shape_.keys) == shape_.keys;
  }

  /// Whether the call reads and writes more than a cache of so many bytes holds.
  bool exceeds(Index cache) const {
    const Index width = shape_.head_dim + shape_.value_dim;
    const Index numbers = width * (shape_.packed_queries * shape_.query_heads +
                                   shape_.packed_keys * shape_.key_value_heads);
    return numbers > cache / static_cast<Index>(sizeof(Scalar));
  }

  /// Whether several queries ask for memory, head by head; else that is left to the hardware and to the
  /// products, and the rows of all heads are read in the order in which they lie. To ask for what a cache
  /// holds, which was made just before as a rule, costs up to a fifth of the time. Only rows are asked for.
  bool asks_ahead(Index cache) const {
    return may_ask_ahead() && !reads_columns() && exceeds(cache);
  }

  /// Whether results are stored past a cache that would not hold them until they are read, which saves
  /// reading what they replace: if they are whole lines of memory, and rows of 2 KiB or more, an eighth of
  /// the time. Of narrower rows the hardware reads the next in time, and they take up to a quarter more.
  bool results_pass(Index cache, MatrixView<Scalar> out) const {
    const auto address = reinterpret_cast<std::uintptr_t>(out.data);
    return simd::passes_caches<Scalar> && lie_ready(out) &&
           out.cols >= 2048 / static_cast<Index>(sizeof(Scalar)) &&
           address % simd::line<char> == 0 && row_distance(out) % simd::line<Scalar> == 0 &&
           exceeds(cache);
  }

  /// The next run comes from memory while one is computed, for all heads.
  void look_ahead_to_run(Index first_key, Index wanted, Index keys) {
    if (wanted == 0) return;
    const auto next = operands_.segment_of(first_key, operands_.run_of_keys(first_key, wanted));
    const MatrixView<const Scalar> none{};
    keys_ahead_ = {next.keys, none, shape_.key_value_heads * rows_ * keys};
    if (!operands_.values_are_keys)
      values_ahead_ = {next.values, none, shape_.key_value_heads * rows_ * shape_.value_dim * keys};
  }

  /// Where one run is all, the next head comes from memory while one is computed: all that it reads,
  /// and what it writes, which is read as well unless it passes the caches. After the last it is the
  /// first of the next sequence, whose rows follow in memory.
  void look_ahead_to_head(Index head, MatrixView<Scalar> out) {
    const Index queries_left = shape_.packed_queries - shape_.first_query - shape_.queries;
    const Index keys_left = shape_.packed_keys - shape_.first_key - shape_.keys;
    const auto of_head = [&](MatrixView<const Scalar> rows, Index left) {
      const Index width = rows.cols / shape_.key_value_heads;
      if (head < shape_.key_value_heads) return rows.block_cols(head * width, width);
      const Index count = std::max<Index>(0, std::min(rows.rows, left));
      return rows.block_rows(rows.rows, count).block_cols(0, width);
    };
    const auto segment = operands_.segment_of(0, shape_.keys);
    const MatrixView<const Scalar> none{};
    keys_ahead_ = {of_head(segment.keys, keys_left),
                   queries_lie_ready_ ? of_head(operands_.queries, queries_left) : none,
                   rows_ * shape_.keys};
    values_ahead_ = {operands_.values_are_keys ? none : of_head(segment.values, keys_left),
                     past_caches_ ? none : of_head(out, queries_left),
                     rows_ * shape_.value_dim * shape_.keys};
  }

  /// Key/value heads [first, last).
  struct Heads {
    Index first, last;
  };

  /// Calls use(head, count_of_heads, first, count) for the keys [first, first + count) of a run, a step at a
  /// time. Steps must not depend on the batch: what is not finite is added at the end of each.
  template <class Use>
  void each_step(Heads heads, Index keys, const Use& use) const {
    for (Index first = 0; first < keys; first += step_) {
      const Index count = std::min(step_, keys - first);
      each_group_in_sight(heads, [&](Index head, Index count_of_heads) {
        use(head, count_of_heads, first, count);
      });
    }
  }

  /// The products of all queries with the keys of a run.
  void multiply_run(Heads heads, Index first_key, Index keys) {
    each_step(heads, keys, [&](Index head, Index count_of_heads, Index first, Index count) {
      multiply_keys(head, count_of_heads, first_key, first, count);
    });
  }

  /// q_i·k_j of some key/value heads and all query heads that share them, for the keys [first, first +
  /// count) of a run.
  void multiply_keys(Index head, Index heads, Index first_key, Index first, Index count) {
    const auto rows = operands_.keys_of(head, first_key + first, count);
    if (rows.col_stride == 1)
      return multiply_rows(head, heads, first, count, rows.data, rows.row_stride);
    if (rows.is_stored_by_columns()) return multiply_columns(head, heads, first, rows);
    const Index stride = simd::padded<Accumulator>(shape_.head_dim);
    for (const Index end = head + heads; head < end; ++head) {
      simd::pack_rows(operands_.keys_of(head, first_key + first, count), Accumulator(1),
                      buffers_.packed_rows);
      multiply_rows<Accumulator>(head, 1, first, count, buffers_.packed_rows, stride);
    }
  }

  /// q·k → scale·q·k + the bias of the key, for a run of keys of one key/value head.
  void scale_products(Index head, Index first_key, Index keys) {
    fill_key_bias_of(head, first_key, keys);
    for (Index row = 0; row < rows_; ++row) {
      simd::scale_and_add_row(key_bias(head), log2_scale(operands_), scores(head).from(row).data,
                              keys);
    }
  }

  /// A short run that all heads see whole.
  void visit_whole_short_run(Index first_key, const SoftmaxRows<Accumulator>& outs) {
    multiply_keys(0, shape_.key_value_heads, first_key, 0, run_);
    scale_short_run(first_key, run_);
    take_weights_of_short_run(outs);
    multiply_values(0, shape_.key_value_heads, 0, operands_.values_of(0, first_key, run_),
                    simd::Store::add, {outs.out, outs.stride});
  }

  /// Products → scores, of all heads.
  void scale_short_run(Index first_key, Index keys) {
    const Index places = short_runs_.places();
    Accumulator* const bias = buffers_.key_bias;
    norms_come_with_products()
        ? simd::scale_row(bias, places, operands_.key_norm_weight * simd::log2_e<Accumulator>)
        : std::fill(bias, bias + places, Accumulator(0));
    if (operands_.log_prior.data) {
      for (Index head = 0; head < shape_.key_value_heads; ++head)
        add_log_prior(operands_, head, first_key, keys, key_bias(head));
      simd::ask_for_rows_after(operands_.log_prior_of(first_key, keys));
    }
    simd::scale_and_add_row(bias, log2_scale(operands_), buffers_.scores, places);
  }

  void take_weights_of_short_run(const SoftmaxRows<Accumulator>& outs) {
    short_runs_.take_weights(buffers_.scores, outs.softmax, outs.out, outs.stride);
  }

  /// W·V of some key/value heads, where `values` are the rows of the first and `out` its results.
  void multiply_values(Index head, Index heads, Index first, const MatrixView<const Scalar>& values,
                       simd::Store mode, simd::ContiguousRows<Accumulator> out) {
    simd::set_rows_products<Accumulator, Scalar>(
        {mode,
         heads,
         rows_,
         values.rows,
         shape_.value_dim,
         {{scores(head, 0, first).data, score_stride_}, rows_ * score_stride_},
         {{values.data, values.row_stride}, value_head_stride()},
         {out, rows_ * out.stride},
         visits_short_runs_,
         past_caches_ && mode == simd::Store::set},
        values_ahead_);
  }

  /// O += W·V of a key/value head, where V is stored by columns: its columns are the rows of K in Q·Kᵀ.
  void add_columns_of_values(Index head, Index first, const MatrixView<const Scalar>& values,
                             simd::ContiguousRows<Accumulator> out) {
    const simd::ContiguousRows<Accumulator> sums{buffers_.packed_rows,
                                                 simd::padded<Accumulator>(shape_.value_dim)};
    for (Index row = 0, some; row < rows_; row += some) {
      some = std::min(run_, rows_ - row);
      simd::set_dot_products<Accumulator, Scalar>(
          {1,
           some,
           values.cols,
           values.rows,
           {{scores(head, 0, first).from(row).data, score_stride_}, 0},
           {{values.data, values.col_stride}, 0},
           {sums, 0},
           {{nullptr, 0}, 0}},
          values_ahead_);
      for (Index i = 0; i < some; ++i) simd::add_row(sums.row(i), out.row(row + i), values.cols);
    }
  }

  /// Whether the rows of a key/value head in a matrix with a row for each query are as they are
  /// wanted: whole packets, and one as far from the other as the next.
  template <class Stored>
  bool lie_ready(MatrixView<Stored> matrix) const {
    return std::is_same_v<Scalar, Accumulator> && matrix.col_stride == 1 &&
           matrix.cols / shape_.query_heads % simd::lanes<Accumulator> == 0 &&
           (group_ == 1 || shape_.queries == 1);
  }
  template <class Stored>
  Index row_distance(MatrixView<Stored> matrix) const {
    return group_ == 1 ? matrix.row_stride : matrix.cols / shape_.query_heads;
  }

  /// Writes the finished rows of a key/value head.
  void write_rows_of_head(Index head, const SoftmaxRows<Accumulator>& outs,
                          MatrixView<Scalar> out) const {
    const Index width = shape_.value_dim;
    for (Index member = 0; member < group_; ++member) {
      simd::write_rows<simd::Store::set>(outs.tile(member * shape_.queries).data, outs.stride,
                                         out.block_cols((head * group_ + member) * width, width));
    }
  }

  /// Values can be used as they lie where their rows or columns are contiguous. Behind a mask they must be
  /// finite besides, since 0·NaN is NaN; without one every value is seen.
  static bool can_be_read_in_place(const MatrixView<const Scalar>& values, Coverage coverage) {
    const bool by_columns = values.is_stored_by_columns();
    if (values.col_stride != 1 && !by_columns) return false;
    return coverage == Coverage::full ||
           simd::are_finite<Accumulator>(by_columns ? values.transposed() : values);
  }

  /// The tile of one of the query heads that share a key/value head.
  Tile tile_of(Index head, Index member, Index first_key, Index keys) const {
    return {head * group_ + member, 0, shape_.queries, first_key, keys};
  }

  /// The scores, from the one with key `first` of a run on, of one member of the query heads that
  /// share a key/value head, and of those after it.
  simd::Tile<Accumulator> scores(Index head, Index member = 0, Index first = 0) const {
    const Index row = head * rows_ + member * shape_.queries;
    return {buffers_.scores + row * score_stride_ + first, score_stride_};
  }

  /// Whether queries are taken several at a time.
  bool takes_blocks() const { return simd::rows_in_blocks(rows_) > 0; }

  /// Whether keys or values are stored by columns.
  bool reads_columns() const {
    return operands_.keys.is_stored_by_columns() || operands_.values.is_stored_by_columns();
  }

  const Operands<Scalar>& operands_;
  const Shape& shape_;
  StreamBuffers<Accumulator>& buffers_;
  Index group_;  ///< query heads that share a key/value head
  Index rows_;   ///< of one key/value head
  bool visits_short_runs_;
  Index run_;           ///< keys that are visited at a time at most
  Index step_;          ///< those of them that are multiplied before the next, see keys_of_step()
  Index score_stride_;  ///< without a gap between the rows of a short run
  ShortRunSoftmax<Accumulator> short_runs_;
  bool past_caches_ = false;  ///< whether results that are set where they belong pass the caches

 private:
  /// Nothing is written to the places that pad short runs to whole packets.
  void clear_places() {
    for (Accumulator* const row : {buffers_.scores, buffers_.key_bias})
      std::fill(row, row + short_runs_.places(), Accumulator(0));
  }

  /// As many tokens as leave the first-level cache room for their rows of all heads; twice as many where each
  /// row is read once, from memory. Where they may be asked for all keys of a run are one step, which saves
  /// sums from being stored, and where they are columns, which are read in longer pieces then.
  Index keys_of_step() const {
    const bool reads_once = rows_ == 1 && !operands_.values_are_keys;
    const Index budget = (Index(1) << (reads_once ? 16 : 15)) / static_cast<Index>(sizeof(Scalar));
    constexpr Index fewest = 8;
    const Index width = shape_.key_value_heads * std::max(shape_.head_dim, shape_.value_dim);
    return std::max(fewest, budget / std::max<Index>(width, 1) / fewest * fewest);
  }

  /// Whether they may ask for memory.
  bool may_ask_ahead() const { return simd::blocks_ask_ahead && takes_blocks(); }

  /// Calls use(head, count) for those of which queries see keys of the run, as many neighbours at a time
  /// as there are.
  template <class Use>
  void each_group_in_sight(Heads heads, const Use& use) const {
    const auto is_in_sight = [&](Index head) {
      return head < heads.last && buffers_.coverage[head] != Coverage::empty;
    };
    for (Index head = heads.first, end; head < heads.last; head = end + 1) {
      for (end = head; is_in_sight(end);) ++end;
      if (head < end) use(head, end - head);
    }
  }

  template <class Source>
  void multiply_rows(Index head, Index heads, Index first, Index count, const Source* keys,
                     Index stride) {
    simd::set_dot_products<Accumulator, Source>(
        {heads,
         rows_,
         count,
         shape_.head_dim,
         queries_from(head),
         {{keys, stride}, shape_.head_dim},
         {{scores(head, 0, first).data, score_stride_}, rows_ * score_stride_},
         {{norms_come_with_products() ? key_bias(head) + first : nullptr, 0}, score_stride_}},
        keys_ahead_);
  }

  /// The same of keys that are stored by columns, which are the rows of V in W·V.
  void multiply_columns(Index head, Index heads, Index first,
                        const MatrixView<const Scalar>& keys) {
    simd::set_rows_products<Accumulator, Scalar>(
        {simd::Store::set,
         heads,
         rows_,
         shape_.head_dim,
         keys.rows,
         queries_from(head),
         {{keys.data, keys.col_stride}, shape_.head_dim * keys.col_stride},
         {{scores(head, 0, first).data, score_stride_}, rows_ * score_stride_}},
        keys_ahead_);
  }

  Accumulator* key_bias(Index head) const { return buffers_.key_bias + head * score_stride_; }

  bool norms_come_with_products() const {
    return !takes_blocks() && operands_.key_norm_weight != Accumulator(0) &&
           !operands_.keys.is_stored_by_columns();
  }

  /// Whether queries whose rows are so far apart compete for lines of the first-level cache with some keys,
  /// which they are multiplied with again and again: 16 of them took up to a tenth more time. Rows a
  /// multiple of 4096 bytes apart, as in many models, share one set of lines, eight in caches of 32 KB.
  bool compete(Index distance) const {
    constexpr Index ways = 8, keys = 4, page = 4096 / static_cast<Index>(sizeof(Scalar));
    return rows_ + keys > ways * (page / std::gcd(distance, page));
  }

  /// The queries of the key/value heads from `head` on, without the scale.
  simd::HeadRows<const Accumulator> queries_from(Index head) const {
    if constexpr (std::is_same_v<Scalar, Accumulator>) {
      if (queries_lie_ready_) {
        return {{operands_.query_head(head * group_).data, row_distance(operands_.queries)},
                group_ * shape_.head_dim};
      }
    }
    const Index stride = buffers_.query_stride;
    return {{buffers_.queries + head * rows_ * stride, stride}, rows_ * stride};
  }

  Index value_head_stride() const {
    return operands_.values_are_keys ? shape_.head_dim : shape_.value_dim;
  }

  /// The bias of a run of keys, whose norms are in its place already or formed while the keys are in a
  /// cache.
  void fill_key_bias_of(Index head, Index first_key, Index keys) {
    Accumulator* const bias = key_bias(head);
    const auto rows = operands_.keys_of(head, first_key, keys);
    if (norms_come_with_products()) {
      std::fill(bias + keys, bias + simd::padded<Accumulator>(keys), Accumulator(0));
    } else if (Accumulator* const norms = start_key_bias(operands_, keys, bias)) {
      rows.is_stored_by_columns() ? simd::squared_norms_by_columns(rows, norms)
                                  : simd::squared_norms(rows, norms);
    }
    finish_key_bias(operands_, head, first_key, keys, bias);
  }

  bool queries_lie_ready_;
  simd::ProductAhead<Scalar> keys_ahead_, values_ahead_;
};

/// All queries of all heads against one part of the keys.
template <class Scalar, class Terms>
class StreamTask : StreamProducts<Scalar> {
  using Products = StreamProducts<Scalar>;
  using Accumulator = accumulator_t<Scalar>;

 public:
  using Products::takes_head_by_head;

  StreamTask(const Operands<Scalar>& operands, const Terms& terms, const StreamPlan<Scalar>& plan,
             StreamBuffers<Accumulator>& buffers)
      : Products(operands, plan, buffers, Terms::only_masks), terms_(terms) {}

  /// All keys are one run: each head is finished and written before the next.
  void run_once(const SoftmaxRows<Accumulator>& outs, const ForwardOutputs<Scalar>& outputs) {
    constexpr Index shared_cache = Index(1) << 23;
    const bool asks = this->asks_ahead(shared_cache);
    this->past_caches_ = this->results_pass(shared_cache, outputs.out);
    for (Index head = 0; head < shape_.key_value_heads; ++head) {
      if (asks) this->look_ahead_to_head(head + 1, outputs.out);
      outs.softmax.reset(rows_);
      const Coverage coverage = coverage_of_all(head, 0, shape_.keys);
      if (coverage != Coverage::empty) {
        this->multiply_keys(head, 1, 0, 0, shape_.keys);
        weigh(head, 0, shape_.keys, coverage, outs);
      }
      normalise(head, coverage, outs, outputs);
      write_values(head, coverage, outs, outputs);
    }
    if (this->past_caches_) simd::finish_past_caches();
  }

  void run(Index first_key, Index keys, const SoftmaxRows<Accumulator>& outs) {
    outs.reset(shape_.query_heads * shape_.queries);
    visits_short_runs_ ? visit_short_runs(first_key, keys, outs)
                       : visit_long_runs(first_key, keys, outs);
  }

 private:
  using Products::buffers_, Products::group_, Products::operands_, Products::rows_, Products::run_,
      Products::shape_, Products::visits_short_runs_;
  using Products::can_be_read_in_place, Products::multiply_values, Products::scores,
      Products::reads_columns, Products::takes_blocks, Products::tile_of;
  using Heads = typename Products::Heads;

  void visit_long_runs(Index first_key, Index keys, const SoftmaxRows<Accumulator>& outs) {
    constexpr Index second_level = Index(1) << 20;
    const bool asks = this->asks_ahead(second_level);
    // Halves of a run, where values share the cache with keys, save about a tenth of the time.
    const bool halves = takes_blocks() && !operands_.values_are_keys && !reads_columns();
    const Index most = halves ? blocks(run_, 2) : run_;
    const Index end = first_key + keys;
    for (Index key = first_key, count; key < end; key += count) {
      count = operands_.run_of_keys(key, std::min(most, end - key));
      if (asks) this->look_ahead_to_run(key + count, std::min(most, end - key - count), count);
      const Index heads = asks ? 1 : shape_.key_value_heads;
      for (Index head = 0; head < shape_.key_value_heads; head += heads) {
        look_at({head, head + heads}, key, count);
        visit_run({head, head + heads}, key, count, outs);
      }
    }
  }

  void visit_short_runs(Index first_key, Index keys, const SoftmaxRows<Accumulator>& outs) {
    this->short_runs_.reset();
    const Heads all{0, shape_.key_value_heads};
    const bool sees_all = see_all(all, first_key, keys);
    const Index end = first_key + keys;
    for (Index key = first_key, count; key < end; key += count) {
      count = operands_.run_of_keys(key, std::min(run_, end - key));
      const bool is_whole = count == run_;
      const bool sees_run = (is_whole && sees_all) || look_at(all, key, count);
      if (is_whole && sees_run) {
        this->visit_whole_short_run(key, outs);
      } else {
        visit_run(all, key, count, outs);
      }
    }
    this->short_runs_.write_sums(outs.softmax.sum);
  }

  /// Some heads against one run of keys that they have looked at: all its scores, then their weights,
  /// then what these add to the output.
  void visit_run(Heads heads, Index first_key, Index keys, const SoftmaxRows<Accumulator>& outs) {
    this->multiply_run(heads, first_key, keys);
    visits_short_runs_ ? weigh_short_run(first_key, keys, outs)
                       : weigh_long_run(heads, first_key, keys, outs);
    this->each_step(heads, keys, [&](Index head, Index count_of_heads, Index first, Index count) {
      add_values(head, count_of_heads, first_key, first, count, outs.from(head * rows_));
    });
  }

  void weigh_long_run(Heads heads, Index first_key, Index keys,
                      const SoftmaxRows<Accumulator>& outs) {
    for (Index head = heads.first; head < heads.last; ++head) {
      const Coverage coverage = buffers_.coverage[head];
      if (coverage != Coverage::empty)
        weigh(head, first_key, keys, coverage, outs.from(head * rows_));
    }
  }

  /// The same of a short run of all heads. Hidden keys, and places of more keys than there are, are −∞.
  void weigh_short_run(Index first_key, Index keys, const SoftmaxRows<Accumulator>& outs) {
    constexpr auto hidden = simd::minus_infinity<Accumulator>;
    this->scale_short_run(first_key, keys);
    for (Index head = 0; head < shape_.key_value_heads; ++head) {
      const auto row = scores(head);
      const Coverage coverage = buffers_.coverage[head];
      if (coverage == Coverage::partial)
        terms_.hide(tile_of(head, 0, first_key, keys), row.data, row.row_stride, hidden);
      std::fill(row.data + (coverage == Coverage::empty ? 0 : keys), row.data + run_, hidden);
    }
    this->take_weights_of_short_run(outs);
  }

  /// The weights of one run of keys of one key/value head, for all query heads that share it.
  void weigh(Index head, Index first_key, Index keys, Coverage coverage,
             const SoftmaxRows<Accumulator>& outs) {
    finish_products(head, first_key, keys, coverage);
    outs.take_weights(0, rows_, keys, scores(head));
    for (Index member = 0; member < group_; ++member)
      terms_.drop(tile_of(head, member, first_key, keys), scores(head, member));
  }

  Index head_of(Index head, Index row) const { return head * group_ + row / shape_.queries; }

  /// Products → scores.
  void finish_products(Index head, Index first_key, Index keys, Coverage coverage) {
    this->scale_products(head, first_key, keys);
    for (Index member = 0; member < group_; ++member) {
      const Tile tile = tile_of(head, member, first_key, keys);
      const auto rows = scores(head, member);
      finish_scores(operands_, terms_, tile, rows);
      if (coverage == Coverage::full) continue;
      terms_.hide(tile, rows.data, rows.row_stride, simd::minus_infinity<Accumulator>);
    }
  }

  /// O += W·V of some key/value heads for the keys [first, first + count) of a run; `outs` is of the
  /// first.
  void add_values(Index head, Index heads, Index first_key, Index first, Index count,
                  const SoftmaxRows<Accumulator>& outs) {
    const Coverage* const coverage = buffers_.coverage + head;
    const bool see_all = std::all_of(coverage, coverage + heads,
                                     [](Coverage seen) { return seen == Coverage::full; });
    if (see_all && heads > 1 && operands_.values.col_stride == 1) {
      multiply_values(head, heads, first, operands_.values_of(head, first_key + first, count),
                      simd::Store::add, {outs.out, outs.stride});
      return;
    }
    for (Index h = 0; h < heads; ++h)
      add_values_of_head(head + h, coverage[h], first_key, first, count, outs.from(h * rows_));
  }

  void add_values_of_head(Index head, Coverage coverage, Index first_key, Index first, Index count,
                          const SoftmaxRows<Accumulator>& outs) {
    const auto value_rows = operands_.values_of(head, first_key + first, count);
    if (can_be_read_in_place(value_rows, coverage)) {
      value_rows.is_stored_by_columns()
          ? this->add_columns_of_values(head, first, value_rows, {outs.out, outs.stride})
          : multiply_values(head, 1, first, value_rows, simd::Store::add, {outs.out, outs.stride});
      return;
    }
    const auto values = pack_row_operand(value_rows, Accumulator(1), buffers_.packed_rows,
                                         buffers_.non_finite_values);
    for (Index member = 0; member < group_; ++member) {
      add_weighted_rows<false>(terms_, tile_of(head, member, first_key + first, count),
                               scores(head, member, first), values, 0,
                               outs.tile(member * shape_.queries));
    }
  }

  /// W·V of a head whose keys are one run, in the buffer.
  void sum_values(Index head, Coverage coverage, const SoftmaxRows<Accumulator>& outs) {
    outs.reset_out(rows_);
    if (coverage != Coverage::empty) add_values_of_head(head, coverage, 0, 0, shape_.keys, outs);
  }

  /// W ← W/l of a head whose keys are one run, and its log-sum-exp.
  void normalise(Index head, Coverage coverage, const SoftmaxRows<Accumulator>& outs,
                 const ForwardOutputs<Scalar>& outputs) {
    const Index weights =
        coverage == Coverage::empty ? 0 : simd::rounded_up(shape_.keys, simd::lanes<Accumulator>);
    for (Index row = 0; row < rows_; ++row) {
      Accumulator* const weighed = scores(head).from(row).data;
      outs.include_sinks(row, terms_, head_of(head, row), weighed, weights);
      simd::scale_row(weighed, weights, outs.softmax.normaliser(row));
    }
    for (Index row = 0; outputs.log_sum_exp && row < rows_; row += shape_.queries) {
      outs.template load_offsets<Terms>(row, operands_, head_of(head, row), 0, shape_.queries);
      outs.write_log_sum_exp(row, outputs, head_of(head, row), 0, shape_.queries);
    }
  }

  /// O = W·V of such a head, where it belongs: at once, or through the buffer, with the same bits.
  void write_values(Index head, Coverage coverage, const SoftmaxRows<Accumulator>& outs,
                    const ForwardOutputs<Scalar>& outputs) {
    const Index width = shape_.value_dim;
    if constexpr (std::is_same_v<Scalar, Accumulator>) {
      const auto value_rows = operands_.values_of(head, 0, shape_.keys);
      if (coverage != Coverage::empty && this->lie_ready(outputs.out) &&
          value_rows.col_stride == 1 && can_be_read_in_place(value_rows, coverage)) {
        multiply_values(head, 1, 0, value_rows, simd::Store::set,
                        {outputs.out.block_cols(head * group_ * width, width).data,
                         this->row_distance(outputs.out)});
        return;
      }
    }
    sum_values(head, coverage, outs);
    this->write_rows_of_head(head, outs, outputs.out);
  }

  /// Whether no query of the heads is kept from a key; asks no further than it must.
  bool see_all(Heads heads, Index first_key, Index keys) const {
    for (Index head = heads.first; head < heads.last; ++head)
      if (coverage_of_all(head, first_key, keys) != Coverage::full) return false;
    return true;
  }

  /// The same of a run, whose coverage is noted for every head.
  bool look_at(Heads heads, Index first_key, Index keys) {
    bool all = true;
    for (Index head = heads.first; head < heads.last; ++head) {
      buffers_.coverage[head] = coverage_of_all(head, first_key, keys);
      all = all && buffers_.coverage[head] == Coverage::full;
    }
    return all;
  }

  Coverage coverage_of_all(Index head, Index first_key, Index keys) const {
    if (rows_ == 0 || keys == 0) return Coverage::empty;  // no tile to ask the masks about
    bool all_empty = true, all_full = true;
    for (Index member = 0; member < group_; ++member) {
      const Coverage coverage = terms_.coverage(tile_of(head, member, first_key, keys));
      all_empty = all_empty && coverage == Coverage::empty;
      all_full = all_full && coverage == Coverage::full;
    }
    return all_empty ? Coverage::empty : all_full ? Coverage::full : Coverage::partial;
  }

  const Terms& terms_;
};

/// O = W·V and log_sum_exp of few queries: the items of one sequence that fall to one worker.
template <class Scalar, class Terms, class Items>
void forward(const Operands<Scalar>& operands, const Terms& terms, const StreamPlan<Scalar>& plan,
             const ForwardOutputs<Scalar>& outputs, Arena shared, Arena own, const Items& items) {
  StreamBuffers<accumulator_t<Scalar>> buffers(own, plan.shape, plan.run);
  StreamTask<Scalar, Terms> task(operands, terms, plan, buffers);
  items([&](Index item) {
    if (task.takes_head_by_head()) return task.run_once(buffers.outs, outputs);
    const Index first_key = item * plan.part;
    task.run(first_key, std::min(plan.part, plan.shape.keys - first_key),
             plan.items > 1 ? plan.part_of(shared, item) : buffers.outs);
    if (plan.items == 1) buffers.outs.write_all(operands, terms, outputs);
  });
}

/// Merges the parts of a sequence, in order, and writes every output once.
template <class Scalar, class Terms>
void finish_forward(const Operands<Scalar>& operands, const Terms& terms,
                    const StreamPlan<Scalar>& plan, const ForwardOutputs<Scalar>& outputs,
                    Arena shared) {
  if (plan.items == 1) return;
  const auto whole = plan.part_of(shared, 0);
  for (Index item = 1; item < plan.items; ++item) {
    const auto part = plan.part_of(shared, item);
    for (Index row = 0; row < plan.rows(); ++row) whole.merge(row, part);
  }
  whole.write_all(operands, terms, outputs);
}

}  // namespace surfattn::detail
