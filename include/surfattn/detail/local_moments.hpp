// surfattn layer 4: the second moments of the keys about each query's projection

#pragma once

#include <algorithm>
#include <surfattn/detail/cholesky.hpp>
#include <surfattn/detail/weight_tiles.hpp>
#include <surfattn/detail/work_plan.hpp>
#include <surfattn/executor.hpp>

namespace surfattn::detail {

/// What a local-linear estimate is computed from: a problem, and its local-constant projection.
template <class Scalar>
struct LocalProblem {
  Operands<Scalar> operands;             ///< `values` may differ from the keys, in their width too
  MatrixView<const Scalar> projection;   ///< μ, Tq × (Hq·d)
  MatrixView<const Scalar> log_sum_exp;  ///< Tq × Hq
  accumulator_t<Scalar> ridge{};         ///< λ

  /// The problem of one sequence of the batch.
  LocalProblem of_sequence(Index index) const {
    const auto one = operands.of_sequence(index);
    return {one, query_rows(projection, one.shape), query_rows(log_sum_exp, one.shape), ridge};
  }
};

/// The estimate is of weights that sum to 1.
template <class Terms>
inline constexpr bool keeps_sum_of_weights = !Terms::has_sinks && !Terms::drops_weights;

/// Calls use(problem, terms) for each sequence of a batch, one after the other.
template <class Scalar, class Bind, class Use>
void for_each_sequence(const LocalProblem<Scalar>& batch, const Bind& bind, const Use& use) {
  for (Index s = 0; s < batch.operands.shape.sequences.count(); ++s) {
    const auto one = batch.of_sequence(s);
    const auto terms = bind(one.operands.shape);
    static_assert(
        keeps_sum_of_weights<plain_t<decltype(terms)>>,
        "surfattn: a local-linear estimate takes no sinks and no dropout, for its weights "
        "must sum to 1");
    use(one, terms);
  }
}

/// The moments of one query: with w_j its weights, μ its projection and δ_j = k_j − μ,
///
///     M = Σ w δ·δᵀ,   S = Σ w δ·(v − t)ᵀ,   s = Σ w (v − t),
///
/// where t is the value of the first key that has any weight. About these shifts the sums do not
/// cancel; μ is one for which Σ w δ = 0, so that S does not depend on t. The columns that pad the
/// rows are 0.
template <class Accumulator>
struct Moments {
  Index dim, stride;
  Index value_dim, value_stride;
  Accumulator* second;        ///< M, d × stride; its lower triangle
  Accumulator* cross;         ///< S, d × value_stride; null where the values are the keys
  Accumulator* value_sum;     ///< s
  Accumulator* value_origin;  ///< t
  const Accumulator* centre;  ///< μ
  Accumulator* scratch[2];    ///< two vectors of length stride, for whoever uses the moments
};

/// Buffers of one task; over an empty arena, their size.
template <class Accumulator>
struct MomentBuffers {
  /// Keys whose differences from a query's centre are formed together: few, so that these stay in a
  /// cache near by.
  static constexpr Index keys_at_a_time = 64;

  WeightBuffers<Accumulator> weights;
  Index stride, value_stride;
  Index rows, key_tile;
  bool has_values;
  Accumulator* centres;
  Accumulator* second;
  Accumulator* cross = nullptr;
  Accumulator* value_sums = nullptr;
  Accumulator* value_origins = nullptr;
  bool* has_origin = nullptr;
  Accumulator* keys;              ///< of the tile at hand
  Accumulator* values = nullptr;  ///< of these
  Accumulator* differences;
  Accumulator* weighted;
  Accumulator* value_differences = nullptr;
  Accumulator* scratch[2];

  MomentBuffers(Arena& arena, const Shape& shape, bool values_are_keys)
      : weights(arena, shape, block_rows(shape), key_rows(shape)),
        stride(simd::padded<Accumulator>(shape.head_dim)),
        value_stride(simd::padded<Accumulator>(shape.value_dim)),
        rows(block_rows(shape)),
        key_tile(key_rows(shape)),
        has_values(!values_are_keys) {
    centres = arena.take<Accumulator>(rows * stride);
    second = arena.take<Accumulator>(rows * shape.head_dim * stride);
    keys = arena.take<Accumulator>(key_tile * stride);
    differences = arena.take<Accumulator>(keys_at_a_time * stride);
    weighted = arena.take<Accumulator>(keys_at_a_time * stride);
    for (auto& vector : scratch) vector = arena.take<Accumulator>(stride);
    if (!has_values) return;
    cross = arena.take<Accumulator>(rows * shape.head_dim * value_stride);
    value_sums = arena.take<Accumulator>(rows * value_stride);
    value_origins = arena.take<Accumulator>(rows * value_stride);
    has_origin = arena.take<bool>(rows);
    values = arena.take<Accumulator>(key_tile * value_stride);
    value_differences = arena.take<Accumulator>(keys_at_a_time * value_stride);
  }

  /// Queries of one task: so many that their moments stay in a second-level cache.
  static Index block_rows(const Shape& shape) {
    constexpr Index most = 64, budget = (Index(1) << 19) / static_cast<Index>(sizeof(Accumulator));
    const Index numbers =
        std::max<Index>(1, shape.head_dim * (simd::padded<Accumulator>(shape.head_dim) +
                                             simd::padded<Accumulator>(shape.value_dim)));
    return std::clamp<Index>(budget / numbers, 1, most);
  }
  static Index key_rows(const Shape& shape) {
    return tile_rows<Accumulator>(256, std::max(shape.head_dim, shape.value_dim));
  }
};

/// The moments of one block of queries of one query head, in one pass over the keys.
template <class Scalar, class Terms>
class MomentTask {
  using Accumulator = accumulator_t<Scalar>;

 public:
  MomentTask(const LocalProblem<Scalar>& problem, const Terms& terms,
             MomentBuffers<Accumulator>& buffers)
      : problem_(problem),
        shape_(problem.operands.shape),
        buffers_(buffers),
        tiles_(problem.operands, terms, problem.log_sum_exp, buffers.weights) {}

  /// Calls finish(query, sees a key, moments) for each of the queries.
  template <class Finish>
  void run(Index head, Index first_query, Index queries, const Finish& finish) {
    reset(head, first_query, queries);
    for (Index key = 0, keys; key < shape_.keys; key += keys) {
      keys = problem_.operands.run_of_keys(key, std::min(buffers_.key_tile, shape_.keys - key));
      tiles_.load_keys(head / shape_.group(), key, keys);
      const Coverage coverage = tiles_.coverage();
      if (coverage == Coverage::empty) continue;
      const auto weights = tiles_.weights();
      if (coverage == Coverage::partial) tiles_.hide(weights);
      load_keys();
      for (Index i = 0; i < queries; ++i) add_keys(i, weights.data + i * weights.row_stride);
    }
    for (Index i = 0; i < queries; ++i)
      finish(first_query + i, tiles_.sees_a_key(i), moments_of(i));
  }

 private:
  void reset(Index head, Index first_query, Index queries) {
    tiles_.load_queries(head, first_query, queries);
    simd::pack_rows(problem_.projection.block_cols(head * shape_.head_dim, shape_.head_dim)
                        .block_rows(first_query, queries),
                    Accumulator(1), buffers_.centres);
    const auto clear = [&](Accumulator* numbers, Index row_size) {
      std::fill(numbers, numbers + queries * row_size, Accumulator(0));
    };
    clear(buffers_.second, shape_.head_dim * buffers_.stride);
    if (!buffers_.has_values) return;
    clear(buffers_.cross, shape_.head_dim * buffers_.value_stride);
    clear(buffers_.value_sums, buffers_.value_stride);
    clear(buffers_.value_origins, buffers_.value_stride);
    std::fill(buffers_.has_origin, buffers_.has_origin + queries, false);
  }

  Moments<Accumulator> moments_of(Index i) const {
    const auto at = [i](Accumulator* numbers, Index row_size) {
      return numbers ? numbers + i * row_size : nullptr;
    };
    return {shape_.head_dim,
            buffers_.stride,
            shape_.value_dim,
            buffers_.value_stride,
            at(buffers_.second, shape_.head_dim * buffers_.stride),
            at(buffers_.cross, shape_.head_dim * buffers_.value_stride),
            at(buffers_.value_sums, buffers_.value_stride),
            at(buffers_.value_origins, buffers_.value_stride),
            at(buffers_.centres, buffers_.stride),
            {buffers_.scratch[0], buffers_.scratch[1]}};
  }

  void load_keys() {
    simd::pack_rows(tiles_.key_rows(), Accumulator(1), buffers_.keys);
    if (buffers_.has_values) simd::pack_rows(tiles_.value_rows(), Accumulator(1), buffers_.values);
  }

  /// Adds what the tile's keys give to the moments of one query. A key of weight 0, behind a mask
  /// or far away, is left out, whatever it holds.
  void add_keys(Index i, const Accumulator* weights) {
    const Moments<Accumulator> moments = moments_of(i);
    const Index keys = tiles_.tile().keys;
    Index count = 0;
    for (Index j = 0; j < keys; ++j) {
      if (weights[j] == Accumulator(0)) continue;
      const Index at = count * moments.stride;
      simd::subtract_and_scale_rows(buffers_.keys + j * moments.stride, moments.centre, weights[j],
                                    moments.stride, buffers_.differences + at,
                                    buffers_.weighted + at);
      if (buffers_.has_values) add_value(i, moments, j, weights[j], count);
      if (++count < MomentBuffers<Accumulator>::keys_at_a_time) continue;
      add_products(count, moments);
      count = 0;
    }
    if (count > 0) add_products(count, moments);
  }

  void add_value(Index i, const Moments<Accumulator>& moments, Index j, Accumulator weight,
                 Index count) {
    const Accumulator* const value = buffers_.values + j * moments.value_stride;
    if (!buffers_.has_origin[i]) {
      std::copy(value, value + moments.value_stride, moments.value_origin);
      buffers_.has_origin[i] = true;
    }
    Accumulator* difference = buffers_.value_differences + count * moments.value_stride;
    simd::subtract_rows(value, moments.value_origin, moments.value_stride, difference);
    simd::add_scaled_row(difference, weight, moments.value_sum, moments.value_stride);
  }

  /// Δᵀ·w as a left operand, from the rows of w·Δ.
  static simd::ColumnsOperand<Accumulator> transposed(const Accumulator* rows, Index stride) {
    return {rows, stride, simd::left_width<Accumulator>};
  }

  /// M += Δᵀ·w·Δ, panel by panel and from the diagonal down, and S += Δᵀ·w·(V − t).
  void add_products(Index count, const Moments<Accumulator>& moments) {
    constexpr Index width = simd::panel_width<Accumulator>;
    const Index stride = moments.stride;
    for (Index first = 0; first < moments.dim; first += width) {
      simd::add_product<Accumulator>(moments.dim - first, std::min(width, moments.dim - first),
                                     count, transposed(buffers_.weighted + first, stride),
                                     {buffers_.differences + first, width, stride},
                                     {moments.second + first * stride + first, stride});
    }
    if (!buffers_.has_values) return;
    simd::add_product<Accumulator>(moments.dim, moments.value_dim, count,
                                   transposed(buffers_.weighted, stride),
                                   {buffers_.value_differences, width, moments.value_stride},
                                   {moments.cross, moments.value_stride});
  }

  const LocalProblem<Scalar>& problem_;
  const Shape& shape_;
  MomentBuffers<Accumulator>& buffers_;
  WeightTiles<Scalar, Terms> tiles_;
};

/// How the moments of the longest sequence are shared out: one item for each block of queries of each
/// query head. Of other sequences there are fewer items, in the same memory.
template <class Scalar>
struct MomentPlan : WorkPlan {
  Shape shape;
  bool values_are_keys;
  Index block;

  Index items_of(const Shape& sequence) const {
    return sequence.query_heads * blocks(sequence.queries, block);
  }

  MomentPlan(const Shape& problem, bool shared, const Executor* executor)
      : shape(problem),
        values_are_keys(shared),
        block(MomentBuffers<accumulator_t<Scalar>>::block_rows(problem)) {
    for (Index s = 0; s < shape.sequences.count(); ++s)
      items = std::max(items, items_of(shape.of_sequence(s)));
    workers = detail::workers(executor, items);
    Arena counter;
    MomentBuffers<accumulator_t<Scalar>>(counter, shape, values_are_keys);
    bytes_per_worker = counter.used();
  }
};

/// Calls finish(head, query, sees a key, moments) for every query of every head, on any worker.
template <class Scalar, class Terms, class Finish>
void for_each_moments(const LocalProblem<Scalar>& problem, const Terms& terms,
                      const MomentPlan<Scalar>& plan, const Workspace& workspace,
                      Executor* executor, const Finish& finish) {
  const Shape& shape = problem.operands.shape;
  const Index items = plan.items_of(shape), blocks_per_head = blocks(shape.queries, plan.block);
  const Index workers = std::min(plan.workers_within(workspace), detail::workers(executor, items));
  share_items(executor, workers, [&](Index worker, const auto& take) {
    Arena arena = plan.arena_of(workspace, worker);
    MomentBuffers<accumulator_t<Scalar>> buffers(arena, shape, plan.values_are_keys);
    MomentTask<Scalar, Terms> task(problem, terms, buffers);
    for (Index item = take(); item < items; item = take()) {
      const Index head = item / blocks_per_head, first = item % blocks_per_head * plan.block;
      task.run(head, first, std::min(plan.block, shape.queries - first),
               [&](Index query, bool sees_a_key, const auto& moments) {
                 finish(head, query, sees_a_key, moments);
               });
    }
  });
}

}  // namespace surfattn::detail
