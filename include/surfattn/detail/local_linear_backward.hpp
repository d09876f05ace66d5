// surfattn layer 4: the backward pass of local-linear estimates

#pragma once

#include <algorithm>
#include <optional>
#include <surfattn/detail/local_moments.hpp>

/// With δ_j = k_j − μ, ν_j = v_j − v̄, C = M + λI, S = Σ w δ·νᵀ, the estimate of a query is
///
///     z = C⁻¹(q − μ),   f = v̄ + Sᵀz = Σ_j w_j·e_j·v_j,   e_j = 1 + z·δ_j.
///
/// Because Σ w δ = 0 and Σ w ν = 0, neither M nor S moves with μ or v̄, and with a = C⁻¹·S·g for an
/// upstream gradient g the gradient is
///
///     h_j = g·ν_j − a·δ_j,
///     w:  dw_j = e_j·h_j,  whose weighted mean is D = λ·z·a,   dS_j = w_j(e_j·h_j − D)
///     v:  dv_j = w_j·e_j·g
///     k:  dk_j = w_j(h_j·z − e_j·a), besides what comes through the scores
///     q:  dq = a, besides
///     λ:  dλ = −z·a = −D/λ.
///
/// Where the values are the keys, S = C − λI, hence a = g − λC⁻¹g and f = q − λz; dk and dv add up
/// to w_j(h_j·z − e_j·b) and h_j = −b·δ_j with b = a − g. In general b = a. So a pair costs no more
/// than a few products of its width, once z and b are known.
namespace surfattn::detail {

/// What the backward pass knows of each query: z and b, Tq × (Hq·d), and for each query head the
/// numbers that complete e = z·k + e₀ and h = g·v − b·k + h₀, and D.
template <class Scalar>
struct LocalAdjoints {
  MatrixView<Scalar> directions;                              ///< z
  MatrixView<Scalar> pulls;                                   ///< b
  MatrixView<Scalar> direction_offsets, pull_offsets, means;  ///< e₀, h₀, D
  /// r_i = Σ_j dS_ij of the raw scores of each sequence, at head·Tq + i; 0 but for modifiers
  Scalar* row_sums;

  LocalAdjoints(Arena& arena, const Shape& shape) {
    const auto take = [&](Index cols) {
      return MatrixView<Scalar>{arena.take<Scalar>(shape.queries * cols), shape.queries, cols, cols,
                                1};
    };
    directions = take(shape.query_heads * shape.head_dim);
    pulls = take(shape.query_heads * shape.head_dim);
    direction_offsets = take(shape.query_heads);
    pull_offsets = take(shape.query_heads);
    means = take(shape.query_heads);
    row_sums = arena.take<Scalar>(shape.queries * shape.query_heads);
  }

  LocalAdjoints of_sequence(const Shape& sequence) const {
    LocalAdjoints one = *this;
    for (auto* view :
         {&one.directions, &one.pulls, &one.direction_offsets, &one.pull_offsets, &one.means}) {
      *view = query_rows(*view, sequence);
    }
    if (row_sums) one.row_sums += sequence.first_query * sequence.query_heads;
    return one;
  }
};

/// z, a and the numbers that follow from them, from the moments of one query. A query that saw no
/// key takes no part: z = b = 0, D = 0.
template <class Scalar>
class AdjointSolver {
  using Accumulator = accumulator_t<Scalar>;
  using Vector = Eigen::Map<Eigen::Matrix<Accumulator, 1, Eigen::Dynamic>>;

 public:
  AdjointSolver(const LocalProblem<Scalar>& problem, MatrixView<const Scalar> grad_out,
                const LocalAdjoints<Scalar>& adjoints)
      : problem_(problem), grad_out_(grad_out), adjoints_(adjoints) {}

  void operator()(Index head, Index query, bool sees_a_key,
                  const Moments<Accumulator>& moments) const {
    Vector z(moments.scratch[0], moments.dim), a(moments.scratch[1], moments.dim);
    if (!sees_a_key) {
      z.setZero();
      a.setZero();
      return store(head, query, z, a, Accumulator(1), Accumulator(0), Accumulator(0));
    }
    const auto queries = problem_.operands.query_head(head);
    const Vector centre(const_cast<Accumulator*>(moments.centre), moments.dim);
    for (Index c = 0; c < moments.dim; ++c)
      z[c] = static_cast<Accumulator>(queries(query, c)) - centre[c];
    factorise(moments.dim, moments.second, moments.stride, problem_.ridge);
    detail::solve(moments.dim, moments.second, moments.stride, z.data());
    const bool values_are_keys = problem_.operands.values_are_keys;
    const Accumulator mean_value = values_are_keys ? solve_for_keys(head, query, moments, a)
                                                   : solve_for_values(head, query, moments, a);
    const Accumulator mean = problem_.ridge * z.dot(a);
    if (values_are_keys) {
      for (Index c = 0; c < moments.dim; ++c) a[c] -= gradient(head, query, c);
    }
    store(head, query, z, a, 1 - z.dot(centre), a.dot(centre) - mean_value, mean);
  }

 private:
  Accumulator gradient(Index head, Index query, Index col) const {
    return static_cast<Accumulator>(
        grad_out_(query, head * problem_.operands.shape.value_dim + col));
  }

  /// a = g − λ·C⁻¹·g. Returns 0, for h needs no values.
  Accumulator solve_for_keys(Index head, Index query, const Moments<Accumulator>& moments,
                             Vector& a) const {
    for (Index c = 0; c < moments.dim; ++c) a[c] = gradient(head, query, c);
    detail::solve(moments.dim, moments.second, moments.stride, a.data());
    for (Index c = 0; c < moments.dim; ++c) a[c] = gradient(head, query, c) - problem_.ridge * a[c];
    return Accumulator(0);
  }

  /// a = C⁻¹·S·g. Returns g·v̄.
  Accumulator solve_for_values(Index head, Index query, const Moments<Accumulator>& moments,
                               Vector& a) const {
    a.setZero();
    Accumulator mean_value(0);
    for (Index c = 0; c < moments.value_dim; ++c) {
      const Accumulator g = gradient(head, query, c);
      mean_value += g * (moments.value_origin[c] + moments.value_sum[c]);
      for (Index r = 0; r < moments.dim; ++r)
        a[r] += g * moments.cross[r * moments.value_stride + c];
    }
    detail::solve(moments.dim, moments.second, moments.stride, a.data());
    return mean_value;
  }

  void store(Index head, Index query, const Vector& z, const Vector& b, Accumulator e0,
             Accumulator h0, Accumulator mean) const {
    const Index first = head * problem_.operands.shape.head_dim;
    for (Index c = 0; c < z.size(); ++c) {
      adjoints_.directions(query, first + c) = static_cast<Scalar>(z[c]);
      adjoints_.pulls(query, first + c) = static_cast<Scalar>(b[c]);
    }
    adjoints_.direction_offsets(query, head) = static_cast<Scalar>(e0);
    adjoints_.pull_offsets(query, head) = static_cast<Scalar>(h0);
    adjoints_.means(query, head) = static_cast<Scalar>(mean);
  }

  const LocalProblem<Scalar>& problem_;
  MatrixView<const Scalar> grad_out_;
  const LocalAdjoints<Scalar>& adjoints_;
};

/// What the second and third walk write: dQ through the scores alone, and the gradients of the keys.
template <class Scalar>
struct LocalGradientOutputs {
  MatrixView<Scalar> queries;
  MatrixView<Scalar> keys;
  std::optional<MatrixView<Scalar>> values;  ///< absent where the values are the keys
  MatrixView<Scalar> key_bias;               ///< c_j, Tk × Hkv

  LocalGradientOutputs of_sequence(const Shape& sequence) const {
    LocalGradientOutputs one{
        query_rows(queries, sequence), key_rows(keys, sequence), {}, key_rows(key_bias, sequence)};
    if (values) one.values = key_rows(*values, sequence);
    return one;
  }
};

/// Buffers of one task; over an empty arena, their size.
template <class Accumulator>
struct LocalGradientBuffers {
  static constexpr Index query_tile = 64;

  /// Rows of an operand as a left and as a right one.
  struct Rows {
    Accumulator* columns;
    Accumulator* panels;
    Index* non_finite;

    Rows(Arena& arena, Index count, Index width)
        : columns(arena.take<Accumulator>(simd::packed_left_size<Accumulator>(count, width))),
          panels(arena.take<Accumulator>(count * simd::padded<Accumulator>(width))),
          non_finite(arena.take<Index>(count)) {}
  };

  Index key_tile;
  Index stride, value_stride;
  WeightBuffers<Accumulator> weights;
  Rows queries, directions, pulls, grad_out;
  Accumulator* bent_weights;  ///< e, then w∘e
  Accumulator* pulled;        ///< h, then w∘h
  Accumulator* transposed_values;
  Accumulator* key_panels;
  Index* non_finite_keys;
  Accumulator* grad_queries;
  Accumulator* grad_keys;
  Accumulator* grad_values;
  Accumulator* grad_key_bias;
  Accumulator* records;  ///< one tile for each modifier

  LocalGradientBuffers(Arena& arena, const Shape& shape, std::size_t modifiers)
      : key_tile(MomentBuffers<Accumulator>::key_rows(shape)),
        stride(simd::padded<Accumulator>(shape.head_dim)),
        value_stride(simd::padded<Accumulator>(shape.value_dim)),
        weights(arena, shape, query_tile, key_tile),
        queries(arena, query_tile, shape.head_dim),
        directions(arena, query_tile, shape.head_dim),
        pulls(arena, query_tile, shape.head_dim),
        grad_out(arena, query_tile, shape.value_dim) {
    const Index padded_keys = simd::padded<Accumulator>(key_tile);
    bent_weights = arena.take<Accumulator>(query_tile * weights.score_stride);
    pulled = arena.take<Accumulator>(query_tile * weights.score_stride);
    transposed_values = arena.take<Accumulator>(padded_keys * shape.value_dim);
    key_panels = arena.take<Accumulator>(key_tile * stride);
    non_finite_keys = arena.take<Index>(key_tile);
    grad_queries = arena.take<Accumulator>(query_tile * stride);
    grad_keys = arena.take<Accumulator>(key_tile * stride);
    grad_values = arena.take<Accumulator>(key_tile * value_stride);
    grad_key_bias = arena.take<Accumulator>(padded_keys);
    records =
        arena.take<Accumulator>(static_cast<Index>(modifiers) * query_tile * weights.score_stride);
  }
};

/// The tiles of w, w∘e, w∘h and dS, and their products with keys (for the queries) and with queries
/// (for the keys).
template <class Scalar, class Terms>
class LocalGradientTask {
  using Accumulator = accumulator_t<Scalar>;
  using ScoreTile = simd::Tile<Accumulator>;

 public:
  LocalGradientTask(const LocalProblem<Scalar>& problem, const Terms& terms,
                    MatrixView<const Scalar> grad_out, const LocalAdjoints<Scalar>& adjoints,
                    LocalGradientBuffers<Accumulator>& buffers)
      : problem_(problem),
        operands_(problem.operands),
        shape_(problem.operands.shape),
        terms_(terms),
        grad_out_(grad_out),
        adjoints_(adjoints),
        buffers_(buffers),
        tiles_(problem.operands, terms, problem.log_sum_exp, buffers.weights) {
    Accumulator* next = buffers.records;
    for (auto& record : records_) {
      record = {next, buffers.weights.score_stride};
      next += LocalGradientBuffers<Accumulator>::query_tile * buffers.weights.score_stride;
    }
  }

  /// dQ = scale·dS·K of one run of queries, over all keys.
  void run_queries(Index head, Index first_query, Index queries, MatrixView<Scalar> grad_queries) {
    load_queries(head, first_query, queries);
    std::fill(buffers_.grad_queries, buffers_.grad_queries + queries * buffers_.stride,
              Accumulator(0));
    Scalar* row_sums = adjoints_.row_sums + head * shape_.queries + first_query;
    std::fill(row_sums, row_sums + queries, Scalar(0));
    for (Index key = 0; key < shape_.keys; key += buffers_.key_tile) {
      load_keys(head / shape_.group(), key);
      if (tiles_.coverage() == Coverage::empty) continue;
      const RowOperand<Scalar> keys = pack_row_operand(
          tiles_.key_rows(), Accumulator(1), buffers_.key_panels, buffers_.non_finite_keys);
      const ScoreTile grad_scores = differentiate();
      if constexpr (Terms::modifies_scores) add_row_sums(grad_scores, row_sums);
      add_weighted_rows<false>(terms_, tiles_.tile(), grad_scores, keys, 0,
                               {buffers_.grad_queries, buffers_.stride});
    }
    const auto out = grad_queries.block_cols(head * shape_.head_dim, shape_.head_dim)
                         .block_rows(first_query, queries);
    for (Index i = 0; i < queries; ++i) {
      simd::write_row<simd::Store::set>(buffers_.grad_queries + i * buffers_.stride,
                                        operands_.scale, out, i);
    }
  }

  /// Everything that one run of keys gets, from all queries of all heads that share it.
  void run_keys(Index key_value_head, Index first_key,
                const LocalGradientOutputs<Scalar>& gradients) {
    load_keys(key_value_head, first_key);
    clear_key_sums();
    for (Index member = 0; member < shape_.group(); ++member) {
      for (Index query = 0; query < shape_.queries; query += buffers_.query_tile) {
        const Index head = key_value_head * shape_.group() + member;
        load_queries(head, query, std::min(buffers_.query_tile, shape_.queries - query));
        if (tiles_.coverage() != Coverage::empty) add_to_keys();
      }
    }
    store_keys(key_value_head, first_key, gradients);
  }

 private:
  template <class Source>
  MatrixView<const Scalar> rows_of(MatrixView<Source> all, Index width) const {
    const Tile& tile = tiles_.tile();
    return all.block_cols(tile.head * width, width).block_rows(tile.first_query, tile.queries);
  }

  void load_queries(Index head, Index first_query, Index queries) {
    tiles_.load_queries(head, first_query, queries);
    const Index d = shape_.head_dim;
    simd::pack_left(rows_of(adjoints_.directions, d), Accumulator(1), buffers_.directions.columns);
    simd::pack_left(rows_of(adjoints_.pulls, d), Accumulator(-1), buffers_.pulls.columns);
    if (!operands_.values_are_keys) {
      simd::pack_left(rows_of(grad_out_, shape_.value_dim), Accumulator(1),
                      buffers_.grad_out.columns);
    }
  }

  void load_keys(Index key_value_head, Index first_key) {
    tiles_.load_keys(key_value_head, first_key,
                     std::min(buffers_.key_tile, shape_.keys - first_key));
    if (!operands_.values_are_keys)
      simd::pack_transposed(tiles_.value_rows(), buffers_.transposed_values);
  }

  ScoreTile bent_weights() const { return {buffers_.bent_weights, buffers_.weights.score_stride}; }
  ScoreTile pulled() const { return {buffers_.pulled, buffers_.weights.score_stride}; }

  using Rows = typename LocalGradientBuffers<Accumulator>::Rows;

  simd::ColumnsOperand<Accumulator> left(const Rows& rows, Index width) const {
    return simd::packed_left(rows.columns, width, 0, tiles_.tile().queries);
  }

  void add_row_sums(ScoreTile grad_scores, Scalar* sums) const {
    for (Index i = 0; i < tiles_.tile().queries; ++i) {
      const Accumulator* row = grad_scores.data + i * grad_scores.row_stride;
      for (Index j = 0; j < tiles_.tile().keys; ++j) sums[i] += static_cast<Scalar>(row[j]);
    }
  }

  /// Fills w∘e and w∘h and returns dS of the raw scores, in the place of w.
  ScoreTile differentiate() {
    const Tile& tile = tiles_.tile();
    const ScoreTile weights = tiles_.weights(records_), e = bent_weights(), h = pulled();
    simd::set_product<Accumulator>(tile.queries, tile.keys, shape_.head_dim,
                                   left(buffers_.directions, shape_.head_dim),
                                   tiles_.transposed_keys(), e);
    simd::set_product<Accumulator>(tile.queries, tile.keys, shape_.head_dim,
                                   left(buffers_.pulls, shape_.head_dim), tiles_.transposed_keys(),
                                   h);
    if (!operands_.values_are_keys) {
      simd::add_product<Accumulator>(
          tile.queries, tile.keys, shape_.value_dim, left(buffers_.grad_out, shape_.value_dim),
          {buffers_.transposed_values, shape_.value_dim * simd::panel_width<Accumulator>}, h);
    }
    for (Index i = 0; i < tile.queries; ++i) differentiate_row(i, weights, e, h);
    if (tiles_.coverage() == Coverage::partial) {
      for (const ScoreTile hidden : {weights, e, h}) tiles_.hide(hidden);
    }
    if constexpr (Terms::modifies_scores) {
      terms_.differentiate(tile, records_, weights,
                           [](std::size_t) { return ItemSums<Accumulator>{}; });
    }
    return weights;
  }

  void differentiate_row(Index i, ScoreTile weights, ScoreTile e, ScoreTile h) const {
    using Row = Eigen::Map<Eigen::Array<Accumulator, Eigen::Dynamic, 1>>;
    const Tile& tile = tiles_.tile();
    const auto of_query = [&](MatrixView<Scalar> numbers) {
      return static_cast<Accumulator>(numbers(tile.first_query + i, tile.head));
    };
    const Accumulator e0 = of_query(adjoints_.direction_offsets),
                      h0 = of_query(adjoints_.pull_offsets), mean = of_query(adjoints_.means);
    Row w(weights.data + i * weights.row_stride, tile.keys),
        bent(e.data + i * e.row_stride, tile.keys), pulled(h.data + i * h.row_stride, tile.keys);
    bent += e0;
    pulled += h0;
    for (Index j = 0; j < tile.keys; ++j) {
      const Accumulator weight = w[j], bend = bent[j], pull = pulled[j];
      w[j] = weight * (bend * pull - mean);
      bent[j] = weight * bend;
      pulled[j] = weight * pull;
    }
  }

  void clear_key_sums() {
    const Index keys = tiles_.tile().keys;
    std::fill(buffers_.grad_keys, buffers_.grad_keys + keys * buffers_.stride, Accumulator(0));
    std::fill(buffers_.grad_values, buffers_.grad_values + keys * buffers_.value_stride,
              Accumulator(0));
    std::fill(buffers_.grad_key_bias, buffers_.grad_key_bias + simd::padded<Accumulator>(keys),
              Accumulator(0));
  }

  void add_to_keys() {
    const Tile& tile = tiles_.tile();
    const ScoreTile grad_scores = differentiate();
    const auto add = [&](ScoreTile coefficients, MatrixView<const Scalar> rows, Accumulator factor,
                         Rows& packed, Accumulator* to, Index stride) {
      add_weighted_rows<true>(terms_, tile, coefficients,
                              pack_row_operand(rows, factor, packed.panels, packed.non_finite), 0,
                              {to, stride});
    };
    const Index d = shape_.head_dim;
    add(grad_scores, tiles_.query_rows(), operands_.scale, buffers_.queries, buffers_.grad_keys,
        buffers_.stride);
    add(pulled(), rows_of(adjoints_.directions, d), Accumulator(1), buffers_.directions,
        buffers_.grad_keys, buffers_.stride);
    add(bent_weights(), rows_of(adjoints_.pulls, d), Accumulator(-1), buffers_.pulls,
        buffers_.grad_keys, buffers_.stride);
    if (!operands_.values_are_keys) {
      add(bent_weights(), rows_of(grad_out_, shape_.value_dim), Accumulator(1), buffers_.grad_out,
          buffers_.grad_values, buffers_.value_stride);
    }
    for (Index i = 0; i < tile.queries; ++i) {
      simd::add_row(grad_scores.data + i * grad_scores.row_stride, buffers_.grad_key_bias,
                    tile.keys);
    }
  }

  void store_keys(Index head, Index first_key, const LocalGradientOutputs<Scalar>& gradients) {
    const auto rows = tiles_.key_rows();
    const auto grad_keys = gradients.keys.block_cols(head * shape_.head_dim, shape_.head_dim);
    for (Index j = 0; j < rows.rows; ++j) {
      const Accumulator bias = buffers_.grad_key_bias[j];
      Accumulator* grad_key = buffers_.grad_keys + j * buffers_.stride;
      // b_j = w‖k_j‖² + …; what a key holds that nobody sees must not come through
      const Accumulator factor = 2 * operands_.key_norm_weight * bias;
      for (Index c = 0; factor != Accumulator(0) && c < rows.cols; ++c)
        grad_key[c] += factor * static_cast<Accumulator>(rows(j, c));
      simd::write_row<simd::Store::set>(grad_key, Accumulator(1), grad_keys, first_key + j);
      gradients.key_bias(first_key + j, head) = static_cast<Scalar>(bias);
      if (!gradients.values) continue;
      simd::write_row<simd::Store::set>(
          buffers_.grad_values + j * buffers_.value_stride, Accumulator(1),
          gradients.values->block_cols(head * shape_.value_dim, shape_.value_dim), first_key + j);
    }
  }

  const LocalProblem<Scalar>& problem_;
  const Operands<Scalar>& operands_;
  const Shape& shape_;
  const Terms& terms_;
  MatrixView<const Scalar> grad_out_;
  const LocalAdjoints<Scalar>& adjoints_;
  LocalGradientBuffers<Accumulator>& buffers_;
  WeightTiles<Scalar, Terms> tiles_;
  TermRecords<Accumulator, Terms::records> records_{};
};

/// How the walks over the longest sequence are shared out: one item for each run of queries of each
/// query head, then one for each run of keys of each key/value head. Each writes its own rows and no
/// other's.
template <class Scalar>
struct LocalGradientPlan : WorkPlan {
  using Buffers = LocalGradientBuffers<accumulator_t<Scalar>>;

  Shape shape;
  std::size_t modifiers;
  Index key_tile;

  Index query_items(const Shape& sequence) const {
    return sequence.query_heads * blocks(sequence.queries, Buffers::query_tile);
  }
  Index items_of(const Shape& sequence) const {
    return query_items(sequence) + sequence.key_value_heads * blocks(sequence.keys, key_tile);
  }

  LocalGradientPlan(const Shape& problem, std::size_t modifier_count, const Executor* executor)
      : shape(problem), modifiers(modifier_count) {
    Arena counter;
    key_tile = Buffers(counter, shape, modifiers).key_tile;
    for (Index s = 0; s < shape.sequences.count(); ++s)
      items = std::max(items, items_of(shape.of_sequence(s)));
    workers = detail::workers(executor, items);
    bytes_per_worker = counter.used();
  }
};

template <class Scalar, class Terms>
void local_gradients(const LocalProblem<Scalar>& problem, const Terms& terms,
                     const LocalGradientPlan<Scalar>& plan, MatrixView<const Scalar> grad_out,
                     const LocalAdjoints<Scalar>& adjoints,
                     const LocalGradientOutputs<Scalar>& gradients, const Workspace& workspace,
                     Executor* executor) {
  using Buffers = LocalGradientBuffers<accumulator_t<Scalar>>;
  const Shape& shape = problem.operands.shape;
  const Index items = plan.items_of(shape), query_items = plan.query_items(shape);
  const Index query_blocks = blocks(shape.queries, Buffers::query_tile),
              key_blocks = blocks(shape.keys, plan.key_tile);
  const Index workers = std::min(plan.workers_within(workspace), detail::workers(executor, items));
  share_items(executor, workers, [&](Index worker, const auto& take) {
    Arena arena = plan.arena_of(workspace, worker);
    Buffers buffers(arena, shape, plan.modifiers);
    LocalGradientTask<Scalar, Terms> task(problem, terms, grad_out, adjoints, buffers);
    for (Index item = take(); item < items; item = take()) {
      if (item < query_items) {
        const Index first = item % query_blocks * Buffers::query_tile;
        task.run_queries(item / query_blocks, first,
                         std::min(Buffers::query_tile, shape.queries - first), gradients.queries);
      } else {
        const Index block = item - query_items;
        task.run_keys(block / key_blocks, block % key_blocks * plan.key_tile, gradients);
      }
    }
  });
}

}  // namespace surfattn::detail
