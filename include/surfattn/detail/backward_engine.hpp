// surfattn layer 4: the backward pass of both forms

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/simd/softmax_gradients.hpp>
#include <surfattn/detail/term_gradients.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

/// Memory for a product operand in two packed forms: columns for a left operand, panels for a right
/// one.
template <class Accumulator>
struct PackedTile {
  Accumulator* columns = nullptr;
  Accumulator* panels = nullptr;
  Index* non_finite = nullptr;
};

/// Packed keys and gradient sums of one key tile of the block.
template <class Accumulator>
struct KeyTileBuffers {
  Accumulator* transposed_keys;
  Accumulator* transposed_values;
  Accumulator* key_panels;
  Index* non_finite_keys;
  Accumulator* key_bias;
  Accumulator* grad_keys;
  Accumulator* grad_values;
  Accumulator* grad_key_bias;
};

/// Buffers of one task; over an empty arena, their size.
template <class Accumulator>
struct BackwardBuffers {
  Index key_stride;
  Index value_stride;
  Index score_stride;
  KeyTileBuffers<Accumulator> key_tiles[max_key_tiles];
  PackedTile<Accumulator> queries;
  PackedTile<Accumulator> grad_out;
  Accumulator* log_sum_exp;  ///< these two become softmax_rows
  Accumulator* delta;
  simd::SoftmaxGradientRow<Accumulator>* softmax_rows;
  Accumulator* grad_queries;
  Accumulator* weights;
  Accumulator* grad_scores;

  BackwardBuffers(Arena& arena, const Shape& shape, const Tiling& tiling, bool values_are_keys)
      : key_stride(simd::padded<Accumulator>(shape.head_dim)),
        value_stride(simd::padded<Accumulator>(shape.value_dim)),
        score_stride(detail::score_stride<Accumulator>(tiling.key_tile)) {
    for (Index n = 0; n * tiling.key_tile < std::min(tiling.block, shape.keys); ++n)
      take_key_tile(arena, shape, tiling.key_tile, values_are_keys, key_tiles[n]);
    take_query_tile(arena, shape, tiling.query_tile);
    weights = arena.take<Accumulator>(tiling.query_tile * score_stride);
    grad_scores = arena.take<Accumulator>(tiling.query_tile * score_stride);
  }

 private:
  void take_key_tile(Arena& arena, const Shape& shape, Index keys, bool values_are_keys,
                     KeyTileBuffers<Accumulator>& tile) {
    const Index padded_keys = simd::padded<Accumulator>(keys);
    tile.transposed_keys = arena.take<Accumulator>(padded_keys * shape.head_dim);
    tile.transposed_values = values_are_keys
                                 ? tile.transposed_keys
                                 : arena.take<Accumulator>(padded_keys * shape.value_dim);
    tile.key_panels = arena.take<Accumulator>(keys * key_stride);
    tile.non_finite_keys = arena.take<Index>(keys);
    tile.key_bias = arena.take<Accumulator>(padded_keys);
    tile.grad_keys = arena.take<Accumulator>(keys * key_stride);
    tile.grad_values =
        values_are_keys ? tile.grad_keys : arena.take<Accumulator>(keys * value_stride);
    tile.grad_key_bias = arena.take<Accumulator>(padded_keys);
  }

  void take_query_tile(Arena& arena, const Shape& shape, Index rows) {
    queries.columns =
        arena.take<Accumulator>(simd::packed_left_size<Accumulator>(rows, shape.head_dim));
    queries.panels = arena.take<Accumulator>(rows * key_stride);
    queries.non_finite = arena.take<Index>(rows);
    grad_out.columns =
        arena.take<Accumulator>(simd::packed_left_size<Accumulator>(rows, shape.value_dim));
    grad_out.panels = arena.take<Accumulator>(rows * value_stride);
    grad_out.non_finite = arena.take<Index>(rows);
    log_sum_exp = arena.take<Accumulator>(rows);
    delta = arena.take<Accumulator>(rows);
    softmax_rows = arena.take<simd::SoftmaxGradientRow<Accumulator>>(rows);
    grad_queries = arena.take<Accumulator>(rows * key_stride);
  }
};

/// How many runs of queries a task has added its part of dQ to.
using Turn = std::atomic<Index>;

/// Blocks of keys add to the same rows of dQ. They do so in the order of the blocks, so that the
/// sums have the same bits on any number of threads: each waits until the block before it has
/// passed the rows. That block has begun (items are taken in order), so the wait ends.
struct Turns {
  Turn* own;
  Turn* before;  ///< of the block before; null for the first
  /// Of the block of the same keys in the key/value head before, or in the sequence before; null
  /// where no term sums over these.
  Turn* same_keys_before = nullptr;

  void wait_for(Index turn) const { wait_for(before, turn); }
  void wait_for_same_keys(Index turn) const { wait_for(same_keys_before, turn); }

  void pass(Index turn) const {
    own->store(turn + 1, std::memory_order_release);
    own->notify_all();
  }

 private:
  static void wait_for(Turn* other, Index turn) {
    if (!other) return;
    for (Index passed = other->load(std::memory_order_acquire); passed <= turn;
         passed = other->load(std::memory_order_acquire)) {
      other->wait(passed, std::memory_order_acquire);
    }
  }
};

/// What is done for a block of keys whatever the terms are: what is loaded and packed, and the gradients
/// that leave it. Compiled once for all terms.
template <class Scalar>
class BackwardBlock {
 protected:
  using Accumulator = accumulator_t<Scalar>;

  BackwardBlock(const Operands<Scalar>& operands, const Tiling& tiling,
                const Upstream<Scalar>& upstream, const GradientOutputs<Scalar>& gradients,
                BackwardBuffers<Accumulator>& buffers, Index key_value_head, Index first_key,
                Turns turns)
      : operands_(operands),
        shape_(operands.shape),
        tiling_(tiling),
        upstream_(upstream),
        gradients_(gradients),
        buffers_(buffers),
        key_value_head_(key_value_head),
        first_key_(first_key),
        turns_(turns),
        keys_(std::min(tiling.block, operands.shape.keys - first_key)) {}

  Index first_key_of(Index key_tile) const { return first_key_ + key_tile * tiling_.key_tile; }
  Index keys_of(Index key_tile) const {
    return std::min(tiling_.key_tile, keys_ - key_tile * tiling_.key_tile);
  }
  Index key_tiles() const { return blocks(keys_, tiling_.key_tile); }

  void load_keys() {
    for (Index n = 0; n < key_tiles(); ++n) load_key_tile(n, buffers_.key_tiles[n]);
  }

  /// `norms_stand_beside`: the scores of the softmax do not hold the norms of the queries.
  void load_queries(const Tile& run, bool norms_stand_beside) {
    queries_are_packed_ = true;
    const auto queries = query_rows(run);
    const auto grad_out = out_rows(upstream_.grad_out, run);
    simd::pack_left(queries, log2_scale(operands_), buffers_.queries.columns);
    Accumulator* const norms =
        start_offsets(operands_, norms_stand_beside, run.queries, buffers_.log_sum_exp);
    queries_of_run_ = pack_row_operand(queries, operands_.scale, buffers_.queries.panels,
                                       buffers_.queries.non_finite, norms);
    if (norms) weigh_query_norms(operands_, run.queries, norms);
    finish_log_sum_exp(upstream_.log_sum_exp, run.head, run.first_query, run.queries,
                       buffers_.log_sum_exp);
    simd::pack_left(grad_out, Accumulator(1), buffers_.grad_out.columns);
    grad_out_of_run_ = pack_row_operand(grad_out, Accumulator(1), buffers_.grad_out.panels,
                                        buffers_.grad_out.non_finite);
    load_softmax_rows(run, grad_out, out_rows(upstream_.out, run));
  }

  /// Returns when the item before this one at the same keys has passed these queries with all its
  /// query heads.
  void wait_for_same_keys(Index first_query) const {
    const Index runs = blocks(shape_.queries, tiling_.query_tile);
    turns_.wait_for_same_keys((shape_.group() - 1) * runs + first_query / tiling_.query_tile);
  }

  bool wants_key_bias() const {
    return gradients_.key_bias || operands_.key_norm_weight != Accumulator(0);
  }

  void add_to_grad_queries(Index head, Index first_query, Index queries) {
    const auto out = gradients_.query_sums.block_cols(head * shape_.head_dim, shape_.head_dim)
                         .block_rows(first_query, queries);
    simd::write_rows<simd::Store::add>(buffers_.grad_queries, buffers_.key_stride, out,
                                       [&](Index) { return operands_.scale; });
  }

  void store_keys() {
    const auto grad_keys =
        gradients_.keys.block_cols(key_value_head_ * shape_.head_dim, shape_.head_dim);
    for (Index n = 0; n < key_tiles(); ++n) {
      KeyTileBuffers<Accumulator>& tile = buffers_.key_tiles[n];
      add_norm_gradient(n, tile);
      simd::write_rows<simd::Store::set>(tile.grad_keys, buffers_.key_stride,
                                         grad_keys.block_rows(first_key_of(n), keys_of(n)));
      if (!operands_.values_are_keys) {
        const auto grad_values =
            gradients_.values->block_cols(key_value_head_ * shape_.value_dim, shape_.value_dim);
        simd::write_rows<simd::Store::set>(tile.grad_values, buffers_.value_stride,
                                           grad_values.block_rows(first_key_of(n), keys_of(n)));
      }
      if (!gradients_.key_bias) continue;
      for (Index j = 0; j < keys_of(n); ++j) {
        (*gradients_.key_bias)(first_key_of(n) + j, key_value_head_) = tile.grad_key_bias[j];
      }
    }
  }

  const Operands<Scalar>& operands_;
  const Shape& shape_;
  const Tiling& tiling_;
  const Upstream<Scalar>& upstream_;
  const GradientOutputs<Scalar>& gradients_;
  BackwardBuffers<Accumulator>& buffers_;
  Index key_value_head_;
  Index first_key_;
  Turns turns_;
  RowOperand<Scalar> keys_of_tile_[max_key_tiles]{};
  bool queries_are_packed_ = false;  ///< those of the run at hand
  RowOperand<Scalar> queries_of_run_{}, grad_out_of_run_{};

 private:
  MatrixView<const Scalar> key_rows(Index key_tile) const {
    return operands_.key_head(key_value_head_)
        .block_rows(first_key_of(key_tile), keys_of(key_tile));
  }

  void load_key_tile(Index n, KeyTileBuffers<Accumulator>& tile) {
    const Index keys = keys_of(n);
    const auto rows = key_rows(n);
    simd::pack_transposed(rows, tile.transposed_keys);
    keys_of_tile_[n] = pack_row_operand(rows, Accumulator(1), tile.key_panels, tile.non_finite_keys,
                                        start_key_bias(operands_, keys, tile.key_bias));
    finish_key_bias(operands_, key_value_head_, first_key_of(n), keys, tile.key_bias);
    std::fill(tile.grad_keys, tile.grad_keys + keys * buffers_.key_stride, Accumulator(0));
    std::fill(tile.grad_key_bias, tile.grad_key_bias + simd::padded<Accumulator>(keys),
              Accumulator(0));
    if (operands_.values_are_keys) return;
    simd::pack_transposed(operands_.value_head(key_value_head_).block_rows(first_key_of(n), keys),
                          tile.transposed_values);
    std::fill(tile.grad_values, tile.grad_values + keys * buffers_.value_stride, Accumulator(0));
  }

  MatrixView<const Scalar> query_rows(const Tile& tile) const {
    return operands_.query_head(tile.head).block_rows(tile.first_query, tile.queries);
  }

  MatrixView<const Scalar> out_rows(MatrixView<const Scalar> outs, const Tile& tile) const {
    return outs.block_cols(tile.head * shape_.value_dim, shape_.value_dim)
        .block_rows(tile.first_query, tile.queries);
  }

  /// D_i = dO_i·O_i − dL_i, beside the log-sum-exps that are there.
  void load_softmax_rows(const Tile& tile, MatrixView<const Scalar> grad_out,
                         MatrixView<const Scalar> out) {
    simd::row_products(grad_out, out, buffers_.delta);
    for (Index i = 0; upstream_.grad_log_sum_exp && i < tile.queries; ++i)
      buffers_.delta[i] -= upstream_.grad_log_sum_exp_of(tile.first_query + i, tile.head);
    for (Index i = 0; i < tile.queries; ++i)
      buffers_.softmax_rows[i] = {buffers_.log_sum_exp[i], buffers_.delta[i]};
  }

  /// dk_j += 2w·c_j·k_j. A key that nobody sees has c_j = 0, and then whatever it holds must not
  /// come through.
  void add_norm_gradient(Index n, KeyTileBuffers<Accumulator>& tile) {
    if (operands_.key_norm_weight == Accumulator(0)) return;
    const auto rows = key_rows(n);
    for (Index j = 0; j < rows.rows; ++j) {
      if (tile.grad_key_bias[j] == Accumulator(0)) continue;
      const auto factor = simd::broadcast(2 * operands_.key_norm_weight * tile.grad_key_bias[j]);
      Accumulator* row = tile.grad_keys + j * buffers_.key_stride;
      for (Index c = 0; c < rows.cols; c += simd::lanes<Accumulator>) {
        simd::store(row + c, simd::add(simd::load(row + c),
                                       simd::row_elements<Accumulator>(rows, j, c, factor)));
      }
    }
  }

  Index keys_;
};

/// One block of keys of one key/value head, against all queries of all query heads that share it.
/// Weights are recomputed from the log-sum-exp, as in FlashAttention (Dao et al. 2022,
/// arXiv:2205.14135, Algorithm 4). For each tile, each line beside the forward line that it
/// differentiates:
///
///     S = scale·Q·Kᵀ + b,       W = exp(S − L)
///     O = W·V                   dP = dO·Vᵀ,   dV += Wᵀ·dO
///     W = softmax(S)            dS = W∘(dP − D),   D_i = dO_i·O_i − dL_i
///     b_j                       c_j += Σ_i dS_ij
///     S = scale·Q·Kᵀ            dQ += scale·dS·K,   dK += dSᵀ·(scale·Q)
///     b_j = w‖k_j‖² + …         dk_j += 2w·c_j·k_j     (once, at the end)
///
/// where the values are the keys, dV is added into dK.
template <class Scalar, class Terms>
class BackwardTask : BackwardBlock<Scalar> {
  using Block = BackwardBlock<Scalar>;
  using Accumulator = accumulator_t<Scalar>;

 public:
  BackwardTask(const Operands<Scalar>& operands, const Terms& terms, const Tiling& tiling,
               const Upstream<Scalar>& upstream, const GradientOutputs<Scalar>& gradients,
               BackwardBuffers<Accumulator>& buffers, TermTask<Scalar, Terms> term_task,
               Index key_value_head, Index first_key, Turns turns)
      : Block(operands, tiling, upstream, gradients, buffers, key_value_head, first_key, turns),
        terms_(terms),
        term_task_(term_task) {}

  void run() {
    this->load_keys();
    const Index runs = blocks(shape_.queries, tiling_.query_tile);
    for (Index turn = 0; turn < shape_.group() * runs; ++turn) {
      const Index first_query = turn % runs * tiling_.query_tile;
      visit_queries(key_value_head_ * shape_.group() + turn / runs, first_query,
                    std::min(tiling_.query_tile, shape_.queries - first_query), turn);
    }
    this->store_keys();
  }

 private:
  using Block::buffers_, Block::first_key_of, Block::grad_out_of_run_, Block::key_tiles,
      Block::key_value_head_, Block::keys_of, Block::keys_of_tile_, Block::operands_,
      Block::queries_are_packed_, Block::queries_of_run_, Block::shape_, Block::tiling_,
      Block::turns_;

  /// All tiles of one run of queries.
  void visit_queries(Index head, Index first_query, Index queries, Index turn) {
    const Index tiles = tiling_.addend / tiling_.key_tile;
    queries_are_packed_ = false;
    for (Index n = 0; n < key_tiles(); n += tiles) {
      const Index keys = std::min(tiling_.addend, shape_.keys - first_key_of(n));
      visit_addend({head, first_query, queries, first_key_of(n), keys}, n, turn);
    }
    // Tile or no tile, so that whoever waits for this waits for all.
    turns_.wait_for(turn);
    this->wait_for_same_keys(first_query);
    turns_.pass(turn);
  }

  /// One addend of dQ, from the key tiles from `first_tile` on. Queries are packed when the first tile that
  /// is not empty needs them.
  void visit_addend(const Tile& addend, Index first_tile, Index turn) {
    bool begun = false;
    for (Index n = first_tile; first_key_of(n) < addend.first_key + addend.keys; ++n) {
      const Tile whole{addend.head, addend.first_query, addend.queries, first_key_of(n),
                       keys_of(n)};
      terms_.each_part(whole, simd::left_width<Accumulator>, simd::panel_width<Accumulator>,
                       [&](const Tile& tile, Coverage coverage) {
                         if (!begun) begin_addend(addend);
                         begun = true;
                         visit_tile(tile, coverage, tile.first_query - addend.first_query, n);
                       });
    }
    if (!begun) return;
    turns_.wait_for(turn);
    this->add_to_grad_queries(addend.head, addend.first_query, addend.queries);
    term_task_.end_run(addend.head, addend.first_query, addend.queries);
  }

  void begin_addend(const Tile& addend) {
    if (!queries_are_packed_) Block::load_queries(addend, !Terms::needs_whole_scores);
    std::fill(buffers_.grad_queries, buffers_.grad_queries + addend.queries * buffers_.key_stride,
              Accumulator(0));
    const Index of_head = blocks(shape_.keys, tiling_.addend);
    term_task_.begin_run(key_value_head_ * of_head + addend.first_key / tiling_.addend,
                         addend.queries);
  }

  /// `row` is the tile's first row within the run of queries.
  void visit_tile(const Tile& tile, Coverage coverage, Index row, Index key_tile) {
    const KeyTileBuffers<Accumulator>& keys = buffers_.key_tiles[key_tile];
    const Index offset = tile.first_key - first_key_of(key_tile);  // a whole number of panels
    const simd::Tile<Accumulator> weights{buffers_.weights, buffers_.score_stride};
    const simd::Tile<Accumulator> grad_scores{buffers_.grad_scores, buffers_.score_stride};
    score_tile(tile, shape_.head_dim,
               simd::packed_left(buffers_.queries.columns, shape_.head_dim, row, tile.queries),
               keys.transposed_keys + offset * shape_.head_dim, keys.key_bias + offset, weights);
    finish_scores(operands_, terms_, tile, weights, term_task_.records());
    Accumulator* const bias_gradient =
        this->wants_key_bias() ? keys.grad_key_bias + offset : nullptr;
    const bool is_final = is_left_by_softmax(tile, coverage, key_tile, offset);
    differentiate_softmax(tile, row, keys, offset, grad_scores,
                          {weights.data - grad_scores.data, is_final ? bias_gradient : nullptr});
    if (coverage == Coverage::partial) {
      // By selection, and last: a row whose score is NaN in sight of one key has NaN for every weight.
      terms_.hide(tile, weights.data, weights.row_stride, Accumulator(0));
      terms_.hide(tile, grad_scores.data, grad_scores.row_stride, Accumulator(0));
    }
    term_task_.drop_weights(tile, weights);
    term_task_.differentiate(tile, row, grad_scores,
                             [&] { this->wait_for_same_keys(tile.first_query); });
    for (Index i = 0; bias_gradient && !is_final && i < tile.queries; ++i)
      simd::add_row(grad_scores.from(i).data, bias_gradient, tile.keys);
    add_to_gradients(tile, row, weights, grad_scores, key_tile, offset);
  }

  /// dP = dO·Vᵀ, then S → W = 2^(S − L) and dP → dS = W∘(dP − D) in place.
  void differentiate_softmax(const Tile& tile, Index row, const KeyTileBuffers<Accumulator>& keys,
                             Index offset, simd::Tile<Accumulator> grad_scores,
                             const simd::DifferentiateSoftmax<Accumulator>& work) {
    const Index dim = shape_.value_dim,
                value_depth = operands_.values_are_keys ? shape_.head_dim : dim;
    const auto grad_out = simd::packed_left(buffers_.grad_out.columns, dim, row, tile.queries);
    const simd::Panels<Accumulator> values{keys.transposed_values + offset * value_depth,
                                           value_depth * simd::panel_width<Accumulator>};
    const auto* const rows = buffers_.softmax_rows + row;
    if constexpr (Terms::drops_weights) {
      simd::set_product(tile.queries, tile.keys, dim, grad_out, values, grad_scores);
      term_task_.drop_gradients(tile, grad_scores);
      simd::differentiate_softmax(tile.queries, tile.keys, grad_scores, rows, work);
    } else {
      simd::set_softmax_gradients(tile.queries, tile.keys, dim, grad_out, values, grad_scores, rows,
                                  work);
    }
  }

  /// Whether dS stays as the softmax leaves it, and the columns that pad it stand for no other keys.
  bool is_left_by_softmax(const Tile& tile, Coverage coverage, Index key_tile, Index offset) const {
    return coverage == Coverage::full && !Terms::modifies_scores &&
           (tile.keys % simd::panel_width<Accumulator> == 0 ||
            offset + tile.keys == keys_of(key_tile));
  }

  void add_to_gradients(const Tile& tile, Index row, simd::Tile<Accumulator> weights,
                        simd::Tile<Accumulator> grad_scores, Index key_tile, Index offset) {
    const KeyTileBuffers<Accumulator>& keys = buffers_.key_tiles[key_tile];
    const Index value_stride =
        operands_.values_are_keys ? buffers_.key_stride : buffers_.value_stride;
    // dQ += dS·K, still without the scale
    add_weighted_rows<false>(
        terms_, tile, grad_scores, keys_of_tile_[key_tile], offset,
        {buffers_.grad_queries + row * buffers_.key_stride, buffers_.key_stride});
    // dV += Wᵀ·dO
    add_weighted_rows<true>(terms_, tile, weights, grad_out_of_run_, row,
                            {keys.grad_values + offset * value_stride, value_stride});
    // dK += dSᵀ·(scale·Q)
    add_weighted_rows<true>(terms_, tile, grad_scores, queries_of_run_, row,
                            {keys.grad_keys + offset * buffers_.key_stride, buffers_.key_stride});
  }

  const Terms& terms_;
  TermTask<Scalar, Terms> term_task_;
};

template <class Scalar>
void set_zero(MatrixView<Scalar> view) {
  for (Index i = 0; i < view.rows; ++i) {
    for (Index c = 0; c < view.cols; ++c) view(i, c) = Scalar(0);
  }
}

/// How the backward pass of a sequence is shared out: one item for each block of keys of each
/// key/value head. The items share a counter of turns for each, and the sums of the terms.
template <class Scalar>
struct BackwardPlan {
  using Accumulator = accumulator_t<Scalar>;

  Shape shape;
  bool values_are_keys;
  Tiling tiling;
  Index items;
  TermSums<Accumulator> sums;

  template <class Terms = TermChain<>>
  BackwardPlan(const Shape& sequence, const Tiling& cut, bool shared, const Terms& terms = Terms())
      : shape(sequence),
        values_are_keys(shared),
        tiling(cut),
        items(shape.key_value_heads * blocks(shape.keys, tiling.block)),
        sums(terms, shape, tiling, shared) {
    eigen_assert(tiling.addend % tiling.key_tile == 0 && tiling.block % tiling.addend == 0 &&
                 tiling.block <= max_key_tiles * tiling.key_tile);
    Arena counter;
    BackwardBuffers<Accumulator>(counter, shape, tiling, values_are_keys);
    TermBuffers<Accumulator, Terms>(counter, tiling);
    bytes_per_worker_ = counter.used();
  }

  std::size_t shared_bytes() const {
    Arena counter;
    turns_in(counter);
    TermSums<Accumulator>(sums).take(counter);
    return counter.used();
  }
  std::size_t bytes_per_worker() const { return bytes_per_worker_; }

  Turn* turns_in(Arena& shared) const { return shared.take<Turn>(items); }

  /// The sums, in the memory that all workers share.
  TermSums<Accumulator> sums_in(Arena shared) const {
    turns_in(shared);
    TermSums<Accumulator> placed = sums;
    placed.take(shared);
    return placed;
  }

 private:
  std::size_t bytes_per_worker_ = 0;
};

/// Before the items of a sequence: all turns and sums are 0.
template <class Scalar>
void start_backward(const BackwardPlan<Scalar>& plan, Arena shared) {
  const TermSums<accumulator_t<Scalar>> sums = plan.sums_in(shared);
  std::uninitialized_value_construct_n(plan.turns_in(shared), plan.items);
  sums.set_zero();
}

/// The turns of an item. Where a term adds to the same numbers from different heads, or from
/// different sequences (which then have the same shape), they do so in order.
template <class Scalar, class Terms>
Turns turns_of(Index item, const Terms& terms, const BackwardPlan<Scalar>& plan, Arena shared) {
  const Index blocks_per_head = blocks(plan.shape.keys, plan.tiling.block);
  Arena of_sequence = shared;
  Turn* turns = plan.turns_in(of_sequence);
  Turns own{turns + item, item % blocks_per_head > 0 ? turns + item - 1 : nullptr};
  if (item >= blocks_per_head && (terms.adds_across_heads() || terms.adds_across_sequences())) {
    own.same_keys_before = turns + item - blocks_per_head;
  } else if (plan.shape.sequence > 0 && terms.adds_across_sequences()) {
    Arena before = shared;
    before.go_back(plan.shared_bytes());
    own.same_keys_before = plan.turns_in(before) + plan.items - blocks_per_head + item;
  }
  return own;
}

/// All gradients but for `gradients.query_sums`, to which its part is added, and those of terms: the
/// items of one sequence that fall to one worker.
template <class Scalar, class Terms, class Items>
void backward(const Operands<Scalar>& operands, const Terms& terms,
              const BackwardPlan<Scalar>& plan, const Upstream<Scalar>& upstream,
              const GradientOutputs<Scalar>& gradients, Arena shared, Arena own,
              const Items& items) {
  using Accumulator = accumulator_t<Scalar>;
  const Index blocks_per_head = blocks(plan.shape.keys, plan.tiling.block);
  const TermSums<Accumulator> sums = plan.sums_in(shared);
  BackwardBuffers<Accumulator> buffers(own, plan.shape, plan.tiling, plan.values_are_keys);
  TermBuffers<Accumulator, Terms> term_buffers(own, plan.tiling);
  items([&](Index item) {
    BackwardTask<Scalar, Terms>(operands, terms, plan.tiling, upstream, gradients, buffers,
                                {plan.shape, terms, term_buffers, sums}, item / blocks_per_head,
                                item % blocks_per_head * plan.tiling.block,
                                turns_of(item, terms, plan, shared))
        .run();
  });
}

}  // namespace surfattn::detail
