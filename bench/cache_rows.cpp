// What caches promise of their speed: a stream over a ring, and decoding in both forms.
#include "support/cache_rows.hpp"

#include <memory>
#include <stdexcept>
#include <surfattn/surfattn.hpp>

#include "support/peak.hpp"

namespace surfattn::bench {
namespace {

/// A cache full of random keys, and what a step of a stream or of decoding needs.
struct Cached {
  Surface<float> cache;
  Matrix<float> keys, values, query, out;
  Workspace workspace;

  Cached(Surface<float>&& empty, Index length)
      : cache(std::move(empty)),
        keys(Matrix<float>::Random(length, cache.key_width())),
        values(Matrix<float>::Random(length, cache.value_width())),
        query(Matrix<float>::Random(1, cache.key_width())),
        out(1, cache.value_width()),
        workspace(cache.workspace_size(1)) {
    if (cache.values_are_keys()) {
      cache.append(keys);
    } else {
      cache.append(keys, values);
    }
  }
};

std::shared_ptr<Cached> surface_of(Index width, Index length, const CacheOptions& options) {
  return std::make_shared<Cached>(Surface<float>(width, options), length);
}

/// Appends one key to a ring and projects one query.
Work stream_step(const std::shared_ptr<Cached>& ring) {
  return [=] {
    ring->cache.append(ring->query);
    ring->cache.project_into(ring->query, ring->out, ring->workspace);
  };
}

/// Against a loop that reads the same bytes, from wherever they are.
Comparison stream_against_reading(Index length, Index width) {
  const auto ring = surface_of(width, length, {.bandwidth = 4, .window = length});
  return {stream_step(ring), [=] { run_read_loop(ring->keys.data(), ring->keys.size()); }};
}

/// Against a loop that reads as many bytes from memory: the next ones of an array that no cache
/// holds.
Comparison stream_against_memory(Index length, Index width) {
  const auto ring = surface_of(width, length, {.bandwidth = 4, .window = length});
  const auto far = std::make_shared<Matrix<float>>(Matrix<float>::Random(Index(1) << 21, 64));
  const auto next = std::make_shared<Index>(0);
  const Index count = length * width;
  return {stream_step(ring), [=] {
            if (*next + count > far->size()) *next = 0;
            run_read_loop(far->data() + *next, count);
            *next += count;
          }};
}

/// One query against a cache of keys that are the values, against one of keys and values.
Comparison decode_both_forms(Index length, Index heads, Index head_dim, KeyPrior prior) {
  const Index width = heads * head_dim;
  const auto surface =
      surface_of(width, length, {.heads = {heads}, .prior = prior, .capacity = length});
  const auto standard = std::make_shared<Cached>(
      Surface<float>(width, width, {.heads = {heads}, .capacity = length}), length);
  const std::size_t norms = prior.is_sdpa() ? 0 : std::size_t(heads) * sizeof(float);
  if (2 * (surface->cache.bytes_per_key() - norms) != standard->cache.bytes_per_key())
    throw std::logic_error("the surface form does not hold half as much");
  const auto step = [](const std::shared_ptr<Cached>& of) {
    return [=] { of->cache.attend_into(of->query, of->out, of->workspace); };
  };
  return {step(surface), step(standard)};
}

/// Keys and values in both storage orders, and what one query against them needs.
struct Past {
  Matrix<float> keys, values, query, out;
  Eigen::MatrixXf key_columns, value_columns;
  Options options;
  Workspace workspace;

  Past(Index length, Index heads, Index head_dim)
      : keys(Matrix<float>::Random(length, heads * head_dim)),
        values(Matrix<float>::Random(length, heads * head_dim)),
        query(Matrix<float>::Random(1, heads * head_dim)),
        out(1, heads * head_dim),
        key_columns(keys),
        value_columns(values),
        options{.heads = {heads}},
        workspace(workspace_size(Pass::forward, query, keys, values, options)) {}

  void attend_to_rows() { attention_into(query, keys, values, out, workspace, options); }
  void attend_to_columns() {
    attention_into(query, key_columns, value_columns, out, workspace, options);
  }
};

/// One query against keys and values that are stored by columns, against the same stored by rows.
Comparison decode_columns(Index length, Index heads, Index head_dim) {
  const auto past = std::make_shared<Past>(length, heads, head_dim);
  past->attend_to_rows();
  const Matrix<float> expected = past->out;
  past->attend_to_columns();
  if (!((past->out - expected).cwiseAbs().maxCoeff() <= 1e-5f))
    throw std::logic_error("columns do not give what rows give");
  return {[=] { past->attend_to_columns(); }, [=] { past->attend_to_rows(); }};
}

/// A token through a layer of the paper's width, whose heads are as wide as its input: one cache of
/// inputs against one of keys and values for each head.
Comparison decode_layer(Index length, Index heads, Index width) {
  const auto weight = [](Index rows, Index cols) {
    return Matrix<float>(Matrix<float>::Random(rows, cols) / std::sqrt(float(rows) / 3));
  };
  StandardWeights<float> standard{weight(width, heads * width), weight(width, heads * width),
                                  weight(width, heads * width), weight(heads * width, width)};
  standard.heads = {heads};
  const Matrix<float> tokens = Matrix<float>::Random(length, width);
  const auto step = [&](const auto& weights) {
    auto cache = std::make_shared<Surface<float>>(layer_cache(weights, {.capacity = length}));
    layer_append(tokens, weights, *cache);
    const Matrix<float> x = tokens.topRows(1);
    return [=] { layer_attend(x, weights, *cache); };
  };
  return {step(merge(standard)), step(standard)};
}

}  // namespace

void add_cache_rows(std::vector<Row>& rows) {
  rows.push_back({"cache-stream-65536x64", "as much from memory", 0.85,
                  [] { return stream_against_memory(65536, 64); }});
  rows.push_back({"cache-stream-65536x64-again", "reading the keys", 0,
                  [] { return stream_against_reading(65536, 64); }});
  rows.push_back({"cache-stream-1048576x64", "reading the keys", 0.85,
                  [] { return stream_against_reading(1 << 20, 64); }});
  rows.push_back({"cache-decode-uniform", "keys and values", 1.7,
                  [] { return decode_both_forms(16384, 8, 128, KeyPrior::uniform); }});
  rows.push_back({"cache-decode-sdpa", "keys and values", 1.7,
                  [] { return decode_both_forms(16384, 8, 128, KeyPrior::sdpa); }});
  rows.push_back({"cache-decode-one-head", "keys and values", 1.7,
                  [] { return decode_both_forms(16384, 1, 256, KeyPrior::sdpa); }});
  rows.push_back(
      {"decode-columns", "stored by rows", 0.7, [] { return decode_columns(16000, 8, 128); }});
  rows.push_back(
      {"cache-decode-layer", "standard layer", 0, [] { return decode_layer(16384, 8, 256); }});
}

}  // namespace surfattn::bench
