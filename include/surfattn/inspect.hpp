// surfattn layer 6: a look at scores and weights, for plots, tests and doubts

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <surfattn/attention.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/surface.hpp>
#include <type_traits>
#include <vector>

/// What the passes compute and do not keep, formed by the same code. (Weights too small to be normal,
/// which count as 0 in a pass, show here.) All functions run on the
/// calling thread, whatever the executor, and allocate their results and O(tile) numbers besides.
namespace surfattn {

/// How far a score has come.
enum class Stage {
  raw,         ///< S_ij as the form defines it, before any term
  modified,    ///< after the modifiers
  biased,      ///< after the biases; what a mask will hide still shows
  masked,      ///< −∞ where a term hides the key
  normalised,  ///< W_ij = softmax of the row, sinks included, before dropout; 0 where hidden
};

/// Which scores to look at.
struct ScoresAt {
  Stage stage = Stage::normalised;
  Index first_query = 0;              ///< of the rows of queries
  std::optional<Index> queries = {};  ///< how many from there; all by default
};

/// The keys that count most for each query, in falling order of weight; of equal ones the earlier.
template <class Scalar>
struct Neighbours {
  Matrix<Index> keys;  ///< Tq × (Hq·k), counted within the sequence; −1 where no more are seen
  Matrix<accumulator_t<Scalar>> weights;  ///< of the same shape; 0 there
};

namespace detail {

/// Tiles of scores of one sequence, a few queries at a time.
template <class Scalar, class Terms>
class ScoreReader {
  using Accumulator = accumulator_t<Scalar>;

 public:
  static constexpr Index most_queries = 64;

  ScoreReader(const Operands<Scalar>& operands, const Terms& terms)
      : operands_(operands),
        terms_(terms),
        key_tile_(tile_rows<Scalar>(512, operands.shape.head_dim)),
        stride_(score_stride<Accumulator>(key_tile_)) {
    Arena counter;
    take(counter);
    memory_ = Workspace(counter.used() + Arena::alignment);
    Arena arena(memory_);
    take(arena);
  }

  /// Calls visit(tile, scores, row_stride) for tiles of up to most_queries queries of one head,
  /// from the first key to the last: in units of ln 2, and without row_offset. From Stage::masked
  /// on, what the terms hide is −∞, and tiles that they leave empty are left out.
  template <class Visit>
  void read(Index head, Index first_query, Index queries, Stage stage, const Visit& visit) {
    const Shape& shape = operands_.shape;
    simd::pack_left(operands_.query_head(head).block_rows(first_query, queries),
                    log2_scale(operands_), queries_);
    for (Index key = 0; key < shape.keys; key += key_tile_) {
      const Index keys = std::min(key_tile_, shape.keys - key);
      const auto rows = operands_.key_head(head / shape.group()).block_rows(key, keys);
      simd::pack_transposed(rows, keys_);
      fill_key_bias(operands_, head / shape.group(), key, rows, bias_);
      const auto form = [&](const Tile& tile, Coverage coverage) {
        const Index offset = tile.first_key - key;
        const simd::Tile<Accumulator> scores{scores_, stride_};
        score_tile<Accumulator>(tile, shape.head_dim,
                                simd::packed_left(queries_, shape.head_dim, Index(0), tile.queries),
                                keys_ + offset * shape.head_dim, bias_ + offset, scores);
        if (stage == Stage::modified) modify_scores(operands_, terms_, tile, scores);
        if (stage >= Stage::biased) finish_scores(operands_, terms_, tile, scores);
        if (coverage == Coverage::partial)
          terms_.hide(tile, scores_, stride_, simd::minus_infinity<Accumulator>);
        visit(tile, static_cast<const Accumulator*>(scores_), stride_);
      };
      const Tile whole{head, first_query, queries, key, keys};
      if (stage >= Stage::masked) {
        terms_.each_run(whole, simd::panel_width<Accumulator>, form);
      } else {
        form(whole, Coverage::full);
      }
    }
  }

  /// What all scores of a row have besides, in natural units.
  Accumulator row_offset(Index head, Index query, Stage stage) const {
    return stage == Stage::raw ? query_offset(operands_, head, query)
                               : offset_beside_scores<Terms>(operands_, head, query);
  }

  /// Calls use(logit) for each sink of a head, in units of ln 2.
  template <class Use>
  void each_sink(Index head, const Use& use) const {
    terms_.each_sink([&](const auto& sink) {
      use(sink.template logit<Accumulator>(head) * simd::log2_e<Accumulator>);
    });
  }

 private:
  void take(Arena& arena) {
    const Index width = operands_.shape.head_dim, keys = simd::padded<Accumulator>(key_tile_);
    queries_ = arena.take<Accumulator>(simd::packed_left_size<Accumulator>(most_queries, width));
    keys_ = arena.take<Accumulator>(keys * width);
    bias_ = arena.take<Accumulator>(keys);
    scores_ = arena.take<Accumulator>(most_queries * stride_);
  }

  const Operands<Scalar>& operands_;
  const Terms& terms_;
  Index key_tile_, stride_;
  Workspace memory_;
  Accumulator *queries_ = nullptr, *keys_ = nullptr, *bias_ = nullptr, *scores_ = nullptr;
};

/// Over the keys that arrive: m = max S, l = Σ 2^(S − m), t = Σ 2^(S − m)·(S − m); and l with what
/// sinks add to it.
template <class Accumulator>
struct RunningEntropy {
  Accumulator maximum = simd::minus_infinity<Accumulator>;
  Accumulator seen{0}, sum{0}, moment{0};

  void add(const Accumulator* scores, Index keys) {
    Accumulator largest = maximum;
    for (Index j = 0; j < keys && !std::isnan(largest); ++j) {
      if (!(scores[j] <= largest)) largest = scores[j];  // a NaN stays
    }
    if (largest == simd::minus_infinity<Accumulator>) return;
    rescale(largest);
    for (Index j = 0; j < keys; ++j) {
      const Accumulator difference = scores[j] - maximum, weight = std::exp2(difference);
      if (weight == Accumulator(0)) continue;
      seen += weight;
      sum += weight;
      moment += weight * difference;
    }
  }

  void add_sink(Accumulator logit) {
    if (logit == simd::minus_infinity<Accumulator>) return;
    if (!(logit <= maximum)) rescale(logit);
    sum += std::exp2(logit - maximum);
  }

  /// m + log₂ l, sinks included; −∞ where there is nothing.
  Accumulator log_sum_exp() const {
    return sum == Accumulator(0) ? simd::minus_infinity<Accumulator> : maximum + std::log2(sum);
  }

  /// −Σ W·ln W over the keys; −∞ where none was seen.
  Accumulator entropy() const {
    if (seen == Accumulator(0)) return simd::minus_infinity<Accumulator>;
    const Accumulator bits = (seen * std::log2(sum) - moment) / sum;
    return bits < Accumulator(0) ? Accumulator(0) : bits * simd::ln_2<Accumulator>;
  }

 private:
  void rescale(Accumulator largest) {
    if (sum > Accumulator(0)) {
      const Accumulator shrunk = std::exp2(maximum - largest);
      if (seen > Accumulator(0)) moment = shrunk * (moment + (maximum - largest) * seen);
      seen *= shrunk;
      sum *= shrunk;
    }
    maximum = largest;
  }
};

/// Calls use(operands, terms) for each sequence of a batch, all of which have been checked.
template <class Scalar, class Use, class... Terms>
void each_sequence(const Operands<Scalar>& batch, const Require& require, const Use& use,
                   const Terms&... terms) {
  const auto bind = term_binder(batch, require, terms...);
  for (Index s = 0; s < batch.shape.sequences.count(); ++s) {
    const auto operands = batch.of_sequence(s);
    use(operands, bind(operands.shape));
  }
}

/// Calls use(reader, head, first_query, queries) for blocks of queries, of rows [first, last) of
/// the batch.
template <class Scalar, class Use, class... Terms>
void each_block(const Operands<Scalar>& batch, const Require& require, Index first, Index last,
                const Use& use, const Terms&... terms) {
  each_sequence(
      batch, require,
      [&](const Operands<Scalar>& operands, const auto& bound) {
        ScoreReader reader(operands, bound);
        const Shape& shape = operands.shape;
        const Index from = std::clamp<Index>(first - shape.first_query, 0, shape.queries),
                    to = std::clamp<Index>(last - shape.first_query, 0, shape.queries);
        for (Index head = 0; head < shape.query_heads; ++head) {
          for (Index query = from; query < to; query += reader.most_queries)
            use(operands, reader, head, query, std::min(reader.most_queries, to - query));
        }
      },
      terms...);
}

template <class Reader, class Accumulator>
void add_sinks(const Reader& reader, Index head, std::vector<RunningEntropy<Accumulator>>& rows) {
  reader.each_sink(head, [&](Accumulator logit) {
    for (auto& row : rows) row.add_sink(logit);
  });
}

/// log₂ Σ_j 2^S_ij and the entropies of a block.
template <class Accumulator, class Reader>
std::vector<RunningEntropy<Accumulator>> read_entropy(Reader& reader, Index head, Index query,
                                                      Index queries) {
  std::vector<RunningEntropy<Accumulator>> rows(static_cast<std::size_t>(queries));
  reader.read(head, query, queries, Stage::masked,
              [&](const Tile& tile, const Accumulator* scores, Index stride) {
                for (Index i = 0; i < queries; ++i)
                  rows[static_cast<std::size_t>(i)].add(scores + i * stride, tile.keys);
              });
  add_sinks(reader, head, rows);
  return rows;
}

template <class Scalar, class... Terms>
Matrix<accumulator_t<Scalar>> inspect_scores(const Operands<Scalar>& batch, const ScoresAt& at,
                                             const Require& require, const Terms&... terms) {
  using Accumulator = accumulator_t<Scalar>;
  const Shape& shape = batch.shape;
  const Index count = at.queries.value_or(shape.queries - at.first_query);
  if (at.first_query < 0 || count < 0 || at.first_query + count > shape.queries) {
    require.fail("the rows must lie among those of queries, but they are ", count, " from ",
                 at.first_query, " and queries is ", shape.queries_extent());
  }
  const bool masked = at.stage >= Stage::masked, normalised = at.stage == Stage::normalised;
  Matrix<Accumulator> result = Matrix<Accumulator>::Constant(
      count, shape.query_heads * shape.longest_keys,
      normalised ? Accumulator(0) : simd::minus_infinity<Accumulator>);
  each_block(
      batch, require, at.first_query, at.first_query + count,
      [&](const Operands<Scalar>& one, auto& reader, Index head, Index query, Index queries) {
        std::vector<RunningEntropy<Accumulator>> sums;
        if (normalised) sums = read_entropy<Accumulator>(reader, head, query, queries);
        const Index row = one.shape.first_query + query - at.first_query;
        reader.read(head, query, queries, at.stage,
                    [&](const Tile& tile, const Accumulator* scores, Index stride) {
                      for (Index i = 0; i < queries; ++i) {
                        const Accumulator origin =
                            normalised ? sums[static_cast<std::size_t>(i)].log_sum_exp()
                                       : -reader.row_offset(head, query + i, at.stage) *
                                             simd::log2_e<Accumulator>;
                        for (Index j = 0; j < tile.keys; ++j) {
                          const Accumulator score = scores[i * stride + j];
                          if (masked && score == simd::minus_infinity<Accumulator>) continue;
                          const Accumulator moved = score - origin;
                          result(row + i, head * shape.longest_keys + tile.first_key + j) =
                              static_cast<Accumulator>(
                                  normalised ? std::exp2(moved) : moved * simd::ln_2<Accumulator>);
                        }
                      }
                    });
      },
      terms...);
  return result;
}

template <class Scalar, class... Terms>
Matrix<accumulator_t<Scalar>> inspect_entropy(const Operands<Scalar>& batch, const Require& require,
                                              const Terms&... terms) {
  using Accumulator = accumulator_t<Scalar>;
  auto result = matrix<Accumulator>(batch.shape.log_sum_exp_extent());
  each_block(
      batch, require, 0, batch.shape.queries,
      [&](const Operands<Scalar>& one, auto& reader, Index head, Index query, Index queries) {
        const auto rows = read_entropy<Accumulator>(reader, head, query, queries);
        for (Index i = 0; i < queries; ++i) {
          result(one.shape.first_query + query + i, head) =
              static_cast<Accumulator>(rows[static_cast<std::size_t>(i)].entropy());
        }
      },
      terms...);
  return result;
}

/// The largest scores of a row so far, in falling order.
template <class Accumulator>
struct LargestScores {
  Accumulator* scores;
  Index* keys;
  Index count;

  /// Later keys go behind equal ones.
  void add(Accumulator score, Index key) const {
    if (!(score > scores[count - 1])) return;
    Index place = count - 1;
    for (; place > 0 && score > scores[place - 1]; --place) {
      scores[place] = scores[place - 1];
      keys[place] = keys[place - 1];
    }
    scores[place] = score;
    keys[place] = key;
  }
};

template <class Scalar, class... Terms>
Neighbours<Scalar> inspect_neighbours(const Operands<Scalar>& batch, Index count,
                                      const Require& require, const Terms&... terms) {
  using Accumulator = accumulator_t<Scalar>;
  const Shape& shape = batch.shape;
  if (count < 1) require.fail("there must be at least 1 neighbour to look for, but it is ", count);
  Neighbours<Scalar> result{Matrix<Index>::Constant(shape.queries, shape.query_heads * count, -1),
                            Matrix<Accumulator>::Zero(shape.queries, shape.query_heads * count)};
  std::vector<Accumulator> kept;
  each_block(
      batch, require, 0, shape.queries,
      [&](const Operands<Scalar>& one, auto& reader, Index head, Index query, Index queries) {
        std::vector<RunningEntropy<Accumulator>> sums(static_cast<std::size_t>(queries));
        kept.assign(static_cast<std::size_t>(queries * count), simd::minus_infinity<Accumulator>);
        const Index row = one.shape.first_query + query;
        const auto largest = [&](Index i) {
          return LargestScores<Accumulator>{kept.data() + i * count,
                                            &result.keys(row + i, head * count), count};
        };
        reader.read(head, query, queries, Stage::masked,
                    [&](const Tile& tile, const Accumulator* scores, Index stride) {
                      for (Index i = 0; i < queries; ++i) {
                        sums[static_cast<std::size_t>(i)].add(scores + i * stride, tile.keys);
                        for (Index j = 0; j < tile.keys; ++j)
                          largest(i).add(scores[i * stride + j], tile.first_key + j);
                      }
                    });
        add_sinks(reader, head, sums);
        for (Index i = 0; i < queries; ++i) {
          for (Index n = 0; n < count && largest(i).keys[n] >= 0; ++n) {
            result.weights(row + i, head * count + n) = static_cast<Accumulator>(
                std::exp2(largest(i).scores[n] - sums[static_cast<std::size_t>(i)].log_sum_exp()));
          }
        }
      },
      terms...);
  return result;
}

}  // namespace detail

/// Scores or weights of the standard form as a matrix: rows `at` of the queries × (Hq·Tk), a block
/// of columns for each query head. Scores are natural: W = exp(S − log_sum_exp). In a batch the
/// columns are the keys of each row's own sequence; Tk is that of the longest, and what is beyond a
/// shorter one is hidden. O(rows·Hq·Tk) memory, by intention. Errors as for attention; rows that
/// are not there.
template <class Queries, class Keys, class... Terms>
auto attention_scores(const Queries& queries, const Keys& keys, const ScoresAt& at = {},
                      const Options& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("attention_scores");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  return detail::inspect_scores(detail::attention_operands(q, k, k, options, require), at, require,
                                terms...);
}

/// The same of the surface form.
template <class Queries, class Keys, class... Terms>
auto projection_scores(const Queries& queries, const Keys& keys, const ScoresAt& at = {},
                       const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("projection_scores");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  return detail::inspect_scores(detail::surface_operands(q, k, options, require), at, require,
                                terms...);
}

/// The entropy of each query's weights, H_i = −Σ_j W_ij·ln W_ij, Tq × Hq, of the standard form:
/// exp(H) is the effective number of keys that it attends to, from 1 to Tk; −∞ (number 0) for a
/// query that sees no key. One pass, O(tile) memory. Errors as for attention.
template <class Queries, class Keys, class... Terms>
auto attention_entropy(const Queries& queries, const Keys& keys, const Options& options = {},
                       const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("attention_entropy");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  return detail::inspect_entropy(detail::attention_operands(q, k, k, options, require), require,
                                 terms...);
}

/// The same of the surface form.
template <class Queries, class Keys, class... Terms>
auto projection_entropy(const Queries& queries, const Keys& keys,
                        const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("projection_entropy");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  return detail::inspect_entropy(detail::surface_operands(q, k, options, require), require,
                                 terms...);
}

/// The `count` keys of largest weight for each query and head of the standard form, with their
/// weights: Tq × (Hq·count) each. A key whose score is −∞ or NaN is none of them. One pass, O(tile
/// + Tq·Hq·count) memory. Errors as for attention; a count below 1.
template <class Queries, class Keys, class... Terms>
auto attention_neighbours(const Queries& queries, const Keys& keys, Index count,
                          const Options& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("attention_neighbours");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  return detail::inspect_neighbours(detail::attention_operands(q, k, k, options, require), count,
                                    require, terms...);
}

/// The same of the surface form.
template <class Queries, class Keys, class... Terms>
auto projection_neighbours(const Queries& queries, const Keys& keys, Index count,
                           const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("projection_neighbours");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  return detail::inspect_neighbours(detail::surface_operands(q, k, options, require), count,
                                    require, terms...);
}

}  // namespace surfattn
